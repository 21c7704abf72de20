"""DCRIS: a phrase and a photo in, the logits of a mask out (paper, Figure 1).

    words, sentence = text(tokens)            CLIP text transformer, TextAdapter beside some MLPs      Eq. 3
    taps            = vision(image, words)    DINOv2 ViT, DenseCrossAdapter beside some MLPs           Eq. 1-2
    fused           = neck(taps, sentence)    three levels gated by the sentence, merged, placed       Eq. 4
    fused           = decoder(fused, words)   self-attention, attention to the words, MLP, three times
    logits          = projector(fused, sentence)   x4 larger, then a 3x3 kernel made from the sentence Eq. 5
    loss            = contrastive_loss(logits, mask)                                                   Eq. 6
Axes: B image-sentence pairs, P photos (P = B unless pairs share photos), H, W pixels, h, w patches, N = h*w,
S = 1 + R + N image tokens with R registers, L text tokens, C image width, D text width, d head width.
"""
import argparse
import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters import (METHODS, Attention, ConvBN, DenseCrossAdapter, HypercomplexLinear, QuickGELU,
                      VisionAttention, attach, mlp, run_in_step, sine_positions, square_positions)

ADAPTER_SCALE = 0.2                                       # weight of an adapter beside its MLP, as released
MEAN = (0.48145466, 0.4578275, 0.40821073)                # CLIP's, for DINOv2 too, as released
STD = (0.26862954, 0.26130258, 0.27577711)

@dataclass
class Config:
    """Every dial; the command line's flags are these fields. Defaults: DCRIS-B of the paper."""
    # image encoder
    vision_width: int = 768            # C
    vision_depth: int = 12             # blocks
    vision_heads: int = 12
    patch_size: int = 14               # pixels
    registers: int = 4                 # R
    pos_grid: int = 37                 # side of the released position table, patches
    pos_resize: str = "dinov2"         # dinov2: antialias, by size; detris: no antialias, by factor with +0.1
    image_size: int = 448              # side of the square input, pixels
    taps: tuple = (4, 8)               # blocks whose patches feed the neck, 0-based; the last one always does
    visual_layers: tuple = (-1,)       # blocks with adapters, 0-based; -1: the method's own (METHODS)
    visual_rank: int = 0               # their reduced width r; 0: the method's own
    # text encoder
    text_width: int = 512              # D, of words and sentence
    text_depth: int = 12
    text_heads: int = 8
    vocab_size: int = 49408            # CLIP's byte pairs; with --weights none one id a word, any number
    context: int = 77                  # length of the released position table, tokens
    text_length: int = 17              # L, start and end tokens included
    text_layers: tuple = (-1,)         # as for the image
    text_rank: int = 0
    text_adapter: str = "plain"        # plain: Eq. 3; dense: the authors' release
    # head
    head_width: int = 512              # d, of neck and decoder; the projector's kernel reads d/2 channels
    head_heads: int = 8
    decoder_depth: int = 3
    decoder_ffn: int = 512
    dropout: float = 0.1               # decoder, and attention weights in decoder and adapters
    calm_start: bool = False           # begin as "all background": kernel head x0.1, its bias -3
    mask_rule: str = "aligned"         # how masks change size: aligned (ours) or detris (the release's)
    method: str = "dcris"              # dcris lora adapter compacter etris; frozen: just the head; full: all
    # training
    dataset: str = "refcoco"           # a name that data.open_dataset knows, or the path of a .jsonl
    data_root: str = "data"
    mix_leaky: bool = False            # mix: keep photos that are in a val or test split, as released
    cache: str = ""                    # folder for letterboxed photos in one file, so that loading is fast
    weights: str = "weights"           # folder of released encoders; or a .pt of ours; none: at random
    batch_size: int = 32               # pairs a step, over all processes
    accumulate: int = 1                # parts that a step's batch is computed in, for small memories
    epochs: int = 50
    lr: float = 1e-4                   # peak, Adam
    schedule: str = "step"             # step: x0.1 after each of lr_steps; cosine: to 0
    lr_steps: tuple = (35,)            # epochs
    warmup: float = 0.0                # share of the run over which lr climbs from 0
    clip: float = 0.0                  # largest gradient norm; 0: no clipping
    seed: int = 0
    workers: int = 4                   # loader processes
    compile: bool = True               # torch.compile the model
    bf16: bool = True                  # autocast to bfloat16
    device: str = "auto"               # auto: cuda, else mps, else cpu
    out: str = "out"                   # folder of checkpoints, log and pictures
    save_minutes: float = 10.0         # last.pt is written this often, and after each epoch
    resume: str = ""                   # a last.pt to go on from
    table: int = 0                     # 2, 3, 4, 5: print the rows of that table of the paper, stop
    benchmark: int = 0                 # N: time N steps on random data, print one JSON line, stop

    def __post_init__(self):
        at = lambda name: getattr(self, name)
        vars(self).update({f.name: tuple(at(f.name)) for f in fields(self) if f.type is tuple})  # of lists
        *owns, unit = METHODS.get(self.method, METHODS["dcris"])
        for name, own in zip(("visual_layers", "visual_rank", "text_layers", "text_rank"), owns):
            if at(name) in ((-1,), 0) or self.method == "frozen":
                setattr(self, name, own)
        good = {name: (at(name) in some, f"one of {some}") for name, some in CHOICES.items()}
        for name, of in (MULTIPLES | dict(visual_rank=(unit,), text_rank=(unit,))).items():
            unit = math.prod(max(1, at(f)) if type(f) is str else f for f in of)
            good[name] = at(name) > 0 and at(name) % unit == 0, f"a positive multiple of {unit}"
        number = dict(taps=2) | ({"text_layers": len(self.visual_layers)} if self.method == "etris" else {})
        for name, depth in (("visual_layers", self.vision_depth), ("text_layers", self.text_depth),
                            ("taps", self.vision_depth - 1)):
            rising = list(at(name)) == sorted({*at(name)} & {*range(depth)})
            good[name] = rising and number.get(name, len(at(name))) == len(at(name)), (
                f"{number.get(name, 'any')} rising block numbers from 0 to {depth - 1}")
        good["text_length"] = 3 <= self.text_length <= self.context, f"3 to --context {self.context}"
        good |= {name: (0 <= at(name) < end, f"from 0 to below {end}") for name, end in BELOW.items()}
        for name, (is_good, need) in good.items():
            if not is_good:
                raise ValueError(f"--{name} {at(name)}: need {need}")

CHOICES = {"pos_resize": ("dinov2", "detris"), "mask_rule": ("aligned", "detris"),
           "text_adapter": ("plain", "dense"), "schedule": ("step", "cosine"),
           "method": tuple(METHODS), "table": (0, 2, 3, 4, 5)}
BELOW = dict(dropout=1, warmup=1) | dict.fromkeys(("lr", "clip", "workers", "save_minutes", "seed"), math.inf)
MULTIPLES = dict(vision_width=("vision_heads", 4), text_width=("text_heads",), head_width=("head_heads", 4),
                 image_size=("patch_size",)) | dict.fromkeys((                      # (): of 1
    "vision_heads text_heads head_heads patch_size vision_depth text_depth decoder_depth decoder_ffn "
    "pos_grid batch_size accumulate epochs").split(), ())

PRESETS = {                            # differences from the defaults, nothing else
    "tiny": dict(vision_width=128, vision_depth=4, vision_heads=4, patch_size=8, image_size=64, pos_grid=8,
                 registers=1, taps=(1, 2), visual_layers=(3,), visual_rank=64, text_width=128, text_depth=2,
                 text_heads=4, vocab_size=2048, context=24, text_layers=(1,), head_width=64, head_heads=4,
                 decoder_depth=2, decoder_ffn=128, dropout=0.0, calm_start=True, method="full",
                 weights="none", dataset="shapes", batch_size=16, epochs=5, lr=6e-4, schedule="cosine",
                 warmup=0.05, clip=0.2, workers=1, compile=False),
    "dcris_s": dict(vision_width=384, vision_heads=6),
    "dcris_b": dict(),
    "dcris_l": dict(vision_width=1024, vision_depth=24, vision_heads=16, taps=(8, 16),
                    visual_layers=(2, 6, 10, 14, 18, 22), lr=2e-4, batch_size=64),
    "detris_b": dict(pos_resize="detris", text_adapter="dense", mask_rule="detris", epochs=65,
                     lr_steps=(35, 55)),
}
PAPER = {                              # data set, split -> mIoU of dcris_b and dcris_l in the paper's Table 1
    "refcoco": dict(val=(76.4, 77.9), testA=(77.9, 79.0), testB=(73.7, 75.0)),
    "refcoco+": dict(val=(69.8, 71.9), testA=(74.4, 75.9), testB=(62.6, 65.7)),
    "refcocog_umd": dict(val=(68.4, 70.1), test=(68.5, 70.9)), "refcocog_google": dict(val=(65.9, 68.5))}

def parse_config(argv: list[str] | None = None, saved: dict | None = None) -> Config:
    """Defaults < preset, or a checkpoint's saved config < flags. A wrong flag or value exits with 2."""
    p = argparse.ArgumentParser(argument_default=argparse.SUPPRESS, allow_abbrev=False, epilog=(
        "Config in model.py says what each means. Defaults are dcris_b's; --preset (tiny) changes them."))
    p.add_argument("--preset", choices=PRESETS, default="tiny")
    for f in fields(Config):
        kind = {bool: dict(action=argparse.BooleanOptionalAction),
                tuple: dict(type=int, nargs="*")}.get(f.type, dict(type=f.type, choices=CHOICES.get(f.name)))
        p.add_argument(f"--{f.name}", help=f"default {f.default}", **kind)
    flags = vars(p.parse_args(argv))
    preset = PRESETS[flags.pop("preset")]
    try:
        return Config(**{**(saved or preset), **flags})
    except ValueError as error:
        p.error(str(error))

# ---- image encoder: DINOv2 with registers (Oquab et al. 2023; Darcet et al. 2023), released names ----
class VisionBlock(nn.Module):
    """Pre-norm block in two halves: attend knows no words; update does where the block has an adapter."""
    def __init__(self, cfg: Config, i: int):
        super().__init__()
        C = cfg.vision_width
        self.norm1, self.norm2 = nn.LayerNorm(C, eps=1e-6), nn.LayerNorm(C, eps=1e-6)
        self.attn, self.mlp = VisionAttention(C, cfg.vision_heads), mlp(C, "fc1", nn.GELU(), "fc2")
        self.ls1, self.ls2 = (nn.ParameterDict({"gamma": torch.ones(C)}) for _ in range(2))     # LayerScale
        attach(self, cfg, i, visual=True)

    def attend(self, x: Tensor) -> Tensor:
        return x + self.ls1["gamma"] * self.attn(self.norm1(x))

    def update(self, x: Tensor, words: Tensor, grid: tuple[int, int]) -> Tensor:
        normed = self.norm2(x)
        change = self.mlp(normed)
        if isinstance(self.adapter, DenseCrossAdapter):   # inside LayerScale, as released
            change = change + ADAPTER_SCALE * self.adapter(normed, words, grid)
        return x + self.ls2["gamma"] * change

class VisionTransformer(nn.Module):
    """DINOv2 ViT. image (P, 3, H, W) normalised, words (B, L, D) -> three taps, each (B, C, h, w).
    photo (B,) says which of the P images each pair shows; None: P = B, in order. Whatever comes before the
    first adapter knows no words, so it runs once a photo, and pairs part only there."""
    def __init__(self, cfg: Config):
        super().__init__()
        C, side = cfg.vision_width, cfg.image_size // cfg.patch_size
        self.grid, self.image_size = (side, side), (cfg.image_size, cfg.image_size)
        self.table_side, self.rule = cfg.pos_grid, cfg.pos_resize
        self.prefix, self.taps = 1 + cfg.registers, (*cfg.taps, cfg.vision_depth - 1)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, C))
        # differs: sines where the original draws at random, for training from nothing; files replace them
        self.pos_embed = nn.Parameter(0.5 * F.pad(square_positions(cfg.pos_grid, C), (0, 0, 1, 0))[None])
        self.register_tokens = nn.Parameter(1e-6 * torch.randn(1, cfg.registers, C))
        self.mask_token = nn.Parameter(torch.zeros(1, C), requires_grad=False)   # of pretraining, never read
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, C, cfg.patch_size, stride=cfg.patch_size)})
        self.blocks = nn.ModuleList(VisionBlock(cfg, i) for i in range(cfg.vision_depth))
        self.norm = nn.LayerNorm(C, eps=1e-6)
        self.register_buffer("positions", self.resize_positions().detach().clone(), persistent=False)
        self.register_load_state_dict_post_hook(                           # once a load, not once a forward
            lambda vision, _: setattr(vision, "positions", vision.resize_positions().detach().clone()))

    def resize_positions(self) -> Tensor:
        """The table for this grid, (1, 1 + N, C): bicubic, by the rule; the class token's entry is kept."""
        if self.grid == (self.table_side, self.table_side):
            return self.pos_embed
        first, patches = self.pos_embed.split([1, self.table_side ** 2], dim=1)
        factor = [(side + 0.1) / self.table_side for side in self.grid]    # not rounded: detris's step
        how = dict(size=self.grid, antialias=True) if self.rule == "dinov2" else dict(scale_factor=factor)
        patches = patches.unflatten(1, (self.table_side, -1)).permute(0, 3, 1, 2)
        patches = F.interpolate(patches, mode="bicubic", **how)            # (1, C, h, w)
        return torch.cat([first, patches.flatten(2).transpose(1, 2)], dim=1)

    def embed(self, image: Tensor) -> Tensor:
        """(P, 3, H, W) -> (P, S, C): class, registers, patches; registers have no position."""
        P, _, H, W = image.shape
        if (H, W) != self.image_size:
            raise ValueError(f"image is {H}x{W} pixels, expected {self.image_size}: letterbox it first")
        patches = self.patch_embed["proj"](image).flatten(2).transpose(1, 2)      # (P, N, C)
        table = self.resize_positions() if self.pos_embed.requires_grad else self.positions
        x = torch.cat([self.cls_token.expand(P, -1, -1), patches], dim=1) + table
        return torch.cat([x[:, :1], self.register_tokens.expand(P, -1, -1), x[:, 1:]], dim=1)

    def forward(self, image: Tensor, words: Tensor, photo: Tensor | None = None) -> list[Tensor]:
        return next(self.stages(image, words, photo))

    def stages(self, image: Tensor, words: Tensor | None, photo: Tensor | None):
        """Yields the taps; before that, under ETRIS, the patches at each bridge, for what the bridge adds."""
        shared = photo is not None                        # still one row a photo, not one a pair
        x, taps = self.embed(image), []
        for i, block in enumerate(self.blocks):
            x = block.attend(x)
            if shared and block.adapter is not None:      # here the words come in
                x, taps, shared = x[photo], [tap[photo] for tap in taps], False
            x = block.update(x, words, self.grid)
            if block.bridged:
                x = x + F.pad((yield x[:, self.prefix:]), (0, 0, self.prefix, 0))
            if i in self.taps:
                tap = self.norm(x) if i == self.taps[-1] else x            # only the last is normalised
                taps.append(tap[:, self.prefix:])                          # (P or B, N, C)
        taps = [tap[photo] for tap in taps] if shared else taps
        yield [tap.transpose(1, 2).unflatten(2, self.grid) for tap in taps]

# ---- text encoder: CLIP's text transformer (Radford et al. 2021), released names ----
class TextBlock(nn.Module):
    """Pre-norm block; the adapter reads the stream after attention, not normalised, as released."""
    def __init__(self, cfg: Config, i: int):
        super().__init__()
        D = cfg.text_width
        self.ln_1, self.ln_2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.attn, self.mlp = Attention(D, cfg.text_heads), mlp(D, "c_fc", QuickGELU(), "c_proj")
        attach(self, cfg, i, visual=False)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, causal=True)
        change = self.mlp(self.ln_2(x))
        if self.adapter is not None:
            change = change + ADAPTER_SCALE * self.adapter(x)
        return x + change

class TextTransformer(nn.Module):
    """CLIP text transformer. tokens (B, L) -> words (B, L, D) after the final norm, sentence (B, D)."""
    def __init__(self, cfg: Config):
        super().__init__()
        D = cfg.text_width
        self.token_embedding = nn.Embedding(cfg.vocab_size, D)
        # differs: CLIP starts both tables at 0.02 and 0.01, too faint to learn words from nothing in minutes
        self.positional_embedding = nn.Parameter(0.2 * torch.randn(cfg.context, D))
        blocks = nn.ModuleList(TextBlock(cfg, i) for i in range(cfg.text_depth))
        self.transformer = nn.ModuleDict({"resblocks": blocks})            # so that the released names fit
        self.ln_final = nn.LayerNorm(D)
        self.text_projection = nn.Parameter(D ** -0.5 * torch.randn(D, D))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)), requires_grad=False)   # never read
        nn.init.normal_(self.token_embedding.weight, std=0.5)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return next(self.stages(tokens))

    def stages(self, tokens: Tensor):
        """As the image encoder's: yields the stream at each of ETRIS's bridges, then words and sentence."""
        x = self.token_embedding(tokens) + self.positional_embedding[:tokens.shape[1]]
        for block in self.transformer["resblocks"]:
            x = block(x)
            if block.bridged:
                x = x + (yield x)
        words = self.ln_final(x)                          # (B, L, D)
        end = tokens.argmax(dim=1)                        # the end token has the largest id
        yield words, words[torch.arange(len(words), device=end.device), end] @ self.text_projection

# ---- head (paper, section 3.4; after CRIS and ETRIS) ----
class Neck(nn.Module):
    """Cross-modal neck (Eq. 4). taps 3 x (B, C, h, w), sentence (B, D) -> (B, d, h, w)."""
    def __init__(self, cfg: Config):
        super().__init__()
        d = cfg.head_width
        self.sentence = nn.Linear(cfg.text_width, d)
        self.levels = nn.ModuleList(ConvBN(cfg.vision_width, d, 1) for _ in range(3))
        self.fuse = nn.ModuleList(Attention(d, cfg.head_heads) for _ in range(3))
        self.merge = ConvBN(3 * d, d, 1)
        self.place = nn.Sequential(ConvBN(d + 2, d, 3), ConvBN(d, d, 3))
        side = torch.linspace(-1, 1, cfg.image_size // cfg.patch_size)
        y, x = torch.meshgrid(side, side, indexing="ij")
        self.register_buffer("coordinates", torch.stack([x, y])[None], persistent=False)   # (1, 2, h, w)

    def forward(self, taps: list[Tensor], sentence: Tensor) -> Tensor:
        sentence = self.sentence(sentence)                                                 # (B, d)
        # The paper's cross attention asks one key, the sentence: its answer is the same for every patch.
        levels = [level(tap) * fuse.gate(sentence)[:, :, None, None]
                  for tap, level, fuse in zip(taps, self.levels, self.fuse)]
        fused = self.merge(torch.cat(levels, dim=1))                                       # (B, d, h, w)
        coordinates = self.coordinates.expand(len(fused), -1, -1, -1).to(fused.dtype)
        return fused + self.place(torch.cat([fused, coordinates], dim=1))

class DecoderLayer(nn.Module):
    """Patches look at each other, then at the words, then an MLP; an extra norm closes each attention."""
    def __init__(self, cfg: Config):
        super().__init__()
        d, p = cfg.head_width, cfg.dropout
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(d), nn.LayerNorm(d), nn.LayerNorm(d)
        self.self_attn, self.cross_attn = Attention(d, cfg.head_heads, p), Attention(d, cfg.head_heads, p)
        self.self_attn_norm, self.cross_attn_norm = nn.LayerNorm(d), nn.LayerNorm(d)
        self.ffn = nn.Sequential(nn.Linear(d, cfg.decoder_ffn), nn.ReLU(), nn.Dropout(p),
                                 nn.LayerNorm(cfg.decoder_ffn), nn.Linear(cfg.decoder_ffn, d))
        self.drop = nn.Dropout(p)

    def forward(self, x: Tensor, pos: Tensor, words: Tensor, words_pos: Tensor, pad: Tensor) -> Tensor:
        value = self.norm1(x)
        asked = value + pos
        x = x + self.drop(self.self_attn_norm(self.self_attn(asked, asked, value)))
        found = self.cross_attn(self.norm2(x) + pos, words + words_pos, words, pad)
        x = x + self.drop(self.cross_attn_norm(found))
        return x + self.drop(self.ffn(self.norm3(x)))

class Decoder(nn.Module):
    """Vision-language decoder. x (B, d, h, w), words (B, L, D), pad (B, L) -> (B, d, h, w)."""
    def __init__(self, cfg: Config):
        super().__init__()
        d, side = cfg.head_width, cfg.image_size // cfg.patch_size
        self.words = nn.Identity() if cfg.text_width == d else nn.Linear(cfg.text_width, d)
        self.layers = nn.ModuleList(DecoderLayer(cfg) for _ in range(cfg.decoder_depth))
        self.norm = nn.LayerNorm(d)
        self.register_buffer("pos", square_positions(side, d), persistent=False)           # (N, d)
        self.register_buffer("words_pos", sine_positions(cfg.context, d), persistent=False)

    def forward(self, x: Tensor, words: Tensor, pad: Tensor) -> Tensor:
        grid, words, words_pos = x.shape[2:], self.words(words), self.words_pos[:words.shape[1]]
        x = x.flatten(2).transpose(1, 2)                                   # (B, N, d)
        for layer in self.layers:
            x = layer(x, self.pos, words, words_pos, pad)
        return self.norm(x).transpose(1, 2).unflatten(2, grid)

class UpConvBN(ConvBN):
    """ConvBN, 3x3, of its input's bilinear enlargement: (B, C, h, h) -> (B, c, 2h, 2h). Both are linear, so
    channels mix first, for a quarter of the products; then a matrix enlarges and shifts columns, and rows."""
    def __init__(self, inputs: int, outputs: int, side: int):
        super().__init__(inputs, outputs, 3)
        large = F.interpolate(torch.eye(side)[None], scale_factor=2, mode="linear")[0].T   # (2h, h)
        shifts = [F.pad(large, (0, 0, 1, 1))[k:k + 2 * side] for k in range(3)]
        self.register_buffer("shifts", torch.cat(shifts, dim=1), persistent=False)         # (2h, 3h)

    def forward(self, x: Tensor) -> Tensor:
        mix = self.conv.weight.permute(2, 3, 0, 1).flatten(0, 2)[..., None, None]          # (9c, C, 1, 1)
        maps = F.conv2d(x, mix).unflatten(1, (3, 3, -1))                   # (B, 3, 3, c, h, h)
        maps = maps.permute(0, 1, 3, 4, 2, 5).flatten(4) @ self.shifts.T   # (B, 3, c, h, 2h)
        maps = self.shifts @ maps.transpose(1, 2).flatten(2, 3)            # (B, c, 2h, 2h)
        return self.normalise(maps)

class Projector(nn.Module):
    """Up-sampling projector (Eq. 5). x (B, d, h, w), sentence (B, D) -> logits (B, 1, 4h, 4w)."""
    def __init__(self, cfg: Config):
        super().__init__()
        d, c, side = cfg.head_width, cfg.head_width // 2, cfg.image_size // cfg.patch_size
        self.up = nn.Sequential(UpConvBN(d, d, side), UpConvBN(d, c, 2 * side))
        self.mix = nn.Conv2d(c, c, 1)
        self.kernel = nn.Linear(cfg.text_width, 9 * c + 1)                 # c kernels of 3x3, then one bias
        if cfg.calm_start:
            nn.init.zeros_(self.kernel.bias)
            self.kernel.weight.data *= 0.1
            self.kernel.bias.data[-1] = -3.0

    def forward(self, x: Tensor, sentence: Tensor) -> Tensor:
        x = self.up(x)                                                     # (B, c, 4h, 4w)
        kernel, bias = self.kernel(sentence).split([9 * x.shape[1], 1], dim=1)
        kernel = kernel.unflatten(1, (-1, 9)).transpose(1, 2).flip(1)      # (B, 9, c), last place first
        # F_c is mix(x) and the logits are F_c's 3x3 convolution with the kernel. Both are linear, so the
        # kernel takes mix's weights in, nine maps come of one product, and fold shifts and adds them.
        maps = (kernel @ self.mix.weight.flatten(1)) @ x.flatten(2) + kernel @ self.mix.bias[:, None]
        return F.fold(maps, x.shape[2:], kernel_size=3, padding=1) + bias[:, :, None, None]

class DCRIS(nn.Module):
    """The whole model. image (P, 3, H, W) uint8 0 ... 255, or float already normalised; tokens (T, L) int64
    with 0 for padding; photo, phrase (B,): each pair's rows there, or None -> float32 (B, 1, 4h, 4w)."""
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.vision, self.text = VisionTransformer(config), TextTransformer(config)
        self.neck, self.decoder, self.projector = Neck(config), Decoder(config), Projector(config)
        self.register_buffer("mean", 255 * torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(STD).view(3, 1, 1), persistent=False)
        for layer in (compacter := [x for x in self.modules() if isinstance(x, HypercomplexLinear)]):
            layer.A = compacter[0].A                      # one for both encoders
        for name, p in self.named_parameters():           # frozen: the encoders, but for what attach put in
            if name.startswith(("vision.", "text.")) and config.method != "full":
                p.requires_grad_(".adapter." in name)

    def forward(self, image: Tensor, tokens: Tensor, photo: Tensor | None = None, phrase=None) -> Tensor:
        if image.dtype == torch.uint8:
            image = (image - self.mean) / self.std
        pairs = lambda x: x if phrase is None else x[phrase]               # rows of tokens -> of pairs
        if self.config.method == "etris":
            taps, (words, sentence) = run_in_step(self.vision, self.text, image, pairs(tokens), photo)
        else:
            words, sentence = map(pairs, self.text(tokens))
            taps = self.vision(image, words, photo)
        fused = self.decoder(self.neck(taps, sentence), words, pairs(tokens == 0))
        return self.projector(fused, sentence).float()

    def parameter_counts(self) -> dict[str, int]:
        """Parameters by part; `backbone` is the paper's sum, which leaves out the text position table."""
        counts = dict.fromkeys(("adapters", "neck", "decoder", "projector", "trainable", "vision", "text"), 0)
        for name, p in self.named_parameters():
            counts["adapters" if ".adapter." in name else name.split(".")[0]] += p.numel()
            counts["trainable"] += p.numel() * p.requires_grad
        table = self.text.positional_embedding.numel()
        return counts | dict(backbone=counts["vision"] + counts["text"] - table)

def contrastive_loss(logits: Tensor, mask: Tensor, rule: str = "aligned") -> Tensor:
    """Text-to-pixel contrastive loss (paper, Eq. 6): cross-entropy of sigma(F_c . F_l), mean over pixels.
    logits (B, 1, 4h, 4w) float32; mask (B, 1, H, W) in [0, 1], brought to the logits' grid by the rule:
    aligned, the exact area average; detris, the nearest pixel. Returns a scalar in nats."""
    if rule == "detris":
        mask = F.interpolate(mask, logits.shape[2:], mode="nearest")
    else:
        fine = [math.lcm(*sides) for sides in zip(mask.shape[2:], logits.shape[2:])]   # pixels of both
        mask = F.adaptive_avg_pool2d(F.interpolate(mask, fine, mode="nearest"), logits.shape[2:])
    return F.binary_cross_entropy_with_logits(logits, mask)

"""DCRIS: a photo and a phrase go in, the logits of a mask come out (paper, Figure 1).

    words, sentence = text(tokens)            CLIP's text transformer, TextAdapters         Eq. 3
    taps = vision(image, words)               DINOv2's ViT, DenseCrossAdapters              Eq. 1, 2
    fused = neck(taps, sentence)              three levels, multiplied by the sentence      Eq. 4
    fused = decoder(fused, words)             three layers: patches look at the words
    logits = projector(fused, sentence)       4 x larger, then a kernel of the sentence     Eq. 5
    loss = contrastive_loss(logits, mask)                                                   Eq. 6

Once through DCRIS-B in numbers, for B pairs:

    image (B, 3, 448, 448): 448 / 14 = 32, so 32 x 32 patches, N = 1,024
    image tokens (B, 1029, 768): S = 1 class token + 4 registers + 1,024 patches, C = 768
    tokens (B, 17) -> words (B, 17, 512) and sentence (B, 512): L = 17, D = 512
    DenseCrossAdapter: 768 -> r = 128 -> branches of 64, 32 and 32 channels -> 768. Of its 382,896
        parameters, down and up hold 52 %, cross attention 43 %, the dense convolutions 5 %
    taps: patches after blocks 4, 8 and 11 (counted from 0), each (B, 768, 32, 32)
    neck and decoder (B, 512, 32, 32); F_c (B, 256, 128, 128)
    F_l (B, 2305): a 3 x 3 kernel over 256 channels, 9 * 256 numbers, and one bias
    logits (B, 1, 128, 128)

Axes: B pairs; H, W pixels; h, w patch grid; N = h * w; S image tokens; L text tokens; C image
width; D text width; d width of neck and decoder; R registers.
"""

import argparse
import math
from collections import Counter, OrderedDict
from dataclasses import dataclass, field, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters import (
    Attention,
    ConvBN,
    VisionAttention,
    adapter_keys,
    add_adapters,
    etris_bridges,
    sine_positions,
    square_positions,
)

# The authors' code feeds DINOv2 with CLIP's mean and deviation too; the paper does not say.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
ADAPTER_SCALE = 0.2  # weight of an adapter beside its MLP, from the authors' code


# ---- configuration ----


def option(default, sentence: str):
    """A field of Config. The sentence is what --help prints."""
    return field(default=default, metadata={"help": sentence})


@dataclass
class Config:
    """Everything that can be set; the command line's flags are these fields.

    The defaults are the paper's DCRIS-B. A value out of range raises ValueError with its flag.
    """

    # image encoder
    vision_width: int = option(768, "width C of the image encoder, in channels")
    vision_depth: int = option(12, "blocks of the image encoder")
    vision_heads: int = option(12, "attention heads of the image encoder")
    patch_size: int = option(14, "side of a patch, in pixels")
    registers: int = option(4, "register tokens R of the image encoder")
    pos_grid: int = option(37, "side of the image encoder's stored position table, in patches")
    pos_resize: str = option(
        "dinov2", "how that table is resized: dinov2 (antialiased) or detris (the authors' release)"
    )
    image_size: int = option(448, "side of the square that photos are letterboxed into, in pixels")
    taps: tuple = option(
        (4, 8), "two blocks, from 0, whose patches feed the neck; the last block always does"
    )
    visual_layers: tuple = option(
        (1, 3, 5, 7, 9, 11), "blocks of the image encoder, from 0, that get adapters"
    )
    visual_rank: int = option(128, "reduced width r of the adapters in the image encoder")

    # text encoder
    text_width: int = option(512, "width D of words and sentence, in channels")
    text_depth: int = option(12, "blocks of the text encoder")
    text_heads: int = option(8, "attention heads of the text encoder")
    vocab_size: int = option(49408, "number of token ids; 49408 with CLIP's vocabulary")
    context: int = option(77, "length of the text encoder's stored position table, in tokens")
    # The paper gives no length; 17 is the authors' code's, as is the cutting of longer phrases.
    text_length: int = option(17, "tokens L of a phrase with start and end; longer ones are cut")
    text_layers: tuple = option(
        (1, 3, 5, 7, 9, 11), "blocks of the text encoder, from 0, that get adapters"
    )
    text_rank: int = option(64, "reduced width of the adapters in the text encoder")
    text_adapter: str = option("plain", "plain (the paper's Eq. 3) or dense (the authors' release)")

    # head
    head_width: int = option(512, "width d of neck and decoder; the projector ends with d / 2")
    head_heads: int = option(8, "attention heads of neck and decoder")
    decoder_depth: int = option(3, "layers of the decoder")
    decoder_ffn: int = option(512, "inner width of the decoder's MLPs")
    dropout: float = option(0.1, "dropout in the decoder and in the adapters' attention")
    calm_start: bool = option(False, "start with logits of about -3, as if all were background")
    mask_rule: str = option(
        "aligned",
        "how photos and masks change size: aligned (pixel centres) or detris (the authors')",
    )
    method: str = option("dcris", "what trains in the encoders: a row of the paper's Table 2")

    # data
    dataset: str = option("refcoco", "name of a data set, or the path of a .jsonl file of your own")
    data_root: str = option("data", "folder of RefCOCO's annotations and COCO's photos")
    cache: str = option("", "folder for letterboxed photos in one file, which loads faster")
    weights: str = option(
        "weights", "folder of the released encoders, a .pt file of ours, or none (start at random)"
    )

    # training
    batch_size: int = option(32, "pairs of one step, over all processes")
    accumulate: int = option(1, "parts that a step is computed in, for small memories")
    epochs: int = option(50, "epochs; one shows every object once, with one of its phrases")
    lr: float = option(1e-4, "largest learning rate of Adam")
    schedule: str = option("step", "step (times 0.1 at lr_steps) or cosine (down to 0)")
    lr_steps: tuple = option((35,), "epochs after which the learning rate is multiplied by 0.1")
    warmup: float = option(0.0, "share of the run in which the learning rate climbs from 0")
    clip: float = option(0.0, "largest gradient norm; 0 does not clip")
    seed: int = option(0, "seed of weights, batches and dropout")
    workers: int = option(4, "processes that load photos")
    threads: int = option(0, "threads of torch on a CPU; 0 leaves it to torch")
    compile: bool = option(True, "compile the model with torch.compile")
    bf16: bool = option(True, "compute in bfloat16 where autocast allows it")
    device: str = option("auto", "cuda, cuda:1, mps, cpu; auto takes the first that is there")
    out: str = option("out", "folder for checkpoints, log and pictures")
    save_minutes: float = option(10.0, "minutes between two writings of last.pt inside an epoch")
    resume: str = option("", "checkpoint to go on from, such as out/last.pt")

    # instead of training
    preset: str = option("", "settings to start from; tiny's where none is named")
    pretrain: bool = option(False, "make the small encoders of --weights anew and stop")
    table: int = option(
        0, "print the rows of this table of the paper (2, 3, 4, 5); with --preset tiny, train them"
    )
    seeds: int = option(3, "seeds that --table trains each row with")
    benchmark: int = option(0, "time this many steps on random data, print one JSON line and stop")

    def __post_init__(self):
        for f in fields(self):
            if f.type is tuple:
                setattr(self, f.name, tuple(getattr(self, f.name)))  # lists come from flags
        check_ranges(self)
        check_shapes(self)
        check_layers(self)

    @property
    def grid_side(self) -> int:
        """Side of the patch grid, in patches."""
        return self.image_size // self.patch_size


PRESETS = {  # differences from the defaults, nothing else
    # the paper's recipe in small; train.py's pretrain makes the two small encoders for it first
    "tiny": {
        "vision_width": 128,
        "vision_depth": 4,
        "vision_heads": 4,
        "patch_size": 8,
        "registers": 1,
        "pos_grid": 8,
        "image_size": 64,
        "taps": (1, 2),
        "visual_layers": (1, 3),
        "visual_rank": 64,
        "text_width": 128,
        "text_depth": 2,
        "text_heads": 4,
        "vocab_size": 2048,
        "context": 24,
        "text_length": 12,
        "text_layers": (0, 1),
        "text_rank": 32,
        "head_width": 64,
        "head_heads": 4,
        "decoder_ffn": 256,
        "dropout": 0.0,
        "calm_start": True,
        "dataset": "shapes",
        "weights": "weights/tiny_encoders.pt",
        "batch_size": 16,
        "epochs": 6,
        "lr": 6e-4,
        "schedule": "cosine",
        "warmup": 0.05,
        "clip": 0.2,
        "workers": 1,
        "threads": 1,
        "compile": False,
    },
    "dcris_s": {"vision_width": 384, "vision_heads": 6},
    "dcris_b": {},
    "dcris_l": {
        "vision_width": 1024,
        "vision_depth": 24,
        "vision_heads": 16,
        "taps": (8, 16),
        "visual_layers": (2, 6, 10, 14, 18, 22),
        "batch_size": 64,
        "lr": 2e-4,
    },
    # the authors' later release, DETRIS: needed to load its checkpoints and to score as it does
    "detris_b": {
        "pos_resize": "detris",
        "text_adapter": "dense",
        "mask_rule": "detris",
        "epochs": 65,
        "lr_steps": (35, 55),
    },
}

EVERY = tuple(range(12))
# Layers and ranks of Table 2's rows. The paper prints only their parameter counts. These choices
# give these counts, and others would, too. Where a preset names layers or ranks, those are taken.
METHODS = {
    "dcris": {},
    "lora": {"visual_layers": EVERY, "visual_rank": 32, "text_layers": EVERY, "text_rank": 16},
    "adapter": {"visual_layers": EVERY, "visual_rank": 64, "text_layers": EVERY, "text_rank": 64},
    "compacter": {
        "visual_layers": EVERY,
        "visual_rank": 384,
        "text_layers": EVERY,
        "text_rank": 384,
    },
    "etris": {"visual_layers": (3, 7, 11), "visual_rank": 128, "text_layers": (3, 7, 11)},
    "frozen": {"visual_layers": (), "text_layers": ()},
    "full": {"visual_layers": (), "text_layers": ()},
}


def parse_config(argv: list[str] | None = None, saved: dict | None = None) -> Config:
    """Defaults, then settings, then flags; each overrides what came before.

    The settings are those of the method and then of the preset. If saved is given, it alone is the
    settings, and neither method nor preset adds any.

    argv: flags without the program's name; None takes the command line's. A wrong flag or value
    prints the usage, and a line that names it, to stderr, and exits with status 2.
    """
    parser = argparse.ArgumentParser(
        add_help=False,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for f in fields(Config):
        flag = f"--{f.name}"
        sentence = f.metadata["help"]
        if f.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=sentence)
        elif f.type is tuple:
            parser.add_argument(flag, type=int, nargs="*", help=sentence)
        else:
            parser.add_argument(flag, type=f.type, choices=CHOICES.get(f.name), help=sentence)

    # The flags are read twice. The first reading finds preset and method; their settings become the
    # defaults of the second. --help is added only then, so that it prints these defaults.
    named, _ = parser.parse_known_args(argv)
    settings = saved
    if saved is None:
        settings = METHODS[named.method or "dcris"] | PRESETS[named.preset or "tiny"]
    defaults = vars(Config()) | settings
    parser.set_defaults(**defaults)
    parser.add_argument("-h", "--help", action="help", help="print this and stop")
    flags = parser.parse_args(argv)
    try:
        return Config(**vars(flags))
    except ValueError as error:
        parser.error(str(error))


CHOICES = {
    "preset": (*PRESETS, ""),
    "method": tuple(METHODS),
    "pos_resize": ("dinov2", "detris"),
    "text_adapter": ("plain", "dense"),
    "mask_rule": ("aligned", "detris"),
    "schedule": ("step", "cosine"),
    "table": (0, 2, 3, 4, 5),
}
LEAST = {  # the smallest value allowed; of whole numbers not listed here it is 1, of fractions 0
    "registers": 0,
    "seed": 0,
    "workers": 0,
    "threads": 0,
    "table": 0,
    "benchmark": 0,
    "vocab_size": 4,  # padding, a word, start and end
    "text_length": 3,  # start, a word, end
}
# Values must be below these. The large ones stop typing errors before they fill the memory; numpy's
# seeds have 32 bits.
BELOW = {
    "dropout": 1,
    "warmup": 1,
    "seed": 2**32,
    "workers": 1025,
    "threads": 1025,
    "vision_depth": 1000,
    "text_depth": 1000,
    "decoder_depth": 1000,
    "batch_size": 100_000,
    "epochs": 100_000,
}
DIVISORS = {
    "image_size": "patch_size",
    "vision_width": "vision_heads",
    "text_width": "text_heads",
    "head_width": "head_heads",
}
# What a rank must be a multiple of: Eq. 1 has layers of r / 16 channels, Compacter cuts r into 4
# pieces, ETRIS has 8 attention heads.
RANK_UNITS = {"dcris": 16, "full": 16, "compacter": 4, "etris": 8}


def check_ranges(cfg):
    for name, choices in CHOICES.items():
        if getattr(cfg, name) not in choices:
            refuse(cfg, name, f"one of {choices}")
    for f in fields(cfg):
        value = getattr(cfg, f.name)
        least = LEAST.get(f.name, 1 if f.type is int else 0)
        if f.type in (int, float) and not least <= value < math.inf:
            refuse(cfg, f.name, f"{least} or more")
    for name, bound in BELOW.items():
        if getattr(cfg, name) >= bound:
            refuse(cfg, name, f"less than {bound}")
    if cfg.text_length > cfg.context:
        refuse(cfg, "text_length", f"{cfg.context} at most, the length of --context")


def check_shapes(cfg):
    for name, divisor in DIVISORS.items():
        unit = getattr(cfg, divisor)
        if getattr(cfg, name) % unit:
            refuse(cfg, name, f"a multiple of --{divisor} {unit}")
    for name in ("vision_width", "head_width"):
        if getattr(cfg, name) % 4:
            refuse(cfg, name, "a multiple of 4: sine and cosine of x and of y")


def check_layers(cfg):
    unit = RANK_UNITS.get(cfg.method, 1)
    if cfg.visual_layers and cfg.visual_rank % unit:
        refuse(cfg, "visual_rank", f"a multiple of {unit} with --method {cfg.method}")
    has_text_rank = cfg.text_layers and cfg.method != "etris"  # a bridge has one rank for both
    if has_text_rank and cfg.text_rank % unit:
        refuse(cfg, "text_rank", f"a multiple of {unit} with --method {cfg.method}")
    # Compacter cuts the widths into pieces, too; that of images is a multiple of 4 in any case.
    if cfg.method == "compacter" and cfg.text_width % unit:
        refuse(cfg, "text_width", f"a multiple of {unit} with --method compacter")

    depths = {"visual_layers": "vision_depth", "text_layers": "text_depth", "taps": "vision_depth"}
    for name, depth_name in depths.items():
        depth = getattr(cfg, depth_name)
        last = depth - 2 if name == "taps" else depth - 1  # the last block is a tap in any case
        blocks = getattr(cfg, name)
        rising = tuple(i for i in range(last + 1) if i in blocks)
        if blocks != rising:
            refuse(cfg, name, f"rising block numbers from 0 to {last} with --{depth_name} {depth}")
    if len(cfg.taps) != 2:
        refuse(cfg, "taps", "two blocks")
    if cfg.method == "etris" and len(cfg.text_layers) != len(cfg.visual_layers):
        refuse(cfg, "text_layers", f"as many blocks as --visual_layers {cfg.visual_layers}")


def refuse(cfg, name, expected):
    raise ValueError(f"--{name} {getattr(cfg, name)}: expected {expected}")


# ---- image encoder: DINOv2 with registers, under the released parameter names ----


class VisionTransformer(nn.Module):
    """DINOv2's ViT (Oquab et al. 2023; registers: Darcet et al. 2023).

    image: (B, 3, H, W), normalised. words: (B, L, D), read by DenseCrossAdapters only; may be None
    where no block has one.
    Returns three taps, each (B, C, h, w): the patches after two inner blocks, as they are, and
    after the last block and its norm. The paper names a third, two thirds and the end of the
    encoder; the exact blocks, and that only the last tap is normalised, are the authors' code's.
    """

    def __init__(self, cfg):
        super().__init__()
        C = cfg.vision_width
        self.grid = (cfg.grid_side, cfg.grid_side)  # (h, w)
        self.pos_grid = cfg.pos_grid
        self.pos_resize = cfg.pos_resize
        self.prefix_length = 1 + cfg.registers
        self.taps = cfg.taps

        # ModuleDicts of one entry, also in the text encoder, give the released parameter names
        patch_layer = nn.Conv2d(3, C, cfg.patch_size, stride=cfg.patch_size)
        self.patch_embed = nn.ModuleDict({"proj": patch_layer})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, C))
        self.register_tokens = nn.Parameter(1e-6 * torch.randn(1, cfg.registers, C))
        self.mask_token = nn.Parameter(torch.zeros(1, C))  # of DINOv2's pretraining, not read here
        # differs: sines instead of random numbers, for training from nothing; a released file
        # replaces them
        table = 0.5 * square_positions(cfg.pos_grid, C)
        with_class_row = F.pad(table, (0, 0, 1, 0))  # zeros for the class token, on top
        self.pos_embed = nn.Parameter(with_class_row[None])  # (1, 1 + pos_grid ** 2, C)
        self.blocks = nn.ModuleList(
            VisionBlock(C, cfg.vision_heads) for _ in range(cfg.vision_depth)
        )
        self.norm = nn.LayerNorm(C, eps=1e-6)

    def forward(self, image: Tensor, words: Tensor | None) -> list[Tensor]:
        x = self.embed(image)  # (B, S, C)
        taps = []
        for i, block in enumerate(self.blocks):
            x = block(x, words, self.grid)
            if i in self.taps:
                taps.append(self.to_square(x))
        taps.append(self.to_square(self.norm(x)))
        return taps

    def embed(self, image):
        """(B, 3, H, W) -> (B, S, C): class token, registers, patches."""
        patches = self.patch_embed["proj"](image).flatten(2).transpose(1, 2)  # (B, N, C)
        positions = self.positions()
        cls_token = self.cls_token + positions[:, :1]
        prefix = torch.cat([cls_token, self.register_tokens], dim=1)  # registers have no position
        prefix = prefix.expand(len(image), -1, -1)  # (B, 1 + R, C)
        return torch.cat([prefix, patches + positions[:, 1:]], dim=1)

    def positions(self):
        """The stored table, bicubically resized to this grid: (1, 1 + N, C)."""
        stored_grid = (self.pos_grid, self.pos_grid)
        if self.grid == stored_grid:
            return self.pos_embed
        class_row = self.pos_embed[:, :1]
        table = self.pos_embed[:, 1:].transpose(1, 2).unflatten(2, stored_grid)
        if self.pos_resize == "dinov2":  # as DINOv2's own models with registers do
            table = F.interpolate(table, size=self.grid, mode="bicubic", antialias=True)
        else:  # as the authors' release does: 0.1 keeps the size from being rounded down
            factor = (self.grid[0] + 0.1) / self.pos_grid
            table = F.interpolate(table, scale_factor=factor, mode="bicubic")
        return torch.cat([class_row, table.flatten(2).transpose(1, 2)], dim=1)

    def to_square(self, x):
        """The patches of (B, S, C), as a square: (B, C, h, w)."""
        return x[:, self.prefix_length :].transpose(1, 2).unflatten(2, self.grid)


class VisionBlock(nn.Module):
    """Block of DINOv2, with slots: places that a method may put a module of its own into."""

    def __init__(self, width, n_head):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = VisionAttention(width, n_head)  # its own slot is attn.lora
        self.ls1 = LayerScale(width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = mlp(width, "fc1", nn.GELU(), "fc2")
        self.ls2 = LayerScale(width)

        self.after_attention = nn.Identity()  # slot
        self.after_mlp = nn.Identity()  # slot
        self.adapter = None  # slot beside the MLP: DenseCrossAdapter

    def forward(self, x: Tensor, words: Tensor | None, grid: tuple[int, int]) -> Tensor:
        attended = self.after_attention(self.attn(self.norm1(x)))
        x = x + self.ls1(attended)

        normed = self.norm2(x)
        change = self.after_mlp(self.mlp(normed))
        if self.adapter is not None:
            change = change + ADAPTER_SCALE * self.adapter(normed, words, grid)
        return x + self.ls2(change)  # the adapter inside LayerScale, as in the authors' code


def mlp(width, first, activation, second):
    """A block's MLP, four times as wide inside; the two names are the released ones."""
    layers = OrderedDict()
    layers[first] = nn.Linear(width, 4 * width)
    layers["activation"] = activation
    layers[second] = nn.Linear(4 * width, width)
    return nn.Sequential(layers)


class LayerScale(nn.Module):
    """A learned factor for each channel of a residual branch."""

    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.gamma * x


# ---- text encoder: CLIP's text transformer, under the released parameter names ----


class TextTransformer(nn.Module):
    """CLIP's text transformer (Radford et al. 2021).

    tokens: (B, L) ids. Returns words f_t (B, L, D), after the final norm, and sentence f_s (B, D):
    the word at the end token, projected.
    """

    def __init__(self, cfg):
        super().__init__()
        D = cfg.text_width
        self.token_embedding = nn.Embedding(cfg.vocab_size, D)
        self.positional_embedding = nn.Parameter(torch.empty(cfg.context, D))
        blocks = [TextBlock(D, cfg.text_heads) for _ in range(cfg.text_depth)]
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(blocks)})
        self.ln_final = nn.LayerNorm(D)
        self.text_projection = nn.Parameter(D**-0.5 * torch.randn(D, D))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # of CLIP, not read here
        # differs: CLIP starts with deviations of 0.02 and 0.01, too faint to learn words from
        # nothing in minutes
        nn.init.normal_(self.token_embedding.weight, std=0.5)
        nn.init.normal_(self.positional_embedding, std=0.2)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(tokens)  # (B, L, D)
        for block in self.transformer["resblocks"]:
            x = block(x)
        return self.read_out(x, tokens)

    def embed(self, tokens):
        """(B, L) -> (B, L, D)."""
        L = tokens.shape[1]
        return self.token_embedding(tokens) + self.positional_embedding[:L]

    def read_out(self, x, tokens):
        """Words and sentence from what the last block gave."""
        words = self.ln_final(x)  # f_t: (B, L, D)
        end = tokens.argmax(dim=1)  # the end token has the largest id
        pair = torch.arange(len(tokens), device=tokens.device)
        sentence = words[pair, end] @ self.text_projection  # f_s: (B, D)
        return words, sentence


class TextBlock(nn.Module):
    """Block of CLIP's text transformer, with the same slots as VisionBlock."""

    def __init__(self, width, n_head):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, n_head)  # its own slot is attn.lora
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = mlp(width, "c_fc", QuickGELU(), "c_proj")

        self.after_attention = nn.Identity()  # slot
        self.after_mlp = nn.Identity()  # slot
        self.adapter = None  # slot beside the MLP: TextAdapter

    def forward(self, x: Tensor) -> Tensor:
        normed = self.ln_1(x)
        attended = self.attn(normed, normed, normed, causal=True)
        x = x + self.after_attention(attended)

        change = self.after_mlp(self.mlp(self.ln_2(x)))
        if self.adapter is not None:  # reads the stream before the norm, as in the authors' code
            change = change + ADAPTER_SCALE * self.adapter(x)
        return x + change


class QuickGELU(nn.Module):
    """CLIP's approximation of GELU."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


# ---- head (paper, section 3.4; it comes from CRIS and ETRIS) ----


class Neck(nn.Module):
    """Cross-modal neck (paper, Eq. 4): joins three taps and the sentence into one square.

    taps: 3 x (B, C, h, w). sentence: (B, D). Returns f_c: (B, d, h, w).

    The paper's Eq. 4 has the text features f_t as keys and one convolution. The authors' code,
    which we follow, has the sentence as the only key, multiplies each level by the answer, and
    ends with two 3x3 convolutions and a residual connection.
    """

    def __init__(self, cfg):
        super().__init__()
        d = cfg.head_width
        self.sentence_proj = nn.Linear(cfg.text_width, d)
        self.levels = nn.ModuleList(ConvBN(cfg.vision_width, d, 1) for _ in range(3))
        self.fuse = nn.ModuleList(Attention(d, cfg.head_heads) for _ in range(3))
        self.merge = ConvBN(3 * d, d, 1)
        self.place = nn.Sequential(ConvBN(d + 2, d, 3), ConvBN(d, d, 3))

        across = torch.linspace(-1, 1, cfg.grid_side).expand(cfg.grid_side, -1)  # x: rows are alike
        coordinates = torch.stack([across, across.T])[None]  # F_coord: (1, 2, h, w), x and y
        self.register_buffer("coordinates", coordinates, persistent=False)

    def forward(self, taps: list[Tensor], sentence: Tensor) -> Tensor:
        key = self.sentence_proj(sentence)  # (B, d), the only key
        levels = []
        for tap, level, fuse in zip(taps, self.levels, self.fuse, strict=True):
            answer = fuse.of_one_key(key)  # F_MHCA(f_v, f_s): (B, d), the same for every patch
            levels.append(level(tap) * answer[:, :, None, None])  # (B, d, h, w)
        fused = self.merge(torch.cat(levels, dim=1))  # F_f: (B, d, h, w)

        coordinates = self.coordinates.expand(len(fused), -1, -1, -1)
        placed = self.place(torch.cat([fused, coordinates], dim=1))  # Conv([F_f, F_coord])
        return fused + placed  # f_c


class Decoder(nn.Module):
    """Vision-language decoder (paper, section 3.4).

    x: f_c (B, d, h, w). words: f_t (B, L, D). pad: (B, L), True where padded. Returns F_mm, like x.
    """

    def __init__(self, cfg):
        super().__init__()
        d = cfg.head_width
        self.words_proj = nn.Identity()
        if cfg.text_width != d:  # never in the paper's models
            self.words_proj = nn.Linear(cfg.text_width, d)
        self.layers = nn.ModuleList(DecoderLayer(cfg) for _ in range(cfg.decoder_depth))
        self.norm = nn.LayerNorm(d)
        self.register_buffer("pos", square_positions(cfg.grid_side, d), persistent=False)  # (N, d)
        self.register_buffer("words_pos", sine_positions(cfg.context, d), persistent=False)

    def forward(self, x: Tensor, words: Tensor, pad: Tensor) -> Tensor:
        grid = x.shape[2:]
        words = self.words_proj(words)  # (B, L, d)
        words_pos = self.words_pos[: words.shape[1]]  # (L, d)
        x = x.flatten(2).transpose(1, 2)  # (B, N, d)
        for layer in self.layers:
            x = layer(x, self.pos, words, words_pos, pad)
        return self.norm(x).transpose(1, 2).unflatten(2, grid)  # F_mm: (B, d, h, w)


class DecoderLayer(nn.Module):
    """Patches look at each other, then at the words, then pass an MLP.

    The norms after both attentions and inside the MLP are the authors' code's; the paper only says
    "layer normalization and residual connections".
    """

    def __init__(self, cfg):
        super().__init__()
        d = cfg.head_width
        self.norm1 = nn.LayerNorm(d)
        self.norm2 = nn.LayerNorm(d)
        self.norm3 = nn.LayerNorm(d)
        self.self_attn = Attention(d, cfg.head_heads, cfg.dropout)
        self.self_attn_norm = nn.LayerNorm(d)
        self.cross_attn = Attention(d, cfg.head_heads, cfg.dropout)
        self.cross_attn_norm = nn.LayerNorm(d)
        self.ffn = nn.Sequential(
            nn.Linear(d, cfg.decoder_ffn),
            nn.ReLU(),
            nn.Dropout(cfg.dropout),
            nn.LayerNorm(cfg.decoder_ffn),
            nn.Linear(cfg.decoder_ffn, d),
        )
        self.drop = nn.Dropout(cfg.dropout)

    def forward(
        self, x: Tensor, pos: Tensor, words: Tensor, words_pos: Tensor, pad: Tensor
    ) -> Tensor:
        value = self.norm1(x)
        query = value + pos
        attended = self.self_attn(query, query, value)  # (B, N, d)
        x = x + self.drop(self.self_attn_norm(attended))

        query = self.norm2(x) + pos
        attended = self.cross_attn(query, words + words_pos, words, pad)  # (B, N, d)
        x = x + self.drop(self.cross_attn_norm(attended))

        return x + self.drop(self.ffn(self.norm3(x)))


class Projector(nn.Module):
    """Up-sampling projector (paper, Eq. 5). x: F_mm (B, d, h, w). sentence: f_s (B, D).

    Returns logits (B, 1, 4h, 4w): F_c, convolved with a 3x3 kernel F_l of each sentence's own. In
    the plain form, for one pair:

        F_c = mix(up(x))                              # (c, 4h, 4w)
        F_l = kernel(sentence)                        # (9 * c + 1,)
        logits = F.conv2d(F_c[None], F_l[:-1].view(1, c, 3, 3), F_l[-1:], padding=1)

    Both steps after `up` are linear, so F_c itself is never computed. Each of the nine places of
    the kernel is multiplied by the weights of mix. One matrix product makes nine maps from the
    large features. F.fold shifts the nine maps and adds them. This saves the pass of mix over all
    pixels, and a convolution for each pair.
    """

    def __init__(self, cfg):
        super().__init__()
        d = cfg.head_width
        c = d // 2
        side = cfg.grid_side
        self.up = nn.Sequential(UpConvBN(d, d, side), UpConvBN(d, c, 2 * side))
        self.mix = nn.Conv2d(c, c, 1)
        self.kernel = nn.Linear(cfg.text_width, 9 * c + 1)  # last the bias
        if cfg.calm_start:  # differs: for training from nothing
            nn.init.zeros_(self.kernel.bias)
            self.kernel.weight.data *= 0.1
            self.kernel.bias.data[-1] = -3.0

    def forward(self, x: Tensor, sentence: Tensor) -> Tensor:
        large = self.up(x)  # (B, c, 4h, 4w)
        c = large.shape[1]
        kernel, bias = self.kernel(sentence).split([9 * c, 1], dim=1)  # F_l: (B, 9 * c), (B, 1)
        kernel = kernel.unflatten(1, (c, 9)).transpose(1, 2)  # (B, 9, c)
        # Along one axis a kernel has the places k = 0, 1, 2. At place k, a convolution takes pixel
        # q to the pixel p with q = p + k - 1. Solved for p, that is p = q + (2 - k) - 1. F.fold
        # adds map k of pixel q to pixel q + k - 1. So place k of the kernel is fold's place 2 - k:
        # the nine are reversed first.
        kernel = kernel.flip(1)

        mixed_kernel = kernel @ self.mix.weight.flatten(1)  # (B, 9, c)
        mixed_bias = kernel @ self.mix.bias[:, None]  # (B, 9, 1)
        maps = mixed_kernel @ large.flatten(2) + mixed_bias  # (B, 9, 16 * h * w)
        logits = F.fold(
            maps, large.shape[2:], kernel_size=3, padding=1
        )  # F_c . F_l: (B, 1, 4h, 4w)
        return logits + bias[:, :, None, None]


class UpConvBN(ConvBN):
    """Enlarge to twice the side, then a 3x3 ConvBN. (B, C, h, h) -> (B, c, 2h, 2h). The plain form:

        x = F.interpolate(x, scale_factor=2, mode="bilinear")
        return F.relu(self.bn(self.conv(x)))

    Enlarging treats every channel alike, so the channels can be mixed before it, on a quarter of
    the pixels. `maps` holds the c output channels once for each of the kernel's nine places. Then
    one matrix works along x: it enlarges, shifts by the kernel's column, and adds the three
    columns. The same matrix does it along y.
    """

    def __init__(self, inputs, outputs, side):
        super().__init__(inputs, outputs, 3)
        # Wanted is matrix[p, k * h + x]: the share of pixel x in the enlarged pixel p + k - 1,
        # which the kernel's place k reads for p; 0 where that lies outside.
        one_pixel_each = torch.eye(side)[None]  # (1, h, h)
        # enlarged[x, q]: the share of pixel x in the enlarged pixel q
        enlarged = F.interpolate(one_pixel_each, scale_factor=2, mode="linear")[0]  # (h, 2h)
        padded = F.pad(enlarged, (1, 1))  # (h, 2h + 2)
        shifted = padded.unfold(1, 2 * side, 1)  # [x, k, p] is enlarged[x, p + k - 1]: (h, 3, 2h)
        matrix = shifted.permute(2, 1, 0).flatten(1)  # (2h, 3h)
        self.register_buffer("matrix", matrix, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight.permute(2, 3, 0, 1)  # (3, 3, c, C)
        maps = F.conv2d(x, weight.flatten(0, 2)[:, :, None, None])  # (B, 9 * c, h, h)
        maps = maps.unflatten(1, (3, 3, -1))  # (B, 3 rows, 3 columns, c, y, x)
        maps = maps.permute(0, 3, 1, 4, 2, 5)  # (B, c, rows, y, columns, x)
        wide = maps.flatten(4) @ self.matrix.T  # (B, c, rows, y, 2h)
        large = self.matrix @ wide.flatten(2, 3)  # (B, c, 2h, 2h)
        return F.relu(self.normalise(large))


# ---- the whole model and its loss ----


class DCRIS(nn.Module):
    """The whole model (paper, Figure 1).

    image: (B, 3, H, W), uint8 of 0 to 255, or float and already normalised; H = W = cfg.image_size.
    tokens: (B, L) int64, 0 where padded. Returns logits (B, 1, 4h, 4w), float32.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.tokenizer = None  # weights.py puts the one that fits the text encoder here
        self.keeps_encoders = True  # whether checkpoints hold the encoders; weights.py decides
        self.vision = VisionTransformer(config)
        self.text = TextTransformer(config)

        # the encoders are frozen before anything else is added, so all that follows trains
        if config.method != "full":
            self.vision.requires_grad_(False)
            self.text.requires_grad_(False)
        # never read here: DistributedDataParallel refuses parameters that get no gradient
        self.vision.mask_token.requires_grad_(False)
        self.text.logit_scale.requires_grad_(False)

        add_adapters(self.vision.blocks, self.text.transformer["resblocks"], config)
        self.bridges = etris_bridges(config)
        self.neck = Neck(config)
        self.decoder = Decoder(config)
        self.projector = Projector(config)

        self.register_buffer("mean", 255 * torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(STD).view(3, 1, 1), persistent=False)

    def forward(self, image: Tensor, tokens: Tensor) -> Tensor:
        side = self.config.image_size
        if image.shape[2:] != (side, side):
            H, W = image.shape[2:]
            raise ValueError(f"image of {H}x{W}, expected {side}x{side}: letterbox it")
        if image.dtype == torch.uint8:
            image = (image - self.mean) / self.std

        if self.config.method == "etris":
            taps, words, sentence = self.encode_in_step(image, tokens)
        else:
            words, sentence = self.text(tokens)  # f_t, f_s
            taps = self.vision(image, words)

        pad = tokens == 0  # as in the authors' code; a "!" inside a word may have id 0, too
        fused = self.neck(taps, sentence)  # f_c
        fused = self.decoder(fused, words, pad)  # F_mm
        return self.projector(fused, sentence).float()

    def encode_in_step(self, image, tokens):
        """Both encoders under ETRIS, which joins them at its bridges: taps, words, sentence."""
        vision = self.vision
        text_blocks = list(self.text.transformer["resblocks"])
        text_done = 0
        before = None  # the (v, t) that the bridge before returned

        x = vision.embed(image)
        text_x = self.text.embed(tokens)
        taps = []
        for i, block in enumerate(vision.blocks):
            x = block(x, None, vision.grid)

            if i in self.config.visual_layers:
                stage = self.config.visual_layers.index(i)
                text_stop = self.config.text_layers[stage] + 1
                for text_block in text_blocks[text_done:text_stop]:
                    text_x = text_block(text_x)
                text_done = text_stop

                patches = x[:, vision.prefix_length :]
                change, text_change, before = self.bridges[stage](patches, text_x, before)
                x = x + F.pad(change, (0, 0, vision.prefix_length, 0))  # nothing for the prefix
                text_x = text_x + text_change

            if i in vision.taps:
                taps.append(vision.to_square(x))

        for text_block in text_blocks[text_done:]:
            text_x = text_block(text_x)
        taps.append(vision.to_square(vision.norm(x)))
        words, sentence = self.text.read_out(text_x, tokens)
        return taps, words, sentence

    def parameter_counts(self) -> dict[str, int]:
        """Parameters of each part, of all that trains, and of the backbone, as the paper counts."""
        counts = Counter()
        added = adapter_keys(self)
        for name, parameter in self.named_parameters():
            part = "adapters" if name in added else name.split(".")[0]
            counts[part] += parameter.numel()
            if parameter.requires_grad:
                counts["trainable"] += parameter.numel()
        # the paper's 149.97M (149,972,225) leaves out the text encoder's position table
        position_table = self.text.positional_embedding.numel()
        counts["backbone"] = counts["vision"] + counts["text"] - position_table
        return counts


def contrastive_loss(logits: Tensor, mask: Tensor, rule: str = "aligned") -> Tensor:
    """Text-to-pixel contrastive loss (paper, Eq. 6): the mean over all pixels of

        -log(sigmoid(F_c . F_l)) inside the mask, -log(1 - sigmoid(F_c . F_l)) outside.

    logits: F_c . F_l, (B, 1, 4h, 4h) float32. mask: (B, 1, H, H) in [0, 1], square as all
    letterboxed photos are. Returns a scalar in nats.
    """
    target = resize_mask(mask, logits.shape[-1], rule)
    return F.binary_cross_entropy_with_logits(logits, target)


def resize_mask(mask, side, rule):
    """The mask at the logits' size: (B, 1, H, H) -> (B, 1, side, side).

    The paper does not say how. detris: the nearest pixel, as in the authors' release. aligned,
    ours: how much of each logit's area the mask covers, from 0 to 1.
    """
    if rule == "detris":
        return F.interpolate(mask, side, mode="nearest")
    # differs: exact area average, also where an area is 3.5 pixels wide
    fine = math.lcm(mask.shape[-1], side)  # every area is a whole number of these pixels
    return F.adaptive_avg_pool2d(F.interpolate(mask, fine, mode="nearest"), side)

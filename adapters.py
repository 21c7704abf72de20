"""The small trainable modules that join a frozen image encoder and a frozen text encoder, and their rivals.

Blocks that parts share, then ours, then Table 2's rivals; last, attach says which method puts what where.
Axes: B pairs, S image tokens (class, R registers, N = h*w patches), L text tokens, C image width, D text
width, r the adapter's reduced width ("rank" in the flags, "dim" in the paper's tables).
"""
import math
from collections import OrderedDict

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, section 3.2.2); equals nn.MultiheadAttention, batch first.
    query (B, Q, E), key and value (B, K, E) -> (B, Q, E). Dropout falls on the attention weights.
    pad: (B, K) bool, True where a key must not be looked at. causal: token i sees tokens 0 ... i only."""
    def __init__(self, width: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))   # query, key, value: one table
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        self.adapter = nn.ModuleDict({"table": nn.Identity(), "out": nn.Identity()})     # places for attach
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, pad: Tensor | None = None,
                causal: bool = False) -> Tensor:
        table = self.adapter["table"](self.in_proj_weight)
        parts = zip((query, key, value), table.chunk(3), self.in_proj_bias.chunk(3))
        q, k, v = (F.linear(x, weight, bias).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for x, weight, bias in parts)                            # (B, nh, Q or K, hd)
        seen = None if pad is None else ~pad[:, None, None, :]              # (B, 1, 1, K)
        x = F.scaled_dot_product_attention(q, k, v, seen, self.dropout if self.training else 0.0, causal)
        return self.adapter["out"](self.out_proj(x.transpose(1, 2).flatten(2)))

    def gate(self, value: Tensor) -> Tensor:
        """The output where there is one key only: the softmax is 1 whatever the query. (B, E) -> (B, E).
        The table's rows for queries and keys are never read; as in the original, their gradient is zero."""
        weight, bias = self.in_proj_weight.chunk(3)[2], self.in_proj_bias.chunk(3)[2]
        return self.out_proj(F.linear(value, weight, bias))

class VisionAttention(nn.Module):
    """Self-attention over image tokens (B, S, C), under DINOv2's names. (B, S, C) -> (B, S, C)."""
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.adapter = nn.ModuleDict({"table": nn.Identity(), "out": nn.Identity()})     # places for attach

    def forward(self, x: Tensor) -> Tensor:
        qkv = F.linear(x, self.adapter["table"](self.qkv.weight), self.qkv.bias)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)          # 3 x (B, nh, S, hd)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.adapter["out"](self.proj(x))

class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)

def mlp(width: int, first: str, act: nn.Module, second: str) -> nn.Sequential:
    """Four times as wide inside; `first` and `second` are the released names of its two layers."""
    return nn.Sequential(OrderedDict({first: nn.Linear(width, 4 * width), "act": act,
                                      second: nn.Linear(4 * width, width)}))

def sine_positions(length: int, width: int) -> Tensor:
    """Sine and cosine interleaved, base 10000 (Vaswani et al. 2017, section 3.5): (length, width)."""
    rate = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    angle = torch.arange(length)[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)

def square_positions(side: int, width: int) -> Tensor:
    """The same for a square of patches, (side * side, width): first half of the width x, second half y."""
    line = sine_positions(side, width // 2)
    return torch.cat([line.repeat(side, 1), line.repeat_interleave(side, dim=0)], dim=1)

class ConvBN(nn.Module):
    """Convolution that keeps the size, BatchNorm, ReLU. dims 1: (B, C, L); dims 2: (B, C, h, w)."""
    def __init__(self, inputs: int, outputs: int, kernel: int, eps: float = 1e-5, bias=False, dims=2):
        super().__init__()
        conv, norm = {1: (nn.Conv1d, nn.BatchNorm1d), 2: (nn.Conv2d, nn.BatchNorm2d)}[dims]
        self.conv = conv(inputs, outputs, kernel, padding=kernel // 2, bias=bias)
        self.bn = norm(outputs, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.normalise(self.conv(x))

    def normalise(self, x: Tensor) -> Tensor:
        if not (self.training and dist.is_initialized()):
            return F.relu(self.bn(x))
        # Over all processes, which hold as many samples each. torch's SyncBatchNorm has no CPU path, and its
        # masks cut a compiled graph into pieces.
        bn, world, dims = self.bn, dist.get_world_size(), [0, *range(2, x.dim())]
        own = torch.stack(torch.var_mean(x.float(), dims, correction=0, keepdim=True))       # (2, 1, C, ...)
        parts = [torch.empty_like(own) for _ in range(world)]
        dist.all_gather(parts, own.detach())
        parts[dist.get_rank()] = own                      # the only ones with a gradient, summed in place
        every = torch.stack(parts)                        # (world, 2, 1, C, ...)
        every.register_hook(lambda grad: dist.all_reduce(grad))
        var, mean = every[:, 0].mean(0) + every[:, 1].var(0, correction=0), every[:, 1].mean(0)
        n = world * x.numel() // x.shape[1]
        for average, now in ((bn.running_mean, mean), (bn.running_var, var * n / (n - 1))):
            average.lerp_(now.detach().flatten(), bn.momentum)
        bn.num_batches_tracked += 1
        x = ((x - mean) * (var + bn.eps).rsqrt()).to(x.dtype)
        return F.relu(x * bn.weight.view(mean.shape) + bn.bias.view(mean.shape))

class DenseBranches(nn.Module):
    """The densely connected prior of Eq. 1: each kernel size reads the input and all smaller ones' outputs.
    (B, r, h, w) -> (B, r, h, w), or (B, r, L) -> (B, r, L) with dims=1. "+ F_v" is the caller's."""
    def __init__(self, rank: int, dims: int):
        super().__init__()
        conv = lambda inputs, outputs, kernel: ConvBN(inputs, outputs, kernel, eps=1e-3, bias=True, dims=dims)
        half, quarter, reduced = rank // 2, rank // 4, rank // 16
        self.branch1 = conv(rank, half, 1)
        self.branch2 = nn.Sequential(conv(rank + half, reduced, 1), conv(reduced, quarter, 3))
        self.branch3 = nn.Sequential(conv(rank + half + quarter, reduced, 1), conv(reduced, quarter, 5))

    def forward(self, x: Tensor) -> Tensor:
        first = self.branch1(x)                                             # (B, r/2, ...)
        second = self.branch2(torch.cat([x, first], 1))                     # (B, r/4, ...)
        third = self.branch3(torch.cat([x, first, second], 1))              # (B, r/4, ...)
        return torch.cat([first, second, third], 1)

class CrossAttention(nn.Module):
    """F_MHCA of Eq. 2: patches ask, words answer, at a width of 128 whatever the rank is."""
    def __init__(self, rank: int, text_width: int, dropout: float, width: int = 128, heads: int = 8):
        super().__init__()
        self.query, self.words = nn.Linear(rank, width), nn.Linear(text_width, width)
        self.attn, self.back = Attention(width, heads, dropout), nn.Linear(width, rank)

    def forward(self, patches: Tensor, words: Tensor) -> Tensor:
        words = self.words(words)                                           # (B, L, 128)
        return self.back(self.attn(self.query(patches), words, words))      # no padding mask, as released

class DenseCrossAdapter(nn.Module):
    """DenseCrossAdapter (paper, Eq. 1-2; DETRIS: DenseAligner). Its output is added, times 0.2, to an MLP's.
    x (B, S, C), words (B, L, D), grid (h, w) with S - h*w prefix tokens -> (B, S, C).
    Class and register tokens skip convolution and attention; the release gives them F_v twice."""
    def __init__(self, width: int, rank: int, text_width: int, dropout: float = 0.1):
        super().__init__()
        self.down = nn.Linear(width, rank)
        self.dense = DenseBranches(rank, dims=2)
        self.cross = CrossAttention(rank, text_width, dropout)
        self.up = nn.Linear(rank, width)
        self.apply(init_adapter)

    def forward(self, x: Tensor, words: Tensor, grid: tuple[int, int]) -> Tensor:
        h, w = grid
        x = F.relu(self.down(x))                                            # (B, S, r), F_v
        prefix, patches = x.split([x.shape[1] - h * w, h * w], dim=1)
        square = patches.transpose(1, 2).unflatten(2, (h, w)).contiguous()  # (B, r, h, w)
        dense = self.dense(square).flatten(2).transpose(1, 2) + patches     # (B, N, r), F_dense
        cross = self.cross(dense, words) + patches                          # (B, N, r), F_cross
        return self.up(torch.cat([prefix + prefix, cross], dim=1))

class TextAdapter(nn.Module):
    """Text adapter (paper, Eq. 3): down, ReLU, up. (B, L, D) -> (B, L, D)."""
    def __init__(self, width: int, rank: int):
        super().__init__()
        self.down, self.up = nn.Linear(width, rank), nn.Linear(rank, width)
        self.apply(init_adapter)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(F.relu(self.down(x)))

class DenseTextAdapter(nn.Module):
    """The release's text adapter (DETRIS: TextAdapter): Eq. 1's branches along the sentence, kernels 1, 3, 5.
    (B, L, D) -> (B, L, D). The start token skips the branches, and like all gets "+ F_t" at the end."""
    def __init__(self, width: int, rank: int):
        super().__init__()
        self.down, self.dense = nn.Linear(width, rank), DenseBranches(rank, dims=1)
        self.up = nn.Linear(rank, width)
        self.apply(init_adapter)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.down(x))                                            # (B, L, r), F_t
        dense = self.dense(x[:, 1:].transpose(1, 2)).transpose(1, 2)        # (B, L - 1, r)
        return self.up(torch.cat([x[:, :1], dense], dim=1) + x)

def init_adapter(layer: nn.Module) -> None:
    """Kaiming normal weights, zero biases, as released; no weight starts at zero, so adapters act at once."""
    if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)):
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)

# ---- the rivals of Table 2 ----
class LoRA(nn.Module):
    """LoRA (Hu et al. 2022, Eq. 3): W_0 + B A in place of W_0, for queries and values; B = 0 at first.
    table (3C, C), the weights of queries, keys and values -> the same, so no token costs a product more."""
    def __init__(self, width: int, rank: int):
        super().__init__()
        self.A = nn.Parameter(torch.randn(2, rank, width) * width ** -0.5)
        self.B = nn.Parameter(torch.zeros(2, width, rank))

    def forward(self, table: Tensor) -> Tensor:
        query, value = self.B @ self.A                                      # 2 x (C, C), times alpha / r = 1
        return table + torch.cat([query, torch.zeros_like(query), value])

class HoulsbyAdapter(TextAdapter):
    """Adapter (Houlsby et al. 2019, Figure 2): x + up(relu(down(x))), behind an MLP. (B, S, C) -> same."""
    def __init__(self, width: int, rank: int):
        super().__init__(width, rank)
        nn.init.zeros_(self.up.weight)                    # differs: nearly 0 there, here nothing at first

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)

class HypercomplexLinear(nn.Module):
    """Compacter's layer: x W + b, W the sum of n Kronecker products of A_i (n, n) and s_i t_i of a low rank.
    No product is ever built: x in n pieces meets s, then A, then t. (B, S, inputs) -> (B, S, outputs)."""
    def __init__(self, inputs: int, outputs: int, n: int = 4, factor: int = 16):
        super().__init__()
        glorot = lambda a, b: (2 * torch.rand(n, a, b) - 1) * math.sqrt(12 / (a + b))     # gain sqrt(2)
        self.A = nn.Parameter(0.01 * torch.randn(n, n, n))
        self.s, self.t = (nn.Parameter(glorot(*x)) for x in ((inputs // n, factor), (factor, outputs // n)))
        self.b = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(-1, (len(self.A), -1))                              # (B, S, n, inputs / n)
        x = torch.einsum("...pc,icr,ipq->...iqr", x, self.s, self.A)        # (B, S, n, n, factor)
        return torch.einsum("...iqr,ird->...qd", x, self.t).flatten(-2) + self.b

class Compacter(HoulsbyAdapter):
    """Compacter (Karimi Mahabadi et al. 2021): Houlsby's of such layers, behind attention and behind MLP."""
    def __init__(self, width: int, rank: int):
        nn.Module.__init__(self)
        self.down, self.up = HypercomplexLinear(width, rank), HypercomplexLinear(rank, width)

class EtrisBridge(nn.Module):
    """A stage of ETRIS's Bridger (Xu et al. 2023): image + up(v * MHA(v, t, t)), text + up(t * MHA(t, v, v)).
    patches (B, N, C), words (B, L, D), before: v and t of the stage before, zeros at first
    -> what to add to patches and to words, and v (B, N, r) and t (B, L, r)."""
    def __init__(self, width: int, text_width: int, rank: int, first: bool):
        super().__init__()
        self.down, self.up = ConvBN(width, rank, 1, dims=1), ConvBN(rank, width, 1, dims=1)
        self.words_down, self.words_up = nn.Linear(text_width, rank), nn.Linear(rank, text_width)
        self.norm, self.words_norm = (nn.Identity() if first else nn.LayerNorm(rank) for _ in range(2))
        self.attn, self.words_attn = Attention(rank, 8), Attention(rank, 8)
        for conv in (self.down.conv, self.up.conv):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        for linear in (self.words_down, self.words_up, self.attn.out_proj, self.words_attn.out_proj):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, patches: Tensor, words: Tensor, before: tuple) -> tuple[Tensor, Tensor, tuple]:
        v = self.norm(self.down(patches.mT).mT + before[0])                 # (B, N, r)
        t = self.words_norm(self.words_down(words) + before[1])             # (B, L, r)
        patches, words = v * self.attn(v, t, t), t * self.words_attn(t, v, v)
        return self.up(patches.mT).mT, self.words_up(words), (v, t)

def run_in_step(vision: nn.Module, text: nn.Module, image: Tensor, tokens: Tensor, photo) -> tuple:
    """Both encoders, which stop at each of ETRIS's bridges for what it adds: (taps, (words, sentence))."""
    image_side, text_side, before = vision.stages(image, None, photo), text.stages(tokens), (0.0, 0.0)
    patches, words = next(image_side), next(text_side)
    for bridge in filter(None, (block.adapter for block in vision.blocks)):
        change, words_change, before = bridge(patches, words, before)
        patches, words = image_side.send(change), text_side.send(words_change)
    return patches, words

# ---- which method puts what where ----
EVERY, ODD = tuple(range(12)), (1, 3, 5, 7, 9, 11)
METHODS = {   # blocks and rank in the image encoder, in the text encoder; what ranks must be multiples of
    "dcris": (ODD, 128, ODD, 64, 16),                     # 2,694,048 parameters
    "lora": (EVERY, 32, EVERY, 16, 1),                    # 1,572,864
    "adapter": (EVERY, 64, EVERY, 64, 1),                 # 1,982,976
    "compacter": (EVERY, 384, EVERY, 384, 4),             # 1,622,080
    "etris": ((3, 7, 11), 128, (3, 7, 11), 128, 8),       # 1,387,648
    "frozen": ((), 128, (), 64, 16), "full": ((), 128, (), 64, 16),
}

def attach(block: nn.Module, cfg, i: int, visual: bool) -> None:
    """Put what cfg.method has there into block i of the image or text encoder: all methods side by side."""
    width, rank, layers = ((cfg.vision_width, cfg.visual_rank, cfg.visual_layers) if visual else
                           (cfg.text_width, cfg.text_rank, cfg.text_layers))
    block.adapter, block.bridged = None, cfg.method == "etris" and i in layers
    if i not in layers:
        return
    if cfg.method == "lora":                              # onto the weights of attention
        block.attn.adapter["table"] = LoRA(width, rank)
    elif cfg.method == "adapter":                         # behind the MLP
        block.mlp.add_module("adapter", HoulsbyAdapter(width, rank))
    elif cfg.method == "compacter":                       # behind attention and behind the MLP
        block.attn.adapter["out"] = Compacter(width, rank)
        block.mlp.add_module("adapter", Compacter(width, rank))
    elif cfg.method == "etris":                           # behind the block, between both encoders
        block.adapter = EtrisBridge(width, cfg.text_width, rank, i == layers[0]) if visual else None
    elif visual:                                          # beside the MLP: dcris, and full
        block.adapter = DenseCrossAdapter(width, rank, cfg.text_width, cfg.dropout)
    else:
        block.adapter = (TextAdapter if cfg.text_adapter == "plain" else DenseTextAdapter)(width, rank)

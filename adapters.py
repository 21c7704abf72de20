"""The small trainable modules that join a frozen image encoder and a frozen text encoder.

    Attention, ConvBN    and other blocks that several parts are built from
    DenseCrossAdapter    paper Eq. 1-2: beside the MLP of some DINOv2 blocks
    TextAdapter          paper Eq. 3: beside the MLP of some CLIP text blocks
    DenseTextAdapter     what the authors' release has in place of Eq. 3

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
    pad: (B, K) bool, True where a key must not be looked at. causal: token i sees tokens 0 ... i only.
    """
    def __init__(self, width: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))   # query, key, value: one table
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, pad: Tensor | None = None,
                causal: bool = False) -> Tensor:
        parts = zip((query, key, value), self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3))
        q, k, v = (F.linear(x, weight, bias).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for x, weight, bias in parts)                            # (B, nh, Q or K, hd)
        seen = None if pad is None else ~pad[:, None, None, :]              # (B, 1, 1, K)
        x = F.scaled_dot_product_attention(q, k, v, seen, self.dropout if self.training else 0.0, causal)
        return self.out_proj(x.transpose(1, 2).flatten(2))

    def gate(self, value: Tensor) -> Tensor:
        """The output where there is one key only: the softmax is 1 whatever the query. (B, E) -> (B, E).

        Queries and keys are never computed; their rows of the table stay (they count, and checkpoints
        have them) and get a gradient of exactly zero, as they do in the original.
        """
        weight, bias = self.in_proj_weight.chunk(3)[2], self.in_proj_bias.chunk(3)[2]
        return self.out_proj(F.linear(value, weight, bias))

class VisionAttention(nn.Module):
    """Self-attention over image tokens (B, S, C), under DINOv2's names. (B, S, C) -> (B, S, C)."""
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)   # 3 x (B, nh, S, hd)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

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
    x, y = line[None].expand(side, -1, -1), line[:, None].expand(-1, side, -1)
    return torch.cat([x, y], dim=-1).flatten(0, 1)

class Gather(torch.autograd.Function):
    """All processes' samples, (B, ...) -> (world * B, ...), equally many each; gradients come back summed."""
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        dist.all_reduce(grad := grad.contiguous())
        return grad.chunk(dist.get_world_size())[dist.get_rank()]

class ConvBN(nn.Module):
    """Convolution that keeps the size, BatchNorm, ReLU. dims 1: (B, C, L); dims 2: (B, C, h, w)."""
    def __init__(self, inputs: int, outputs: int, kernel: int, eps: float = 1e-5, bias: bool = False,
                 dims: int = 2):
        super().__init__()
        conv, norm = {1: (nn.Conv1d, nn.BatchNorm1d), 2: (nn.Conv2d, nn.BatchNorm2d)}[dims]
        self.conv = conv(inputs, outputs, kernel, padding=kernel // 2, bias=bias)
        self.bn = norm(outputs, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.normalise(self.conv(x))

    def normalise(self, x: Tensor) -> Tensor:             # GPUs: torch's SyncBatchNorm, which CPUs lack
        if not (self.training and dist.is_initialized() and x.device.type == "cpu"):
            return F.relu(self.bn(x))
        everyone = self.bn(Gather.apply(x.contiguous()))
        return F.relu(everyone.chunk(dist.get_world_size())[dist.get_rank()])

class DenseBranches(nn.Module):
    """The densely connected prior of Eq. 1: each kernel size reads the input and all smaller ones' outputs.

    (B, r, h, w) -> (B, r, h, w), or (B, r, L) -> (B, r, L) with dims=1. The residual "+ F_v" is the caller's.
    """
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
        self.query = nn.Linear(rank, width)
        self.words = nn.Linear(text_width, width)
        self.attn = Attention(width, heads, dropout)
        self.back = nn.Linear(width, rank)

    def forward(self, patches: Tensor, words: Tensor) -> Tensor:
        words = self.words(words)                                           # (B, L, 128)
        return self.back(self.attn(self.query(patches), words, words))      # no padding mask, as released

class DenseCrossAdapter(nn.Module):
    """DenseCrossAdapter (paper, Eq. 1-2; DETRIS: DenseAligner). Its output is added, times 0.2, to an MLP's.

    x (B, S, C), words (B, L, D), grid (h, w) with S - h*w prefix tokens -> (B, S, C).
    Class and register tokens skip convolution and attention; the release gives them F_v twice.
    """
    def __init__(self, width: int, rank: int, text_width: int, dropout: float = 0.1):
        super().__init__()
        self.down = nn.Linear(width, rank)
        self.dense = DenseBranches(rank, dims=2)
        self.cross = CrossAttention(rank, text_width, dropout)
        self.up = nn.Linear(rank, width)
        init_adapter(self)

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
        self.down = nn.Linear(width, rank)
        self.up = nn.Linear(rank, width)
        init_adapter(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(F.relu(self.down(x)))

class DenseTextAdapter(nn.Module):
    """The release's text adapter (DETRIS: TextAdapter): Eq. 1's branches along the sentence, kernels 1, 3, 5.

    (B, L, D) -> (B, L, D). The start token skips the branches, and like all tokens gets "+ F_t" at the end.
    """
    def __init__(self, width: int, rank: int):
        super().__init__()
        self.down = nn.Linear(width, rank)
        self.dense = DenseBranches(rank, dims=1)
        self.up = nn.Linear(rank, width)
        init_adapter(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.down(x))                                            # (B, L, r), F_t
        dense = self.dense(x[:, 1:].transpose(1, 2)).transpose(1, 2)        # (B, L - 1, r)
        return self.up(torch.cat([x[:, :1], dense], dim=1) + x)

def init_adapter(adapter: nn.Module) -> None:
    """Kaiming normal weights, zero biases, as released; no weight starts at zero, so adapters act at once."""
    for module in adapter.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)

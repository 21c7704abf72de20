"""The small trainable modules that join a frozen image encoder and a frozen text encoder.

First the paper's two adapters and a third from the authors' release, then the blocks they are made
of, then the rivals of the paper's Table 2. `add_adapters` says which method puts what into which
place of the encoders. Last come two tables of positions, which model.py reads.
A comment "differs", in any file, marks where we depart on purpose from the work that it names.

Axes: B image-sentence pairs; S image tokens (one class token, R registers, N = h * w patches); L
text tokens; C image width; D text width; r the adapter's reduced width ("dim" in the paper's
tables, `rank` in our flags); nh heads of width hd.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# ---- the paper's adapters, and the release's own for text ----


class DenseCrossAdapter(nn.Module):
    """DenseCrossAdapter (paper, Eq. 1 and 2; called DenseAligner in the authors' code).

    It sits beside the MLP of an image block; its output, times 0.2, is added to the MLP's.

    x: (B, S, C) image tokens after the block's second norm. words: (B, L, D) text features f_t.
    grid: (h, w) of the patches; the first S - h * w tokens are the class token and the registers.
    Returns f_dc: (B, S, C).
    """

    def __init__(self, width: int, rank: int, text_width: int, dropout: float = 0.1):
        super().__init__()
        self.down = nn.Linear(width, rank)
        self.dense = DenseBranches(rank, dims=2)
        self.cross = CrossAttention(rank, text_width, dropout)
        self.up = nn.Linear(rank, width)
        self.apply(init_adapter)

    def forward(self, x: Tensor, words: Tensor, grid: tuple[int, int]) -> Tensor:
        h, w = grid
        prefix_length = x.shape[1] - h * w  # 1 + R

        reduced = F.relu(self.down(x))  # F_v: (B, S, r)
        prefix, patches = reduced.split([prefix_length, h * w], dim=1)

        square = patches.transpose(1, 2).unflatten(2, grid)  # (B, r, h, w)
        branches = self.dense(square).flatten(2).transpose(1, 2)  # (F_v1, F_v2, F_v3): (B, N, r)
        dense = branches + patches  # F_dense: (B, N, r)
        cross = self.cross(dense, words) + patches  # F_cross: (B, N, r)

        # Convolution and attention are for patches only. The paper does not say what the class
        # token and the registers get. In the authors' code they skip both and stay F_v. At the end
        # F_v is added to every token, so they become 2 F_v.
        doubled = prefix + prefix  # (B, 1 + R, r)
        return self.up(torch.cat([doubled, cross], dim=1))  # f_dc: (B, S, C)


class TextAdapter(nn.Module):
    """Text adapter (paper, Eq. 3), beside the MLP of a text block.

    x: (B, L, D), what reaches the block's MLP, before its norm. Returns f_w: (B, L, D).
    """

    def __init__(self, width: int, rank: int):
        super().__init__()
        self.down = nn.Linear(width, rank)
        self.up = nn.Linear(rank, width)
        self.apply(init_adapter)

    def forward(self, x: Tensor) -> Tensor:
        reduced = self.down(x)  # F_t: (B, L, r)
        activated = F.relu(reduced)  # F_relu: (B, L, r)
        return self.up(activated)  # f_w: (B, L, D)


class DenseTextAdapter(nn.Module):
    """The authors' release's text adapter (there: TextAdapter), needed to load their checkpoints.

    It differs from Eq. 3: between down and up, the branches of Eq. 1 run along the sentence. The
    start token skips them. (B, L, D) -> (B, L, D).
    """

    def __init__(self, width: int, rank: int):
        super().__init__()
        self.down = nn.Linear(width, rank)
        self.dense = DenseBranches(rank, dims=1)
        self.up = nn.Linear(rank, width)
        self.apply(init_adapter)

    def forward(self, x: Tensor) -> Tensor:
        reduced = F.relu(self.down(x))  # (B, L, r)
        start, rest = reduced.split([1, x.shape[1] - 1], dim=1)
        branches = self.dense(rest.transpose(1, 2)).transpose(1, 2)  # (B, L - 1, r)
        joined = torch.cat([start, branches], dim=1)
        return self.up(joined + reduced)  # the start token is doubled, as in their code


# ---- what the adapters are made of ----


class DenseBranches(nn.Module):
    """The densely connected convolutions of Eq. 1, up to "+ F_v", which their caller adds.

    Each kernel size reads the input and the outputs of all smaller ones. The paper gives the
    kernels; the widths (r/2, r/4, r/4; r/16 between a branch's two layers), BatchNorm with eps 1e-3
    and ReLU are the authors' code's.

    F_v: (B, r, h, w). Returns (F_v1, F_v2, F_v3): (B, r, h, w). With dims=1 (B, r, L) becomes
    (B, r, L).
    """

    def __init__(self, rank, dims):
        super().__init__()

        def conv(inputs, outputs, kernel):
            return ConvBN(inputs, outputs, kernel, dims, eps=1e-3, bias=True)

        half = rank // 2
        quarter = rank // 4
        narrow = rank // 16
        self.branch1 = conv(rank, half, 1)
        self.branch2 = nn.Sequential(
            conv(rank + half, narrow, 1),
            conv(narrow, quarter, 3),
        )
        self.branch3 = nn.Sequential(
            conv(rank + half + quarter, narrow, 1),
            conv(narrow, quarter, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        # F_v1 = conv1x1(F_v), F_v2 = conv3x3(F_v, F_v1), F_v3 = conv5x5(F_v, F_v1, F_v2)
        first = self.branch1(x)  # (B, r/2, h, w)
        second = self.branch2(torch.cat([x, first], dim=1))  # (B, r/4, h, w)
        third = self.branch3(torch.cat([x, first, second], dim=1))  # (B, r/4, h, w)
        return torch.cat([first, second, third], dim=1)  # (B, r, h, w)


class CrossAttention(nn.Module):
    """F_MHCA of Eq. 2: patches ask, words answer. (B, N, r) and (B, L, D) -> (B, N, r).

    The attention is 128 wide whatever r is; the paper does not say so, but only this width gives
    the parameter counts of its Table 4. Padded words are not masked, as in the authors' code.
    """

    WIDTH = 128
    HEADS = 8

    def __init__(self, rank, text_width, dropout):
        super().__init__()
        self.query_proj = nn.Linear(rank, self.WIDTH)
        self.words_proj = nn.Linear(text_width, self.WIDTH)
        self.attn = Attention(self.WIDTH, self.HEADS, dropout)
        self.back = nn.Linear(self.WIDTH, rank)

    def forward(self, patches: Tensor, words: Tensor) -> Tensor:
        query = self.query_proj(patches)  # (B, N, 128)
        key = self.words_proj(words)  # (B, L, 128)
        answer = self.attn(query, key, key)  # (B, N, 128)
        return self.back(answer)


def init_adapter(layer):
    """Kaiming normal weights and zero biases, as in the authors' code.

    No weight starts at zero, so an adapter changes the model from the first step. Attention's
    in_proj_weight is its own parameter, not that of a linear layer, and keeps its Xavier start.
    """
    if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)):
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, section 3.2.2); equals torch's
    nn.MultiheadAttention.

    query: (B, Q, C). key and value: (B, K, C). pad: (B, K) bool, True where a key must not be
    looked at. causal: token i sees tokens 0 to i only. Dropout falls on the attention weights.
    Returns (B, Q, C).
    """

    def __init__(self, width, n_head, dropout=0.0):
        super().__init__()
        self.n_head = n_head
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))  # query, key, value
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        self.lora = nn.Identity()  # slot: LoRA changes the query and value weights
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pad: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor:
        weight = self.lora(self.in_proj_weight)
        query_weight, key_weight, value_weight = weight.chunk(3)
        query_bias, key_bias, value_bias = self.in_proj_bias.chunk(3)
        q = self.project(query, query_weight, query_bias)  # (B, nh, Q, hd)
        k = self.project(key, key_weight, key_bias)  # (B, nh, K, hd)
        v = self.project(value, value_weight, value_bias)  # (B, nh, K, hd)

        seen = None if pad is None else ~pad[:, None, None]  # (B, 1, 1, K)
        dropout = self.dropout if self.training else 0.0
        heads = F.scaled_dot_product_attention(q, k, v, seen, dropout, causal)  # (B, nh, Q, hd)
        return self.out_proj(heads.transpose(1, 2).flatten(2))  # (B, Q, C)

    def project(self, x, weight, bias):
        """A linear layer, its output cut into heads: (B, tokens, C) -> (B, nh, tokens, hd)."""
        return F.linear(x, weight, bias).unflatten(-1, (self.n_head, -1)).transpose(1, 2)

    def of_one_key(self, value):
        """The same as forward where there is one key: (B, C) -> (B, C), alike for every query.

        It is for attention without dropout and LoRA, as in the neck.
        The plain form is `self(query, value[:, None], value[:, None])` for any query. The softmax
        over one key is 1, so the answer is the projected value. Query and key weights are not
        needed, and their gradient would be zero.
        """
        value_weight = self.in_proj_weight.chunk(3)[2]
        value_bias = self.in_proj_bias.chunk(3)[2]
        return self.out_proj(F.linear(value, value_weight, value_bias))


class VisionAttention(nn.Module):
    """Self-attention over image tokens, under DINOv2's parameter names. (B, S, C) -> (B, S, C)."""

    def __init__(self, width, n_head):
        super().__init__()
        self.n_head = n_head
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.lora = nn.Identity()  # slot: LoRA changes the query and value weights

    def forward(self, x: Tensor) -> Tensor:
        weight = self.lora(self.qkv.weight)
        qkv = F.linear(x, weight, self.qkv.bias)  # (B, S, 3 * C)
        qkv = qkv.unflatten(-1, (3, self.n_head, -1))  # (B, S, 3, nh, hd)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 x (B, nh, S, hd)
        heads = F.scaled_dot_product_attention(q, k, v)  # (B, nh, S, hd)
        return self.proj(heads.transpose(1, 2).flatten(2))  # (B, S, C)


class ConvBN(nn.Module):
    """Convolution that keeps the size, BatchNorm, ReLU. (B, C, h, w), or (B, C, L) with dims=1."""

    def __init__(self, inputs, outputs, kernel, dims=2, eps=1e-5, bias=False):
        super().__init__()
        Conv = nn.Conv1d if dims == 1 else nn.Conv2d
        BatchNorm = nn.BatchNorm1d if dims == 1 else nn.BatchNorm2d
        self.conv = Conv(inputs, outputs, kernel, padding=kernel // 2, bias=bias)
        self.bn = BatchNorm(outputs, eps)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.normalise(self.conv(x)))

    def normalise(self, x):
        if self.training and dist.is_initialized():
            return batch_norm_over_processes(x, self.bn)
        return self.bn(x)


def batch_norm_over_processes(x, bn):
    """BatchNorm of a training batch whose samples are spread over processes, equally many in each.

    The law of total variance joins the processes' own averages: the variance of all samples is the
    mean of the processes' variances plus the variance of their means.

    torch's SyncBatchNorm would compute the same, but it refuses to train on CPUs, where we test
    that two processes equal one, and under torch.compile it cuts the model into many graphs.
    """
    world = dist.get_world_size()
    dims = [0, *range(2, x.dim())]  # all but the channels
    own_var, own_mean = torch.var_mean(x.float(), dims, correction=0, keepdim=True)
    mean = SumOverProcesses.apply(own_mean) / world  # (1, channels, 1, 1)
    spread = own_var + (own_mean - mean) ** 2
    var = SumOverProcesses.apply(spread) / world

    with torch.no_grad():
        n = world * x.numel() // x.shape[1]
        unbiased = var * n / (n - 1)
        bn.running_mean.lerp_(mean.flatten(), bn.momentum)
        bn.running_var.lerp_(unbiased.flatten(), bn.momentum)
        bn.num_batches_tracked.add_(1)

    normed = (x - mean) * (var + bn.eps).rsqrt()
    scaled = normed * bn.weight.view(mean.shape) + bn.bias.view(mean.shape)
    return scaled.to(x.dtype)


class SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes.

    Every process computes its loss from the sum. So the gradient of each x is the sum of the
    gradients of all processes, and backward is the same all_reduce as forward. torch's own
    all_reduce with a gradient cannot be compiled.
    """

    @staticmethod
    def forward(ctx, x):
        total = x.clone()
        dist.all_reduce(total)
        return total

    backward = forward


# ---- the rivals of Table 2 ----


class LoRA(nn.Module):
    """LoRA (Hu et al. 2022, Eq. 3): W_0 + B A in place of W_0, here for queries and values.

    weight: (3 * C, C), of queries, keys and values. Returns the same with B A added. B starts at
    zero. Their factor alpha / r is 1 here.
    """

    def __init__(self, width, rank):
        super().__init__()
        self.A = nn.Parameter(torch.randn(2, rank, width) * width**-0.5)
        self.B = nn.Parameter(torch.zeros(2, width, rank))

    def forward(self, weight: Tensor) -> Tensor:
        query, value = self.B @ self.A  # 2 x (C, C)
        key = torch.zeros_like(query)
        return weight + torch.cat([query, key, value])


class HoulsbyAdapter(nn.Module):
    """Adapter (Houlsby et al. 2019, Figure 2): h + up(relu(down(h))), here after an MLP."""

    def __init__(self, width, rank):
        super().__init__()
        self.down = nn.Linear(width, rank)
        self.up = nn.Linear(rank, width)
        init_adapter(self.down)
        # differs from Houlsby et al., whose weights start near zero: up starts at zero, so that h
        # is unchanged at the start
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.up(F.relu(self.down(h)))


class Compacter(nn.Module):
    """Compacter (Karimi Mahabadi et al. 2021): Houlsby's adapter, its layers hypercomplex."""

    # differs: ReLU, as in our other adapters, where Karimi Mahabadi et al. have GELU

    def __init__(self, width, rank, A):
        super().__init__()
        self.down = HypercomplexLinear(width, rank, A)
        self.up = HypercomplexLinear(rank, width, A)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.up(F.relu(self.down(h)))


class HypercomplexLinear(nn.Module):
    """Compacter's layer: x W + b with W = sum over i of kron(A_i, s_i t_i).

    A: (n, n, n), one for all layers. s: (n, inputs / n, k) and t: (n, k, outputs / n) have a low
    rank k. W itself, (inputs, outputs), is never built. x: (B, S, inputs) -> (B, S, outputs). The
    plain form:

        W = sum(torch.kron(A[i], s[i] @ t[i]) for i in range(n))
        return x @ W + b
    """

    K = 16

    def __init__(self, inputs, outputs, A):
        super().__init__()
        n = len(A)
        self.A = A
        self.s = nn.Parameter(glorot_uniform(n, inputs // n, self.K))
        self.t = nn.Parameter(glorot_uniform(n, self.K, outputs // n))
        self.b = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        n = len(self.A)
        groups = x.unflatten(-1, (n, -1))  # (B, S, n, inputs / n)
        # i: term of the sum. p, q: row and column of A_i. c: row of s_i. d: column of t_i. k: rank.
        mixed = torch.einsum("...pc,ick,ipq->...iqk", groups, self.s, self.A)  # (B, S, n, n, k)
        outputs = torch.einsum("...iqk,ikd->...qd", mixed, self.t)  # (B, S, n, outputs / n)
        return outputs.flatten(-2) + self.b


def glorot_uniform(n, rows, columns):
    """n random matrices, drawn as Compacter's code does: Glorot's rule with gain sqrt(2)."""
    limit = math.sqrt(12 / (rows + columns))
    return limit * (2 * torch.rand(n, rows, columns) - 1)


class EtrisBridge(nn.Module):
    """One stage of ETRIS's Bridger (Xu et al. 2023), which joins the encoders at several depths.

    patches: (B, N, C). words: (B, L, D). before: the (v, t) that the stage before returned, or None
    in the first stage.
    Returns what to add to the patches, what to add to the words, and this stage's own (v, t):
    v (B, N, r) and t (B, L, r), which its two attentions read.
    """

    def __init__(self, width, text_width, rank, first):
        super().__init__()
        self.down = ConvBN(width, rank, 1, dims=1)
        self.up = ConvBN(rank, width, 1, dims=1)
        self.words_down = nn.Linear(text_width, rank)
        self.words_up = nn.Linear(rank, text_width)
        if not first:
            self.norm = nn.LayerNorm(rank)
            self.words_norm = nn.LayerNorm(rank)
        self.attn = Attention(rank, n_head=8)
        self.words_attn = Attention(rank, n_head=8)

        for layer in self.modules():
            if isinstance(layer, nn.Conv1d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, patches: Tensor, words: Tensor, before: tuple | None) -> tuple:
        v = self.down(patches.mT).mT  # (B, N, r)
        t = self.words_down(words)  # (B, L, r)
        if before is not None:
            v = self.norm(v + before[0])
            t = self.words_norm(t + before[1])

        joined_v = v * self.attn(v, t, t)  # (B, N, r)
        joined_t = t * self.words_attn(t, v, v)  # (B, L, r)
        change = self.up(joined_v.mT).mT  # (B, N, C)
        words_change = self.words_up(joined_t)  # (B, L, D)
        return change, words_change, (v, t)


# ---- which method puts what where ----

ADAPTERS = (
    DenseCrossAdapter,
    TextAdapter,
    DenseTextAdapter,
    LoRA,
    HoulsbyAdapter,
    Compacter,
    EtrisBridge,
)


def adapter_keys(module):
    """Set of the state-dict names that a method added to the module: no released file has them."""
    keys = set()
    for name, part in module.named_modules():
        if isinstance(part, ADAPTERS):
            keys.update(part.state_dict(prefix=f"{name}."))
    return keys


def add_adapters(image_blocks, text_blocks, cfg):
    """Put what cfg.method asks for into the slots of the blocks that cfg's layers name.

    cfg: model.Config. "frozen" adds nothing. "etris" adds nothing to blocks, see etris_bridges.
    "full" trains the encoders themselves, and METHODS in model.py gives it no layers. A preset that
    names layers, as tiny does, or a flag overrides that: then the paper's adapters go in, too, to
    see what they bring to encoders that train.
    """
    # Compacter has one A for all layers of both encoders. It is drawn for every method, although
    # only Compacter reads it: without this draw all later random numbers would be others, and the
    # README's tables could not be repeated.
    compacter_A = nn.Parameter(0.01 * torch.randn(4, 4, 4))
    has_papers_adapters = cfg.method in ("dcris", "full")

    for i in cfg.visual_layers:
        add_rival(image_blocks[i], cfg.method, cfg.vision_width, cfg.visual_rank, compacter_A)
        if has_papers_adapters:
            image_blocks[i].adapter = DenseCrossAdapter(
                cfg.vision_width, cfg.visual_rank, cfg.text_width, cfg.dropout
            )

    for i in cfg.text_layers:
        add_rival(text_blocks[i], cfg.method, cfg.text_width, cfg.text_rank, compacter_A)
        if has_papers_adapters:
            kind = TextAdapter if cfg.text_adapter == "plain" else DenseTextAdapter
            text_blocks[i].adapter = kind(cfg.text_width, cfg.text_rank)


def add_rival(block, method, width, rank, compacter_A):
    """Those of Table 2 that treat the blocks of both encoders alike."""
    if method == "lora":
        block.attn.lora = LoRA(width, rank)
    if method == "adapter":
        block.after_mlp = HoulsbyAdapter(width, rank)
    if method == "compacter":
        block.after_attention = Compacter(width, rank, compacter_A)
        block.after_mlp = Compacter(width, rank, compacter_A)


def etris_bridges(cfg):
    """ETRIS's bridges, one for each pair of cfg.visual_layers and text_layers; for others none."""
    bridges = nn.ModuleList()
    if cfg.method == "etris":
        for i in cfg.visual_layers:
            first = i == cfg.visual_layers[0]
            bridges.append(EtrisBridge(cfg.vision_width, cfg.text_width, cfg.visual_rank, first))
    return bridges


# ---- fixed position tables ----


def sine_positions(length, width):
    """Vaswani et al. 2017, section 3.5, sine and cosine interleaved: (length, width)."""
    rate = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    angle = torch.arange(length)[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)


def square_positions(side, width):
    """The same for a square of patches, (side * side, width): half of the width says x, half y."""
    line = sine_positions(side, width // 2)
    x = line.repeat(side, 1)
    y = line.repeat_interleave(side, dim=0)
    return torch.cat([x, y], dim=1)

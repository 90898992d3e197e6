"""Textbook forms of the ops: what the papers' pseudo-code says, or what is published, in the fewest lines of PyTorch.

They are the peers that the ops and the models are measured against. Whatever depends on sizes alone (indices, masks)
can be made beforehand, as a module would. Tensors are laid out as the ops take them.
"""

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers.halo_attn import rel_logits_1d
from timm.models import maxxvit
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

__all__ = [
    "DenseNeighborhood", "FlexNeighborhood", "Windows", "channel_module", "channel_sdpa", "halo_timm",
    "large_kernel_direct", "mapping_unfold", "neighborhood_gather", "neighborhood_gather_matmul",
    "neighborhood_gather_packed", "neighborhood_unfold", "neighborhood_windows", "routing_gather", "sampling_unfold",
    "window_partitioned", "window_partitioned_packed", "window_positions", "window_timm",
]  # fmt: skip

Pair = tuple[int, int]


def _pair(x: Any) -> Pair:
    return (x, x) if isinstance(x, int) else (x[0], x[1])


# ---- neighborhood attention


class Windows(NamedTuple):
    """Where every query's window begins, its keys, and where their biases stand in a head's flattened table."""

    top: Tensor  # (H,)
    left: Tensor  # (W,)
    keys: Tensor  # (N, k * k)
    pairs: Tensor  # (N, k * k)


def _windows(size: Pair, kernel_size: Pair, dilation: Pair, device: torch.device) -> Windows:
    axes = zip(size, kernel_size, dilation, strict=True)
    (rows, rel_h), (columns, rel_w) = (_axis(*axis, device) for axis in axes)
    keys = rows[:, None, :, None] * size[1] + columns[None, :, None, :]
    pairs = rel_h[:, None, :, None] * (2 * kernel_size[1] - 1) + rel_w[None, :, None, :]
    return Windows(rows[:, 0], columns[:, 0], keys.flatten(2).flatten(0, 1), pairs.flatten(2).flatten(0, 1))


def _axis(length: int, kernel_size: int, dilation: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The keys of every query, and their offsets into the bias table: (length, k) each."""
    token = torch.arange(length, device=device)
    phase, query = token % dilation, token // dilation
    count = (length - phase + dilation - 1) // dilation
    start = torch.minimum((query - kernel_size // 2).clamp(min=0), count - kernel_size)[:, None]
    key = start + torch.arange(kernel_size, device=device)
    return key * dilation + phase[:, None], key - query[:, None] + kernel_size - 1


# made once, as a module would; not as inference tensors, which a later training step could not save
_kept_windows = functools.lru_cache(maxsize=64)(torch.inference_mode(mode=False)(_windows))


def neighborhood_windows(size: Any, kernel_size: Any, dilation: Any, device: torch.device) -> Windows:
    """The windows of a map; kept, where no compiler traces."""
    make = _windows if torch.compiler.is_compiling() else _kept_windows
    return make((size[0], size[1]), _pair(kernel_size), _pair(dilation), device)


def neighborhood_gather(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *, windows: Windows, scale: float | None = None
) -> Tensor:
    """Advanced indexing copies every query's keys and values, in the layout of the op."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    keys, values = (x.flatten(1, 2)[:, windows.keys] for x in (k, v))  # (B, N, k * k, nh, d)
    logits = torch.einsum("bnhd,bnkhd->bnhk", q.flatten(1, 2) * scale, keys)
    logits = logits + bias.flatten(1)[:, windows.pairs].transpose(0, 1)
    return torch.einsum("bnhk,bnkhd->bnhd", logits.softmax(-1), values).view(q.shape)


def neighborhood_gather_packed(
    qkv: Tensor, kernel_size: Any, *, dilation: Any = 1, bias: Tensor, scale: float, **_: Any
) -> Tensor:
    """The same, called like `neighborhood_attention_qkvpacked`."""
    windows = neighborhood_windows(qkv.shape[1:3], kernel_size, dilation, qkv.device)
    q, k, v = qkv.unbind(3)
    return neighborhood_gather(q, k, v, bias, windows=windows, scale=scale)


def neighborhood_gather_matmul(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *, windows: Windows) -> Tensor:
    """The same with the heads first, so that the copies feed batched matrix products without another copy."""
    query, keys, values = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
    keys, values = keys[:, :, windows.keys], values[:, :, windows.keys]  # (B, nh, N, k * k, d)
    logits = (query.unsqueeze(3) * q.shape[-1] ** -0.5) @ keys.mT + bias.flatten(1)[:, windows.pairs].unsqueeze(2)
    return (logits.softmax(-1) @ values).squeeze(3).transpose(1, 2).reshape(q.shape)


def neighborhood_unfold(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *, kernel_size: int, dilation: int, windows: Windows
) -> Tensor:
    """im2col over the map, then every query's window: the border's are repeated."""
    batch, *size, heads, dim = q.shape
    height, width = (n - dilation * (kernel_size - 1) for n in size)

    def columns(x: Tensor) -> Tensor:
        x = F.unfold(x.flatten(3).permute(0, 3, 1, 2), kernel_size, dilation=dilation).unflatten(2, (height, width))
        if dilation == 1:
            x = F.pad(x, (kernel_size // 2, (kernel_size - 1) // 2) * 2, mode="replicate")
        else:
            x = x.index_select(2, windows.top).index_select(3, windows.left)
        return x.reshape(batch, heads, dim, kernel_size**2, -1)  # (B, nh, d, k * k, N)

    keys, values = columns(k), columns(v)
    query = q.flatten(1, 2).permute(0, 2, 3, 1).unsqueeze(3) * q.shape[-1] ** -0.5  # (B, nh, d, 1, N)
    logits = (query * keys).sum(2) + bias.flatten(1)[:, windows.pairs].transpose(1, 2)
    return (logits.softmax(2).unsqueeze(2) * values).sum(3).permute(0, 3, 1, 2).reshape(q.shape)


class DenseNeighborhood:
    """SDPA over the whole map with a float mask; without gradients the mask is made once, outside the measurement."""

    def __init__(self, windows: Windows) -> None:
        self.windows = windows
        self.mask: Tensor | None = None

    def make_mask(self, bias: Tensor) -> Tensor:
        tokens = self.windows.keys.shape[0]
        values = bias.flatten(1)[:, self.windows.pairs]
        mask = values.new_full((values.shape[0], tokens, tokens), float("-inf"))
        return mask.scatter(2, self.windows.keys.expand_as(values), values)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            mask = self.make_mask(bias)
        else:
            mask = self.mask = self.make_mask(bias) if self.mask is None else self.mask
        q_, k_, v_ = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q_, k_, v_, attn_mask=mask[None])
        return out.transpose(1, 2).reshape(q.shape)


class FlexNeighborhood:
    """FlexAttention with a block mask and the bias as a score modification; compiled unless told otherwise."""

    def __init__(
        self, size: Pair, kernel_size: int, dilation: int, device: torch.device, *, compiled: bool = True
    ) -> None:
        (height, width), k, d = size, kernel_size, dilation
        windows = neighborhood_windows(size, k, d, device)
        top, left = windows.top, windows.left

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            dy, dx = key // width - top[query // width], key % width - left[query % width]
            on_grid = (dy % d == 0) & (dx % d == 0)
            return on_grid & (dy >= 0) & (dy < k * d) & (dx >= 0) & (dx < k * d)

        tokens = height * width
        self.block_mask = create_block_mask(visible, None, None, tokens, tokens, device=device)
        self.width, self.kernel_size, self.dilation = width, k, d
        attend: Any = flex_attention
        self.attend = torch.compile(attend, dynamic=False) if compiled else attend

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        width, size, d = self.width, self.kernel_size, self.dilation

        def biased(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            # of hidden keys the index may leave the table
            dy = (key // width // d - query // width // d + size - 1).clamp(0, 2 * size - 2)
            dx = (key % width // d - query % width // d + size - 1).clamp(0, 2 * size - 2)
            return score + bias[head, dy, dx]

        q_, k_, v_ = (x.flatten(1, 2).transpose(1, 2).contiguous() for x in (q, k, v))
        out: Tensor = self.attend(q_, k_, v_, score_mod=biased, block_mask=self.block_mask)
        return out.transpose(1, 2).reshape(q.shape)


# ---- window and grid attention


def window_positions(window: int) -> Tensor:
    """(w * w, w * w) positions of key - query in a head's flattened bias table."""
    i = torch.arange(window)
    rel = i[None, :] - i[:, None] + window - 1
    pairs = rel[:, None, :, None] * (2 * window - 1) + rel[None, :, None, :]
    return pairs.flatten(2).flatten(0, 1)


def window_partitioned(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *, window: int, grid: bool, positions: Tensor, fused: bool
) -> Tensor:
    """Partition of a square map, attention (SDPA, or with the scores written out), reversal."""
    batch, side, _, heads, dim = q.shape
    count, w = side // window, window
    split = (w, count) if grid else (count, w)
    order = (0, 2, 4, 5, 1, 3, 6) if grid else (0, 1, 3, 5, 2, 4, 6)

    def windows(x: Tensor) -> Tensor:  # (B * windows, heads, w * w, d)
        x = x.unflatten(2, split).unflatten(1, split).permute(order)
        return x.reshape(-1, heads, w * w, dim)

    pairs = bias.flatten(1)[:, positions]
    if fused:
        out = F.scaled_dot_product_attention(windows(q), windows(k), windows(v), attn_mask=pairs[None])
    else:
        scores = (windows(q) * dim**-0.5) @ windows(k).mT + pairs
        out = scores.softmax(-1) @ windows(v)
    out = out.view(batch, count, count, heads, w, w, dim)
    back = (0, 4, 1, 5, 2, 3, 6) if grid else (0, 1, 4, 2, 5, 3, 6)
    return out.permute(back).reshape(q.shape)


def window_timm(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *, window: int, grid: bool, positions: Tensor) -> Tensor:
    """timm's own partition and reversal, around the attention of its MaxViT."""
    side, heads, dim = q.shape[2:]
    split = maxxvit.grid_partition if grid else maxxvit.window_partition
    join = maxxvit.grid_reverse if grid else maxxvit.window_reverse
    w = [window, window]
    q, k, v = (split(x.flatten(3), w).reshape(-1, window**2, heads, dim).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.flatten(1)[:, positions][None])
    out = out.transpose(1, 2).reshape(-1, window, window, heads * dim)
    joined: Tensor = join(out, w, [side, side])
    return joined.unflatten(3, (heads, dim))


def window_partitioned_packed(qkv: Tensor, window_size: Any, **_: Any) -> Tensor:
    """Partition, a full score tensor, and the windows put back, called like `window_attention_qkvpacked`."""
    side = _pair(window_size)
    (batch, height, width), (heads, dim) = qkv.shape[:3], qkv.shape[4:]
    x = qkv.unflatten(2, (-1, side[1])).unflatten(1, (-1, side[0])).transpose(2, 3)
    q, k, v = x.reshape(-1, side[0] * side[1], 3, heads, dim).permute(2, 0, 3, 1, 4)
    out = ((q * dim**-0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
    out = out.transpose(1, 2).reshape(batch, height // side[0], width // side[1], *side, heads, dim).transpose(2, 3)
    return out.reshape(batch, height, width, heads, dim)


# ---- halo attention


def halo_timm(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor, *, block: int, reach: int) -> Tensor:
    """What timm's HaloAttn does between its projections, with its relative logits, on a square map."""
    _, side, _, heads, dim = q.shape
    win, blocks = block + 2 * reach, side // block

    def windows(x: Tensor) -> Tensor:  # (B * nh, blocks, win * win, d)
        x = F.pad(x.permute(0, 3, 4, 1, 2).flatten(0, 1), (reach,) * 4)
        x = x.unfold(2, win, block).unfold(3, win, block).reshape(x.shape[0], dim, blocks**2, -1)
        return x.permute(0, 2, 3, 1)

    query = q.permute(0, 3, 1, 2, 4).reshape(-1, blocks, block, blocks, block, dim).transpose(2, 3)
    query = query.reshape(-1, blocks**2, block**2, dim)
    keys, values = windows(k), windows(v)
    flat = query.reshape(-1, block, block, dim)
    across = rel_logits_1d(flat, columns, [0, 1, 3, 2, 4])
    down = rel_logits_1d(flat.transpose(1, 2), rows, [0, 3, 1, 4, 2])
    relative = (across + down).reshape(-1, blocks**2, block**2, win**2)
    out = ((query @ keys.mT) * dim**-0.5 + relative).softmax(-1) @ values
    out = out.reshape(-1, heads, blocks, blocks, block, block, dim).permute(0, 2, 4, 3, 5, 1, 6)
    return out.reshape(q.shape)


# ---- routing attention


def routing_gather(
    q: Tensor, k: Tensor, v: Tensor, regions: Any, topk: int, *, scale: float | None, index: Tensor, **_: Any
) -> Tensor:
    """Bi-level routing attention by gathering the chosen regions' keys and values."""
    batch, height, width, heads, dim = q.shape
    rows, cols = _pair(regions)
    scale = (heads * dim) ** -0.5 if scale is None else scale

    def cut(x: Tensor) -> Tensor:  # (B, H, W, nh, d) -> (B, R, n, nh, d)
        x = x.unflatten(2, (cols, -1)).unflatten(1, (rows, -1)).transpose(2, 3)
        return x.flatten(3, 4).flatten(1, 2)

    def gather(x: Tensor) -> Tensor:
        x = cut(x)
        where = index[..., None, None, None].expand(-1, -1, -1, *x.shape[2:])
        return x[:, None].expand(-1, rows * cols, -1, -1, -1, -1).gather(2, where).flatten(2, 3)

    logits = torch.einsum("brnhd,brmhd->brhnm", cut(q) * scale, gather(k))
    out = torch.einsum("brhnm,brmhd->brnhd", logits.softmax(-1), gather(v))
    out = out.unflatten(1, (rows, cols)).unflatten(3, (height // rows, width // cols)).transpose(2, 3)
    return out.reshape(batch, height, width, heads, v.shape[-1])


# ---- channel attention


def channel_module(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """The form of the published module."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, N, d)
    maps = ((k * scale).mT @ v).softmax(-1)
    return (maps @ q.mT).permute(0, 3, 1, 2).contiguous()


def channel_sdpa(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """Channels are the tokens: k^T attends to v^T and mixes q^T."""
    q, k, v = (x.permute(0, 2, 3, 1) for x in (q, k, v))  # (B, heads, d, N)
    return F.scaled_dot_product_attention(k, v, q, scale=scale).permute(0, 3, 1, 2).contiguous()


# ---- large kernel attention


def large_kernel_direct(
    x: Tensor, w0: Tensor, b0: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, **_: Any
) -> Tensor:
    """Large kernel attention as three convolutions and a product."""
    attn = F.conv2d(x, w0, b0, padding=w0.shape[-1] // 2, groups=x.shape[1])
    attn = F.conv2d(attn, w1, b1, padding=3 * (w1.shape[-1] // 2), dilation=3, groups=x.shape[1])
    return x * F.conv2d(attn, w2, b2)


# ---- super tokens


def sampling_unfold(
    x: Tensor, token_size: Any, *, n_iter: int = 1, scale: float | None = None, **_: Any
) -> tuple[Tensor, Tensor]:
    """Super-token sampling with unfold and fold."""
    side = _pair(token_size)
    cells = x.unflatten(2, (-1, side[1])).unflatten(1, (-1, side[0])).transpose(2, 3).flatten(3, 4)  # (B, h, w, n, C)
    batch, rows, cols, _, channels = cells.shape
    with torch.no_grad():
        tokens = cells.mean(3)
        for i in range(n_iter):
            near = _unfold(tokens)
            affinity = (cells @ near.transpose(-2, -1) * (scale or channels**-0.5)).softmax(-1)
            mass = _fold(affinity.sum(3).unsqueeze(-1)) + 1e-12
            if i < n_iter - 1:
                tokens = _fold(affinity.transpose(-2, -1) @ cells) / mass
    tokens = _fold(affinity.transpose(-2, -1) @ cells) / mass
    spread = affinity.unflatten(3, side).transpose(2, 3).reshape(batch, rows * side[0], cols * side[1], 9)
    return tokens, spread


def mapping_unfold(tokens: Tensor, affinity: Tensor, token_size: Any, **_: Any) -> Tensor:
    """Super-token mapping with unfold."""
    side = _pair(token_size)
    weights = affinity.unflatten(2, (-1, side[1])).unflatten(1, (-1, side[0])).transpose(2, 3).flatten(3, 4)
    out = (weights @ _unfold(tokens)).unflatten(3, side).transpose(2, 3)
    return out.reshape(*affinity.shape[:3], tokens.shape[-1])


def _unfold(tokens: Tensor) -> Tensor:  # (B, h, w, C) -> (B, h, w, 9, C)
    batch, rows, cols, channels = tokens.shape
    near = F.unfold(tokens.permute(0, 3, 1, 2), 3, padding=1)
    return near.view(batch, channels, 9, rows, cols).permute(0, 3, 4, 2, 1)


def _fold(parts: Tensor) -> Tensor:  # (B, h, w, 9, C) -> (B, h, w, C)
    batch, rows, cols, _, channels = parts.shape
    flat = parts.permute(0, 4, 3, 1, 2).reshape(batch, channels * 9, rows * cols)
    return F.fold(flat, (rows, cols), 3, padding=1).permute(0, 2, 3, 1)

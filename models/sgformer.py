"""SG-Former: self-guided attention, whose keys are fine where the map is significant and coarse elsewhere.

Paper: "SG-Former: Self-guided Transformer with Evolving Token Reallocation" (ICCV 2023),
       https://arxiv.org/abs/2308.12216
Original: https://github.com/OliverRensu/SG-Former (sgformer.py; no licence file).

Numbers are the original's at its sizes, in float64: tokens are ordered by significance, and neighbours in that order
differ by less than float32 resolves, so that float32 runs differ from each other, also those of the original. What
differs:
- every image size runs, where the original takes multiples of 224: windows are padded, and padding neither attends nor
  is attended to; the tokens of a part that is no multiple of its groups are drawn evenly, in their order, some twice;
  positions are interpolated, bicubic, unless the map has as many pixels as the table: then its rows follow those of the
  table, as in the original, which takes 112 x 448 images in this way;
- tokens of the same significance keep their order, by rows for the one half of the heads and by columns for the other;
- q and kv of the last stage's attention are one Linear.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from timm.layers import build_sincos2d_pos_embed
from timm.models import checkpoint, generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.ops.maps import crop_map, is_symbolic, pad_map
from zoo.ops.scriptable import window_attention

from ._build import build_model, published_cfg
from ._modules import DWMlp, global_attention
from ._pyramid import DropPath, Pyramid, Stage, init_linear, stage_rates
from ._tables import as_map, check_image_size, check_map, halved, resize_map
from .dialects import OURS, Dialect, moved_by, rename

__all__ = ["SGFormer"]

# what they do depends on the size
for _name in ("check_map", "grouped", "orders", "positions", "spread", "window_significance", "without_spares"):
    torch.fx.wrap(_name)

# how many tokens become one key, by the stage's sr_ratio: of the least significant quarter, the two in the middle and
# the most significant; or of either half
GROUPS: dict[int, tuple[int, ...]] = {8: (196, 56, 28), 4: (49, 14, 7), 2: (2, 1)}


def window_significance(q: Tensor, k: Tensor, window: int, scale: float) -> Tensor:
    """How much attention every token gets inside its window: the mean weight over heads and the window's queries.

    At the border, where a window reaches over it, what is missing counts as queries that attend to nothing.

    Args:
        q, k: (B, H, W, heads, d).
        window: side of a window.
        scale: factor of the scores.

    Returns:
        (B, H, W), without gradient.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k = q.detach().to(dtype), k.detach().to(dtype)
    _, H, W, nh, _ = q.shape
    there = _windows(torch.ones_like(q[:1, :, :, 0, :1]), window, 1)
    scores = scale * _windows(q.flatten(3), window, nh) @ _windows(k.flatten(3), window, nh).transpose(-1, -2)
    # finite, for windows of nothing but padding
    weights = scores.masked_fill(there.transpose(-1, -2) == 0, -1e30).softmax(-1) * there
    got = weights.mean((3, 4))  # (B, rows, columns, tokens)
    got = got.unflatten(3, (window, window)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return crop_map(got.unsqueeze(3), H, W).squeeze(3)


def _windows(x: Tensor, window: int, heads: int) -> Tensor:
    """(B, H, W, heads * d), padded, to (B, rows, columns, heads, window ** 2, d)."""
    x = pad_map(x, window)
    if is_symbolic(x.shape[1], x.shape[2]):  # PyTorch compiles and exports sides of one window apart: here is another
        x = F.pad(x, (0, 0, 0, window, 0, window))
    # unfold asks no symbolic size whether the window divides it
    x = x.unfold(1, window, window).unfold(2, window, window).flatten(4).unflatten(3, (heads, -1))
    return x.transpose(4, 5)


def spread(weights: Tensor, rows: int, columns: int, height: int, width: int) -> Tensor:
    """How much attention every coarse pixel gets, for the pixels that it stands for: (B, height, width), no gradient.

    Args:
        weights: (B, heads, N, rows * columns), of which the mean over heads and queries is taken.
        rows, columns: of the coarse map.
        height, width: of the map.
    """
    dtype = torch.float64 if weights.dtype == torch.float64 else torch.float32
    got = weights.detach().mean((1, 2), dtype=dtype).reshape(-1, 1, rows, columns)
    return F.interpolate(got, size=[height, width], mode="nearest").squeeze(1)


def orders(significance: Tensor) -> Tensor:
    """The tokens from the least significant to the most, counted by rows: two orders of every image, (2 B, N).

    Of tokens of the same significance the first comes first: by rows in the first B orders, by columns in the others.

    Args:
        significance: (B, H, W).
    """
    H, W = significance.shape[1], significance.shape[2]
    by_rows = _order(significance.flatten(1))
    by_columns = _order(significance.transpose(1, 2).flatten(1))
    # tensors, for ONNX has no remainder by a size
    height = torch.scalar_tensor(H, device=by_rows.device, dtype=torch.int64)
    width = torch.scalar_tensor(W, device=by_rows.device, dtype=torch.int64)
    return torch.cat((by_rows, by_columns % height * width + by_columns.div(height, rounding_mode="floor")))


def _order(values: Tensor) -> Tensor:
    """The places of ascending values, equal ones in their order, along (B, N)."""
    if not torch.jit.is_scripting():  # noqa: SIM102 (on a line of its own, as TorchScript wants it)
        if torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export():
            return values.sort(dim=1).indices  # to ONNX's TopK, which keeps the order of equal values
    return values.argsort(dim=1, stable=True)


def grouped(tokens: Tensor, order: Tensor, begin: int, end: int, shares: int, group: int) -> Tensor:
    """A part of an order's tokens in groups of neighbours, (B * groups, C, group).

    Groups that do not divide the part are one more, and their tokens are drawn from it evenly, in their order: every
    token is there, some are twice or more.

    Args:
        tokens: (B, N, C).
        order: (B, N).
        begin, end: of the part, in shares of the N tokens.
        shares: how many of them there are; the last has what is left over.
        group: tokens of a group.
    """
    N = order.shape[1]
    start, length, groups = _part(N, begin, end, shares, group)
    count = groups * group
    drawn = torch.arange(count, device=order.device)
    if is_symbolic(N, N):  # a spare group, see `without_spares`
        drawn = torch.arange(count + group, device=order.device).clamp(max=count - 1)
    index = order[:, (drawn * length).div(count, rounding_mode="floor") + start]
    found = tokens.gather(1, index.unsqueeze(2).expand(-1, -1, tokens.shape[2]))
    return found.reshape(-1, group, found.shape[2]).transpose(1, 2)


def _part(tokens: int, begin: int, end: int, shares: int, group: int) -> tuple[int, int, int]:
    """Where a part of so many tokens starts, its length, and its groups."""
    start = tokens // shares * begin
    length = tokens - start if end == shares else tokens // shares * (end - begin)
    return start, length, (length + group - 1) // group


def without_spares(keys: Tensor, tokens: int, group1: int, group2: int, group3: int) -> Tensor:
    """The keys (B, M, C) of three parts, or two if group3 is 0, of which each has a spare one where sizes are symbols.

    PyTorch compiles and exports a part of one group apart from one of several: with a spare one no part has one.
    """
    if not is_symbolic(tokens, tokens):
        return keys
    if group3 == 0:
        first, second, third = _part(tokens, 0, 1, 2, group1)[2], _part(tokens, 1, 2, 2, group2)[2], 0
    else:
        first, second = _part(tokens, 0, 1, 4, group1)[2], _part(tokens, 1, 3, 4, group2)[2]
        third = _part(tokens, 3, 4, 4, group3)[2]
    index = torch.arange(first + second + third, device=keys.device)
    return keys[:, index + (index >= first).long() + (index >= first + second).long()]


def positions(table: Tensor, height: int, width: int) -> Tensor:
    """The positions of a map: the table's, row after row, where it has as many; interpolated else.

    Args:
        table: (1, H, W, C).
        height, width: of the map.

    Returns:
        (1, height, width, C).
    """
    count, channels = table.shape[1] * table.shape[2], table.shape[3]
    if not is_symbolic(height, width):
        if height * width == count:
            return table.reshape(1, height, width, channels)
        return resize_map(table, height, width)
    index = torch.arange(height * width, device=table.device) % count
    in_rows = table.reshape(count, channels)[index].reshape(1, height, width, channels)
    as_many = torch.full((1,), height * width, device=table.device) == count
    return torch.where(as_many, in_rows, resize_map(table, height, width))


class ConvNorm(nn.Module):
    """A convolution without bias and a norm over the whole image."""

    def __init__(
        self,
        in_chans: int,
        out_chans: int,
        kernel_size: int = 1,
        stride: int = 1,
        groups: int = 1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.conv = nn.Conv2d(
            in_chans, out_chans, kernel_size, stride, kernel_size // 2, groups=groups, bias=False, **dd
        )
        self.norm = nn.GroupNorm(1, out_chans, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Stem(nn.Module):
    """Three 3x3 convolutions of strides 2, 1, 2, a norm and the positions: (B, C, H, W) to (B, H/4, W/4, dim)."""

    def __init__(self, in_chans: int, dim: int, size: tuple[int, int], device: Any = None, dtype: Any = None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.size = size
        self.conv = nn.Sequential(
            ConvNorm(in_chans, dim, 3, 2, **dd), nn.GELU(),
            ConvNorm(dim, dim, 3, 1, **dd), nn.GELU(),
            ConvNorm(dim, dim, 3, 2, **dd),
        )  # fmt: skip
        self.norm = nn.LayerNorm(dim, **dd)
        table = build_sincos2d_pos_embed(list(size), dim, **dd)
        self.pos_embed = nn.Parameter(table.reshape(1, *size, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x).permute(0, 2, 3, 1))
        return x + positions(self.pos_embed, x.shape[1], x.shape[2])


class PatchMerging(nn.Module):
    """1x1, depthwise 3x3 of stride 2 and 1x1 convolution, each with a norm, on (B, H, W, C)."""

    def __init__(self, dim: int, out_dim: int, device: Any = None, dtype: Any = None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.conv1 = ConvNorm(dim, out_dim, **dd)
        self.conv2 = ConvNorm(out_dim, out_dim, 3, 2, out_dim, **dd)
        self.conv3 = ConvNorm(out_dim, out_dim, **dd)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv1(x.permute(0, 3, 1, 2)))
        return self.conv3(self.act(self.conv2(x))).permute(0, 2, 3, 1)


class Lepe(nn.Module):
    """Locally enhanced positions on (B, H, W, C): a Linear and a depthwise 3x3 convolution."""

    def __init__(self, dim: int, device: Any = None, dtype: Any = None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.linear = nn.Linear(dim, dim, **dd)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.linear(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class HybridAttention(nn.Module):
    """Half of the heads attend to a coarse map, half inside windows; both say how significant the tokens are.

    Takes and gives (B, H, W, C) and a significance (B, H, W), of which it does not read the given one.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        sr_ratio: int,
        window_size: int = 7,
        qkv_bias: bool = True,
        attn_backend: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.half_heads = num_heads // 2
        self.head_dim = dim // num_heads
        self.sr_ratio = sr_ratio
        self.window_size = window_size
        self.attn_backend = attn_backend
        self.sr = nn.Conv2d(dim, dim, sr_ratio, sr_ratio, **dd)
        self.norm = nn.LayerNorm(dim, **dd)
        self.act = nn.GELU()
        self.q1 = nn.Linear(dim, dim // 2, bias=qkv_bias, **dd)
        self.kv1 = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.q2 = nn.Linear(dim, dim // 2, bias=qkv_bias, **dd)
        self.kv2 = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.lepe = Lepe(dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor, significance: Tensor) -> tuple[Tensor, Tensor]:
        B, H, W, _ = x.shape
        nh, d, scale = self.half_heads, self.head_dim, self.head_dim**-0.5
        x = check_map(x, self.sr_ratio)
        coarse = self.sr(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        rows, columns = coarse.shape[1], coarse.shape[2]
        coarse = self.act(self.norm(coarse))
        q = self.q1(x).reshape(B, H * W, nh, d).transpose(1, 2)  # (B, nh, N, d)
        kv = self.kv1(coarse).reshape(B, rows * columns, 2, nh, d).permute(2, 0, 3, 1, 4)
        weights = (scale * q @ kv[0].transpose(-1, -2)).softmax(-1)
        globally = (weights @ kv[1]).transpose(1, 2).reshape(B, H, W, nh * d)
        significance = spread(weights, rows, columns, H, W)

        q = self.q2(x).reshape(B, H, W, nh, d)
        kv = self.kv2(x).reshape(B, H, W, 2, nh, d)
        k, v = kv[:, :, :, 0], kv[:, :, :, 1]
        locally = window_attention(q, k, v, self.window_size, scale=scale, backend=self.attn_backend).flatten(3)
        significance = significance + window_significance(q, k, self.window_size, scale)
        return self.proj(torch.cat((globally, locally), dim=3) + self.lepe(x)), significance


class GuidedAttention(nn.Module):
    """Attention to tokens that are merged the more the less significant they are.

    Takes and gives (B, H, W, C) and a significance (B, H, W). A part of the ordered tokens is merged by one Linear,
    group after group, the same for all channels; half of the heads have the keys of either order.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        sr_ratio: int,
        qkv_bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        groups = GROUPS[sr_ratio]
        self.group1, self.group2, self.group3 = groups if len(groups) == 3 else (*groups, 0)
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.kv1 = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.kv2 = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.f1 = nn.Linear(self.group1, 1, **dd)
        self.f2 = nn.Linear(self.group2, 1, **dd)
        self.f3 = nn.Linear(self.group3, 1, **dd) if self.group3 else nn.Identity()
        self.lepe = Lepe(dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def merged(self, x: Tensor, order: Tensor) -> Tensor:
        """The tokens (B, N, C) that an order's groups become, (B, M, C)."""
        B, N, C = x.shape
        if self.group3 == 0:
            first, second = grouped(x, order, 0, 1, 2, self.group1), grouped(x, order, 1, 2, 2, self.group2)
            keys = torch.cat((self.f1(first).reshape(B, -1, C), self.f2(second).reshape(B, -1, C)), dim=1)
        else:
            first, second = grouped(x, order, 0, 1, 4, self.group1), grouped(x, order, 1, 3, 4, self.group2)
            third = self.f3(grouped(x, order, 3, 4, 4, self.group3)).reshape(B, -1, C)
            keys = torch.cat((self.f1(first).reshape(B, -1, C), self.f2(second).reshape(B, -1, C), third), dim=1)
        return without_spares(keys, N, self.group1, self.group2, self.group3)

    def heads(self, kv: Tensor) -> Tensor:
        """Keys and values (2, B, heads / 2, M, d) of (B, M, C)."""
        return kv.reshape(kv.shape[0], kv.shape[1], 2, self.num_heads // 2, self.head_dim).permute(2, 0, 3, 1, 4)

    def forward(self, x: Tensor, significance: Tensor) -> tuple[Tensor, Tensor]:
        B, H, W, C = x.shape
        # both orders at once, so that each Linear is called once
        merged = self.merged(x.flatten(1, 2).repeat(2, 1, 1), orders(significance))
        first, second = merged.unflatten(0, (2, B)).unbind(0)
        kv = torch.cat((self.heads(self.kv1(first)), self.heads(self.kv2(second))), dim=2)  # (2, B, nh, M, d)
        q = self.q(x).reshape(B, H * W, self.num_heads, self.head_dim).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, kv[0], kv[1]).transpose(1, 2).reshape(B, H, W, C)
        return self.proj(y + self.lepe(x)), significance


class FullAttention(nn.Module):
    """Global attention on (B, H, W, C); the significance is passed on."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, device: Any = None, dtype: Any = None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.lepe = Lepe(dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor, significance: Tensor) -> tuple[Tensor, Tensor]:
        return self.proj(global_attention(self.qkv(x), self.num_heads) + self.lepe(x)), significance


class Mlp(DWMlp):
    """fc1 - residual depthwise 3x3 - GELU - fc2 on (B, H, W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        x = self.act(x + self.dwconv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return self.drop(self.fc2(x))


class Block(nn.Module):
    """Attention and MLP, pre-norm, each residual; the significance goes through the attention."""

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float = 4.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), proj_drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor, significance: Tensor) -> tuple[Tensor, Tensor]:
        y, significance = self.attn(self.norm1(x), significance)
        x = x + self.drop_path(y)
        return x + self.drop_path(self.mlp(self.norm2(x))), significance


class SGStage(Stage):
    """A stage whose blocks hand on what is significant: hybrid ones find it, guided ones use it, in turns."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None, norm: nn.Module) -> None:
        super().__init__((), downsample, norm)
        # no chain, as each takes two tensors
        self.blocks = nn.ModuleList(blocks)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        significance = x[:, :, :, 0].detach()  # until the first block has found it
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x, significance = checkpoint(block, x, significance)
            else:
                x, significance = block(x, significance)
        return self.norm(x)


class SGFormer(Pyramid):
    """Self-guided transformer: hybrid and guided attention in turns, and global attention in the last stage.

    Args:
        in_chans: channels of the image.
        num_classes: classes; 0 leaves the classifier out.
        global_pool: timm's pooling names; "" keeps the map.
        img_size: the image size in pixels, an int or a pair, that the positions are made for; every size runs.
        embed_dims: channels of each stage.
        depths: blocks of each stage.
        num_heads: attention heads of each stage, even but in stages of sr_ratio 1.
        mlp_ratios: hidden width of the MLP over its input's, for each stage.
        sr_ratios: side of the coarse pixels of each stage, 8, 4 or 2, which says how many tokens are merged, too; 1 for
            global attention.
        window_size: side of the windows.
        qkv_bias: whether the projections to queries, keys and values have a bias.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout after the MLPs.
        drop_path_rate: stochastic depth, growing linearly to this rate at the last block.
        attn_backend: path of the window attention op, None chooses.

    Raises:
        ValueError: img_size, num_heads or sr_ratios do not fit.
    """

    channels_last = True
    no_decay = (".pos_embed",)

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] = 224,
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 4, 16, 1),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        mlp_ratios: Sequence[float] = (4, 4, 4, 4),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        window_size: int = 7,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        attn_backend: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(in_chans, embed_dims[-1])
        self.img_size = check_image_size(img_size)
        self.stem = Stem(in_chans, embed_dims[0], halved(self.img_size, 2), **dd)
        stages = []
        for i, (dim, rates) in enumerate(zip(embed_dims, stage_rates(drop_path_rate, depths), strict=True)):
            nh, ratio = num_heads[i], sr_ratios[i]
            if ratio not in (1, *GROUPS):
                raise ValueError(f"sr_ratios must be among 8, 4, 2 and 1, got {tuple(sr_ratios)}")
            if dim % nh or ratio > 1 and nh % 2:
                raise ValueError(f"num_heads {nh} must divide {dim} channels, and be even where sr_ratio is not 1")
            blocks = []
            for j, rate in enumerate(rates):
                attn: nn.Module
                if ratio == 1:
                    attn = FullAttention(dim, nh, qkv_bias, **dd)
                elif j % 2:
                    attn = GuidedAttention(dim, nh, ratio, qkv_bias, **dd)
                else:
                    attn = HybridAttention(dim, nh, ratio, window_size, qkv_bias, attn_backend, **dd)
                blocks.append(Block(dim, attn, mlp_ratios[i], proj_drop_rate, rate, **dd))
            downsample = PatchMerging(embed_dims[i - 1], dim, **dd) if i else None
            stages.append(SGStage(blocks, downsample, nn.LayerNorm(dim, eps=1e-6, **dd)))
        self.add_stages(stages, embed_dims)
        self.add_head(num_classes, global_pool, drop_rate, **dd)
        self.apply(init_linear)


DIALECTS = (
    OURS,
    Dialect(
        "the original",
        (
            (r"\b(conv\.[024]|conv[123])\.conv\.", r"\1.c."),
            (r"\b(conv\.[024]|conv[123])\.norm\.", r"\1.bn."),
            (r"^stem\.pos_embed$", "pos_embed"),
            (r"^stem\.", "patch_embed1."),
            (r"^stages\.(\d+)\.downsample\.", moved_by(1, "patch_embed{}.")),
            (r"^stages\.(\d+)\.blocks\.", moved_by(1, "block{}.")),
            (r"^stages\.(\d+)\.norm\.", moved_by(1, "norm{}.")),
            (r"\.attn\.qkv\.", ".attn.{q,kv}."),
            (r"\.lepe\.", ".lepe_"),
            (r"\.mlp\.dwconv\.", ".mlp.dwconv.dwconv."),
            (r"^head\.fc\.", "head."),
        ),
    ),
)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Any dialect's names to ours, the positions to the map of the model's img_size."""
    state = rename(state_dict, model)
    for name, module in model.named_modules():
        if isinstance(module, Stem) and (key := f"{name}.pos_embed") in state:
            state[key] = resize_map(as_map(state[key], key), *module.size)
    return state


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return published_cfg(
        "https://drive.google.com/drive/folders/1ZJDEwxDffqqqzBC2SzhOkpWpGRweDsE4",
        crop_pct=0.9,
        first_conv="stem.conv.0.conv",
        classifier="head.fc",
        license="none",
        paper_name="SG-Former: Self-guided Transformer with Evolving Token Reallocation",
        paper_ids=("arXiv:2308.12216",),
        origin_url="https://github.com/OliverRensu/SG-Former",
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {"sgformer_s.in1k": _cfg(), "sgformer_m.in1k": _cfg(), "sgformer_b.in1k": _cfg(top1=84.7)}
)

_SMALL: dict[str, Any] = {"drop_path_rate": 0.1}
_MEDIUM: dict[str, Any] = {"depths": (2, 6, 28, 2), "drop_path_rate": 0.2}
_BASE: dict[str, Any] = {
    "embed_dims": (96, 192, 384, 768),
    "depths": (4, 6, 24, 2),
    "num_heads": (4, 6, 12, 24),
    "drop_path_rate": 0.4,
}


def _create(variant: str, pretrained: bool, args: dict[str, Any], kwargs: dict[str, Any]) -> SGFormer:
    return build_model(SGFormer, variant, pretrained, filter_fn=checkpoint_filter_fn, **{**args, **kwargs})


@register_model
def sgformer_s(pretrained: bool = False, **kwargs: Any) -> SGFormer:
    return _create("sgformer_s", pretrained, _SMALL, kwargs)


@register_model
def sgformer_m(pretrained: bool = False, **kwargs: Any) -> SGFormer:
    return _create("sgformer_m", pretrained, _MEDIUM, kwargs)


@register_model
def sgformer_b(pretrained: bool = False, **kwargs: Any) -> SGFormer:
    return _create("sgformer_b", pretrained, _BASE, kwargs)

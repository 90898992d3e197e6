"""SOFT and SOFT-Norm (SOFT++): attention with a Gaussian kernel, of low rank through landmarks, without softmax.

Papers: "SOFT: Softmax-free Transformer with Linear Complexity" (NeurIPS 2021), https://arxiv.org/abs/2110.11945
        "Softmax-free Linear Transformers" (IJCV 2024), https://arxiv.org/abs/2207.03341
Original: https://github.com/fudan-zvg/SOFT (models/softmax_free_transformer.py, softmax_free_vision_transformer.py and
          SOFT/kernel/inverse.py; MIT).

Numbers are the original's. What differs:
- it runs without CUDA: distances and Newton's iteration are plain PyTorch, in float32 under autocast and in half
  precision; the gradient of the inverse is the original's own, of its result and not of its iterations;
- SOFT-Norm can be built (the original names a class that it does not have). Its Newton iteration has one step size for
  the whole batch, so that an image's output depends on the others where the iteration has not converged;
  `newton_per_image` gives each image its own;
- the tables of positions are made for `img_size` and interpolated, bilinear, for other maps, as in the original;
- `forward_features` gives the normed tokens, (B, 1 + N, C) with the class token first, as timm's do that have one; the
  feature of the last stage is the map of the others. q and kv of the last stage's attention are one Linear.

The README's sizes of the small models (24 M) are not those of the published code (38.9 M), which these are.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from timm.layers import Mlp, global_pool_nlc, trunc_normal_
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from zoo.ops.maps import crop_map, is_symbolic

from ._build import build_model, published_cfg
from ._pyramid import DropPath, Pyramid, Stage, as_asked, as_format, check_output_fmt, init_linear, stage_rates
from ._tables import as_map, check_image_size, check_map, halved, resize_map
from .dialects import OURS, Dialect, moved_by, rename

__all__ = ["SOFT"]

# their shapes, dtypes and checks depend on what they get
for _name in ("softmax_free_attention", "resize_map", "check_map"):
    torch.fx.wrap(_name)


def squared_distance(q: Tensor, k: Tensor) -> Tensor:
    """|q_i - k_j|^2 of (B, heads, N, d) and (B, heads, M, d), by |q|^2 + |k|^2 - 2 q k as in the original."""
    lengths = q.square().sum(-1, keepdim=True) + k.square().sum(-1).unsqueeze(-2)
    return lengths - 2 * (q @ k.transpose(-1, -2))


def newton_inverse(kernel: Tensor, max_iter: int = 20) -> Tensor:
    """The inverse of K + 0.01 I by Newton's iteration from 1.8 / max_rowsum(K)^2 (K + 0.01 I), for every head.

    The gradient is that of an exact inverse V, -V^T g V^T: the iterations are not differentiated, nor is their start.

    Args:
        kernel: (B, heads, M, M), symmetric and not negative.
        max_iter: iterations.
    """
    regular = kernel + 0.01 * _eye(kernel)
    fixed, largest = regular.detach(), kernel.detach().sum(-1).amax(-1)
    inverse = (1.8 / largest.square())[..., None, None] * fixed
    for _ in range(max_iter):
        inverse = 2 * inverse - inverse @ fixed @ inverse
    # the second term is zero, and its gradient is the one that is wanted; always there, for a tracer runs this twice
    return inverse - inverse @ (regular - fixed) @ inverse


def newton_inverse_norm(kernel: Tensor, max_iter: int = 20, per_image: bool = False) -> Tensor:
    """D^-1/2 V D^-1/2, where V is K's inverse by Newton's iteration and D the row sums of K, as in SOFT-Norm.

    The start is alpha K, alpha = 2 / max_rowsum(K)^2, halved up to ten times while ||I - alpha K K||_1 exceeds 1.01;
    maximum and norm are those of the whole tensor. All of it is differentiated.

    Args:
        kernel: (B, heads, M, M), symmetric and not negative.
        max_iter: iterations.
        per_image: maximum and norm are those of each image.
    """
    first = 1 if per_image else 0
    sums = kernel.sum(-1)
    eye, square = _eye(kernel), kernel @ kernel
    step = 2 / _largest(sums, first).square()
    for _ in range(10):
        norm = _largest((eye - step * square).abs().sum(-2), first)
        step = torch.where(norm > 1.01, 0.5 * step, step)  # once it is small enough it stays
    inverse = step * kernel
    for _ in range(max_iter):
        inverse = 2 * inverse - inverse @ kernel @ inverse
    scale = sums.rsqrt()
    return scale.unsqueeze(-1) * inverse * scale.unsqueeze(-2)


def _eye(kernel: Tensor) -> Tensor:
    return torch.eye(kernel.shape[-1], device=kernel.device, dtype=kernel.dtype)


def _largest(sums: Tensor, first: int) -> Tensor:
    """The largest of (B, heads, M), over all or of each image, as (1 or B, 1, 1, 1)."""
    found = sums.flatten(first).amax(-1)
    return found.reshape(-1, 1, 1, 1)


def softmax_free_attention(
    q: Tensor, landmarks: Tensor, v: Tensor, max_iter: int = 20, normed: bool = False, per_image: bool = False
) -> Tensor:
    """K1 inv(K2) K1^T v with Gaussian kernels of the queries, which are the keys too, and of landmarks among them.

    K1 = exp(-|q - l|^2 / 2), K2 = exp(-|l - l'|^2 / 2). Distances and inverse are computed in float32, or float64.

    Args:
        q: (B, heads, N, d), scaled.
        landmarks: (B, heads, M, d).
        v: (B, heads, N, d).
        max_iter: iterations of the inverse.
        normed: the inverse is that of SOFT-Norm.
        per_image: see `newton_inverse_norm`.
    """
    if not torch.jit.is_scripting():  # noqa: SIM102 (on a line of its own, as TorchScript wants it)
        if not q.is_meta and torch.is_autocast_enabled(q.device.type):
            with torch.autocast(q.device.type, enabled=False):
                return _attend(q, landmarks, v, max_iter, normed, per_image)
    return _attend(q, landmarks, v, max_iter, normed, per_image)


def _attend(q: Tensor, landmarks: Tensor, v: Tensor, max_iter: int, normed: bool, per_image: bool) -> Tensor:
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    q, landmarks, values = q.to(dtype), landmarks.to(dtype), v.to(dtype)
    near = torch.exp(-0.5 * squared_distance(q, landmarks))  # (B, nh, N, M)
    kernel = torch.exp(-0.5 * squared_distance(landmarks, landmarks))
    inverse = newton_inverse_norm(kernel, max_iter, per_image) if normed else newton_inverse(kernel, max_iter)
    return (near @ (inverse @ (near.transpose(-1, -2) @ values))).to(v.dtype)


class SoftmaxFreeAttention(nn.Module):
    """Attention with a Gaussian kernel and a convolution of the values on (B, H, W, C).

    Landmarks are a convolution of kernel and stride `ratio` without padding: rows and columns that are left over give
    none.

    Args:
        dim: channels.
        num_heads: attention heads.
        ratio: distance of the landmarks in pixels.
        conv_size: side of the values' convolution, which mixes no heads and has one kernel for all channels of a head.
        qkv_bias: whether the projections to queries and values have a bias.
        max_iter: iterations of the inverse.
        normed: the form of SOFT-Norm.
        per_image: see `newton_inverse_norm`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        ratio: int,
        conv_size: int,
        qkv_bias: bool = True,
        max_iter: int = 20,
        normed: bool = False,
        per_image: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide {dim} channels; give a divisor")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.ratio = ratio
        self.max_iter = max_iter
        self.normed = normed
        self.per_image = per_image
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.v = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.landmarks = nn.Conv2d(self.head_dim, self.head_dim, ratio, ratio, bias=False, **dd)
        self.landmarks_norm = nn.LayerNorm(self.head_dim, **dd)
        self.act = nn.GELU()
        self.conv = nn.Conv2d(
            num_heads, num_heads, conv_size, padding=conv_size // 2, groups=num_heads, bias=False, **dd
        )
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        nh, d = self.num_heads, self.head_dim
        x = check_map(x, self.ratio)
        q = (self.q(x) * d**-0.25).reshape(B, H * W, nh, d).transpose(1, 2)  # (B, nh, N, d)
        maps = q.transpose(2, 3).reshape(B * nh, d, H, W)
        if is_symbolic(H, W):  # what the convolution drops, or Inductor and PyTorch write its floor in two ways
            height, width = H // self.ratio * self.ratio, W // self.ratio * self.ratio
            maps = crop_map(maps.permute(0, 2, 3, 1), height, width).permute(0, 3, 1, 2)
        landmarks = self.landmarks(maps)
        landmarks = landmarks.flatten(2).transpose(1, 2).unflatten(0, (B, nh))  # (B, nh, M, d)
        landmarks = self.act(self.landmarks_norm(landmarks))
        v = self.v(x).reshape(B, H * W, nh, d).transpose(1, 2)
        y = softmax_free_attention(q, landmarks, v, self.max_iter, self.normed, self.per_image)
        mixed = self.conv(v.permute(0, 3, 1, 2).reshape(B * d, nh, H, W)).reshape(B, d, nh, H * W).permute(0, 2, 3, 1)
        return self.proj((y + mixed).transpose(1, 2).reshape(B, H, W, C))


class Block(nn.Module):
    """Softmax-free attention and an MLP on (B, H, W, C), each followed by a norm; `drop` is plain dropout of both."""

    def __init__(self, dim: int, attn: nn.Module, drop: float = 0.0, device: Any = None, dtype: Any = None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.attn = attn
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, 4 * dim, act_layer=_TanhGELU, **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.drop(self.attn(x)))
        return self.norm2(x + self.drop(self.mlp(x)))


class _TanhGELU(nn.GELU):
    def __init__(self) -> None:
        super().__init__(approximate="tanh")


class TokenAttention(nn.Module):
    """Self-attention with softmax on (B, N, C)."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, device: Any = None, dtype: Any = None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide {dim} channels; give a divisor")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # (B, nh, N, d)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, C))


class TokenBlock(nn.Module):
    """Attention with softmax and an MLP on (B, N, C), pre-norm, each residual."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.attn = TokenAttention(dim, num_heads, qkv_bias, **dd)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """3x3 convolutions with batch norm and ReLU, and the positions: (B, H, W, C) to (B, H', W', dim).

    Args:
        in_chans: channels of the input.
        widths: channels of each convolution.
        strides: stride of each.
        size: the height and width that the positions are made for.
        images: the input is (B, C, H, W).
    """

    def __init__(
        self,
        in_chans: int,
        widths: Sequence[int],
        strides: Sequence[int],
        size: tuple[int, int],
        images: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        layers: list[nn.Module] = []
        for width, stride in zip(widths, strides, strict=True):
            layers += [nn.Conv2d(in_chans, width, 3, stride, 1, **dd), nn.BatchNorm2d(width, **dd), nn.ReLU()]
            in_chans = width
        self.images = images
        self.size = size
        self.proj = nn.Sequential(*layers)
        self.pos_embed = nn.Parameter(torch.zeros(1, *size, widths[-1], **dd))
        trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x if self.images else x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + resize_map(self.pos_embed, x.shape[1], x.shape[2], "bilinear")


class ClassEmbed(nn.Module):
    """3x3 convolution of stride 2, a class token and the positions, of which the first is the class token's.

    (B, H, W, C) to (B, H' + 1, W', dim): the class token is one more row, see `with_row`.
    """

    def __init__(self, dim: int, out_dim: int, size: tuple[int, int], device: Any = None, dtype: Any = None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.size = size
        self.proj = nn.Sequential(nn.Conv2d(dim, out_dim, 3, 2, 1, **dd), nn.BatchNorm2d(out_dim, **dd), nn.ReLU())
        self.cls_token = nn.Parameter(torch.zeros(1, 1, out_dim, **dd))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + size[0] * size[1], out_dim, **dd))
        trunc_normal_(self.cls_token, std=0.02)
        trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        positions = self.pos_embed[:, 1:].reshape(1, self.size[0], self.size[1], -1)
        x = x + resize_map(positions, x.shape[1], x.shape[2], "bilinear")
        token = (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
        return with_row(x, token)


def with_row(x: Tensor, token: Tensor) -> Tensor:
    """A map (B, H, W, C) and a token (B, 1, C) in one: the token, repeated, is a last row."""
    return torch.cat((x, token.unsqueeze(1).expand(-1, -1, x.shape[2], -1)), dim=1)


def as_tokens(x: Tensor) -> Tensor:
    """What `with_row` made as tokens (B, 1 + H W, C), the class token first."""
    return torch.cat((x[:, -1, :1], x[:, :-1].flatten(1, 2)), dim=1)


class Patches(nn.Module):
    """The map of what `with_row` made: a module, so that hooks find it."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :-1]


class ClassStage(Stage):
    """A stage whose blocks work on the tokens of the map and on a class token, one more row of input and output."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        _, H, W, C = x.shape
        tokens = as_tokens(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            tokens = checkpoint_seq(self.blocks, tokens)
        else:
            tokens = self.blocks(tokens)
        return with_row(tokens[:, 1:].reshape(-1, H - 1, W, C), tokens[:, :1])


class TokenHead(nn.Module):
    """Pooling of (B, 1 + N, C) tokens, the class token first, and a classifier.

    `pool_type` is timm's for tokens: "token" takes the class token, "avg", "max" and "avgmax" the others, "" classifies
    each. A model that has lost its last stage gives a map, which is passed on.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        pool_type: str = "token",
        drop_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.use_conv = False
        self.in_features = self.num_features = in_features
        self.pool_type = _checked_pool(pool_type)
        self.drop = nn.Dropout(drop_rate)
        self.reset(num_classes, device=device, dtype=dtype)

    def reset(
        self,
        num_classes: int,
        pool_type: str | None = None,
        reset_other: bool = False,
        in_features: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        """A fresh classifier, and another pooling if one is named."""
        if pool_type is not None:
            self.pool_type = _checked_pool(pool_type)
        if in_features is not None:
            self.in_features = self.num_features = in_features
        dd = {"device": device, "dtype": dtype}
        self.fc = nn.Linear(self.in_features, num_classes, **dd) if num_classes > 0 else nn.Identity()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.drop(global_pool_nlc(x, self.pool_type))
        return x if pre_logits else self.fc(x)


def _checked_pool(pool_type: str) -> str:
    if pool_type not in ("", "token", "avg", "max", "avgmax"):
        raise ValueError(f"global_pool must be 'token', 'avg', 'max', 'avgmax' or '', got {pool_type!r}")
    return pool_type


class SOFT(Pyramid):
    """Softmax-free transformer: three stages of softmax-free attention, and one of attention with a class token.

    Args:
        in_chans: channels of the image.
        num_classes: classes; 0 leaves the classifier out.
        global_pool: "token" takes the class token, "avg", "max" and "avgmax" the others, "" gives every token's logits.
        img_size: the image size in pixels, an int or a pair, that the positions are made for; every size runs.
        embed_dims: channels of each stage.
        depths: blocks of each stage.
        num_heads: attention heads of each stage.
        mlp_ratios: hidden width of the MLP over its input's, read in the last stage only: before, it is 4.
        sr_ratios: distance of the landmarks in pixels, for each stage but the last.
        conv_size: side of the convolution of the values, for each stage but the last.
        qkv_bias: whether the projections to queries, keys and values have a bias.
        max_iter: Newton iterations of the inverse.
        normed: the form of SOFT-Norm.
        newton_per_image: SOFT-Norm's step size is one for each image, not one for the batch.
        drop_rate: dropout before the classifier.
        drop_path_rate: growing linearly to this rate at the last block: dropout of the branches before the last stage,
            as in the original, stochastic depth in the last.

    Raises:
        ValueError: img_size, num_heads or global_pool do not fit.
    """

    channels_last = True
    no_decay = (".pos_embed", ".cls_token")

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        img_size: int | tuple[int, int] = 224,
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (1, 2, 3, 2),
        num_heads: Sequence[int] = (2, 4, 10, 16),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        conv_size: Sequence[int] = (9, 5, 3),
        qkv_bias: bool = True,
        max_iter: int = 20,
        normed: bool = False,
        newton_per_image: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(in_chans, embed_dims[-1])
        self.img_size = check_image_size(img_size)
        dim, last = embed_dims[0], len(depths) - 1
        grids = [halved(self.img_size, i + 2) for i in range(len(depths))]
        self.stem = PatchEmbed(in_chans, (dim // 2, dim // 2, dim), (2, 1, 2), grids[0], images=True, **dd)
        newton = (max_iter, normed, newton_per_image)
        stages: list[Stage] = []
        for i, (dim, rates) in enumerate(zip(embed_dims, stage_rates(drop_path_rate, depths), strict=True)):
            nh, before = num_heads[i], embed_dims[i - 1]
            if i == last:
                tokens = [TokenBlock(dim, nh, mlp_ratios[i], qkv_bias, rate, **dd) for rate in rates]
                stages.append(ClassStage(tokens, ClassEmbed(before, dim, grids[i], **dd)))
                continue
            downsample = PatchEmbed(before, (dim,), (2,), grids[i], **dd) if i else None
            attn_args = (dim, nh, sr_ratios[i], conv_size[i], qkv_bias, *newton)
            blocks = [Block(dim, SoftmaxFreeAttention(*attn_args, **dd), rate, **dd) for rate in rates]
            stages.append(Stage(blocks, downsample))
        self.add_stages(stages, embed_dims)
        self.with_class = True
        del self.norm  # programs that run the modules in their order, as timm's do, come to the map before the norm
        self.patches: nn.Module = Patches()
        self.feature_info[-1]["module"] = "patches"
        self.norm: nn.Module = nn.LayerNorm(self.num_features, eps=1e-6, **dd)
        self.add_head(num_classes, global_pool, drop_rate, TokenHead, **dd)
        self.apply(init_linear)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The feature maps as in the frame; the final features are tokens, (B, 1 + N, C)."""
        check_output_fmt(output_fmt)
        last = len(self.stages) - 1
        take, max_index = feature_take_indices(last + 1, indices)
        maps: list[Tensor] = []
        x = self.stem(x)
        for i, stage in enumerate(self.stages):
            if not stop_early or i <= max_index:
                x = stage(x)
                if i in take:
                    tap = self.norm(x) if norm and i == last else x
                    tap = self.patches(tap) if self.with_class and i == last else tap
                    maps.append(as_format(tap, True, output_fmt))
        maps = as_asked(maps, take)
        if intermediates_only:
            return maps
        if stop_early and max_index < last:
            return as_format(x, True, "NCHW"), maps
        return self._final(x), maps

    def _final(self, x: Tensor) -> Tensor:
        """The normed tokens of the last stage's output; of a model without that stage the map, (B, C, H, W)."""
        if self.with_class:
            return self.norm(torch.cat((x[:, -1, :1], self.patches(x).flatten(1, 2)), dim=1))
        return as_format(self.norm(x), True, "NCHW")

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the features at `indices` do not need."""
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        self.with_class = any(isinstance(stage, ClassStage) for stage in self.stages)
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        return self._final(self.stages(self.stem(x)))


DIALECTS = (
    OURS,
    Dialect(
        "the original",
        (
            (r"^stem\.pos_embed$", "pos_embed1"),
            (r"^stages\.(\d+)\.downsample\.pos_embed$", moved_by(1, "pos_embed{}")),
            (r"^stages\.(\d+)\.downsample\.cls_token$", "cls_token"),
            (r"^stem\.", "patch_embed1."),
            (r"^stages\.(\d+)\.downsample\.", moved_by(1, "patch_embed{}.")),
            (r"^stages\.3\.blocks\.(\d+)\.attn\.qkv\.", r"block4.\1.attn.{q,kv}."),
            (r"^stages\.3\.blocks\.", "block4."),
            (r"^stages\.(\d+)\.blocks\.(\d+)\.", lambda m: f"block{int(m[1]) + 1}.{m[2]}.att."),
            (r"\.att\.attn\.q\.", ".att.mha.W_q."),
            (r"\.att\.attn\.v\.", ".att.mha.W_v."),
            (r"\.att\.attn\.landmarks\.", ".att.mha.attn.Qlandmark_op."),
            (r"\.att\.attn\.landmarks_norm\.", ".att.mha.attn.Qnorm_act.0."),
            (r"\.att\.attn\.conv\.", ".att.mha.attn.conv."),
            (r"\.att\.attn\.proj\.", ".att.mha.ff."),
            (r"\.att\.mlp\.fc([12])\.", r".att.ff\1."),
            (r"^head\.fc\.", "head."),
        ),
    ),
)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Any dialect's names to ours, the positions to the maps of the model's img_size."""
    state = rename(state_dict, model)
    for name, module in model.named_modules():
        key = f"{name}.pos_embed"
        if isinstance(module, PatchEmbed) and key in state:
            state[key] = resize_map(as_map(state[key], key), *module.size, "bilinear")
        if isinstance(module, ClassEmbed) and key in state and state[key].shape != module.pos_embed.shape:
            token, rest = state[key][:, :1], as_map(state[key][:, 1:], f"{key} after the first")
            state[key] = torch.cat((token, resize_map(rest, *module.size, "bilinear").flatten(1, 2)), dim=1)
    return state


_DRIVE = "https://drive.google.com/file/d/{}/view?usp=sharing"


def _cfg(file: str = "", **kwargs: Any) -> dict[str, Any]:
    return published_cfg(
        _DRIVE.format(file) if file else "",
        pool_size=None,
        crop_pct=0.9,
        first_conv="stem.proj.0",
        classifier="head.fc",
        license="mit",
        paper_name="SOFT: Softmax-free Transformer with Linear Complexity",
        paper_ids=("arXiv:2110.11945", "arXiv:2207.03341"),
        origin_url="https://github.com/fudan-zvg/SOFT",
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {
        "soft_tiny.in1k": _cfg("1S04DCotIOkP0DaBb8WStQ513z82qT9de", top1=79.3, params="13M", flops="1.9G"),
        "soft_small": _cfg(top1=82.2, params="24M", flops="3.3G"),
        "soft_medium": _cfg(top1=82.9, params="45M", flops="7.2G"),
        "soft_large": _cfg(top1=83.1, params="64M", flops="11.0G"),
        "soft_huge": _cfg(top1=83.3, params="87M", flops="16.3G"),
        "soft_norm_tiny.in1k": _cfg("1Isy5b9v_4pyIXDqhKPNRq3WKH0etDlfl", top1=79.4, params="13M", flops="1.9G"),
        "soft_norm_small.in1k": _cfg("1OBjn7FzVdNP1Urqxq7X0yDykyPhxAAW1", top1=82.4, params="24M", flops="3.3G"),
        "soft_norm_medium.in1k": _cfg("1K2C6daaJn3jwurWh38uvV7rexirWjuzh", top1=83.1, params="45M", flops="7.2G"),
        "soft_norm_large.in1k": _cfg("1aRYuF_gbBGyiXUDKEcpHJmM04SdvTUdP", top1=83.3, params="64M", flops="11.0G"),
        "soft_norm_huge": _cfg(top1=83.4, params="87M", flops="16.3G"),
    }
)

_TINY: dict[str, Any] = {}
_SMALL: dict[str, Any] = {"depths": (1, 3, 20, 4)}
_MEDIUM: dict[str, Any] = {
    "embed_dims": (64, 128, 288, 512),
    "num_heads": (2, 4, 9, 16),
    "depths": (1, 3, 29, 5),
}
_LARGE: dict[str, Any] = {"depths": (1, 3, 40, 5)}
_HUGE: dict[str, Any] = {
    "embed_dims": (64, 128, 352, 512),
    "num_heads": (2, 4, 11, 16),
    "depths": (1, 5, 49, 5),
}


def _create(variant: str, pretrained: bool, args: dict[str, Any], kwargs: dict[str, Any]) -> SOFT:
    args = {"normed": variant.startswith("soft_norm"), **args, **kwargs}
    return build_model(SOFT, variant, pretrained, filter_fn=checkpoint_filter_fn, **args)


@register_model
def soft_tiny(pretrained: bool = False, **kwargs: Any) -> SOFT:
    return _create("soft_tiny", pretrained, _TINY, kwargs)


@register_model
def soft_small(pretrained: bool = False, **kwargs: Any) -> SOFT:
    return _create("soft_small", pretrained, _SMALL, kwargs)


@register_model
def soft_medium(pretrained: bool = False, **kwargs: Any) -> SOFT:
    return _create("soft_medium", pretrained, _MEDIUM, kwargs)


@register_model
def soft_large(pretrained: bool = False, **kwargs: Any) -> SOFT:
    return _create("soft_large", pretrained, _LARGE, kwargs)


@register_model
def soft_huge(pretrained: bool = False, **kwargs: Any) -> SOFT:
    return _create("soft_huge", pretrained, _HUGE, kwargs)


@register_model
def soft_norm_tiny(pretrained: bool = False, **kwargs: Any) -> SOFT:
    return _create("soft_norm_tiny", pretrained, _TINY, kwargs)


@register_model
def soft_norm_small(pretrained: bool = False, **kwargs: Any) -> SOFT:
    return _create("soft_norm_small", pretrained, _SMALL, kwargs)


@register_model
def soft_norm_medium(pretrained: bool = False, **kwargs: Any) -> SOFT:
    return _create("soft_norm_medium", pretrained, _MEDIUM, kwargs)


@register_model
def soft_norm_large(pretrained: bool = False, **kwargs: Any) -> SOFT:
    return _create("soft_norm_large", pretrained, _LARGE, kwargs)


@register_model
def soft_norm_huge(pretrained: bool = False, **kwargs: Any) -> SOFT:
    return _create("soft_norm_huge", pretrained, _HUGE, kwargs)

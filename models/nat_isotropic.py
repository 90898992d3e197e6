"""Isotropic NAT, DiNAT and ViT-rpb: a plain vision transformer whose attention alone differs.

Paper: "Dilated Neighborhood Attention Transformer", https://arxiv.org/abs/2209.15001 (isotropic variants, section 4)
Original: https://github.com/SHI-Labs/Neighborhood-Attention-Transformer (classification/isotropic.py; MIT).

Numbers are the original's. What differs:
- every image size runs, where the original takes 224 x 224 only: images are zero-padded on the right and bottom to
  multiples of the patch, maps smaller than kernel_size x dilation inside the attention, and ViT-rpb interpolates its
  bias table to the map;
- the index buffer of ViT-rpb is computed, not stored; it is dropped from published files;
- `forward_features` gives the normed map, NCHW; pooling belongs to the head;
- `drop_rate` is the dropout before the classifier only, `proj_drop_rate` that of the projections and MLPs.

The blocks are one stage, and the features are theirs.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.ops.maps import is_symbolic

from ._build import build_isotropic, published_cfg
from ._pyramid import Isotropic, NormLayer, PatchEmbed, init_linear, stage_rates
from ._tables import check_image_size
from .dialects import OURS, Dialect
from .nat import (
    Block,
    NeighborhoodAttention,
    checkpoint_filter_fn,
    per_block,
    per_stage,
    resize_table,
)

__all__ = ["NATIsotropic"]

torch.fx.wrap("relative_bias")


class GlobalAttention(nn.Module):
    """Attention over the whole map with a relative position bias, indexed key - query; [B, H, W, C].

    On a map of another size than `grid_size` the bias table is interpolated, bicubic, to that map's offsets.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid_size: tuple[int, int],
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not divisible by num_heads {num_heads}")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = float(qk_scale) if qk_scale else self.head_dim**-0.5
        self.attn_drop = attn_drop
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.rpb = nn.Parameter(torch.zeros(num_heads, 2 * grid_size[0] - 1, 2 * grid_size[1] - 1, **dd))
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        trunc_normal_(self.rpb, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        qkv = self.qkv(x).reshape(B, H * W, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # (B, nh, N, d)
        bias = relative_bias(self.rpb, H, W).to(q.dtype).unsqueeze(0)
        dropout = self.attn_drop if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=self.scale)
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(B, H, W, C)))


def relative_bias(table: Tensor, height: int, width: int) -> Tensor:
    """The bias of every query and key of a map, [heads, height * width, height * width], of a table of any size."""
    if is_symbolic(height, width) or table.shape[1] != 2 * height - 1 or table.shape[2] != 2 * width - 1:
        table = resize_table(table, 2 * height - 1, 2 * width - 1)
    rows = torch.arange(height, device=table.device)
    columns = torch.arange(width, device=table.device)
    rows = rows[None, :] - rows[:, None] + (height - 1)  # (query, key)
    columns = columns[None, :] - columns[:, None] + (width - 1)
    bias = table[:, rows[:, None, :, None], columns[None, :, None, :]]
    return bias.reshape(table.shape[0], height * width, height * width)


class NATIsotropic(Isotropic):
    """Vision transformer of one resolution with neighborhood attention, or global attention with relative bias.

    Args:
        in_chans: channels of the image.
        num_classes: classes; 0 leaves the classifier out.
        global_pool: timm's pooling names; "" keeps the map.
        img_size: the image size in pixels that the bias tables of global attention are made for; every size runs.
        patch_size: side of a patch in pixels.
        embed_dim: channels.
        depth: blocks.
        num_heads: attention heads.
        kernel_size: keys per axis and query, an int or one per block; None means global attention.
        dilations: None, an int for all blocks, or a sequence that is repeated over the blocks.
        dilation: the original's argument: the dilation of every second block; short for dilations=(1, dilation).
        mlp_ratio: hidden width of the MLP over its input's.
        qkv_bias: whether the qkv projections have a bias.
        qk_scale: factor of the scores; head_dim ** -0.5 unless given.
        layer_scale: start value of learned factors of the residual branches; None leaves them out.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout after the attention projections and in the MLPs.
        attn_drop_rate: dropout of the attention weights.
        drop_path_rate: stochastic depth, growing linearly to this rate at the last block.
        norm_layer: norm over the last dimension.
        attn_backend: path of neighborhood attention, None chooses; global attention has no choice of paths.

    Raises:
        ValueError: kernel_size, dilations, dilation or img_size do not fit.
    """

    channels_last = True
    out_norm_eps = 1e-5
    no_decay = (".rpb",)

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 12,
        kernel_size: int | Sequence[int] | None = 7,
        dilations: int | Sequence[int] | None = None,
        dilation: int | None = None,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        layer_scale: float | None = None,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        norm_layer: NormLayer = nn.LayerNorm,
        attn_backend: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(in_chans, embed_dim)
        self.img_size = check_image_size(img_size)

        if dilation is not None:
            if dilations is not None:
                raise ValueError(f"give dilations or dilation, not both; got {dilations!r} and {dilation!r}")
            dilations = (1, dilation)
        attn_args: dict[str, Any] = {
            "qkv_bias": qkv_bias,
            "qk_scale": qk_scale,
            "attn_drop": attn_drop_rate,
            "proj_drop": proj_drop_rate,
            **dd,
        }
        attentions: list[nn.Module]
        if kernel_size is None:
            if dilations is not None:
                raise ValueError(f"dilations {dilations!r} need a kernel_size; without one the attention is global")
            grid = (-(-self.img_size[0] // patch_size), -(-self.img_size[1] // patch_size))
            attentions = [GlobalAttention(embed_dim, num_heads, grid, **attn_args) for _ in range(depth)]
        else:
            kernels = per_stage("kernel_size", kernel_size, depth)
            steps = per_block(dilations if dilations is None else [dilations], [depth])[0]
            attn_args["attn_backend"] = attn_backend
            attentions = [
                NeighborhoodAttention(embed_dim, num_heads, k, d, **attn_args)
                for k, d in zip(kernels, steps, strict=True)
            ]

        self.stem = PatchEmbed(in_chans, embed_dim, patch_size, norm_layer, **dd)
        blocks = [
            Block(embed_dim, attn, mlp_ratio, proj_drop_rate, rate, layer_scale, norm_layer, **dd)
            for attn, rate in zip(attentions, stage_rates(drop_path_rate, [depth])[0], strict=True)
        ]
        self.add_blocks(blocks, embed_dim, patch_size)
        self.norm = norm_layer(embed_dim, **dd)
        self.add_head(num_classes, global_pool, drop_rate, **dd)
        self.apply(init_linear)


DIALECTS = (
    OURS,
    Dialect(
        "the original",
        (
            (r"^stem\.", "patch_embed."),
            (r"^stages\.0\.blocks\.", "layers."),
            (r"\.ls([12])\.gamma$", r".gamma\1"),
            (r"^head\.fc\.", "head."),
        ),
        ignored=r"\.relative_position_index$",
    ),
)


def _cfg(name: str, **kwargs: Any) -> dict[str, Any]:
    return published_cfg(
        f"https://shi-labs.com/projects/dinat/checkpoints/isotropic/{name}_in1k_224.pth",
        pool_size=(14, 14),
        first_conv="stem.proj",
        classifier="head.fc",
        license="mit",
        paper_name="Dilated Neighborhood Attention Transformer",
        paper_ids=("arXiv:2209.15001",),
        origin_url="https://github.com/SHI-Labs/Neighborhood-Attention-Transformer",
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {
        "nat_isotropic_small.in1k": _cfg("nat_isotropic_small", top1=80.0, params="22M", flops="4.3G"),
        "nat_isotropic_base.in1k": _cfg("nat_isotropic_base", top1=81.6, params="86M", flops="16.9G"),
        "dinat_isotropic_small.in1k": _cfg("dinat_isotropic_small", top1=80.8, params="22M", flops="4.3G"),
        "dinat_isotropic_base.in1k": _cfg("dinat_isotropic_base", top1=82.1, params="86M", flops="16.9G"),
        "vitrpb_small.in1k": _cfg("vitrpb_small", top1=81.2, params="22M", flops="4.6G"),
        "vitrpb_base.in1k": _cfg("vitrpb_base", top1=82.5, params="86M", flops="17.5G"),
    }
)

_SMALL = {"embed_dim": 384, "num_heads": 12, "drop_path_rate": 0.1}
_BASE = {"embed_dim": 768, "num_heads": 24, "drop_path_rate": 0.4}


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any], args: dict[str, Any], **more: Any) -> NATIsotropic:
    if kwargs.keys() & {"dilation", "dilations"}:
        more.pop("dilations", None)
    return build_isotropic(
        NATIsotropic, variant, pretrained, filter_fn=checkpoint_filter_fn, **{**args, **more, **kwargs}
    )


@register_model
def nat_isotropic_small(pretrained: bool = False, **kwargs: Any) -> NATIsotropic:
    return _create("nat_isotropic_small", pretrained, kwargs, _SMALL)


@register_model
def nat_isotropic_base(pretrained: bool = False, **kwargs: Any) -> NATIsotropic:
    return _create("nat_isotropic_base", pretrained, kwargs, _BASE)


@register_model
def dinat_isotropic_small(pretrained: bool = False, **kwargs: Any) -> NATIsotropic:
    return _create("dinat_isotropic_small", pretrained, kwargs, _SMALL, dilations=(1, 2))


@register_model
def dinat_isotropic_base(pretrained: bool = False, **kwargs: Any) -> NATIsotropic:
    return _create("dinat_isotropic_base", pretrained, kwargs, _BASE, dilations=(1, 2))


@register_model
def vitrpb_small(pretrained: bool = False, **kwargs: Any) -> NATIsotropic:
    return _create("vitrpb_small", pretrained, kwargs, _SMALL, kernel_size=None)


@register_model
def vitrpb_base(pretrained: bool = False, **kwargs: Any) -> NATIsotropic:
    return _create("vitrpb_base", pretrained, kwargs, _BASE, kernel_size=None)

"""NAT and DiNAT: Neighborhood Attention Transformer and its dilated form.

Papers: "Neighborhood Attention Transformer" (CVPR 2023), https://arxiv.org/abs/2204.07143
        "Dilated Neighborhood Attention Transformer", https://arxiv.org/abs/2209.15001
Original: https://github.com/SHI-Labs/Neighborhood-Attention-Transformer (classification/nat.py, dinat.py; MIT).

Numbers and parameter names are the original's. What differs:
- `forward_features` gives the normed map, NCHW; pooling belongs to `forward_head`;
- `drop_rate` is the dropout before the classifier only, `proj_drop_rate` that of the projections and MLPs;
- `kernel_size` and `dilations` may differ from level to level, and `dilations` may be shorter than a level.

Any image size is accepted: a map smaller than kernel_size x dilation is zero-padded inside the attention.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from timm.layers import calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ._build import build_model, published_cfg
from ._layers import (
    Classifier,
    Dilations,
    NormLayer,
    check_image_size,
    init_linear,
    neighborhood_stage,
    per_block,
    per_level,
    resize_bias_tables,
)

__all__ = ["NAT"]


class ConvTokenizer(nn.Module):
    """Two 3x3 convolutions of stride 2 with nothing between them, and a norm: [B, C, H, W] to [B, H/4, W/4, dim]."""

    def __init__(
        self, in_chans: int, dim: int, norm_layer: NormLayer = nn.LayerNorm, device: Any = None, dtype: Any = None
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, dim // 2, 3, 2, 1, **dd),
            nn.Conv2d(dim // 2, dim, 3, 2, 1, **dd),
        )
        self.norm = norm_layer(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class ConvDownsampler(nn.Module):
    """3x3 convolution of stride 2 to twice the channels, and a norm; [B, H, W, C]."""

    def __init__(self, dim: int, norm_layer: NormLayer = nn.LayerNorm, device: Any = None, dtype: Any = None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, 3, 2, 1, bias=False, **dd)
        self.norm = norm_layer(2 * dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class NAT(Classifier):
    """Neighborhood Attention Transformer.

    Args:
        in_chans: channels of the image.
        num_classes: classes; 0 leaves the classifier out.
        global_pool: timm's pooling names; "" keeps the map.
        img_size: the image size in pixels that the model is meant for; recorded only, every size runs.
        embed_dim: channels of the first level; each further level has twice as many.
        depths: blocks of each level.
        num_heads: attention heads of each level.
        kernel_size: keys per axis and query, an int or one per level.
        dilations: None, an int, or for each level an int or a sequence that is repeated over its blocks.
        mlp_ratio: hidden width of the MLP over its input's.
        qkv_bias: whether the qkv projections have a bias.
        qk_scale: factor of the scores; head_dim ** -0.5 unless given.
        layer_scale: start value of learned factors of the residual branches; None leaves them out.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout after the attention projections and in the MLPs.
        attn_drop_rate: dropout of the attention weights.
        drop_path_rate: stochastic depth, growing linearly to this rate at the last block.
        norm_layer: norm over the last dimension.
        attn_backend: path of the op, None chooses.

    Raises:
        ValueError: depths, num_heads, kernel_size, dilations or img_size do not fit.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] | None = None,
        embed_dim: int = 64,
        depths: Sequence[int] = (3, 4, 6, 5),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        kernel_size: int | Sequence[int] = 7,
        dilations: Dilations = None,
        mlp_ratio: float = 3.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        layer_scale: float | None = None,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
        norm_layer: NormLayer = nn.LayerNorm,
        attn_backend: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        depths, num_heads = list(depths), per_level("num_heads", num_heads, len(depths))
        self.in_chans = in_chans
        self.img_size = None if img_size is None else check_image_size(img_size)
        self.num_features = embed_dim * 2 ** (len(depths) - 1)
        self.feature_info: list[dict[str, Any]] = []

        self.patch_embed = ConvTokenizer(in_chans, embed_dim, norm_layer, **dd)
        kernel_sizes = per_level("kernel_size", kernel_size, len(depths))
        block_dilations = per_block(dilations, depths)
        rates = cast(list[list[float]], calculate_drop_path_rates(drop_path_rate, depths, stagewise=True))
        levels = []
        for i in range(len(depths)):
            dim = embed_dim * 2**i
            levels.append(
                neighborhood_stage(
                    dim,
                    num_heads[i],
                    kernel_sizes[i],
                    block_dilations[i],
                    rates[i],
                    ConvDownsampler(dim, norm_layer, **dd) if i < len(depths) - 1 else None,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    qk_scale=qk_scale,
                    attn_drop=attn_drop_rate,
                    proj_drop=proj_drop_rate,
                    layer_scale=layer_scale,
                    norm_layer=norm_layer,
                    attn_backend=attn_backend,
                    **dd,
                )
            )
            self.feature_info.append({"num_chs": dim, "reduction": 2 ** (i + 2), "module": f"levels.{i}.blocks"})
        self.levels = nn.Sequential(*levels)

        self.norm = norm_layer(self.num_features, **dd)
        self.add_classifier(self.num_features, num_classes, global_pool, drop_rate, **dd)
        self.apply(init_linear)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith(".rpb")}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = [
            (r"^levels\.(\d+)\.blocks\.(\d+)", None),
            (r"^levels\.(\d+)\.downsample", (99999,)),
            (r"^norm\.", (99999,)),
        ]
        return {"stem": r"^patch_embed", "blocks": r"^levels\.(\d+)" if coarse else blocks}

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The levels' outputs, before each downsampling.

        Args:
            x: image batch.
            indices: levels to return: the last n if an int, all if None.
            norm: apply the final norm to the last level's output.
            stop_early: do not run the levels after the last one asked for.
            output_fmt: "NCHW" or "NHWC".
            intermediates_only: leave the final features (NCHW) out.
        """
        assert output_fmt in ("NCHW", "NHWC"), "Output shape must be NCHW or NHWC."
        intermediates: list[Tensor] = []
        take_indices, max_index = feature_take_indices(len(self.levels), indices)
        last = len(self.levels) - 1
        x = self.patch_embed(x)
        if torch.jit.is_scripting() or not stop_early:
            levels = self.levels
        else:
            levels = self.levels[: max_index + 1]
        end = len(levels) - 1
        for i, level in enumerate(levels):
            x = level.forward_blocks(x)  # type: ignore[operator]
            if i in take_indices:
                taken = self.norm(x) if norm and i == last else x
                intermediates.append(taken.permute(0, 3, 1, 2) if output_fmt == "NCHW" else taken)
            if i < end:
                x = level.downsample(x)  # type: ignore[operator]
        if intermediates_only:
            return intermediates
        if end == last:
            x = self.norm(x)
        return x.permute(0, 3, 1, 2), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the layers that the given levels do not need; the final norm and head fit the last level only."""
        take_indices, max_index = feature_take_indices(len(self.levels), indices)
        prune_end = max_index < len(self.levels) - 1
        self.levels = self.levels[: max_index + 1]
        if prune_end:
            self.levels[max_index].downsample = nn.Identity()
            self.num_features = self.head_dim = self.feature_info[max_index]["num_chs"]
        if prune_end or prune_norm:
            self.norm = nn.Identity()
        if prune_end or prune_head:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.levels(self.patch_embed(x))
        return self.norm(x).permute(0, 3, 1, 2)  # (B, C, H, W)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Published names are ours; bias tables of another kernel size are resized."""
    return resize_bias_tables(state_dict, model)


def _cfg(path: str, size: int = 224, **kwargs: Any) -> dict[str, Any]:
    dilated = path.startswith("dinat/")
    defaults: dict[str, Any] = {
        "input_size": (3, size, size),
        "pool_size": (size // 32, size // 32),
        "crop_pct": 0.875 if size == 224 else 1.0,
        "first_conv": "patch_embed.proj.0",
        "classifier": "head",
        "license": "mit",
        "paper_name": "Dilated Neighborhood Attention Transformer" if dilated else "Neighborhood Attention Transformer",
        "paper_ids": ("arXiv:2209.15001",) if dilated else ("arXiv:2204.07143",),
        "origin_url": "https://github.com/SHI-Labs/Neighborhood-Attention-Transformer",
    }
    return published_cfg(f"https://shi-labs.com/projects/{path}", **{**defaults, **kwargs})


_NAT = "nat/checkpoints/CLS"
_IN1K = "dinat/checkpoints/imagenet1k"
_IN22K = "dinat/checkpoints/imagenet22k"

default_cfgs = generate_default_cfgs(
    {
        "nat_mini.in1k": _cfg(f"{_NAT}/nat_mini.pth", top1=81.8, params="20M", flops="2.7G"),
        "nat_tiny.in1k": _cfg(f"{_NAT}/nat_tiny.pth", top1=83.2, params="28M", flops="4.3G"),
        "nat_small.in1k": _cfg(f"{_NAT}/nat_small.pth", top1=83.7, params="51M", flops="7.8G"),
        "nat_base.in1k": _cfg(f"{_NAT}/nat_base.pth", top1=84.3, params="90M", flops="13.7G"),
        "dinat_mini.in1k": _cfg(f"{_IN1K}/dinat_mini_in1k_224.pth", top1=81.8, params="20M", flops="2.7G"),
        "dinat_tiny.in1k": _cfg(f"{_IN1K}/dinat_tiny_in1k_224.pth", top1=82.7, params="28M", flops="4.3G"),
        "dinat_small.in1k": _cfg(f"{_IN1K}/dinat_small_in1k_224.pth", top1=83.8, params="51M", flops="7.8G"),
        "dinat_base.in1k": _cfg(f"{_IN1K}/dinat_base_in1k_224.pth", top1=84.4, params="90M", flops="13.7G"),
        "dinat_large.in22k_ft_in1k": _cfg(
            f"{_IN1K}/dinat_large_in22k_in1k_224.pth", top1=86.6, params="200M", flops="30.6G"
        ),
        "dinat_large.in22k": _cfg(f"{_IN22K}/dinat_large_in22k_224.pth", num_classes=21841, head_from_file=True),
        "dinat_large_384.in22k_ft_in1k": _cfg(
            f"{_IN1K}/dinat_large_in22k_in1k_384.pth", 384, top1=87.4, params="200M", flops="89.7G"
        ),
        "dinat_large_384_11x11.in22k_ft_in1k": _cfg(
            f"{_IN1K}/dinat_large_in22k_in1k_384_11x11.pth", 384, top1=87.5, params="200M", flops="92.4G"
        ),
        "dinat_large_21k.in22k": _cfg(f"{_IN22K}/dinat_large_in22k_224.pth", head_from_file=True),
        "dinat_large_21k_11x11.in22k": _cfg(f"{_IN22K}/dinat_large_in22k_224_11x11interp.pth", head_from_file=True),
    }
)

_MINI = {"depths": (3, 4, 6, 5), "num_heads": (2, 4, 8, 16), "embed_dim": 64, "mlp_ratio": 3, "drop_path_rate": 0.2}
_TINY = {"depths": (3, 4, 18, 5), "num_heads": (2, 4, 8, 16), "embed_dim": 64, "mlp_ratio": 3, "drop_path_rate": 0.2}
_SMALL = {"depths": (3, 4, 18, 5), "num_heads": (3, 6, 12, 24), "embed_dim": 96, "mlp_ratio": 2, "drop_path_rate": 0.3}
_BASE = {"depths": (3, 4, 18, 5), "num_heads": (4, 8, 16, 32), "embed_dim": 128, "mlp_ratio": 2, "drop_path_rate": 0.5}
_LARGE = {
    "depths": (3, 4, 18, 5),
    "num_heads": (6, 12, 24, 48),
    "embed_dim": 192,
    "mlp_ratio": 2,
    "drop_path_rate": 0.35,
}
_21K = {**_LARGE, "drop_path_rate": 0.2}

# repeated over the blocks of each level
_224 = ((1, 8), (1, 4), (1, 2), 1)
_384 = ((1, 13), (1, 6), (1, 3), 1)


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any], args: dict[str, Any], **more: Any) -> NAT:
    build: Callable[..., nn.Module] = build_model
    return cast(NAT, build(NAT, variant, pretrained, filter_fn=checkpoint_filter_fn, **{**args, **more, **kwargs}))


@register_model
def nat_mini(pretrained: bool = False, **kwargs: Any) -> NAT:
    return _create("nat_mini", pretrained, kwargs, _MINI)


@register_model
def nat_tiny(pretrained: bool = False, **kwargs: Any) -> NAT:
    return _create("nat_tiny", pretrained, kwargs, _TINY)


@register_model
def nat_small(pretrained: bool = False, **kwargs: Any) -> NAT:
    return _create("nat_small", pretrained, kwargs, _SMALL, layer_scale=1e-5)


@register_model
def nat_base(pretrained: bool = False, **kwargs: Any) -> NAT:
    return _create("nat_base", pretrained, kwargs, _BASE, layer_scale=1e-5)


@register_model
def dinat_mini(pretrained: bool = False, **kwargs: Any) -> NAT:
    return _create("dinat_mini", pretrained, kwargs, _MINI, dilations=_224)


@register_model
def dinat_tiny(pretrained: bool = False, **kwargs: Any) -> NAT:
    return _create("dinat_tiny", pretrained, kwargs, _TINY, dilations=_224)


@register_model
def dinat_small(pretrained: bool = False, **kwargs: Any) -> NAT:
    return _create("dinat_small", pretrained, kwargs, _SMALL, dilations=_224)


@register_model
def dinat_base(pretrained: bool = False, **kwargs: Any) -> NAT:
    return _create("dinat_base", pretrained, kwargs, _BASE, dilations=_224, layer_scale=1e-5)


@register_model
def dinat_large(pretrained: bool = False, **kwargs: Any) -> NAT:
    return _create("dinat_large", pretrained, kwargs, _LARGE, dilations=_224)


@register_model
def dinat_large_384(pretrained: bool = False, **kwargs: Any) -> NAT:
    return _create("dinat_large_384", pretrained, kwargs, _LARGE, dilations=_384)


@register_model
def dinat_large_384_11x11(pretrained: bool = False, **kwargs: Any) -> NAT:
    return _create("dinat_large_384_11x11", pretrained, kwargs, _LARGE, kernel_size=11, dilations=_224)


@register_model
def dinat_large_21k(pretrained: bool = False, **kwargs: Any) -> NAT:
    return _create("dinat_large_21k", pretrained, kwargs, _21K, dilations=_224)


@register_model
def dinat_large_21k_11x11(pretrained: bool = False, **kwargs: Any) -> NAT:
    return _create("dinat_large_21k_11x11", pretrained, kwargs, _21K, kernel_size=11, dilations=_224)

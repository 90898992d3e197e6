"""DiNAT_s: dilated neighborhood attention in the frame of the Swin Transformer.

Paper: "Dilated Neighborhood Attention Transformer", https://arxiv.org/abs/2209.15001
Original: https://github.com/SHI-Labs/Neighborhood-Attention-Transformer (classification/dinats.py; MIT).

Numbers and parameter names are the original's. What differs:
- `forward_features` gives the normed map, NCHW; pooling belongs to `forward_head`;
- `drop_rate` is the dropout before the classifier only, `proj_drop_rate` that of the projections and MLPs;
- `kernel_size` and `dilations` may differ from level to level, and `dilations` may be shorter than a level.

Any image size is accepted: images and maps are zero-padded to multiples of the patch and to even sides, and a map
smaller than kernel_size x dilation is zero-padded inside the attention.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model, register_notrace_module
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

__all__ = ["DiNATS"]


@register_notrace_module  # padding depends on the size
class PatchEmbed(nn.Module):
    """Non-overlapping patches and a norm: [B, C, H, W] to [B, H/p, W/p, dim], padded on the right and bottom."""

    def __init__(
        self,
        in_chans: int,
        dim: int,
        patch_size: int = 4,
        norm_layer: NormLayer = nn.LayerNorm,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size, **dd)
        self.norm = norm_layer(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        bottom, right = -x.shape[2] % self.patch_size, -x.shape[3] % self.patch_size
        if bottom > 0 or right > 0:
            x = F.pad(x, (0, right, 0, bottom))
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


@register_notrace_module  # padding depends on the size
class PatchMerging(nn.Module):
    """2x2 pixels side by side, norm, and a projection to twice the channels; odd sides are padded; [B, H, W, C]."""

    def __init__(self, dim: int, norm_layer: NormLayer = nn.LayerNorm, device: Any = None, dtype: Any = None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm = norm_layer(4 * dim, **dd)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        bottom, right = H % 2, W % 2
        if bottom > 0 or right > 0:
            x = F.pad(x, (0, 0, 0, right, 0, bottom))
        x = x.reshape(B, (H + bottom) // 2, 2, (W + right) // 2, 2, C)
        x = x.permute(0, 1, 3, 4, 2, 5).flatten(3)  # rows vary faster than columns
        return self.reduction(self.norm(x))


class DiNATS(Classifier):
    """DiNAT_s: neighborhood attention between Swin's patch embedding and patch merging.

    Args:
        in_chans: channels of the image.
        num_classes: classes; 0 leaves the classifier out.
        global_pool: timm's pooling names; "" keeps the map.
        img_size: the image size in pixels that the model is meant for; recorded only, every size runs.
        patch_size: side of a patch in pixels.
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
        patch_size: int = 4,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        kernel_size: int | Sequence[int] = 7,
        dilations: Dilations = None,
        mlp_ratio: float = 4.0,
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

        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size, norm_layer, **dd)
        kernel_sizes = per_level("kernel_size", kernel_size, len(depths))
        block_dilations = per_block(dilations, depths)
        rates = cast(list[list[float]], calculate_drop_path_rates(drop_path_rate, depths, stagewise=True))
        layers = []
        for i in range(len(depths)):
            dim = embed_dim * 2**i
            layers.append(
                neighborhood_stage(
                    dim,
                    num_heads[i],
                    kernel_sizes[i],
                    block_dilations[i],
                    rates[i],
                    PatchMerging(dim, norm_layer, **dd) if i < len(depths) - 1 else None,
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
            self.feature_info.append({"num_chs": dim, "reduction": patch_size * 2**i, "module": f"layers.{i}.blocks"})
        self.layers = nn.Sequential(*layers)

        self.norm = norm_layer(self.num_features, **dd)
        self.add_classifier(self.num_features, num_classes, global_pool, drop_rate, **dd)
        self.apply(init_linear)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith(".rpb")}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = [
            (r"^layers\.(\d+)\.blocks\.(\d+)", None),
            (r"^layers\.(\d+)\.downsample", (99999,)),
            (r"^norm\.", (99999,)),
        ]
        return {"stem": r"^patch_embed", "blocks": r"^layers\.(\d+)" if coarse else blocks}

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
        take_indices, max_index = feature_take_indices(len(self.layers), indices)
        last = len(self.layers) - 1
        x = self.patch_embed(x)
        if torch.jit.is_scripting() or not stop_early:
            layers = self.layers
        else:
            layers = self.layers[: max_index + 1]
        end = len(layers) - 1
        for i, layer in enumerate(layers):
            x = layer.forward_blocks(x)  # type: ignore[operator]
            if i in take_indices:
                taken = self.norm(x) if norm and i == last else x
                intermediates.append(taken.permute(0, 3, 1, 2) if output_fmt == "NCHW" else taken)
            if i < end:
                x = layer.downsample(x)  # type: ignore[operator]
        if intermediates_only:
            return intermediates
        if end == last:
            x = self.norm(x)
        return x.permute(0, 3, 1, 2), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the layers that the given levels do not need; the final norm and head fit the last level only."""
        take_indices, max_index = feature_take_indices(len(self.layers), indices)
        prune_end = max_index < len(self.layers) - 1
        self.layers = self.layers[: max_index + 1]
        if prune_end:
            self.layers[max_index].downsample = nn.Identity()
            self.num_features = self.head_dim = self.feature_info[max_index]["num_chs"]
        if prune_end or prune_norm:
            self.norm = nn.Identity()
        if prune_end or prune_head:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.layers(self.patch_embed(x))
        return self.norm(x).permute(0, 3, 1, 2)  # (B, C, H, W)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Published names are ours; bias tables of another kernel size are resized."""
    return resize_bias_tables(state_dict, model)


def _cfg(path: str, size: int = 224, **kwargs: Any) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        "input_size": (3, size, size),
        "pool_size": (size // 32, size // 32),
        "crop_pct": 0.875 if size == 224 else 1.0,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "mit",
        "paper_name": "Dilated Neighborhood Attention Transformer",
        "paper_ids": ("arXiv:2209.15001",),
        "origin_url": "https://github.com/SHI-Labs/Neighborhood-Attention-Transformer",
    }
    return published_cfg(f"https://shi-labs.com/projects/dinat/checkpoints/{path}", **{**defaults, **kwargs})


_22K = "imagenet22k/dinat_s_large_in22k_224.pth"

default_cfgs = generate_default_cfgs(
    {
        "dinat_s_tiny.in1k": _cfg("imagenet1k/dinat_s_tiny_in1k_224.pth", top1=81.8, params="28M", flops="4.5G"),
        "dinat_s_small.in1k": _cfg("imagenet1k/dinat_s_small_in1k_224.pth", top1=83.5, params="50M", flops="8.7G"),
        "dinat_s_base.in1k": _cfg("imagenet1k/dinat_s_base_in1k_224.pth", top1=83.8, params="88M", flops="15.4G"),
        "dinat_s_large.in22k_ft_in1k": _cfg(
            "imagenet1k/dinat_s_large_in1k_224.pth", top1=86.5, params="197M", flops="34.5G"
        ),
        "dinat_s_large.in22k": _cfg(_22K, num_classes=21841, head_from_file=True),
        "dinat_s_large_384.in22k_ft_in1k": _cfg(
            "imagenet1k/dinat_s_large_in1k_384.pth", 384, top1=87.4, params="197M", flops="101.5G"
        ),
        "dinat_s_large_21k.in22k": _cfg(_22K, head_from_file=True),
    }
)

_TINY = {"depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24), "embed_dim": 96, "drop_path_rate": 0.2}
_SMALL = {"depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24), "embed_dim": 96, "drop_path_rate": 0.3}
_BASE = {"depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32), "embed_dim": 128, "drop_path_rate": 0.5}
_LARGE = {"depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48), "embed_dim": 192, "drop_path_rate": 0.35}
_21K = {**_LARGE, "drop_path_rate": 0.2}

# repeated over the blocks of each level
_224 = ((1, 8), (1, 4), (1, 2), 1)
_384 = ((1, 13), (1, 6), (1, 3), 1)


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any], args: dict[str, Any], **more: Any) -> DiNATS:
    build: Callable[..., nn.Module] = build_model
    return cast(
        DiNATS, build(DiNATS, variant, pretrained, filter_fn=checkpoint_filter_fn, **{**args, **more, **kwargs})
    )


@register_model
def dinat_s_tiny(pretrained: bool = False, **kwargs: Any) -> DiNATS:
    return _create("dinat_s_tiny", pretrained, kwargs, _TINY, dilations=_224)


@register_model
def dinat_s_small(pretrained: bool = False, **kwargs: Any) -> DiNATS:
    return _create("dinat_s_small", pretrained, kwargs, _SMALL, dilations=_224)


@register_model
def dinat_s_base(pretrained: bool = False, **kwargs: Any) -> DiNATS:
    return _create("dinat_s_base", pretrained, kwargs, _BASE, dilations=_224)


@register_model
def dinat_s_large(pretrained: bool = False, **kwargs: Any) -> DiNATS:
    return _create("dinat_s_large", pretrained, kwargs, _LARGE, dilations=_224)


@register_model
def dinat_s_large_384(pretrained: bool = False, **kwargs: Any) -> DiNATS:
    return _create("dinat_s_large_384", pretrained, kwargs, _LARGE, dilations=_384)


@register_model
def dinat_s_large_21k(pretrained: bool = False, **kwargs: Any) -> DiNATS:
    return _create("dinat_s_large_21k", pretrained, kwargs, _21K, dilations=_224)

"""DiNAT_s: dilated neighborhood attention in the frame of the Swin Transformer.

Paper: "Dilated Neighborhood Attention Transformer", https://arxiv.org/abs/2209.15001
Original: https://github.com/SHI-Labs/Neighborhood-Attention-Transformer (classification/dinats.py; MIT).

Numbers are the original's; what differs is what differs in nat.py.

Any image size is accepted: images and maps are zero-padded to multiples of the patch and to even sides, and a map
smaller than kernel_size x dilation is zero-padded inside the attention.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.ops.maps import pad_map

from ._build import build_model, published_cfg
from ._pyramid import NormLayer, PatchEmbed
from .dialects import OURS
from .nat import NAT, checkpoint_filter_fn, original

__all__ = ["DiNATS"]


class PatchMerging(nn.Module):
    """2x2 pixels side by side, norm, and a projection to twice the channels; odd sides are padded; [B, H, W, C]."""

    def __init__(self, dim: int, norm_layer: NormLayer = nn.LayerNorm, device: Any = None, dtype: Any = None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm = norm_layer(4 * dim, **dd)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_map(x, 2)
        x = torch.cat([x[:, i % 2 :: 2, i // 2 :: 2] for i in range(4)], dim=-1)  # rows vary faster than columns
        return self.reduction(self.norm(x))


class DiNATS(NAT):
    """DiNAT_s: neighborhood attention between Swin's patch embedding and patch merging.

    Args:
        patch_size: side of a patch in pixels.
        embed_dim, depths, num_heads, mlp_ratio: as for `NAT`.
        kwargs: the other arguments of `NAT`.

    Raises:
        ValueError: depths, num_heads, kernel_size, dilations or img_size do not fit.
    """

    def __init__(
        self,
        *,
        patch_size: int = 4,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        mlp_ratio: float = 4.0,
        **kwargs: Any,
    ) -> None:
        layers = {"embed_layer": partial(PatchEmbed, patch_size=patch_size), "downsample_layer": PatchMerging}
        sizes: dict[str, Any] = {"embed_dim": embed_dim, "depths": depths, "num_heads": num_heads}
        super().__init__(**sizes, mlp_ratio=mlp_ratio, **{**layers, **kwargs})


DIALECTS = (OURS, original("layers"))


def _cfg(path: str, size: int = 224, **kwargs: Any) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        "input_size": (3, size, size),
        "pool_size": (size // 32, size // 32),
        "crop_pct": 0.875 if size == 224 else 1.0,
        "first_conv": "stem.proj",
        "classifier": "head.fc",
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

# repeated over the blocks of each stage
_224 = ((1, 8), (1, 4), (1, 2), 1)
_384 = ((1, 13), (1, 6), (1, 3), 1)


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any], args: dict[str, Any], **more: Any) -> DiNATS:
    return build_model(DiNATS, variant, pretrained, filter_fn=checkpoint_filter_fn, **{**args, **more, **kwargs})


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

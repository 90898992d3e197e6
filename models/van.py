"""VAN: convolutional networks gated by a decomposed large kernel.

Visual Attention Network, https://arxiv.org/abs/2202.09741
Original: https://github.com/Visual-Attention-Network/VAN-Classification, models/van.py (Apache-2.0); its backbone for
segmentation (VAN-Segmentation) is the same network with another epsilon in the stages' layer norm (`norm_eps=1e-5`).

What differs: the stages are modules of their own, `reset_classifier` works, and dropout has one rate for the classifier
(`drop_rate`) and one for the blocks (`proj_drop_rate`).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import LayerNorm2d, LayerScale2d, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.ops.scriptable import large_kernel_attention

from ._build import build_model, published_cfg
from ._modules import is_plain_conv
from ._pyramid import DropPath, Pyramid, Stage, stage_rates
from .dialects import OURS, Dialect, moved_by, rename

__all__ = ["VAN"]


class LKA(nn.Module):
    """Large kernel attention: the input gated by a 5x5, a dilated 7x7 and a 1x1 convolution of itself.

    The op takes the weights of the three unless something is attached to one; then they are called one after another.
    """

    def __init__(self, dim: int, attn_backend: str | None = None, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.attn_backend = attn_backend
        self.conv0 = nn.Conv2d(dim, dim, 5, padding=2, groups=dim, **dd)
        self.conv_spatial = nn.Conv2d(dim, dim, 7, padding=9, groups=dim, dilation=3, **dd)
        self.conv1 = nn.Conv2d(dim, dim, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            plain = is_plain_conv(self.conv0) and is_plain_conv(self.conv_spatial, 3) and is_plain_conv(self.conv1)
            if not plain:
                return x * self.conv1(self.conv_spatial(self.conv0(x)))
        return large_kernel_attention(
            x,
            self.conv0.weight,
            self.conv0.bias,
            self.conv_spatial.weight,
            self.conv_spatial.bias,
            self.conv1.weight,
            self.conv1.bias,
            dilation=3,
            backend=self.attn_backend,
        )


class Attention(nn.Module):
    """LKA between two projections, plus its own input: a shortcut inside the block's."""

    def __init__(self, dim: int, attn_backend: str | None = None, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.proj_1 = nn.Conv2d(dim, dim, 1, **dd)
        self.activation = nn.GELU()
        self.spatial_gating_unit = LKA(dim, attn_backend, **dd)
        self.proj_2 = nn.Conv2d(dim, dim, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(self.proj_1(x))
        y = self.spatial_gating_unit(y)
        return self.proj_2(y) + x


class Mlp(nn.Module):
    """Two 1x1 convolutions around a 3x3 depth-wise one."""

    def __init__(self, dim: int, hidden: int, drop: float = 0.0, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.fc1 = nn.Conv2d(dim, hidden, 1, **dd)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, **dd)
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(hidden, dim, 1, **dd)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.act(self.dwconv(self.fc1(x))))
        return self.drop(self.fc2(x))


class VANBlock(nn.Module):
    """x + ls1(attn(norm1(x))), then the same with the MLP."""

    def __init__(
        self,
        dim: int,
        mlp_ratio: float,
        drop: float = 0.0,
        drop_path: float = 0.0,
        layer_scale_init: float = 1e-2,
        attn_backend: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = nn.BatchNorm2d(dim, **dd)
        self.attn = Attention(dim, attn_backend, **dd)
        self.ls1 = LayerScale2d(dim, layer_scale_init, **dd)
        self.norm2 = nn.BatchNorm2d(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop, **dd)
        self.ls2 = LayerScale2d(dim, layer_scale_init, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class Downsample(nn.Module):
    """Overlapping strided convolution and batch norm; odd sizes round up. The stem is one, too."""

    def __init__(
        self, in_chans: int, dim: int, kernel_size: int = 3, stride: int = 2, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.proj = nn.Conv2d(in_chans, dim, kernel_size, stride=stride, padding=kernel_size // 2, **dd)
        self.norm = nn.BatchNorm2d(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))


class VAN(Pyramid):
    """Visual Attention Network.

    Args:
        in_chans: input channels.
        num_classes: classes, 0 for no classifier.
        global_pool: pooling before the classifier, "avg" or any other of timm's, "" for none.
        embed_dims, mlp_ratios, depths: one per stage.
        norm_eps: epsilon of the layer norm after each stage: 1e-6 in the classifiers, 1e-5 in the original's backbone
            for segmentation and detection, which loads the same checkpoints.
        layer_scale_init: initial value of the residual branches' scales.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout inside the MLPs.
        drop_path_rate: stochastic depth, growing linearly to this rate.
        attn_backend: backend of the large kernel attention.
        device, dtype: of every parameter and buffer.
    """

    no_decay = (".ls1.", ".ls2.")

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (32, 64, 160, 256),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        depths: Sequence[int] = (3, 3, 5, 2),
        norm_eps: float = 1e-6,
        layer_scale_init: float = 1e-2,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        attn_backend: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if not len(embed_dims) == len(mlp_ratios) == len(depths):
            raise ValueError(
                f"VAN: embed_dims {embed_dims}, mlp_ratios {mlp_ratios} and depths {depths} must have one length"
            )
        dd = {"device": device, "dtype": dtype}
        super().__init__(in_chans, embed_dims[-1])
        self.stem = Downsample(in_chans, embed_dims[0], 7, 4, **dd)
        stages = []
        for i, (dim, mlp_ratio, rates) in enumerate(
            zip(embed_dims, mlp_ratios, stage_rates(drop_path_rate, depths), strict=True)
        ):
            downsample = Downsample(embed_dims[i - 1], dim, **dd) if i else None
            blocks = [
                VANBlock(dim, mlp_ratio, proj_drop_rate, rate, layer_scale_init, attn_backend, **dd) for rate in rates
            ]
            stages.append(Stage(blocks, downsample, norm=LayerNorm2d(dim, eps=norm_eps, **dd)))
        self.add_stages(stages, embed_dims)
        self.add_head(num_classes, global_pool, drop_rate, **dd)
        self.apply(_init_weights)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


_SCALES = (r"\.ls([12])\.gamma$", r".layer_scale_\1")
# all but ours count stages from 1, and their first embedding is our stem
_MMPRETRAIN = (
    (r"^stem\.proj\.", "patch_embed1.projection."),
    (r"^stem\.", "patch_embed1."),
    (r"^stages\.(\d+)\.downsample\.proj\.", moved_by(1, "patch_embed{}.projection.")),
    (r"^stages\.(\d+)\.downsample\.", moved_by(1, "patch_embed{}.")),
    (r"^stages\.(\d+)\.blocks\.", moved_by(1, "blocks{}.")),
    (r"^stages\.(\d+)\.norm\.", moved_by(1, "norm{}.")),
    (r"\.conv0\.", ".DW_conv."),
    (r"\.conv_spatial\.", ".DW_D_conv."),
    _SCALES,
)
_TRANSFORMERS = (
    (r"^stem\.", "stages.0.downsample."),
    (r"\.downsample\.proj\.", ".embeddings.convolution."),
    (r"\.downsample\.norm\.", ".embeddings.normalization."),
    (r"^stages\.(\d+)\.norm\.", r"stages.\1.normalization."),
    (r"\.blocks\.", ".layers."),
    (r"\.norm1\.", ".pre_normomalization."),  # spelt so there
    (r"\.norm2\.", ".post_normalization."),
    (r"\.proj_1\.", ".pre_projection.conv."),
    (r"\.proj_2\.", ".post_projection."),
    (r"\.spatial_gating_unit\.", ".attention_layer.attention."),
    (r"\.conv0\.", ".depth_wise."),
    (r"\.conv_spatial\.", ".depth_wise_dilated."),
    (r"\.conv1\.", ".point_wise."),
    (r"\.attn\.", ".attention."),
    (r"\.mlp\.fc1\.", ".mlp.in_dense."),
    (r"\.mlp\.dwconv\.", ".mlp.depth_wise."),
    (r"\.mlp\.fc2\.", ".mlp.out_dense."),
    (r"\.ls1\.gamma$", ".attention_scaling.weight"),
    (r"\.ls2\.gamma$", ".mlp_scaling.weight"),
    (r"^stages\.", "encoder.stages."),
    (r"^head\.fc\.", "classifier."),
)
_UNUSED = r"^(?:van\.)?layernorm\."  # which transformers' forward never calls

DIALECTS = (
    OURS,
    Dialect(
        "the original",
        (
            (r"^stem\.", "patch_embed1."),
            (r"^stages\.(\d+)\.downsample\.", moved_by(1, "patch_embed{}.")),
            (r"^stages\.(\d+)\.blocks\.", moved_by(1, "block{}.")),
            (r"^stages\.(\d+)\.norm\.", moved_by(1, "norm{}.")),
            (r"\.dwconv\.", ".dwconv.dwconv."),
            _SCALES,
            (r"^head\.fc\.", "head."),
        ),
    ),
    Dialect("mmpretrain", (*_MMPRETRAIN, (r"^(?!head\.)", "backbone."))),
    Dialect("mmpretrain's backbone", _MMPRETRAIN),
    Dialect("transformers' VanForImageClassification", (*_TRANSFORMERS, (r"^(?!classifier)", "van.")), _UNUSED),
    Dialect("transformers' VanModel", _TRANSFORMERS, _UNUSED),
    Dialect("ours, before 0.1", ((r"^stem\.", "stages.0.patch_embed."), (r"\.downsample\.", ".patch_embed."), _SCALES)),
)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Any dialect's names to ours; of a segmentor's or detector's file the backbone."""
    return rename(state_dict, model)


def _cfg(url: str = "", **kwargs: Any) -> dict[str, Any]:
    # Mean and std: the original never states them. Its code falls back on timm 0.4.12's defaults for transformers,
    # 0.5, but the published checkpoints evaluated with ImageNet's statistics (mmpretrain's and Hugging Face's
    # conversions) give 75.41, 81.01, 82.80 and 83.86 % for B0 to B3 against the published 75.4, 81.1, 82.8 and 83.9 %;
    # 0.5 would halve the contrast that those networks see. So ImageNet's, which published_cfg takes, are right.
    defaults: dict[str, Any] = {
        "crop_pct": 0.9,
        "min_input_size": (3, 32, 32),
        "first_conv": "stem.proj",
        "classifier": "head.fc",
        "license": "apache-2.0",
        "paper_name": "Visual Attention Network",
        "paper_ids": ("arXiv:2202.09741",),
        "origin_url": "https://github.com/Visual-Attention-Network/VAN-Classification",
    }
    return published_cfg(url, **{**defaults, **kwargs})


def _cfg_in22k(**kwargs: Any) -> dict[str, Any]:
    # The ImageNet-22k files lie in a shared folder with no address of their own, so they are given as `file`; how many
    # classes their head has is written nowhere.
    folder = "checkpoint in the folder https://cloud.tsinghua.edu.cn/d/0100f0cea37d41ba8d08/"
    return _cfg(head_from_file=True, notes=(folder,), **kwargs)


_HUB = "https://huggingface.co/Visual-Attention-Network/VAN-"

default_cfgs = generate_default_cfgs({
    "van_b0.in1k": _cfg(
        _HUB + "Tiny-original/resolve/main/van_tiny_754.pth.tar", top1=75.4, params="4.1M", flops="0.9G"
    ),
    "van_b1.in1k": _cfg(
        _HUB + "Small-original/resolve/main/van_small_811.pth.tar", top1=81.1, params="13.9M", flops="2.5G"
    ),
    "van_b2.in1k": _cfg(
        _HUB + "Base-original/resolve/main/van_base_828.pth.tar", top1=82.8, params="26.6M", flops="5.0G"
    ),
    "van_b3.in1k": _cfg(
        _HUB + "Large-original/resolve/main/van_large_839.pth.tar", top1=83.9, params="44.8M", flops="9.0G"
    ),
    "van_b4.in22k": _cfg_in22k(),
    "van_b5.in22k": _cfg_in22k(),
    "van_b6.in22k": _cfg_in22k(),
})  # fmt: skip


def _create(
    variant: str, pretrained: bool, embed_dims: tuple[int, ...], depths: tuple[int, ...], kwargs: dict[str, Any]
) -> VAN:
    args: dict[str, Any] = {"embed_dims": embed_dims, "depths": depths, **kwargs}
    return build_model(VAN, variant, pretrained, filter_fn=checkpoint_filter_fn, **args)


@register_model
def van_b0(pretrained: bool = False, **kwargs: Any) -> VAN:
    return _create("van_b0", pretrained, (32, 64, 160, 256), (3, 3, 5, 2), kwargs)


@register_model
def van_b1(pretrained: bool = False, **kwargs: Any) -> VAN:
    return _create("van_b1", pretrained, (64, 128, 320, 512), (2, 2, 4, 2), kwargs)


@register_model
def van_b2(pretrained: bool = False, **kwargs: Any) -> VAN:
    return _create("van_b2", pretrained, (64, 128, 320, 512), (3, 3, 12, 3), kwargs)


@register_model
def van_b3(pretrained: bool = False, **kwargs: Any) -> VAN:
    return _create("van_b3", pretrained, (64, 128, 320, 512), (3, 5, 27, 3), kwargs)


@register_model
def van_b4(pretrained: bool = False, **kwargs: Any) -> VAN:
    return _create("van_b4", pretrained, (64, 128, 320, 512), (3, 6, 40, 3), kwargs)


@register_model
def van_b5(pretrained: bool = False, **kwargs: Any) -> VAN:
    return _create("van_b5", pretrained, (96, 192, 480, 768), (3, 3, 24, 3), kwargs)


@register_model
def van_b6(pretrained: bool = False, **kwargs: Any) -> VAN:
    return _create("van_b6", pretrained, (96, 192, 384, 768), (6, 6, 90, 6), kwargs)

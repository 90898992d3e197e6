"""VAN: convolutional networks gated by a decomposed large kernel.

Visual Attention Network, https://arxiv.org/abs/2202.09741
Original: https://github.com/Visual-Attention-Network/VAN-Classification, models/van.py (Apache-2.0); its backbone for
segmentation (VAN-Segmentation) is the same network with another epsilon in the stages' layer norm (`norm_eps=1e-5`).

What differs: the stages are modules of their own (`stages.0.blocks.0` for `block1.0`), `reset_classifier` works, and
dropout has one rate for the classifier (`drop_rate`) and one for the blocks (`proj_drop_rate`).
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import (
    ClassifierHead,
    DropPath,
    LayerNorm2d,
    calculate_drop_path_rates,
    get_device_dtype,
    trunc_normal_,
)
from timm.models import checkpoint_seq, generate_default_cfgs, register_model, register_notrace_module
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from zoo.ops.large_kernel import large_kernel_attention

from ._build import build_model, published_cfg

__all__ = ["VAN"]


@register_notrace_module
class LKA(nn.Module):
    """Large kernel attention: the input gated by a 5x5, a dilated 7x7 and a 1x1 convolution of itself."""

    def __init__(self, dim: int, attn_backend: str | None = None, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.attn_backend = attn_backend
        self.conv0 = nn.Conv2d(dim, dim, 5, padding=2, groups=dim, **dd)
        self.conv_spatial = nn.Conv2d(dim, dim, 7, padding=9, groups=dim, dilation=3, **dd)
        self.conv1 = nn.Conv2d(dim, dim, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return torch.ops.zoo.large_kernel_attention(
                x, self.conv0.weight, self.conv0.bias, self.conv_spatial.weight, self.conv_spatial.bias,
                self.conv1.weight, self.conv1.bias, 3, "auto",
            )[0]  # fmt: skip
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
    """x + layer_scale_1 * attn(norm1(x)), then the same with the MLP."""

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
        self.layer_scale_init = layer_scale_init
        self.norm1 = nn.BatchNorm2d(dim, **dd)
        self.attn = Attention(dim, attn_backend, **dd)
        self.norm2 = nn.BatchNorm2d(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop, **dd)
        self.layer_scale_1 = nn.Parameter(torch.full((dim,), layer_scale_init, **dd))
        self.layer_scale_2 = nn.Parameter(torch.full((dim,), layer_scale_init, **dd))
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.layer_scale_1[:, None, None] * self.attn(self.norm1(x)))
        return x + self.drop_path(self.layer_scale_2[:, None, None] * self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Overlapping strided convolution and batch norm; odd sizes round up."""

    def __init__(
        self, in_chans: int, dim: int, patch_size: int, stride: int, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=stride, padding=patch_size // 2, **dd)
        self.norm = nn.BatchNorm2d(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))


class VANStage(nn.Module):
    """Patch embedding, blocks, and a layer norm whose output is both the stage's feature and the next one's input."""

    def __init__(
        self,
        in_chans: int,
        dim: int,
        depth: int,
        mlp_ratio: float,
        patch_size: int,
        stride: int,
        drop: float,
        drop_path: Sequence[float],
        layer_scale_init: float,
        norm_eps: float,
        attn_backend: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.grad_checkpointing = False
        self.patch_embed = PatchEmbed(in_chans, dim, patch_size, stride, **dd)
        self.blocks = nn.Sequential(
            *[VANBlock(dim, mlp_ratio, drop, drop_path[i], layer_scale_init, attn_backend, **dd) for i in range(depth)]
        )
        self.norm = LayerNorm2d(dim, eps=norm_eps, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return self.norm(x)


class VAN(nn.Module):
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
        super().__init__()
        if not len(embed_dims) == len(mlp_ratios) == len(depths):
            raise ValueError(
                f"VAN: embed_dims {embed_dims}, mlp_ratios {mlp_ratios} and depths {depths} must have one length"
            )
        dd = {"device": device, "dtype": dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.drop_rate = drop_rate
        feature_info = []
        drop_path: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        chans = in_chans
        for i, (dim, mlp_ratio, depth) in enumerate(zip(embed_dims, mlp_ratios, depths, strict=True)):
            patch_size, stride = (7, 4) if i == 0 else (3, 2)
            stages.append(
                VANStage(
                    chans, dim, depth, mlp_ratio, patch_size, stride, proj_drop_rate, drop_path[i],
                    layer_scale_init, norm_eps, attn_backend, **dd,
                )
            )  # fmt: skip
            feature_info.append({"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"})
            chans = dim
        self.feature_info = feature_info
        self.stages = nn.Sequential(*stages)
        self.num_features = self.head_hidden_size = chans
        self.head = ClassifierHead(chans, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d):
                fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {n for n, _ in self.named_parameters() if "layer_scale" in n}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks: list[Any] = [(r"^stages\.(\d+)", None)]
        if not coarse:
            # A stage's embedding belongs to its first block, its norm to its last.
            blocks = [
                (r"^stages\.(\d+)\.patch_embed", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^stages\.(\d+)\.norm", (99999,)),
            ]
        return {"stem": r"^stages\.0\.patch_embed", "blocks": blocks}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for module in self.modules():
            if isinstance(module, VANStage):
                module.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = global_pool
        self.head.reset(num_classes, global_pool, **get_device_dtype(self))
        self.head_hidden_size = self.head.num_features

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The stages' outputs, after their layer norm (the next stage sees nothing else).

        Args:
            x: [B, in_chans, H, W].
            indices: the last n stages if an int, those stages if a list, all if None.
            norm: no effect: the layer norm is part of the stage.
            stop_early: run no stage that is not asked for.
            output_fmt: "NCHW".
            intermediates_only: return the list alone.

        Returns:
            The list, or (final features, list).
        """
        if output_fmt != "NCHW":
            raise ValueError(f"VAN: output_fmt must be 'NCHW', got {output_fmt!r}")
        take, last = feature_take_indices(len(self.stages), indices)
        stages = self.stages[: last + 1] if stop_early and not torch.jit.is_scripting() else self.stages
        intermediates = []
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in take:
                intermediates.append(x)
        if intermediates_only:
            return intermediates
        return x, intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last one asked for; the indices that were kept."""
        take, last = feature_take_indices(len(self.stages), indices)
        shortened = last + 1 < len(self.stages)
        self.stages = self.stages[: last + 1]
        if shortened:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
            self.head.in_features = self.num_features
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        return self.stages(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x, pre_logits=pre_logits) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.forward_features(x)
        return self.forward_head(x)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The original's keys -> ours; a segmentation or detection model gives its `backbone.`."""
    backbone = {k.removeprefix("backbone."): v for k, v in state_dict.items() if k.startswith("backbone.")}
    out = {}
    for key, value in (backbone or state_dict).items():
        match = re.match(r"(patch_embed|block|norm)(\d+)\.(.*)", key)
        if match:
            part, stage, rest = match.groups()
            key = f"stages.{int(stage) - 1}.{'blocks' if part == 'block' else part}.{rest}"
        key = key.replace(".dwconv.dwconv.", ".dwconv.")
        key = re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", key)
        out[key] = value
    return out


def _cfg(url: str = "", **kwargs: Any) -> dict[str, Any]:
    # Mean and std: the original never states them. Its code falls back on timm 0.4.12's defaults for transformers,
    # 0.5, but the published checkpoints evaluated with ImageNet's statistics (mmpretrain's and Hugging Face's
    # conversions) give 75.41, 81.01, 82.80 and 83.86 % for B0 to B3 against the published 75.4, 81.1, 82.8 and 83.9 %;
    # 0.5 would halve the contrast that those networks see. So ImageNet's, which published_cfg takes, are right.
    defaults: dict[str, Any] = {
        "crop_pct": 0.9,
        "min_input_size": (3, 32, 32),
        "first_conv": "stages.0.patch_embed.proj",
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


def _create(variant: str, pretrained: bool, **kwargs: Any) -> VAN:
    return build_model(VAN, variant, pretrained, filter_fn=checkpoint_filter_fn, **kwargs)


@register_model
def van_b0(pretrained: bool = False, **kwargs: Any) -> VAN:
    args = {"embed_dims": (32, 64, 160, 256), "depths": (3, 3, 5, 2)}
    return _create("van_b0", pretrained, **dict(args, **kwargs))


@register_model
def van_b1(pretrained: bool = False, **kwargs: Any) -> VAN:
    args = {"embed_dims": (64, 128, 320, 512), "depths": (2, 2, 4, 2)}
    return _create("van_b1", pretrained, **dict(args, **kwargs))


@register_model
def van_b2(pretrained: bool = False, **kwargs: Any) -> VAN:
    args = {"embed_dims": (64, 128, 320, 512), "depths": (3, 3, 12, 3)}
    return _create("van_b2", pretrained, **dict(args, **kwargs))


@register_model
def van_b3(pretrained: bool = False, **kwargs: Any) -> VAN:
    args = {"embed_dims": (64, 128, 320, 512), "depths": (3, 5, 27, 3)}
    return _create("van_b3", pretrained, **dict(args, **kwargs))


@register_model
def van_b4(pretrained: bool = False, **kwargs: Any) -> VAN:
    args = {"embed_dims": (64, 128, 320, 512), "depths": (3, 6, 40, 3)}
    return _create("van_b4", pretrained, **dict(args, **kwargs))


@register_model
def van_b5(pretrained: bool = False, **kwargs: Any) -> VAN:
    args = {"embed_dims": (96, 192, 480, 768), "depths": (3, 3, 24, 3)}
    return _create("van_b5", pretrained, **dict(args, **kwargs))


@register_model
def van_b6(pretrained: bool = False, **kwargs: Any) -> VAN:
    args = {"embed_dims": (96, 192, 384, 768), "depths": (6, 6, 90, 6)}
    return _create("van_b6", pretrained, **dict(args, **kwargs))

"""The frame of a backbone: what timm asks of a model, written once, and the few layers that three families share.

`Backbone` is a model with timm's classifier head. `Pyramid` adds a stem, stages and their feature maps, so that a
family's constructor builds `stem`, `stages`, `norm` and the head, in that order, and nothing else is left to say. Its
parameters are `stem.*`, `stages.{i}.downsample.*`, `stages.{i}.blocks.{j}.*`, `norm.*` and `head.*`.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, cast

import timm.layers
import torch
import torch.fx
import torch.nn.functional as F
from timm.layers import ClassifierHead, calculate_drop_path_rates, drop_path, get_device_dtype, trunc_normal_
from timm.models import checkpoint, checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from zoo.ops.maps import is_symbolic, pad_map

__all__ = [
    "Backbone",
    "CeilAvgPool2d",
    "DropPath",
    "FamilyFacts",
    "Isotropic",
    "NormLayer",
    "PatchEmbed",
    "Pyramid",
    "Stage",
    "as_asked",
    "as_format",
    "check_output_fmt",
    "init_linear",
    "quarters",
    "stage_rates",
]

torch.fx.wrap("drop_path")  # its shapes depend on the number of axes

NormLayer = Callable[..., nn.Module]


class FamilyFacts:
    """What training wants to know of a family. A model's class states it; `zoo.registry.model_class` finds the class.

    Attributes:
        out_norms: the outputs that the original's detection backbone normalises.
        out_norm_eps: the epsilon of these norms.
        slow_parameters: factors of the learning rate, by a part of the parameter's name.
        no_decay: parts of the names of parameters that get no weight decay, biases and other vectors apart.
    """

    out_norms: ClassVar[tuple[int, ...]] = ()
    out_norm_eps: ClassVar[float] = 1e-5
    slow_parameters: ClassVar[dict[str, float]] = {}
    no_decay: ClassVar[tuple[str, ...]] = ()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        names = (name for name, _ in cast(nn.Module, self).named_parameters())
        return {name for name in names if any(part in name for part in self.no_decay)}


class Backbone(FamilyFacts, nn.Module):
    """A model that ends in one of timm's heads; a subclass calls `add_head` last and has `forward_features`."""

    def __init__(self, in_chans: int, num_features: int) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.num_features = num_features
        self.feature_info: list[dict[str, Any]] = []

    def add_head(
        self,
        num_classes: int,
        global_pool: str,
        drop_rate: float,
        head: Callable[..., Any] = ClassifierHead,
        **kwargs: Any,
    ) -> None:
        """Add the head for `num_features` channels; kwargs are the head's own. Without pooling it classifies pixels."""
        self.num_classes = num_classes
        self.drop_rate = drop_rate
        if head is ClassifierHead:
            kwargs["use_conv"] = not global_pool
        self.head = head(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, **kwargs)
        self.head_hidden_size = self.head.num_features

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, reset_other: bool = False) -> None:
        """Give the model a fresh classifier, and another pooling if one is named; `reset_other` drops the rest."""
        self.num_classes = num_classes
        if global_pool is not None:
            self.head.use_conv = not global_pool
        self.head.reset(
            num_classes, global_pool, reset_other=reset_other, in_features=self.num_features, **get_device_dtype(self)
        )
        self.head_hidden_size = self.head.num_features

    def forward_features(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class Stage(nn.Module):
    """A downsampling, blocks and norms: the next stage sees what `norm` gives; `out_norm` is for the feature alone."""

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        downsample: nn.Module | None = None,
        norm: nn.Module | None = None,
        out_norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = nn.Identity() if downsample is None else downsample
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.Identity() if norm is None else norm
        self.out_norm = nn.Identity() if out_norm is None else out_norm

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return self.norm(x)


class Pyramid(Backbone):
    """A stem, stages of which all but the first halve the map, and a final norm.

    Attributes:
        channels_last: whether stem, stages and norms work on (B, H, W, C) rather than (B, C, H, W).
        stem_feature: whether the stem's output is feature 0, before those of the stages.
    """

    channels_last: ClassVar[bool] = False
    stem_feature: ClassVar[bool] = False
    __constants__ = ["channels_last", "stem_feature"]

    def __init__(self, in_chans: int, num_features: int) -> None:
        super().__init__(in_chans, num_features)
        self.stem: nn.Module = nn.Identity()
        self.stages = nn.Sequential()
        self.norm: nn.Module = nn.Identity()

    def add_stages(self, stages: Sequence[Stage], channels: Sequence[int], reduction: int = 4) -> None:
        """Add the stages and their features; `reduction` is the stem's stride."""
        for i, dim in enumerate(channels):
            self.feature_info.append({"num_chs": dim, "reduction": reduction * 2**i, "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^stages\.(\d+)\.(?:norm|out_norm)\.", (99999,)),
            (r"^norm\.", (99999,)),
        ]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else blocks}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations inside the blocks in the backward pass."""
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The feature maps in the order of `indices`, after the final features unless `intermediates_only`.

        Args:
            x: images, (B, C, H, W).
            indices: the features to return: the last n if an int, all if None.
            norm: apply the final norm to the last stage's output.
            stop_early: run nothing after the last feature asked for.
            output_fmt: "NCHW" or "NHWC", the layout of the feature maps.
            intermediates_only: leave the final features, always (B, C, H, W), out.

        Raises:
            ValueError: output_fmt is neither.
        """
        check_output_fmt(output_fmt)
        index = 0 if self.stem_feature else -1
        last = len(self.stages) + index
        take, max_index = feature_take_indices(last + 1, indices)
        maps: list[Tensor] = []
        x = self.stem(x)
        if index in take:
            maps.append(as_format(x, self.channels_last, output_fmt))
        if torch.jit.is_scripting() or not stop_early:  # TorchScript cannot slice modules
            stages = self.stages
        else:
            stages = self.stages[: max_index - index]
        y = x
        for stage in stages:
            index += 1
            x = stage(x)
            y = stage.out_norm(x)  # type: ignore[operator]
            if index in take:
                tap = self.norm(y) if norm and index == last else y
                maps.append(as_format(tap, self.channels_last, output_fmt))
        maps = as_asked(maps, take)
        if intermediates_only:
            return maps
        if index == last:
            y = self.norm(y)
        return as_format(y, self.channels_last, "NCHW"), maps

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the features at `indices` do not need; the final norm and head fit the last stage only."""
        first = 1 if self.stem_feature else 0
        take, max_index = feature_take_indices(len(self.stages) + first, indices)
        shortened = max_index + 1 < len(self.stages) + first
        self.stages = self.stages[: max_index + 1 - first]
        for i, stage in enumerate(self.stages, first):
            if i not in take:
                stage.out_norm = nn.Identity()
        if prune_norm or shortened:
            self.norm = nn.Identity()
            self.num_features = self.feature_info[max_index]["num_chs"]
        if prune_head or shortened or self.num_features != self.head.in_features:
            self.reset_classifier(0, "", reset_other=True)
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.stages(self.stem(x))
        if len(self.stages) > 0:  # a model pruned to its stem has none
            x = self.stages[-1].out_norm(x)  # type: ignore[operator]
        return as_format(self.norm(x), self.channels_last, "NCHW")


class Isotropic(Pyramid):
    """A stem and blocks of one resolution, which are one stage; the features are the blocks' outputs."""

    channels_last = True

    def add_blocks(self, blocks: Sequence[nn.Module], dim: int, reduction: int) -> None:
        """Add the blocks, of `dim` channels, and their features; `reduction` is the stem's stride."""
        self.stages = nn.Sequential(Stage(blocks))
        self.feature_info = [
            {"num_chs": dim, "reduction": reduction, "module": f"stages.0.blocks.{i}"} for i in range(len(blocks))
        ]

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^stem", "blocks": [(r"^stages\.0\.blocks\.(\d+)", None), (r"^norm\.", (99999,))]}

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The blocks' outputs; arguments as in the frame, but that `norm` applies to every output."""
        check_output_fmt(output_fmt)
        stage = self.stages[0]
        blocks = stage.blocks
        take, max_index = feature_take_indices(len(blocks), indices)  # type: ignore[arg-type]
        if stop_early and not torch.jit.is_scripting():
            blocks = blocks[: max_index + 1]  # type: ignore[index]
        maps: list[Tensor] = []
        x = self.stem(x)
        for i, block in enumerate(blocks):  # type: ignore[arg-type]
            if stage.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x)
            else:
                x = block(x)
            if i in take:
                maps.append(as_format(self.norm(x) if norm else x, True, output_fmt))
        maps = as_asked(maps, take)
        if intermediates_only:
            return maps
        return as_format(self.norm(x), True, "NCHW"), maps

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the given blocks' outputs do not need."""
        stage = cast(Stage, self.stages[0])
        take, max_index = feature_take_indices(len(stage.blocks), indices)
        stage.blocks = stage.blocks[: max_index + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "", reset_other=True)
        return take


class PatchEmbed(nn.Module):
    """Non-overlapping patches and a norm: (B, C, H, W) to (B, H/p, W/p, dim), padded on the right and bottom."""

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
        x = pad_map(x.permute(0, 2, 3, 1), self.patch_size).permute(0, 3, 1, 2)
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class DropPath(timm.layers.DropPath):
    """Stochastic depth, which FX records as one call."""

    def forward(self, x: Tensor) -> Tensor:
        return drop_path(x, self.drop_prob, self.training, self.scale_by_keep)


class CeilAvgPool2d(nn.Module):
    """Mean over 2x2 pixels, at an odd side over those that are there, on (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        if not is_symbolic(x.shape[2], x.shape[3]):
            return F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)
        # PyTorch's own compares sizes; here zeros are counted, and the share of pixels that are no padding divides
        share = pad_map(x.new_ones(1, x.shape[2], x.shape[3], 1), 2).permute(0, 3, 1, 2)
        x = pad_map(x.permute(0, 2, 3, 1), 2).permute(0, 3, 1, 2)
        return F.avg_pool2d(x, 2) / F.avg_pool2d(share, 2)


def check_output_fmt(output_fmt: str) -> None:
    """Raise ValueError unless it names a layout that feature maps come in."""
    if output_fmt not in ("NCHW", "NHWC"):
        raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC', got '{output_fmt}'")


def as_asked(maps: list[Tensor], take: list[int]) -> list[Tensor]:
    """Maps that were made in rising order of their indices, each once, in the order of `take`."""
    made: list[int] = []
    for index in sorted(take):
        if index not in made:
            made.append(index)
    return [maps[made.index(index)] for index in take]


def as_format(x: Tensor, channels_last: bool, output_fmt: str) -> Tensor:
    """A (B, H, W, C) map, or (B, C, H, W) unless channels_last, in the layout that output_fmt names."""
    if channels_last and output_fmt == "NCHW":
        return x.permute(0, 3, 1, 2)
    if not channels_last and output_fmt == "NHWC":
        return x.permute(0, 2, 3, 1)
    return x


def init_linear(module: nn.Module) -> None:
    """For nn.Module.apply: truncated normal weights of deviation 0.02 and zero biases in every Linear."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def stage_rates(drop_path_rate: float, depths: Sequence[int]) -> list[list[float]]:
    """The stochastic depth of every block of every stage, growing linearly to drop_path_rate at the last block."""
    return cast(list[list[float]], calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True))


def quarters(depth: int) -> tuple[int, ...]:
    """The last block of each quarter of an isotropic model, as deep as the stages of a pyramid."""
    return tuple(sorted({max(depth * i // 4 - 1, 0) for i in range(1, 5)}))

"""HaloNet: residual networks with blocked local self-attention.

Scaling Local Self-Attention for Parameter Efficient Visual Backbones, https://arxiv.org/abs/2103.12731
No official code or weights exist; the published checkpoints are those of timm
(https://github.com/huggingface/pytorch-image-models, byoanet.py and layers/halo_attn.py, Apache-2.0).

The network around the attention is timm's ByobNet, and so are its parameters' names. What differs from timm:
- The attention runs on `zoo.ops.halo`, and takes maps of any size (timm: multiples of the block size only).
- The fixed-size attention of BoTNet in the last stage of two variants takes any size as well: its relative position
  tables are interpolated to the map. At the size they were made for, the numbers are timm's.
- Average pools round odd sizes up, as the strided convolutions beside them do.
- `border="mask"` leaves what lies outside the map out of the softmax.
- Feature maps come in either layout.
"""

from collections.abc import Sequence
from types import FunctionType
from typing import Any, cast

import torch
import torch.fx
from timm.layers import make_divisible, to_2tuple, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from timm.models._features import FeatureListNet, feature_take_indices
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg, interleave_blocks
from torch import Tensor, nn

from zoo.ops.maps import is_symbolic
from zoo.ops.scriptable import halo_attention

from ._build import build_model, published_cfg
from ._modules import channels_last
from ._pyramid import CeilAvgPool2d, FamilyFacts, as_asked, as_format, check_output_fmt
from .dialects import Dialect, rename

__all__ = ["HaloNet"]

for _function in ("_as_laid_out", "_relative"):  # the size and the layout decide how they run
    torch.fx.wrap(_function)


class RelativePosition(nn.Module):
    """Relative position tables of an attention layer, [2 * size - 1, dim] per axis."""

    def __init__(self, size: tuple[int, int], dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.height_rel = nn.Parameter(torch.empty(2 * size[0] - 1, dim, device=device, dtype=dtype))
        self.width_rel = nn.Parameter(torch.empty(2 * size[1] - 1, dim, device=device, dtype=dtype))

    def reset_parameters(self, std: float) -> None:
        trunc_normal_(self.height_rel, std=std)
        trunc_normal_(self.width_rel, std=std)

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.height_rel.clone(), self.width_rel.clone()  # FSDP frees parameters when their module has run


class HaloAttention(nn.Module):
    """Attention of each block of the map to the block and a halo around it, with its projections.

    Args:
        dim: input channels.
        dim_out: output channels, dim by default.
        feat_size: unused; ByobNet gives it to every attention layer.
        stride: 1 or 2; queries are strided, or the output is pooled if avg_down or the block has an odd side.
        num_heads: heads.
        dim_head: channels of q and k per head; by default dim_out * qk_ratio, rounded to a multiple
            of 8, over num_heads.
        block_size, halo_size: in pixels of the input.
        qk_ratio: see dim_head.
        qkv_bias: biases in the projections.
        avg_down: pool rather than stride the queries.
        scale_pos_embed: scale the relative position logits as well as q.k.
        border: "zero" (the published checkpoints) or "mask", see `zoo.ops.halo.halo_attention`.
        attn_backend: backend of the op.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int | None = None,
        feat_size: tuple[int, int] | None = None,
        stride: int = 1,
        num_heads: int = 8,
        dim_head: int | None = None,
        block_size: int = 8,
        halo_size: int = 3,
        qk_ratio: float = 1.0,
        qkv_bias: bool = False,
        avg_down: bool = False,
        scale_pos_embed: bool = False,
        border: str = "zero",
        attn_backend: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        dim_out = dim_out or dim
        if dim_out % num_heads or stride not in (1, 2) or border not in ("zero", "mask"):
            raise ValueError(
                f"HaloAttention: dim_out {dim_out} must be a multiple of num_heads {num_heads}, stride "
                f"({stride}) 1 or 2, border ({border!r}) 'zero' or 'mask'"
            )
        pool = stride == 2 and (avg_down or block_size % 2 == 1)
        self.num_heads = num_heads
        self.dim_qk = dim_head or make_divisible(dim_out * qk_ratio, divisor=8) // num_heads
        self.dim_v = dim_out // num_heads
        self.stride = 1 if pool else stride
        self.block_size = block_size
        self.halo_size = halo_size
        self.border = border
        self.attn_backend = attn_backend
        # timm's q @ k is scaled and its q @ rel is not; with scale_pos_embed both are: then q itself is scaled.
        self.q_scale = self.dim_qk**-0.5 if scale_pos_embed else 1.0
        self.scale = 1.0 if scale_pos_embed else self.dim_qk**-0.5

        self.q = nn.Conv2d(dim, num_heads * self.dim_qk, 1, stride=self.stride, bias=qkv_bias, **dd)
        self.kv = nn.Conv2d(dim, num_heads * (self.dim_qk + self.dim_v), 1, bias=qkv_bias, **dd)
        window = block_size + 2 * halo_size
        self.pos_embed = RelativePosition((window, window), self.dim_qk, **dd)
        self.pool = CeilAvgPool2d() if pool else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        std = self.q.weight.shape[1] ** -0.5
        trunc_normal_(self.q.weight, std=std)
        trunc_normal_(self.kv.weight, std=std)
        self.pos_embed.reset_parameters(self.dim_qk**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = channels_last(x)  # what follows then copies nothing
        q = self.q(tokens).permute(0, 2, 3, 1).unflatten(-1, (self.num_heads, self.dim_qk))
        if self.q_scale != 1.0:
            q = q * self.q_scale
        # The checkpoints' projection holds k and v of a head beside one another.
        kv = self.kv(tokens).permute(0, 2, 3, 1).unflatten(-1, (self.num_heads, self.dim_qk + self.dim_v))
        k, v = kv[..., : self.dim_qk], kv[..., self.dim_qk :]
        rel_height, rel_width = self.pos_embed()
        out = halo_attention(
            q,
            k,
            v,
            self.block_size,
            self.halo_size,
            rel_height=rel_height,
            rel_width=rel_width,
            border=self.border,
            scale=self.scale,
            backend=self.attn_backend,
        )
        out = out.flatten(3).permute(0, 3, 1, 2)  # (B, C, H, W), channels last
        return self.pool(_as_laid_out(out, x))


class BottleneckAttention(nn.Module):
    """BoTNet's attention over the whole map (arXiv:2101.11605), with relative position tables made for one size.

    Args:
        dim: input channels.
        dim_out: output channels, dim by default.
        feat_size: the map the tables are made for; other maps interpolate them.
        stride: 1 or 2; with 2 the output is pooled.
        num_heads, dim_head, qk_ratio, qkv_bias, scale_pos_embed: as for `HaloAttention`.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int | None = None,
        feat_size: tuple[int, int] | None = None,
        stride: int = 1,
        num_heads: int = 4,
        dim_head: int | None = None,
        qk_ratio: float = 1.0,
        qkv_bias: bool = False,
        scale_pos_embed: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        dim_out = dim_out or dim
        if dim_out % num_heads or feat_size is None:
            raise ValueError(
                f"BottleneckAttention: dim_out {dim_out} must be a multiple of num_heads {num_heads}, and feat_size "
                f"({feat_size}) is needed: pass img_size to the model"
            )
        self.num_heads = num_heads
        self.dim_qk = dim_head or make_divisible(dim_out * qk_ratio, divisor=8) // num_heads
        self.dim_v = dim_out // num_heads
        self.scale = self.dim_qk**-0.5
        self.rel_scale = self.scale if scale_pos_embed else 1.0
        self.qkv = nn.Conv2d(dim, num_heads * (2 * self.dim_qk + self.dim_v), 1, bias=qkv_bias, **dd)
        self.pos_embed = RelativePosition(to_2tuple(feat_size), self.dim_qk, **dd)
        self.pool = CeilAvgPool2d() if stride == 2 else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        trunc_normal_(self.qkv.weight, std=self.qkv.weight.shape[1] ** -0.5)
        self.pos_embed.reset_parameters(self.scale)

    def forward(self, x: Tensor) -> Tensor:
        B, _, H, W = x.shape
        dims = [self.num_heads * self.dim_qk, self.num_heads * self.dim_qk, self.num_heads * self.dim_v]
        q, k, v = self.qkv(x).split(dims, 1)
        q, k, v = [t.unflatten(1, (self.num_heads, -1)).flatten(3).transpose(2, 3) for t in (q, k, v)]
        logits = (q @ k.transpose(-2, -1)) * self.scale  # (B, nh, H * W, H * W)
        q = q.unflatten(2, (H, W))
        rel_height, rel_width = self.pos_embed()
        by_row = torch.einsum("bnhwd,hid->bnhwi", q, _relative(rel_height, H))
        by_col = torch.einsum("bnhwd,wjd->bnhwj", q, _relative(rel_width, W))
        position = (by_row.unsqueeze(-1) + by_col.unsqueeze(-2)).flatten(4).flatten(2, 3)
        attn = (logits + position * self.rel_scale).softmax(dim=-1)
        out = (attn @ v).transpose(2, 3).reshape(B, self.num_heads * self.dim_v, H, W)
        return self.pool(out)


def resize_relative(table: Tensor, size: int) -> Tensor:
    """A relative position table [2 * n - 1, dim], centred on offset 0, interpolated to [2 * size - 1, dim]."""
    old = (table.shape[0] + 1) // 2
    if not is_symbolic(size, size) and size == old:
        return table
    offsets = torch.arange(1 - size, size, device=table.device, dtype=torch.float32)
    position = offsets * (float(old - 1) / offsets[-1].clamp(min=1)) + float(old - 1)
    low = position.floor().clamp(0, table.shape[0] - 1)
    high = (low + 1).clamp(max=table.shape[0] - 1)
    weight = (position - low).clamp(0, 1).unsqueeze(1).to(table.dtype)
    return torch.lerp(table[low.long()], table[high.long()], weight)


def _relative(table: Tensor, size: int) -> Tensor:
    """A position table of any size -> (size, size, dim): the row of every query and key."""
    index = torch.arange(size, device=table.device)
    return resize_relative(table, size)[index.unsqueeze(0) - index.unsqueeze(1) + size - 1]


def _as_laid_out(x: Tensor, like: Tensor) -> Tensor:
    return x.contiguous() if like.is_contiguous() else x


def _renamed(function: Any, name: str) -> Any:
    """A copy of a function under another name, for TorchScript: it has no super(), and knows a method by its name."""
    copy = FunctionType(function.__code__, function.__globals__, name, function.__defaults__, function.__closure__)
    copy.__annotations__ = function.__annotations__
    return copy


class ListedFeatures(FeatureListNet):
    """timm's wrapper for features_only=True, whose maps come in the order of `out_indices`, as feature_info says."""

    def __init__(self, model: nn.Module, out_indices: int | Sequence[int] = (0, 1, 2, 3, 4), **kwargs: Any) -> None:
        asked = out_indices if isinstance(out_indices, int) else list(out_indices)
        take, _ = feature_take_indices(len(cast(Any, model).feature_info), asked)
        super().__init__(model, tuple(sorted(set(take))), **kwargs)
        self.feature_info = self.feature_info.from_other(tuple(take))
        self.take: list[int] = take

    def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]  # as timm's own
        return as_asked(list(self._collect(x).values()), self.take)


class HaloNet(FamilyFacts, ByobNet):
    """HaloNet.

    Args:
        cfg: the network, block by block.
        attn_backend: backend of every halo attention.
        border: of every halo attention, "zero" (the published checkpoints) or "mask".
        kwargs: those of timm's ByobNet (num_classes, in_chans, global_pool, output_stride, img_size, drop_rate,
            drop_path_rate, device, dtype, ...) and fields of cfg.
    """

    no_decay = ("height_rel", "width_rel")

    def __init__(self, cfg: ByoModelCfg, attn_backend: str | None = None, border: str = "zero", **kwargs: Any) -> None:
        super().__init__(cfg, **kwargs)
        if border not in ("zero", "mask"):
            raise ValueError(f"HaloNet: border must be 'zero' or 'mask', got {border!r}")
        for module in self.modules():
            if isinstance(module, HaloAttention):
                module.attn_backend = attn_backend
                module.border = border
        if self.head.global_pool.is_identity():
            self.reset_classifier(self.num_classes, "")

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, reset_other: bool = False) -> None:
        """As timm's; without pooling the classifier is one of pixels."""
        if global_pool is not None:
            self.head.use_conv = not global_pool
        super().reset_classifier(num_classes, global_pool, reset_other)

    _timm_intermediates = _renamed(ByobNet.forward_intermediates, "_timm_intermediates")

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        exclude_final_conv: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """As timm's, with the layouts "NCHW" and "NHWC", and the maps in the order of `indices`.

        Raises:
            ValueError: output_fmt is neither.
        """
        check_output_fmt(output_fmt)
        found = self._timm_intermediates(x, indices, norm, stop_early, "NCHW", intermediates_only, exclude_final_conv)
        take, _ = feature_take_indices(len(self.stage_ends), indices)
        if isinstance(found, list):
            return [as_format(m, False, output_fmt) for m in as_asked(found, take)]
        final, maps = found
        return final, [as_format(m, False, output_fmt) for m in as_asked(maps, take)]


DIALECTS = (Dialect("timm, whose names are ours"),)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """timm's keys are ours; BoTNet's position tables are interpolated to the model's map."""
    state_dict = rename(state_dict, model)
    for name, module in model.named_modules():
        if isinstance(module, BottleneckAttention):
            for table in ("height_rel", "width_rel"):
                key = f"{name}.pos_embed.{table}"
                if key in state_dict:
                    size = (getattr(module.pos_embed, table).shape[0] + 1) // 2
                    state_dict[key] = resize_relative(state_dict[key], size)
    return state_dict


def _bottle(depth: int, channels: int, stride: int = 2, **kwargs: Any) -> ByoBlockCfg:
    return ByoBlockCfg(type="bottle", d=depth, c=channels, s=stride, **{"gs": 0, "br": 0.25, **kwargs})


def _attn(depth: int, channels: int, stride: int = 2, **kwargs: Any) -> ByoBlockCfg:
    return ByoBlockCfg(type="self_attn", d=depth, c=channels, s=stride, **{"gs": 0, "br": 0.25, **kwargs})


def _mixed(depth: int, channels: int, every: int | list[int] = 1, **kwargs: Any) -> tuple[ByoBlockCfg, ...]:
    kwargs = {"s": 2, "gs": 0, "br": 0.25, **kwargs}
    blocks: tuple[ByoBlockCfg, ...] = interleave_blocks(("bottle", "self_attn"), depth, every, c=channels, **kwargs)
    return blocks


def _halo_cfg(*blocks: Any, **kwargs: Any) -> ByoModelCfg:
    defaults = {"stem_chs": 64, "stem_type": "tiered", "stem_pool": "maxpool", "self_attn_layer": HaloAttention}
    return ByoModelCfg(blocks=blocks, **{**defaults, **kwargs})


_BOT: dict[str, Any] = {"self_attn_layer": BottleneckAttention, "self_attn_kwargs": {}}
_HALO3: dict[str, Any] = {"self_attn_layer": HaloAttention, "self_attn_kwargs": {"halo_size": 3}}
_HALO3_HEADS4: dict[str, Any] = {
    "self_attn_layer": HaloAttention,
    "self_attn_kwargs": {"block_size": 8, "halo_size": 3, "num_heads": 4},
}

_MODELS = {
    "halonet_h1": _halo_cfg(
        _attn(3, 64, 1, br=1.0), _attn(3, 128, br=1.0), _attn(10, 256, br=1.0), _attn(3, 512, br=1.0),
        stem_type="7x7", self_attn_kwargs={"block_size": 8, "halo_size": 3},
    ),
    "halonet26t": _halo_cfg(
        _bottle(2, 256, 1), _bottle(2, 512), _mixed(2, 1024), _attn(2, 2048),
        self_attn_kwargs={"block_size": 8, "halo_size": 2},
    ),
    "sehalonet33ts": _halo_cfg(
        _bottle(2, 256, 1), _mixed(3, 512, [2]), _mixed(3, 1024, [2]), _attn(2, 1536, br=0.333),
        stem_pool="", act_layer="silu", num_features=1280, attn_layer="se",
        self_attn_kwargs={"block_size": 8, "halo_size": 3},
    ),
    "halonet50ts": _halo_cfg(
        _bottle(3, 256, 1), _mixed(4, 512, 4, **_HALO3_HEADS4), _mixed(6, 1024), _mixed(3, 2048),
        act_layer="silu", self_attn_kwargs={"block_size": 8, "halo_size": 3},
    ),
    "eca_halonext26ts": _halo_cfg(
        _bottle(2, 256, 1, gs=16), _bottle(2, 512, gs=16), _mixed(2, 1024, gs=16), _attn(2, 2048, gs=16),
        act_layer="silu", attn_layer="eca", self_attn_kwargs={"block_size": 8, "halo_size": 2, "dim_head": 16},
    ),
    "haloregnetz_b": _halo_cfg(
        _bottle(2, 48, gs=16, br=3), _bottle(6, 96, gs=16, br=3), _mixed(12, 192, 3, gs=16, br=3),
        _attn(2, 288, gs=16, br=3),
        stem_chs=32, stem_type="3x3", stem_pool="", downsample="", num_features=1536, act_layer="silu",
        attn_layer="se", attn_kwargs={"rd_ratio": 0.25}, block_kwargs={"bottle_in": True, "linear_out": True},
        self_attn_kwargs={"block_size": 7, "halo_size": 2, "qk_ratio": 0.33},
    ),
    "lamhalobotnet50ts": _halo_cfg(
        _bottle(3, 256, 1), _mixed(4, 512, self_attn_layer="lambda", self_attn_kwargs={"r": 13}),
        _mixed(6, 1024, **_HALO3), _mixed(3, 2048, **_BOT),
        stem_pool="", act_layer="silu", self_attn_layer=None,
    ),
    "halo2botnet50ts": _halo_cfg(
        _bottle(3, 256, 1), _mixed(4, 512, **_HALO3), _mixed(6, 1024, **_HALO3), _mixed(3, 2048, **_BOT),
        stem_pool="", act_layer="silu", self_attn_layer=None,
    ),
}  # fmt: skip

_RELEASES = "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-attn-weights/"


def _cfg(name: str = "", file: str = "", **kwargs: Any) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        "hf_hub_id": f"timm/{name}" if name else None,
        "input_size": (3, 256, 256),
        "min_input_size": (3, 32, 32),
        "pool_size": (8, 8),
        "crop_pct": 0.95,
        "first_conv": "stem.conv1.conv",
        "classifier": "head.fc",
        "license": "apache-2.0",
        "paper_name": "Scaling Local Self-Attention for Parameter Efficient Visual Backbones",
        "paper_ids": ("arXiv:2103.12731",),
        "origin_url": "https://github.com/huggingface/pytorch-image-models",
    }
    return published_cfg(_RELEASES + file if file else "", **{**defaults, **kwargs})


default_cfgs = generate_default_cfgs({
    "zoo_halonet_h1.untrained": _cfg(params="8.1M"),
    "zoo_halonet26t.a1h_in1k": _cfg(
        "halonet26t.a1h_in1k", "halonet26t_a1h_256-3083328c.pth", top1=79.134, params="12.48M", flops="3.19G",
    ),
    "zoo_sehalonet33ts.ra2_in1k": _cfg(
        "sehalonet33ts.ra2_in1k", "sehalonet33ts_256-87e053f9.pth", top1=80.976, params="13.69M", flops="3.55G",
        crop_pct=0.94,
    ),
    "zoo_halonet50ts.a1h_in1k": _cfg(
        "halonet50ts.a1h_in1k", "halonet50ts_a1h2_256-f3a3daee.pth", top1=81.640, params="22.73M", flops="5.30G",
        crop_pct=0.94,
    ),
    "zoo_eca_halonext26ts.c1_in1k": _cfg(
        "eca_halonext26ts.c1_in1k", "eca_halonext26ts_c_256-06906299.pth", top1=79.518, params="10.76M", flops="2.44G",
        crop_pct=0.94,
    ),
    "zoo_haloregnetz_b.ra3_in1k": _cfg(
        "haloregnetz_b.ra3_in1k", "haloregnetz_c_raa_256-c8ad7616.pth", top1=81.058, params="11.68M", flops="1.97G",
        mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), first_conv="stem.conv", input_size=(3, 224, 224), pool_size=(7, 7),
        crop_pct=0.94,
    ),
    "zoo_lamhalobotnet50ts_256.a1h_in1k": _cfg(
        "lamhalobotnet50ts_256.a1h_in1k", "lamhalobotnet50ts_a1h2_256-fe3d9445.pth", top1=81.552, params="22.57M",
        flops="5.02G",
    ),
    "zoo_halo2botnet50ts_256.a1h_in1k": _cfg(
        "halo2botnet50ts_256.a1h_in1k", "halo2botnet50ts_a1h2_256-fd9c11a3.pth", top1=82.084, params="22.64M",
        flops="5.02G",
    ),
})  # fmt: skip


def _create(variant: str, model: str, pretrained: bool, **kwargs: Any) -> HaloNet:
    return build_model(
        HaloNet,
        variant,
        pretrained,
        filter_fn=checkpoint_filter_fn,
        model_cfg=_MODELS[model],
        feature_cfg={"out_indices": (0, 1, 2, 3, 4), "feature_cls": ListedFeatures, "flatten_sequential": True},
        **kwargs,
    )


@register_model
def zoo_halonet_h1(pretrained: bool = False, **kwargs: Any) -> HaloNet:
    return _create("zoo_halonet_h1", "halonet_h1", pretrained, **kwargs)


@register_model
def zoo_halonet26t(pretrained: bool = False, **kwargs: Any) -> HaloNet:
    return _create("zoo_halonet26t", "halonet26t", pretrained, **kwargs)


@register_model
def zoo_sehalonet33ts(pretrained: bool = False, **kwargs: Any) -> HaloNet:
    return _create("zoo_sehalonet33ts", "sehalonet33ts", pretrained, **kwargs)


@register_model
def zoo_halonet50ts(pretrained: bool = False, **kwargs: Any) -> HaloNet:
    return _create("zoo_halonet50ts", "halonet50ts", pretrained, **kwargs)


@register_model
def zoo_eca_halonext26ts(pretrained: bool = False, **kwargs: Any) -> HaloNet:
    return _create("zoo_eca_halonext26ts", "eca_halonext26ts", pretrained, **kwargs)


@register_model
def zoo_haloregnetz_b(pretrained: bool = False, **kwargs: Any) -> HaloNet:
    return _create("zoo_haloregnetz_b", "haloregnetz_b", pretrained, **kwargs)


@register_model
def zoo_lamhalobotnet50ts_256(pretrained: bool = False, **kwargs: Any) -> HaloNet:
    return _create("zoo_lamhalobotnet50ts_256", "lamhalobotnet50ts", pretrained, **{"img_size": 256, **kwargs})


@register_model
def zoo_halo2botnet50ts_256(pretrained: bool = False, **kwargs: Any) -> HaloNet:
    return _create("zoo_halo2botnet50ts_256", "halo2botnet50ts", pretrained, **{"img_size": 256, **kwargs})

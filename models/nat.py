"""NAT and DiNAT: Neighborhood Attention Transformer and its dilated form.

Papers: "Neighborhood Attention Transformer" (CVPR 2023), https://arxiv.org/abs/2204.07143
        "Dilated Neighborhood Attention Transformer", https://arxiv.org/abs/2209.15001
Original: https://github.com/SHI-Labs/Neighborhood-Attention-Transformer (classification/nat.py, dinat.py; MIT).

Numbers are the original's. What differs:
- `forward_features` gives the normed map, NCHW; pooling belongs to the head;
- `drop_rate` is the dropout before the classifier only, `proj_drop_rate` that of the projections and MLPs;
- `kernel_size` and `dilations` may differ from stage to stage, and `dilations` may be shorter than a stage.

Any image size is accepted: a map smaller than kernel_size x dilation is zero-padded inside the attention.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.fx
import torch.nn.functional as F
from timm.layers import LayerScale, Mlp, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.ops.maps import crop_map, pad_map
from zoo.ops.neighborhood.reference import axis_windows
from zoo.ops.scriptable import neighborhood_attention_qkvpacked

from ._build import build_model, published_cfg
from ._pyramid import DropPath, NormLayer, Pyramid, Stage, init_linear, stage_rates
from ._tables import check_image_size, is_size
from .dialects import OURS, Dialect, moved_by, rename

__all__ = ["NAT"]

torch.fx.wrap("_attend_and_drop")  # its windows depend on the size

Dilations = int | Sequence[int | Sequence[int]] | None


class NeighborhoodAttention(nn.Module):
    """Neighborhood attention with its projections on [B, H, W, C].

    A map smaller than kernel_size * dilation is zero-padded to that size on the right and bottom before the
    projections, so that the padding has the bias of qkv for key and value and is attended to (natten 0.15.1,
    natten2d.py). Parameters are named as in natten: qkv, rpb, proj.

    Args:
        dim: channels.
        num_heads: attention heads.
        kernel_size: keys per axis.
        dilation: distance in tokens between keys.
        qkv_bias: whether the qkv projection has a bias.
        qk_scale: factor of the scores; head_dim ** -0.5 unless given.
        attn_drop: dropout of the attention weights in training, which takes a slower plain PyTorch path.
        proj_drop: dropout after the output projection.
        attn_backend: path of the op, None chooses.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int,
        dilation: int = 1,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        attn_backend: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not divisible by num_heads {num_heads}")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.scale = float(qk_scale) if qk_scale else self.head_dim**-0.5
        self.attn_drop = attn_drop
        self.attn_backend = attn_backend
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.rpb = nn.Parameter(torch.zeros(num_heads, 2 * kernel_size - 1, 2 * kernel_size - 1, **dd))
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        trunc_normal_(self.rpb, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        _, H, W, _ = x.shape
        kernel, dilation = self.kernel_size, self.dilation
        qkv = self.qkv(pad_map(x, least=kernel * dilation)).unflatten(-1, (3, self.num_heads, self.head_dim))
        if self.training and self.attn_drop > 0.0:
            x = _attention_with_dropout(qkv, self.rpb, kernel, dilation, self.scale, self.attn_drop)
        else:
            x = neighborhood_attention_qkvpacked(
                qkv, kernel, dilation=dilation, bias=self.rpb, scale=self.scale, backend=self.attn_backend
            )
        return self.proj_drop(self.proj(crop_map(x.flatten(3), H, W)))


def _attention_with_dropout(
    qkv: Tensor, bias: Tensor, kernel_size: int, dilation: int, scale: float, drop: float
) -> Tensor:
    if torch.jit.is_scripting():
        raise NotImplementedError("attention dropout is not available in TorchScript")
    return _attend_and_drop(qkv, bias, kernel_size, dilation, scale, drop)


@torch.jit.ignore
def _attend_and_drop(qkv: Tensor, bias: Tensor, kernel_size: int, dilation: int, scale: float, drop: float) -> Tensor:
    """neighborhood_attention whose weights, which the op never forms, go through dropout."""
    q, k, v = qkv.unbind(3)  # (B, H, W, nh, d)
    keys, offsets = [], []
    for axis, shape in ((1, (-1, 1, kernel_size, 1)), (2, (1, -1, 1, kernel_size))):
        key, offset, _ = axis_windows(q.shape[axis], kernel_size, dilation, 1, False, q.device)
        keys.append(key.reshape(shape))
        offsets.append(offset.reshape(shape))
    k, v = (x[:, keys[0], keys[1]].flatten(3, 4) for x in (k, v))  # (B, H, W, keys, nh, d)
    logits = torch.einsum("bhwnd,bhwknd->bhwnk", q * scale, k)
    logits = logits + bias[:, offsets[0], offsets[1]].flatten(3).permute(1, 2, 0, 3)  # (H, W, nh, keys)
    return torch.einsum("bhwnk,bhwknd->bhwnd", F.dropout(logits.softmax(-1), drop).to(v.dtype), v)


class Block(nn.Module):
    """Attention and MLP on [B, H, W, C], pre-norm, each branch with stochastic depth and, if asked, layer scale."""

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float = 4.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        norm_layer: NormLayer = nn.LayerNorm,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm1 = norm_layer(dim, **dd)
        self.attn = attn
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale, **dd)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class ConvTokenizer(nn.Module):
    """Two 3x3 convolutions of stride 2 with nothing between them, and a norm: [B, C, H, W] to [B, H/4, W/4, dim]."""

    def __init__(
        self, in_chans: int, dim: int, norm_layer: NormLayer = nn.LayerNorm, device: Any = None, dtype: Any = None
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.patch_size = 4
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


def per_stage(name: str, value: int | Sequence[int], stages: int) -> list[int]:
    """One positive int per stage from an int or a sequence.

    Raises:
        ValueError: there is not one value per stage, or one is no positive int.
    """
    values = list(value) if isinstance(value, Sequence) else [value] * stages
    if len(values) != stages or not all(map(is_size, values)):
        raise ValueError(f"{name} must be a positive int or {stages} of them, one per stage; got {value!r}")
    return values


def per_block(dilations: Dilations, depths: Sequence[int]) -> list[list[int]]:
    """The dilation of every block of every stage.

    Args:
        dilations: None (no dilation), an int for all blocks, or for each stage an int or a sequence, which is repeated
            over the stage's blocks: (1, 8) in a stage of three blocks means 1, 8, 1.
        depths: blocks of each stage.

    Raises:
        ValueError: there is not one entry per stage, or a value is no positive int.
    """
    common = 1 if dilations is None else dilations
    entries = list(common) if isinstance(common, Sequence) else [common] * len(depths)
    patterns = [list(entry) if isinstance(entry, Sequence) else [entry] for entry in entries]
    if len(patterns) != len(depths) or not all(p and all(map(is_size, p)) for p in patterns):
        raise ValueError(
            f"dilations must be None, a positive int, or for each of the {len(depths)} stages a positive int or a "
            f"sequence of them; got {dilations!r}"
        )
    return [[pattern[i % len(pattern)] for i in range(depth)] for pattern, depth in zip(patterns, depths, strict=True)]


def resize_table(table: Tensor, height: int, width: int) -> Tensor:
    """Bicubic interpolation of a [heads, ., .] bias table, as Swin does; offset 0 stays in the middle."""
    dtype = torch.float64 if table.dtype == torch.float64 else torch.float32
    resized = F.interpolate(table.to(dtype).unsqueeze(0), size=[height, width], mode="bicubic", align_corners=False)
    return resized.squeeze(0).to(table.dtype)


class NAT(Pyramid):
    """Neighborhood Attention Transformer.

    Args:
        in_chans: channels of the image.
        num_classes: classes; 0 leaves the classifier out.
        global_pool: timm's pooling names; "" keeps the map.
        img_size: the image size in pixels that the model is meant for; recorded only, every size runs.
        embed_dim: channels of the first stage; each further stage has twice as many.
        depths: blocks of each stage.
        num_heads: attention heads of each stage.
        kernel_size: keys per axis and query, an int or one per stage.
        dilations: None, an int, or for each stage an int or a sequence that is repeated over its blocks.
        mlp_ratio: hidden width of the MLP over its input's.
        qkv_bias: whether the qkv projections have a bias.
        qk_scale: factor of the scores; head_dim ** -0.5 unless given.
        layer_scale: start value of learned factors of the residual branches; None leaves them out.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout after the attention projections and in the MLPs.
        attn_drop_rate: dropout of the attention weights.
        drop_path_rate: stochastic depth, growing linearly to this rate at the last block.
        norm_layer: norm over the last dimension.
        embed_layer: the stem, from (B, C, H, W) to (B, H/p, W/p, embed_dim), where p is its `patch_size`.
        downsample_layer: between two stages, from C to 2 C channels on half the map.
        attn_backend: path of the op, None chooses.

    Raises:
        ValueError: depths, num_heads, kernel_size, dilations or img_size do not fit.
    """

    channels_last = True
    out_norms = (0, 1, 2, 3)
    no_decay = (".rpb",)

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
        embed_layer: Callable[..., nn.Module] = ConvTokenizer,
        downsample_layer: Callable[..., nn.Module] = ConvDownsampler,
        attn_backend: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        dims = [embed_dim * 2**i for i in range(len(depths))]
        super().__init__(in_chans, dims[-1])
        self.img_size = None if img_size is None else check_image_size(img_size)
        num_heads = per_stage("num_heads", num_heads, len(depths))
        kernel_sizes = per_stage("kernel_size", kernel_size, len(depths))
        block_dilations = per_block(dilations, depths)
        rates = stage_rates(drop_path_rate, depths)

        self.stem = embed_layer(in_chans, embed_dim, norm_layer=norm_layer, **dd)
        stages = []
        downsample: nn.Module | None = None
        for i, dim in enumerate(dims):
            # the next one is drawn before this stage's blocks: what a seed has meant all along
            following = downsample_layer(dim, norm_layer=norm_layer, **dd) if i + 1 < len(dims) else None
            blocks = []
            for dilation, rate in zip(block_dilations[i], rates[i], strict=True):
                attn = NeighborhoodAttention(
                    dim, num_heads[i], kernel_sizes[i], dilation, qkv_bias, qk_scale,
                    attn_drop_rate, proj_drop_rate, attn_backend, **dd,
                )  # fmt: skip
                blocks.append(Block(dim, attn, mlp_ratio, proj_drop_rate, rate, layer_scale, norm_layer, **dd))
            stages.append(Stage(blocks, downsample))
            downsample = following
        self.add_stages(stages, dims, cast(int, self.stem.patch_size))
        self.norm = norm_layer(self.num_features, **dd)
        self.add_head(num_classes, global_pool, drop_rate, **dd)
        self.apply(init_linear)


def original(stages: str) -> Dialect:
    """The original's names, which end a stage with its downsampling; DiNAT_s calls the stages otherwise."""
    return Dialect(
        "the original",
        (
            (r"^stem\.", "patch_embed."),
            (r"^stages\.(\d+)\.downsample\.", moved_by(-1, "stages.{}.downsample.")),
            (r"^stages\.(\d+)\.out_norm\.", r"norm\1."),
            (r"^stages\.", f"{stages}."),
            (r"\.ls([12])\.gamma$", r".gamma\1"),
            (r"^head\.fc\.", "head."),
        ),
    )


_TRANSFORMERS = (
    (r"^stem\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^stem\.", "embeddings."),
    (r"^stages\.(\d+)\.downsample\.", moved_by(-1, "encoder.levels.{}.downsample.")),
    (r"^stages\.(\d+)\.out_norm\.", moved_by(1, "hidden_states_norms.stage{}.")),
    (r"^stages\.(\d+)\.blocks\.", r"encoder.levels.\1.layers."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.rpb$", ".attention.self.rpb"),
    (r"\.attn\.qkv\.", ".attention.self.{query,key,value}."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"\.ls1\.gamma$", ".layer_scale_parameters[0]"),
    (r"\.ls2\.gamma$", ".layer_scale_parameters[1]"),
    (r"^norm\.", "layernorm."),
    (r"^head\.fc\.", "classifier."),
)

DIALECTS = (
    OURS,
    original("levels"),
    *(
        Dialect(
            f"transformers' {name.capitalize()}ForImageClassification",
            (*_TRANSFORMERS, (r"^(?!classifier)", f"{name}.")),
        )
        for name in ("nat", "dinat")
    ),
    Dialect("transformers' NatModel and NatBackbone", _TRANSFORMERS),
)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Any dialect's names to ours; bias tables of another kernel or map size are resized."""
    renamed = rename(state_dict, model)
    own = {name: tensor.shape for name, tensor in model.state_dict().items() if name.endswith("attn.rpb")}
    return {
        name: resize_table(value, own[name][1], own[name][2])
        if value.dim() == 3 and own.get(name, value.shape) != value.shape
        else value
        for name, value in renamed.items()
    }


def _cfg(path: str, size: int = 224, **kwargs: Any) -> dict[str, Any]:
    dilated = path.startswith("dinat/")
    defaults: dict[str, Any] = {
        "input_size": (3, size, size),
        "pool_size": (size // 32, size // 32),
        "crop_pct": 0.875 if size == 224 else 1.0,
        "first_conv": "stem.proj.0",
        "classifier": "head.fc",
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

# repeated over the blocks of each stage
_224 = ((1, 8), (1, 4), (1, 2), 1)
_384 = ((1, 13), (1, 6), (1, 3), 1)


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any], args: dict[str, Any], **more: Any) -> NAT:
    return build_model(NAT, variant, pretrained, filter_fn=checkpoint_filter_fn, **{**args, **more, **kwargs})


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

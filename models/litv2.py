"""LITv2: fast vision transformers with HiLo attention.

Paper: "Fast Vision Transformers with HiLo Attention" (NeurIPS 2022), https://arxiv.org/abs/2205.13213
Original: https://github.com/ziplab/LITv2 (Apache-2.0), classification/models and the detection and segmentation
backbones beside it.

Numbers and parameter names are the original's. What differs:
- any image size is accepted, with the semantics of the dense backbones: the image is zero-padded to the patch size,
  HiLo pads its normalised input with zeros that are attended to, and the deformable token merging floors odd maps. At
  the sizes that the original classifier accepts nothing is padded and both agree;
- `dense=True` is the detection backbone (norms on the outputs of stages 2 to 4, none on the first), and
  `dense=True, dense_norms=(0, 1, 2, 3)` the segmentation backbone; `local_ws=4` gives their larger windows. Use them
  with `features_only=True`. Their `norm0` .. `norm3` are `out_norms.0` .. `out_norms.3` here; a detector's file is read
  by its `backbone.` entries;
- the deformable convolution is torchvision's and takes any batch size; bfloat16 and float16 maps are sampled in
  float32. Published recipes train its offsets (`conv_offset`) at 0.01 of the learning rate.

The published ablation checkpoints of LITv2-S (alpha_0.pth to alpha_1.pth in release v1.1 of the repository) fit
`litv2_s` with `alpha=` 0, 0.2, 0.4, 0.5, 0.7, 0.9 or 1.
"""

import re
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import DropPath, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model, register_notrace_module
from timm.models._features import feature_take_indices
from torch import Tensor
from torchvision import ops as _torchvision_ops  # noqa: F401  (registers torch.ops.torchvision)

from zoo.ops.window import window_attention_qkvpacked

from ._build import build_model, published_cfg
from ._layers import Classifier, Stage, init_linear

__all__ = ["LITv2"]


class PatchEmbed(nn.Module):
    """4x4 convolution of stride 4 and a LayerNorm; the image is zero-padded to a multiple of 4."""

    def __init__(self, in_chans: int, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, 4, 4, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        _, _, H, W = x.shape
        x = F.pad(x, (0, (4 - W % 4) % 4, 0, (4 - H % 4) % 4))
        return self.norm(self.proj(x).permute(0, 2, 3, 1))  # (B, H, W, C)


class DWConv(nn.Module):
    """Depthwise 3x3 convolution of [B, H, W, C]."""

    def __init__(self, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.dwconv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class DWMlp(nn.Module):
    """fc1 - depthwise 3x3 - GELU - fc2."""

    def __init__(
        self, dim: int, hidden_dim: int, proj_drop: float = 0.0, device: Any = None, dtype: Any = None
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim, **dd)
        self.dwconv = DWConv(hidden_dim, **dd)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim, **dd)
        self.drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.act(self.dwconv(self.fc1(x)))))


@register_notrace_module  # padding depends on sizes, and TorchScript needs the branch for the op
class HiLo(nn.Module):
    """HiLo attention on [B, H, W, C]: some heads attend inside windows, the others to window averages.

    int(num_heads * alpha) heads are Lo-Fi, the rest Hi-Fi; the outputs are concatenated, Hi-Fi first. Windows of one
    token make every head Lo-Fi without averaging: global attention. Maps that are no multiple of the window are padded
    with zeros, which take part in windows and averages.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        alpha: float = 0.9,
        qkv_bias: bool = True,
        attn_backend: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"HiLo: num_heads {num_heads} does not divide {dim} channels")
        if not 0 <= alpha <= 1:
            raise ValueError(f"HiLo: alpha must be between 0 and 1, got {alpha}")
        if window_size < 1:
            raise ValueError(f"HiLo: window_size must be at least 1, got {window_size}")
        self.head_dim = dim // num_heads
        self.window_size = window_size
        self.attn_backend = attn_backend
        self.script_backend = attn_backend or "auto"
        self.l_heads = num_heads if window_size == 1 else int(num_heads * alpha)
        self.h_heads = num_heads - self.l_heads
        l_dim, h_dim = self.l_heads * self.head_dim, self.h_heads * self.head_dim
        low, high = self.l_heads > 0, self.h_heads > 0
        self.l_q = nn.Linear(dim, l_dim, bias=qkv_bias, **dd) if low else nn.Identity()
        self.l_kv = nn.Linear(dim, 2 * l_dim, bias=qkv_bias, **dd) if low else nn.Identity()
        self.l_proj = nn.Linear(l_dim, l_dim, **dd) if low else nn.Identity()
        self.h_qkv = nn.Linear(dim, 3 * h_dim, bias=qkv_bias, **dd) if high else nn.Identity()
        self.h_proj = nn.Linear(h_dim, h_dim, **dd) if high else nn.Identity()

    def hifi(self, x: Tensor) -> Tensor:
        B, H, W, _ = x.shape
        ws = self.window_size
        qkv = self.h_qkv(x).reshape(B, H, W, 3, self.h_heads, self.head_dim)
        if torch.jit.is_scripting():
            scale, backend = self.head_dim**-0.5, self.script_backend
            x, _ = torch.ops.zoo.window_attention_qkvpacked(qkv, None, ws, ws, 0, 0, False, scale, backend)
        else:
            x = window_attention_qkvpacked(qkv, ws, backend=self.attn_backend)
        return self.h_proj(x.flatten(3))

    def lofi(self, x: Tensor, H: int, W: int) -> Tensor:
        """Only the H x W tokens that are no padding ask; the averages see all."""
        B, Hp, Wp, C = x.shape
        ws = self.window_size
        q = self.l_q(x[:, :H, :W]).reshape(B, H * W, self.l_heads, self.head_dim).transpose(1, 2)
        if ws > 1:
            x = x.reshape(B, Hp // ws, ws, Wp // ws, ws, C).mean((2, 4))
        N = x.shape[1] * x.shape[2]
        kv = self.l_kv(x).reshape(B, N, 2, self.l_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        k, v = kv.unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)  # (B, nh, N, d)
        return self.l_proj(x.transpose(1, 2).reshape(B, H, W, self.l_heads * self.head_dim))

    def forward(self, x: Tensor) -> Tensor:
        _, H, W, _ = x.shape
        ws = self.window_size
        pad_h, pad_w = (ws - H % ws) % ws, (ws - W % ws) % ws
        if pad_h > 0 or pad_w > 0:
            x = F.pad(x, (0, 0, 0, pad_w, 0, pad_h))
        if self.h_heads == 0:
            return self.lofi(x, H, W)
        high = self.hifi(x)[:, :H, :W]
        if self.l_heads == 0:
            return high
        return torch.cat((high, self.lofi(x, H, W)), dim=-1)


class Block(nn.Module):
    """HiLo attention and a convolutional MLP, each residual; without attention (num_heads 0) the MLP alone."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        alpha: float = 0.9,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        attn_backend: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.has_attn = num_heads > 0
        attn_args = (dim, num_heads, window_size, alpha, qkv_bias, attn_backend)
        self.norm1 = nn.LayerNorm(dim, **dd) if self.has_attn else nn.Identity()
        self.attn = HiLo(*attn_args, **dd) if self.has_attn else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = DWMlp(dim, int(dim * mlp_ratio), proj_drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.has_attn:
            x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


@register_notrace_module  # the dtype decides how it runs
class DeformConv2dPack(nn.Module):
    """Deformable 2x2 convolution of stride 2 that predicts its own offsets, (dy, dx) for each tap."""

    def __init__(self, dim: int, out_dim: int, device: Any = None, dtype: Any = None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_dim, dim, 2, 2, **dd))
        self.bias = nn.Parameter(torch.zeros(out_dim, **dd))
        self.conv_offset = nn.Conv2d(dim, 8, 2, 2, **dd)
        bound = (4 * dim) ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.zeros_(self.conv_offset.weight)
        nn.init.zeros_(cast(Tensor, self.conv_offset.bias))

    def forward(self, x: Tensor) -> Tensor:
        # torchvision has no bfloat16 kernel, and positions need more digits than half precision has.
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        offset = self.conv_offset(x).to(dtype)
        y = torch.ops.torchvision.deform_conv2d(
            x.to(dtype),
            self.weight.to(dtype),
            offset,
            offset.new_zeros(x.shape[0], 1),  # unused: the mask of the modulated form
            self.bias.to(dtype),
            2, 2, 0, 0, 1, 1, 1, 1, False,
        )  # fmt: skip
        return y.to(x.dtype)


class DTM(nn.Module):
    """Deformable token merging: deformable convolution, batch norm, GELU; odd maps lose their last row or column."""

    def __init__(self, dim: int, out_dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.dconv = DeformConv2dPack(dim, out_dim, device=device, dtype=dtype)
        self.norm_layer = nn.BatchNorm2d(out_dim, device=device, dtype=dtype)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.dconv(x.permute(0, 3, 1, 2))
        return self.act(self.norm_layer(x)).permute(0, 2, 3, 1)


class LITv2(Classifier):
    """Vision transformer with HiLo attention in its last stages and convolutional MLPs in its first.

    Args:
        in_chans: channels of the image.
        num_classes: classes; 0 leaves the classifier out.
        global_pool: timm's pooling names; "" keeps the map.
        embed_dim: channels of the first stage, doubled at each further one.
        depths: blocks of each stage.
        num_heads: attention heads of each stage, where it has attention.
        has_msa: for each stage, whether its blocks have attention.
        alpha: share of Lo-Fi heads, 0 to 1.
        local_ws: window of each stage, 1 for global attention; a single int is the third stage's.
        mlp_ratio: hidden width of the MLP over its input's.
        qkv_bias: whether the attention projections have a bias.
        dense: a dense backbone: no final norm, the stages named by `dense_norms` have norms on their outputs.
        dense_norms: stages with a norm on their output, for dense backbones.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout after the MLPs.
        drop_path_rate: stochastic depth, growing linearly to this rate at the last block.
        attn_backend: path of the window attention op, None chooses.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: tuple[int, ...] = (2, 2, 6, 2),
        num_heads: tuple[int, ...] = (3, 6, 12, 24),
        has_msa: tuple[bool, ...] = (False, False, True, True),
        alpha: float = 0.9,
        local_ws: int | Sequence[int] = (0, 0, 2, 1),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        dense: bool = False,
        dense_norms: Sequence[int] = (1, 2, 3),
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        attn_backend: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        windows = (0, 0, local_ws, 1) if isinstance(local_ws, int) else tuple(local_ws)
        dims = [embed_dim * 2**i for i in range(len(depths))]
        self.in_chans = in_chans
        self.num_features = dims[-1]
        self.feature_info: list[dict[str, Any]] = []

        self.patch_embed = PatchEmbed(in_chans, embed_dim, **dd)
        rates = cast(list[list[float]], calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True))
        stages = []
        for i, dim in enumerate(dims):
            blocks = [
                Block(
                    dim,
                    num_heads=num_heads[i] if has_msa[i] else 0,
                    window_size=windows[i],
                    alpha=alpha,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    proj_drop=proj_drop_rate,
                    attn_backend=attn_backend,
                    drop_path=rate,
                    **dd,
                )
                for rate in rates[i]
            ]
            last = i + 1 == len(dims)
            stages.append(Stage(blocks, None if last else DTM(dim, dims[i + 1], **dd)))
            self.feature_info.append({"num_chs": dim, "reduction": 2 ** (i + 2), "module": f"layers.{i}.blocks"})
        self.layers = nn.Sequential(*stages)
        normed = tuple(dense_norms) if dense else ()
        self.out_norms = nn.ModuleList(
            nn.LayerNorm(dim, **dd) if i in normed else nn.Identity() for i, dim in enumerate(dims)
        )
        self.norm = nn.Identity() if dense else nn.LayerNorm(self.num_features, **dd)
        self.add_classifier(self.num_features, num_classes, global_pool, drop_rate, **dd)
        self.apply(init_linear)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = [
            (r"^layers\.(\d+)\.blocks\.(\d+)", None),
            (r"^layers\.(\d+)\.downsample", (99999,)),
            (r"^(?:norm|out_norms)\.", (99999,)),
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
        """The stages' outputs, before each token merging; those of a dense backbone with their norms.

        Args:
            x: image batch.
            indices: stages to return: the last n if an int, all if None.
            norm: apply the classifier's final norm to the last stage's output.
            stop_early: do not run the stages after the last one asked for.
            output_fmt: "NCHW".
            intermediates_only: leave the final features out.
        """
        assert output_fmt in ("NCHW",), "Output shape must be NCHW."
        intermediates: list[Tensor] = []
        take_indices, max_index = feature_take_indices(len(self.layers), indices)
        last = len(self.layers) - 1
        x = self.patch_embed(x)
        if torch.jit.is_scripting() or not stop_early:
            stages = self.layers
            out_norms = self.out_norms
        else:
            stages = self.layers[: max_index + 1]
            out_norms = self.out_norms[: max_index + 1]
        y = x
        for i, (stage, out_norm) in enumerate(zip(stages, out_norms)):  # noqa: B905  (TorchScript has no strict=)
            x = stage.forward_blocks(x)  # type: ignore[operator]
            if i in take_indices or i == last:
                y = out_norm(x)
                if i in take_indices:
                    tap = self.norm(y) if norm and i == last else y
                    intermediates.append(tap.permute(0, 3, 1, 2))
            x = stage.downsample(x)  # type: ignore[operator]
        if intermediates_only:
            return intermediates
        return self.norm(y).permute(0, 3, 1, 2), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the layers that the given stages do not need."""
        take_indices, max_index = feature_take_indices(len(self.layers), indices)
        prune_end = max_index < len(self.layers) - 1
        self.layers = self.layers[: max_index + 1]
        self.out_norms = self.out_norms[: max_index + 1]
        for i in range(max_index):
            if i not in take_indices:
                self.out_norms[i] = nn.Identity()
        if prune_norm or prune_end:
            self.norm = nn.Identity()
        if prune_end:
            self.layers[max_index].downsample = nn.Identity()
            self.num_features = self.head_dim = self.feature_info[max_index]["num_chs"]
        if prune_end or prune_head:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.layers(self.patch_embed(x))
        return self.norm(self.out_norms[-1](x)).permute(0, 3, 1, 2)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Published keys to ours, a detector's or segmentor's file reduced to its backbone; our own keys pass unchanged."""
    backbone = {k.removeprefix("backbone."): v for k, v in state_dict.items() if k.startswith("backbone.")}
    return {re.sub(r"^norm(\d)\.", r"out_norms.\1.", k): v for k, v in (backbone or state_dict).items()}


def _cfg(name: str, **kwargs: Any) -> dict[str, Any]:
    return published_cfg(
        f"https://github.com/ziplab/LITv2/releases/download/v1.0/{name}.pth",
        first_conv="patch_embed.proj",
        classifier="head",
        license="apache-2.0",
        paper_name="Fast Vision Transformers with HiLo Attention",
        paper_ids=("arXiv:2205.13213",),
        origin_url="https://github.com/ziplab/LITv2",
        **kwargs,
    )


_384: dict[str, Any] = {"input_size": (3, 384, 384), "pool_size": (12, 12), "crop_pct": 1.0, "crop_mode": "squash"}
default_cfgs = generate_default_cfgs(
    {
        "litv2_s.in1k": _cfg("litv2_s", top1=82.0, params="28M", flops="3.7G"),
        "litv2_m.in1k": _cfg("litv2_m", top1=83.3, params="49M", flops="7.5G"),
        "litv2_b.in1k": _cfg("litv2_b", top1=83.6, params="87M", flops="13.2G"),
        "litv2_b_384.in1k": _cfg("litv2_b_384", top1=84.7, params="87M", flops="39.7G", **_384),
    }
)

_SMALL: dict[str, Any] = {}
_MEDIUM: dict[str, Any] = {"depths": (2, 2, 18, 2)}
_BASE: dict[str, Any] = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}


def _create(variant: str, pretrained: bool, args: dict[str, Any], kwargs: dict[str, Any]) -> LITv2:
    if kwargs.get("dense"):
        kwargs.setdefault("num_classes", 0)  # published dense backbones have no classifier
    model = build_model(LITv2, variant, pretrained, filter_fn=checkpoint_filter_fn, **dict(args, **kwargs))
    return cast(LITv2, model)


@register_model
def litv2_s(pretrained: bool = False, **kwargs: Any) -> LITv2:
    return _create("litv2_s", pretrained, _SMALL, kwargs)


@register_model
def litv2_m(pretrained: bool = False, **kwargs: Any) -> LITv2:
    return _create("litv2_m", pretrained, _MEDIUM, kwargs)


@register_model
def litv2_b(pretrained: bool = False, **kwargs: Any) -> LITv2:
    return _create("litv2_b", pretrained, _BASE, kwargs)


@register_model
def litv2_b_384(pretrained: bool = False, **kwargs: Any) -> LITv2:
    return _create("litv2_b_384", pretrained, _BASE, kwargs)

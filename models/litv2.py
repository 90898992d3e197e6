"""LITv2: fast vision transformers with HiLo attention.

Paper: "Fast Vision Transformers with HiLo Attention" (NeurIPS 2022), https://arxiv.org/abs/2205.13213
Original: https://github.com/ziplab/LITv2 (Apache-2.0), classification/models and the detection and segmentation
backbones beside it.

Numbers are the original's. What differs:
- any image size is accepted, with the semantics of the dense backbones: the image is zero-padded to the patch size,
  HiLo pads its normalised input with zeros that are attended to, and the deformable token merging floors odd maps. At
  the sizes that the original classifier accepts nothing is padded and both agree;
- `dense=True` is the detection backbone (norms on the outputs of stages 2 to 4, none on the first), and
  `dense=True, dense_norms=(0, 1, 2, 3)` the segmentation backbone; `local_ws=4` gives their larger windows. Use them
  with `features_only=True`. A detector's file is read by its `backbone.` entries;
- the deformable convolution takes any batch size; bfloat16 and float16 maps are sampled in float32. Published recipes
  train its offsets (`conv_offset`) at 0.01 of the learning rate.

The published ablation checkpoints of LITv2-S (alpha_0.pth to alpha_1.pth in release v1.1 of the repository) fit
`litv2_s` with `alpha=` 0, 0.2, 0.4, 0.5, 0.7, 0.9 or 1.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from torch import Tensor

from zoo.ops.maps import crop_map, pad_map
from zoo.ops.scriptable import window_attention_qkvpacked

from ._build import build_model, published_cfg
from ._modules import DWMlp
from ._pyramid import DropPath, PatchEmbed, Pyramid, Stage, init_linear, stage_rates
from .dialects import OURS, Dialect, moved_by, rename

__all__ = ["LITv2"]

torch.fx.wrap("deform_conv")  # the dtype decides how it runs


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
        x = window_attention_qkvpacked(qkv, ws, backend=self.attn_backend)
        return self.h_proj(x.flatten(3))

    def lofi(self, x: Tensor, H: int, W: int) -> Tensor:
        """Only the H x W tokens that are no padding ask; the averages see all."""
        B = x.shape[0]
        ws = self.window_size
        q = self.l_q(crop_map(x, H, W)).reshape(B, H * W, self.l_heads, self.head_dim).transpose(1, 2)
        if ws > 1:
            x = F.avg_pool2d(x.permute(0, 3, 1, 2), ws).permute(0, 2, 3, 1)
        N = x.shape[1] * x.shape[2]
        kv = self.l_kv(x).reshape(B, N, 2, self.l_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        k, v = kv.unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)  # (B, nh, N, d)
        return self.l_proj(x.transpose(1, 2).reshape(B, H, W, self.l_heads * self.head_dim))

    def forward(self, x: Tensor) -> Tensor:
        _, H, W, _ = x.shape
        ws = self.window_size
        x = pad_map(x, ws)
        if self.h_heads == 0:
            return self.lofi(x, H, W)
        high = crop_map(self.hifi(x), H, W)
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
        return deform_conv(x, self.conv_offset(x), self.weight, self.bias)


def deform_conv(x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Deformable 2x2 convolution of stride 2: the map sampled where the taps are moved to, bilinear and zero outside of
    it, then a 1x1 convolution.

    It is sampled in float32 or float64, for positions need more digits than half precision has, and by PyTorch's own
    sampler: faster than torchvision's convolution (`python -m benchmarks.deform`), known to `torch.func`, and an offset
    that is no number gives no number, where torchvision's reads outside of its memory.

    Args:
        x: [B, C, H, W].
        offset: [B, 8, h, w], (dy, dx) of each tap in pixels, the taps of the upper row first.
        weight: [O, C, 2, 2].
        bias: [O].
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    image, offset = x.to(dtype), offset.to(dtype)
    rows = 2 * torch.arange(offset.shape[2], device=x.device, dtype=dtype)
    columns = 2 * torch.arange(offset.shape[3], device=x.device, dtype=dtype)
    height = torch.scalar_tensor(x.shape[2], device=x.device, dtype=dtype)
    width = torch.scalar_tensor(x.shape[3], device=x.device, dtype=dtype)
    grids = []
    for tap in range(4):
        down = offset[:, 2 * tap] + (rows + tap // 2).unsqueeze(1)
        right = offset[:, 2 * tap + 1] + (columns + tap % 2)
        # -1 and 1 are the outer edges of the outer pixels
        grids.append(torch.stack(((2 * right + 1) / width - 1, (2 * down + 1) / height - 1), -1))
    found = F.grid_sample(image, torch.cat(grids, 1), align_corners=False).to(x.dtype)  # one tap above the other
    found = torch.cat([found.narrow(2, tap * offset.shape[2], offset.shape[2]) for tap in range(4)], 1)
    return F.conv2d(found, weight.permute(0, 2, 3, 1).flatten(1)[:, :, None, None], bias)


class DTM(nn.Module):
    """Deformable token merging: deformable convolution, batch norm, GELU; odd maps lose their last row or column."""

    def __init__(self, dim: int, out_dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.dconv = DeformConv2dPack(dim, out_dim, device=device, dtype=dtype)
        self.norm = nn.BatchNorm2d(out_dim, device=device, dtype=dtype)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.dconv(x.permute(0, 3, 1, 2))
        return self.act(self.norm(x)).permute(0, 2, 3, 1)


class LITv2(Pyramid):
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

    channels_last = True
    out_norms = (1, 2, 3)
    slow_parameters = {"dconv.conv_offset": 0.01}  # the offsets of the token merging

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
        dd = {"device": device, "dtype": dtype}
        windows = (0, 0, local_ws, 1) if isinstance(local_ws, int) else tuple(local_ws)
        dims = [embed_dim * 2**i for i in range(len(depths))]
        super().__init__(in_chans, dims[-1])
        self.stem = PatchEmbed(in_chans, embed_dim, **dd)
        stages = []
        for i, (dim, rates) in enumerate(zip(dims, stage_rates(drop_path_rate, depths), strict=True)):
            downsample = DTM(dims[i - 1], dim, **dd) if i else None
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
                for rate in rates
            ]
            out_norm = nn.LayerNorm(dim, **dd) if dense and i in dense_norms else None
            stages.append(Stage(blocks, downsample, out_norm=out_norm))
        self.add_stages(stages, dims)
        self.norm = nn.Identity() if dense else nn.LayerNorm(self.num_features, **dd)
        self.add_head(num_classes, global_pool, drop_rate, **dd)
        self.apply(init_linear)


def _original(name: str, out_norm: str) -> Dialect:
    return Dialect(
        name,
        (
            (r"^stem\.", "patch_embed."),
            (r"^stages\.(\d+)\.out_norm\.", out_norm),
            (r"\.downsample\.norm\.", ".downsample.norm_layer."),
            (r"^stages\.(\d+)\.downsample\.", moved_by(-1, "layers.{}.downsample.")),
            (r"^stages\.", "layers."),
            (r"\.dwconv\.", ".dwconv.dwconv."),
            (r"^head\.fc\.", "head."),
        ),
    )


DIALECTS = (OURS, _original("the original", r"norm\1."), _original("ours, before 0.1", r"out_norms.\1."))


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Any dialect's names to ours; of a detector's or segmentor's file the backbone."""
    return rename(state_dict, model)


def _cfg(name: str, **kwargs: Any) -> dict[str, Any]:
    return published_cfg(
        f"https://github.com/ziplab/LITv2/releases/download/v1.0/{name}.pth",
        first_conv="stem.proj",
        classifier="head.fc",
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
    return build_model(LITv2, variant, pretrained, filter_fn=checkpoint_filter_fn, **{**args, **kwargs})


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

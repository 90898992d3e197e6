"""STViT: vision transformer with super token sampling (also published as SViT).

Paper: "Vision Transformer with Super Token Sampling" (CVPR 2023), https://arxiv.org/abs/2211.11167
Original: https://github.com/hhb072/STViT (models/stvit.py; MIT by its header).

Numbers are the original's. What differs:
- the constant `unfold.weights` and `fold.weights` of every block are no parameters here; they are dropped on loading;
- 1x1 convolutions of the blocks are Linear layers; `checkpoint_filter_fn` reshapes the published ones;
- the 1x1 projection, its norm and activation are the final norm, as in timm's EfficientNet: `forward_features` gives
  their map, and `num_features` counts its channels;
- `projection=None` builds (the original fails); `num_classes=0`, `global_pool` and `features_only` work.

Any image size is accepted: maps that are no multiple of a super token are zero-padded inside the attention, as in the
original.
"""

from collections import OrderedDict
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from torch import Tensor

from zoo.ops.scriptable import super_token_mapping, super_token_sampling

from ._build import build_model, published_cfg
from ._pyramid import DropPath, Pyramid, Stage, init_linear, stage_rates
from .dialects import OURS, Dialect, moved_by, rename

__all__ = ["STViT"]


class ResDWConv(nn.Module):
    """Depthwise 3x3 convolution with a shortcut: the conditional position encoding, and the one inside the FFN."""

    def __init__(self, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class ConvFFN(nn.Module):
    """fc1 - GELU - residual depthwise 3x3 - fc2 on [B, C, H, W]; the convolution follows the activation."""

    def __init__(
        self, dim: int, hidden_dim: int, proj_drop: float = 0.0, device: Any = None, dtype: Any = None
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim, **dd)
        self.act = nn.GELU()
        self.conv = ResDWConv(hidden_dim, **dd)
        self.fc2 = nn.Linear(hidden_dim, dim, **dd)
        self.drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = self.conv(self.act(x)).permute(0, 2, 3, 1)
        return self.drop(self.fc2(x).permute(0, 3, 1, 2))


class Attention(nn.Module):
    """Global self-attention; the channels of qkv are ordered head by head: q, k, v of head 0, of head 1, ..."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, device: Any = None, dtype: Any = None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        qkv = self.qkv(x).reshape(B, H * W, self.num_heads, 3, self.head_dim).permute(3, 0, 2, 1, 4)
        q, k, v = qkv.unbind(0)  # (B, nh, N, d)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, H, W, C)
        return self.proj(x)


class StokenAttention(nn.Module):
    """Super-token attention on [B, H, W, C]; super tokens of a single pixel mean plain global attention."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        stoken_size: int,
        n_iter: int = 1,
        qkv_bias: bool = True,
        attn_backend: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.stoken_size = stoken_size
        self.n_iter = n_iter
        self.scale = dim**-0.5
        self.attn_backend = attn_backend
        self.stoken_refine = Attention(dim, num_heads, qkv_bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        size = self.stoken_size
        if size == 1:
            return self.stoken_refine(x)
        tokens, affinity = super_token_sampling(
            x, size, n_iter=self.n_iter, scale=self.scale, backend=self.attn_backend
        )
        return super_token_mapping(self.stoken_refine(tokens), affinity, size, backend=self.attn_backend)


class LayerScale(nn.Module):
    """A learned factor of every channel, of the shape (1, C, 1, 1): in this form it has weight decay, as published."""

    def __init__(self, dim: int, init_values: float, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((1, dim, 1, 1), init_values, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.gamma * x


class Block(nn.Module):
    """Position encoding, super-token attention and convolutional FFN, each residual."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        stoken_size: int,
        n_iter: int = 1,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: bool = False,
        init_values: float = 1e-6,
        attn_backend: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.pos_embed = ResDWConv(dim, **dd)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.attn = StokenAttention(dim, num_heads, stoken_size, n_iter, qkv_bias, attn_backend, **dd)
        self.norm2 = nn.BatchNorm2d(dim, **dd)
        self.mlp = ConvFFN(dim, int(dim * mlp_ratio), proj_drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.ls1 = LayerScale(dim, init_values, **dd) if layer_scale else nn.Identity()
        self.ls2 = LayerScale(dim, init_values, **dd) if layer_scale else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.pos_embed(x)
        y = self.attn(self.norm1(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        x = x + self.drop_path(self.ls1(y))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


def _stem(in_chans: int, dim: int, device: Any = None, dtype: Any = None) -> nn.Sequential:
    """Four 3x3 convolutions of strides 2, 1, 2, 1; the batch norm follows the activation."""
    layers: list[nn.Module] = []
    for out_chans, stride in ((dim // 2, 2), (dim // 2, 1), (dim, 2), (dim, 1)):
        layers.append(nn.Conv2d(in_chans, out_chans, 3, stride, 1, device=device, dtype=dtype))
        layers += [nn.GELU(), nn.BatchNorm2d(out_chans, device=device, dtype=dtype)]
        in_chans = out_chans
    return nn.Sequential(*layers)


def _downsample(dim: int, out_dim: int, device: Any = None, dtype: Any = None) -> nn.Sequential:
    """3x3 convolution of stride 2 and a batch norm."""
    dd = {"device": device, "dtype": dtype}
    return nn.Sequential(nn.Conv2d(dim, out_dim, 3, 2, 1, **dd), nn.BatchNorm2d(out_dim, **dd))


def _final_norm(dim: int, projection: int | None, device: Any = None, dtype: Any = None) -> nn.Sequential:
    """1x1 projection, batch norm and SiLU of the last map; `projection` None leaves the projection out."""
    dd = {"device": device, "dtype": dtype}
    layers: dict[str, nn.Module] = {}
    if projection is not None:
        layers["proj"] = nn.Conv2d(dim, projection, 1, **dd)
    layers["norm"] = nn.BatchNorm2d(projection or dim, **dd)
    layers["act"] = nn.SiLU()
    return nn.Sequential(OrderedDict(layers))


class STViT(Pyramid):
    """Vision transformer with super token sampling.

    Args:
        in_chans: channels of the image.
        num_classes: classes; 0 leaves the classifier out.
        global_pool: timm's pooling names; "" keeps the map.
        embed_dim: channels of each stage.
        depths: blocks of each stage.
        num_heads: attention heads of each stage.
        stoken_size: side of a super token in pixels, for each stage; 1 means global attention.
        n_iter: sampling iterations of each stage.
        mlp_ratio: hidden width of the FFN over its input's.
        qkv_bias: whether the qkv projections have a bias.
        layer_scale: for each stage, whether its residual branches are scaled by learned factors.
        init_values: start value of those factors.
        projection: channels of the 1x1 projection before pooling; None leaves it out.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout after the FFNs.
        drop_path_rate: stochastic depth, growing linearly to this rate at the last block.
        attn_backend: path of the super-token ops, None chooses.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: tuple[int, ...] = (64, 128, 320, 512),
        depths: tuple[int, ...] = (3, 5, 9, 3),
        num_heads: tuple[int, ...] = (1, 2, 5, 8),
        stoken_size: tuple[int, ...] = (8, 4, 1, 1),
        n_iter: tuple[int, ...] = (1, 1, 1, 1),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        layer_scale: tuple[bool, ...] = (False, False, False, False),
        init_values: float = 1e-6,
        projection: int | None = 1024,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        attn_backend: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(in_chans, projection or embed_dim[-1])
        self.stem = _stem(in_chans, embed_dim[0], **dd)
        stages = []
        for i, (dim, rates) in enumerate(zip(embed_dim, stage_rates(drop_path_rate, depths), strict=True)):
            downsample = _downsample(embed_dim[i - 1], dim, **dd) if i else None
            blocks = [
                Block(
                    dim,
                    num_heads=num_heads[i],
                    stoken_size=stoken_size[i],
                    n_iter=n_iter[i],
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    proj_drop=proj_drop_rate,
                    layer_scale=layer_scale[i],
                    init_values=init_values,
                    attn_backend=attn_backend,
                    drop_path=rate,
                    **dd,
                )
                for rate in rates
            ]
            stages.append(Stage(blocks, downsample))
        self.add_stages(stages, embed_dim)
        self.feature_info[-1]["num_chs_norm"] = self.num_features
        self.norm = _final_norm(embed_dim[-1], projection, **dd)
        self.add_head(num_classes, global_pool, drop_rate, **dd)
        init_linear(self.head.fc)  # the original's other matrices are 1x1 convolutions, with their initial values


_ORIGINAL = (
    (r"^stem\.", "patch_embed.proj."),
    (r"^stages\.(\d+)\.downsample\.", moved_by(-1, "layers.{}.downsample.proj.")),
    (r"^stages\.", "layers."),
    (r"\bmlp\.", "mlp2."),
    (r"\bls([12])\.gamma$", r"gamma_\1"),
    (r"^head\.fc\.", "head."),
    (r"^norm\.(proj|norm)\.", r"\1."),
)

DIALECTS = (
    OURS,
    Dialect("the original", ((r"\bnorm1\.", "norm1.norm."), *_ORIGINAL), ignored=r"\.(?:unfold|fold)\.weights$"),
    Dialect("ours, before 0.1", _ORIGINAL),
    Dialect("ours, when the head had the projection", ((r"^norm\.(proj|norm)\.", r"head.\1."),)),
)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Any dialect's names to ours, without the constants."""
    return rename(state_dict, model)


def _cfg(size: int, **kwargs: Any) -> dict[str, Any]:
    return published_cfg(
        "https://drive.google.com/drive/folders/1uaT5OarQd9iPrnFufHocHpM3zhyTcetB",
        input_size=(3, size, size),
        pool_size=(size // 32, size // 32),
        crop_pct=0.875 if size == 224 else 1.0,
        first_conv="stem.0",
        classifier="head.fc",
        license="mit",
        paper_name="Vision Transformer with Super Token Sampling",
        paper_ids=("arXiv:2211.11167",),
        origin_url="https://github.com/hhb072/STViT",
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {
        "stvit_small.in1k": _cfg(224, top1=83.6, params="25M", flops="4.4G"),
        "stvit_small_384.in1k": _cfg(384, top1=85.0, params="25M", flops="14.1G"),
        "stvit_base.in1k": _cfg(224, top1=84.8, params="52M", flops="9.9G"),
        "stvit_base_384.in1k": _cfg(384, top1=86.0, params="52M", flops="32.5G"),
        "stvit_large.in1k": _cfg(224, top1=85.3, params="95M", flops="15.6G"),
        "stvit_large_384.in1k": _cfg(384, top1=86.4, params="95M", flops="49.7G"),
    }
)

_SMALL: dict[str, Any] = {}
_BASE: dict[str, Any] = {
    "embed_dim": (96, 192, 384, 512),
    "depths": (4, 6, 14, 6),
    "num_heads": (2, 3, 6, 8),
    "layer_scale": (False, False, True, True),
}
_LARGE: dict[str, Any] = {
    "embed_dim": (96, 192, 448, 640),
    "depths": (4, 7, 19, 8),
    "num_heads": (2, 3, 7, 10),
    "layer_scale": (False, False, True, True),
}


def _create(variant: str, pretrained: bool, args: dict[str, Any], kwargs: dict[str, Any]) -> STViT:
    return build_model(STViT, variant, pretrained, filter_fn=checkpoint_filter_fn, **{**args, **kwargs})


@register_model
def stvit_small(pretrained: bool = False, **kwargs: Any) -> STViT:
    return _create("stvit_small", pretrained, _SMALL, kwargs)


@register_model
def stvit_small_384(pretrained: bool = False, **kwargs: Any) -> STViT:
    return _create("stvit_small_384", pretrained, _SMALL, kwargs)


@register_model
def stvit_base(pretrained: bool = False, **kwargs: Any) -> STViT:
    return _create("stvit_base", pretrained, _BASE, kwargs)


@register_model
def stvit_base_384(pretrained: bool = False, **kwargs: Any) -> STViT:
    return _create("stvit_base_384", pretrained, _BASE, kwargs)


@register_model
def stvit_large(pretrained: bool = False, **kwargs: Any) -> STViT:
    return _create("stvit_large", pretrained, _LARGE, kwargs)


@register_model
def stvit_large_384(pretrained: bool = False, **kwargs: Any) -> STViT:
    return _create("stvit_large_384", pretrained, _LARGE, kwargs)

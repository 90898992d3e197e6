"""DaViT: Dual Attention Vision Transformers (https://arxiv.org/abs/2204.03645).

Original: https://github.com/dingmyu/davit (MIT). The variants `fl` are the image towers of Florence-2
(https://arxiv.org/abs/2311.06242, MIT): overlapping downsampling and a second form of channel attention.

Checkpoints of the original, of timm (https://github.com/huggingface/pytorch-image-models, Apache-2.0) and of Florence-2
load. What differs: attention runs through `zoo.ops.window` and `zoo.ops.channel`, and maps are channels-last
throughout, so no block transposes them.

Any input size is accepted. As in the original, a map that is no multiple of the window is padded with zeros after the
norm: the padding's keys and values are the bias of qkv, and tokens attend to them.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from timm.layers import LayerNorm2d, Mlp, NormMlpClassifierHead
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.ops.maps import crop_map, is_symbolic, pad_map
from zoo.ops.scriptable import channel_attention, channel_attention_qkvpacked, window_attention_qkvpacked

from ._build import build_model, published_cfg
from ._modules import channels_last
from ._pyramid import DropPath, Pyramid, Stage, init_linear, stage_rates
from .dialects import Dialect, moved_by, rename

__all__ = ["DaViT"]


class ConvPosEnc(nn.Module):
    """Depthwise 3x3 convolution with a shortcut, on a (B, C, H, W) map."""

    def __init__(self, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj(x)


class Stem(nn.Module):
    """7x7 convolution with stride 4 on an image padded to a multiple of 4, then LayerNorm."""

    def __init__(self, in_chs: int, out_chs: int, norm_eps: float, device: Any = None, dtype: Any = None) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        self.conv = nn.Conv2d(in_chs, out_chs, 7, stride=4, padding=3, **dd)
        self.norm = LayerNorm2d(out_chs, eps=norm_eps, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_map(x.permute(0, 2, 3, 1), 4).permute(0, 3, 1, 2)
        # One input channel has no order of its own, so the convolution may answer in the other layout.
        x = self.conv(channels_last(x))
        return self.norm(channels_last(x))


class Downsample(nn.Module):
    """LayerNorm, then a convolution with stride 2: 2x2 on a map padded to even sides, or 3x3."""

    def __init__(
        self, in_chs: int, out_chs: int, kernel_size: int, norm_eps: float, device: Any = None, dtype: Any = None
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm = LayerNorm2d(in_chs, eps=norm_eps, **dd)
        self.even = kernel_size % 2 == 0
        padding = 0 if self.even else kernel_size // 2
        self.conv = nn.Conv2d(in_chs, out_chs, kernel_size, stride=2, padding=padding, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        if self.even:
            x = pad_map(x.permute(0, 2, 3, 1), 2).permute(0, 3, 1, 2)
        return self.conv(x)


class WindowAttention(nn.Module):
    """Multi-head attention inside windows of a (B, H, W, C) map."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        window_size: int = 7,
        attn_backend: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.window_size = window_size
        self.attn_backend = attn_backend
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        _, H, W, _ = x.shape
        qkv = self.qkv(pad_map(x, self.window_size)).unflatten(-1, (3, self.num_heads, self.head_dim))
        x = window_attention_qkvpacked(qkv, self.window_size, backend=self.attn_backend).flatten(3)
        return self.proj(crop_map(x, H, W))


class ChannelAttention(nn.Module):
    """Attention between the channels of a head over all positions of a (B, H, W, C) map (section 3.2).

    v2 is Florence-2's form: the map of queries and keys over the positions mixes the values.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        v2: bool = False,
        attn_backend: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.v2 = v2
        self.attn_backend = attn_backend
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        qkv = self.qkv(x).view(B, H * W, 3, self.num_heads, self.head_dim)
        if self.v2:
            q, k, v = qkv.unbind(2)
            scale = (H * W) ** -0.5
            if is_symbolic(H, W):  # ops take a number for a scale
                q, scale = q * scale, 1.0
            x = channel_attention(v, q, k, scale=scale, backend=self.attn_backend)
        else:
            x = channel_attention_qkvpacked(qkv, backend=self.attn_backend)
        return self.proj(x.view(B, H, W, C))


class DualBlock(nn.Module):
    """Position encoding, attention, position encoding, MLP; `attn` sees windows or channels."""

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        norm_eps: float = 1e-5,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        self.cpe1 = ConvPosEnc(dim, **dd)
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps, **dd)
        self.attn = attn
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.cpe2 = ConvPosEnc(dim, **dd)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.cpe1(x).permute(0, 2, 3, 1)  # (B, H, W, C)
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        x = self.cpe2(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x.permute(0, 3, 1, 2)


class DaViT(Pyramid):
    """DaViT: a pyramid whose blocks alternate window attention and channel attention.

    Args:
        in_chans: channels of the input.
        num_classes: 0 leaves the classifier out.
        global_pool: timm's pooling names; "" leaves the map.
        depths: pairs of blocks of every stage.
        embed_dims: width of every stage.
        num_heads: heads of every stage, and channel groups.
        window_size: side of a window.
        mlp_ratio: hidden width of the MLPs relative to the stage's.
        qkv_bias: bias of the qkv projections.
        norm_eps: epsilon of every LayerNorm.
        down_kernel_size: 2 (the original's) or 3 (Florence-2's, overlapping).
        channel_attn_v2: Florence-2's channel attention.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth rate of the last pair of blocks, rising linearly.
        attn_backend: passed to `zoo.ops.window` and `zoo.ops.channel`.

    Raises:
        ValueError: the options of the stages do not fit.
    """

    out_norms = (0, 1, 2, 3)

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (1, 1, 3, 1),
        embed_dims: Sequence[int] = (96, 192, 384, 768),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        norm_eps: float = 1e-5,
        down_kernel_size: int = 2,
        channel_attn_v2: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        attn_backend: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if not len(depths) == len(embed_dims) == len(num_heads):
            raise ValueError(
                f"DaViT: depths {depths}, embed_dims {embed_dims} and num_heads {num_heads} "
                "must have one entry per stage"
            )
        if any(dim % heads for dim, heads in zip(embed_dims, num_heads, strict=True)):
            raise ValueError(f"DaViT: num_heads {num_heads} must divide embed_dims {embed_dims}")
        super().__init__(in_chans, embed_dims[-1])
        self.stem = Stem(in_chans, embed_dims[0], norm_eps, **dd)
        shared: dict[str, Any] = {"qkv_bias": qkv_bias, "attn_backend": attn_backend, **dd}
        stages = []
        for i, (dim, heads, rates) in enumerate(
            zip(embed_dims, num_heads, stage_rates(drop_path_rate, depths), strict=True)
        ):
            downsample = Downsample(embed_dims[i - 1], dim, down_kernel_size, norm_eps, **dd) if i else None
            pairs = []
            for rate in rates:
                spatial = WindowAttention(dim, heads, window_size=window_size, **shared)
                channel = ChannelAttention(dim, heads, v2=channel_attn_v2, **shared)
                blocks = (DualBlock(dim, attn, mlp_ratio, rate, norm_eps, **dd) for attn in (spatial, channel))
                pairs.append(nn.Sequential(*blocks))
            stages.append(Stage(pairs, downsample))
        self.add_stages(stages, embed_dims)
        norm = partial(LayerNorm2d, eps=norm_eps)
        self.add_head(num_classes, global_pool, drop_rate, NormMlpClassifierHead, norm_layer=norm, **dd)
        self.apply(init_linear)


_PAIRS = (
    (r"^stages\.(\d+)\.blocks\.(\d+)\.0\.", r"stages.\1.blocks.\2.spatial_block."),
    (r"^stages\.(\d+)\.blocks\.(\d+)\.1\.", r"stages.\1.blocks.\2.channel_block."),
)
_OUT_NORMS = (r"^stages\.(\d+)\.out_norm\.", r"norm\1.")


def _tower(name: str, conv: str, rules: tuple[tuple[str, str], ...]) -> Dialect:
    """The image tower of Florence-2, which ends with the last map: the norm of our head keeps its initial values."""
    embeddings = (
        (r"^stem\.", "convs.0."),
        (r"^stages\.(\d+)\.downsample\.", r"convs.\1."),
        (r"^(convs\.\d+)\.conv\.", rf"\1.{conv}."),
        (r"^stages\.(\d+)\.blocks\.", r"blocks.\1."),
    )
    return Dialect(name, (*_PAIRS, *embeddings, *rules), absent=r"^head\.norm\.")


_MMPRETRAIN = (
    *_PAIRS,
    _OUT_NORMS,
    (r"^stem\.conv\.", "patch_embed.projection."),
    (r"^stem\.", "patch_embed."),
    (r"\.downsample\.conv\.", ".downsample.projection."),
    (r"^stages\.(\d+)\.downsample\.", moved_by(-1, "stages.{}.downsample.")),
    (r"\.spatial_block\.attn\.", ".spatial_block.attn.w_msa."),
    (r"\.mlp\.fc1\.", ".ffn.layers.0.0."),
    (r"\.mlp\.fc2\.", ".ffn.layers.1."),
    (r"^head\.norm\.", "norm3."),
)

DIALECTS = (
    Dialect("timm, whose names are ours"),
    Dialect(
        "the original",
        (
            (r"^stem\.", "stages.0.downsample."),
            (r"^stages\.(\d+)\.downsample\.conv\.", r"patch_embeds.\1.proj."),
            (r"^stages\.(\d+)\.downsample\.", r"patch_embeds.\1."),
            (r"^stages\.(\d+)\.blocks\.", r"main_blocks.\1."),
            _OUT_NORMS,
            (r"\.cpe([12])\.", moved_by(-1, ".cpe.{}.")),
            (r"^head\.norm\.", "norms."),
            (r"^head\.fc\.", "head."),
        ),
    ),
    Dialect("timm's Florence-2, and ours before 0.1", _PAIRS),
    _tower(
        "Florence-2's own code",
        "proj",
        (
            (r"\.spatial_block\.norm1\.", ".spatial_block.window_attn.norm."),
            (r"\.channel_block\.norm1\.", ".channel_block.channel_attn.norm."),
            (r"\.spatial_block\.attn\.", ".spatial_block.window_attn.fn."),
            (r"\.channel_block\.attn\.", ".channel_block.channel_attn.fn."),
            (r"\.norm2\.", ".ffn.norm."),
            (r"\.mlp\.", ".ffn.fn.net."),
            (r"\.cpe([12])\.proj\.", r".conv\1.fn.dw."),
        ),
    ),
    _tower(
        "transformers' Florence-2",
        "conv",
        (
            (r"\.spatial_block\.attn\.", ".spatial_block.window_attn."),
            (r"\.channel_block\.attn\.", ".channel_block.channel_attn."),
            (r"\.mlp\.", ".ffn."),
            (r"\.cpe([12])\.proj\.", r".conv\1."),
        ),
    ),
    Dialect("mmpretrain", (*_MMPRETRAIN, (r"^(?!head\.)", "backbone."))),
    Dialect("mmpretrain's backbone", _MMPRETRAIN),
)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Any dialect's names to ours; of Florence-2's file the image tower."""
    return rename(state_dict, model)


def _cfg(url: str = "", size: int = 224, **kwargs: Any) -> dict[str, Any]:
    return published_cfg(
        url,
        **{
            "input_size": (3, size, size),
            "pool_size": (size // 32, size // 32),
            "crop_pct": 0.9,
            "first_conv": "stem.conv",
            "classifier": "head.fc",
            "license": "mit",
            "paper_name": "DaViT: Dual Attention Vision Transformers",
            "paper_ids": "arXiv:2204.03645",
            "origin_url": "https://github.com/dingmyu/davit",
            **kwargs,
        },
    )


def _florence(hf_hub_id: str, **kwargs: Any) -> dict[str, Any]:
    return _cfg(
        size=768,
        hf_hub_id=hf_hub_id,
        num_classes=0,
        crop_pct=0.95,
        paper_name="Florence-2: Advancing a Unified Representation for a Variety of Vision Tasks",
        paper_ids="arXiv:2311.06242",
        origin_url=f"https://huggingface.co/{hf_hub_id}",
        **kwargs,
    )


_SHARE = "https://connecthkuhk-my.sharepoint.com/:u:/g/personal/u3007305_connect_hku_hk/"

# timm evaluates the three published checkpoints at crop 0.95; the original's crop and figures stand here.
default_cfgs = generate_default_cfgs(
    {
        "zoo_davit_tiny.msft_in1k": _cfg(
            _SHARE + "EcJYlVYP9y5FsDbMP-nwjtABgLmdrNGZBxgR5--Kg3MZ7Q?e=v9OrXB",
            hf_hub_id="timm/davit_tiny.msft_in1k",
            top1=82.8,
            params="28.3M",
            flops="4.5G",
        ),
        "zoo_davit_small.msft_in1k": _cfg(
            _SHARE + "ERN_Gzm8oKdIvO01r0X2cscB_owuRAnnQPNGJEVGP23xHQ?e=MVW3ZO",
            hf_hub_id="timm/davit_small.msft_in1k",
            top1=84.2,
            params="49.7M",
            flops="8.8G",
        ),
        "zoo_davit_base.msft_in1k": _cfg(
            _SHARE + "Ea8kCpdM949CvTM0w7DWbGwBxxiACMSik4zx-emrNY0uKQ?e=aEjC7u",
            hf_hub_id="timm/davit_base.msft_in1k",
            top1=84.6,
            params="87.9M",
            flops="15.5G",
        ),
        "zoo_davit_large.untrained": _cfg(params="196.8M"),
        "zoo_davit_large_window12_384.untrained": _cfg(size=384, crop_pct=1.0, params="196.8M", flops="103.0G"),
        "zoo_davit_huge.untrained": _cfg(params="348.9M"),
        "zoo_davit_giant.untrained": _cfg(params="1406.5M"),
        "zoo_davit_base_fl.msft_florence2": _florence("microsoft/Florence-2-base", params="90.4M"),
        "zoo_davit_huge_fl.msft_florence2": _florence("microsoft/Florence-2-large", params="360.6M"),
    }
)

_SMALL: dict[str, Any] = {"depths": (1, 1, 9, 1)}
_BASE: dict[str, Any] = {**_SMALL, "embed_dims": (128, 256, 512, 1024), "num_heads": (4, 8, 16, 32)}
_LARGE: dict[str, Any] = {**_SMALL, "embed_dims": (192, 384, 768, 1536), "num_heads": (6, 12, 24, 48)}
_HUGE: dict[str, Any] = {**_SMALL, "embed_dims": (256, 512, 1024, 2048), "num_heads": (8, 16, 32, 64)}
_GIANT: dict[str, Any] = {
    "depths": (1, 1, 12, 3),
    "embed_dims": (384, 768, 1536, 3072),
    "num_heads": (12, 24, 48, 96),
}
_FL: dict[str, Any] = {"window_size": 12, "down_kernel_size": 3, "channel_attn_v2": True}


def _create(variant: str, pretrained: bool, args: dict[str, Any], kwargs: dict[str, Any]) -> DaViT:
    return build_model(DaViT, variant, pretrained, filter_fn=checkpoint_filter_fn, **{**args, **kwargs})


@register_model
def zoo_davit_tiny(pretrained: bool = False, **kwargs: Any) -> DaViT:
    return _create("zoo_davit_tiny", pretrained, {}, kwargs)


@register_model
def zoo_davit_small(pretrained: bool = False, **kwargs: Any) -> DaViT:
    return _create("zoo_davit_small", pretrained, _SMALL, kwargs)


@register_model
def zoo_davit_base(pretrained: bool = False, **kwargs: Any) -> DaViT:
    return _create("zoo_davit_base", pretrained, _BASE, kwargs)


@register_model
def zoo_davit_large(pretrained: bool = False, **kwargs: Any) -> DaViT:
    return _create("zoo_davit_large", pretrained, _LARGE, kwargs)


@register_model
def zoo_davit_large_window12_384(pretrained: bool = False, **kwargs: Any) -> DaViT:
    return _create("zoo_davit_large_window12_384", pretrained, {**_LARGE, "window_size": 12}, kwargs)


@register_model
def zoo_davit_huge(pretrained: bool = False, **kwargs: Any) -> DaViT:
    return _create("zoo_davit_huge", pretrained, _HUGE, kwargs)


@register_model
def zoo_davit_giant(pretrained: bool = False, **kwargs: Any) -> DaViT:
    return _create("zoo_davit_giant", pretrained, _GIANT, kwargs)


@register_model
def zoo_davit_base_fl(pretrained: bool = False, **kwargs: Any) -> DaViT:
    return _create("zoo_davit_base_fl", pretrained, {**_BASE, **_FL}, kwargs)


@register_model
def zoo_davit_huge_fl(pretrained: bool = False, **kwargs: Any) -> DaViT:
    return _create("zoo_davit_huge_fl", pretrained, {**_HUGE, **_FL}, kwargs)

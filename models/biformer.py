"""BiFormer: vision transformer with bi-level routing attention.

Paper: "BiFormer: Vision Transformer with Bi-Level Routing Attention" (CVPR 2023), https://arxiv.org/abs/2303.08810
Original: https://github.com/rayleizhu/BiFormer (MIT): models/biformer.py, models/biformer_stl.py,
models/biformer_stl_nchw.py and object_detection/models_mm/biformer_mm.py.

Numbers are the original's; what differs:
- one class holds the three published architectures and their dense form (`out_norms=True`, `n_win=16`);
- `auto_pad` is on by default, so any image size is accepted; at the sizes the original accepts without padding the
  numbers are the same. The NCHW form also takes maps with fewer tokens than regions: a region is then one token;
- parameters are named alike in all of them (`stages.0.blocks.0.attn.qkv`); `checkpoint_filter_fn` renames the
  published ones. 1x1 convolutions of the NCHW form are Linear layers here;
- `reset_classifier` works, and `train()` of the dense form returns the model.
"""

from typing import Any

import torch
import torch.fx
from timm.layers import LayerNorm2d, Mlp
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.ops.maps import crop_map, pad_map
from zoo.ops.routing.layout import from_regions, to_regions
from zoo.ops.scriptable import routing_attention, routing_index

from ._build import build_model, published_cfg
from ._modules import channels_last
from ._pyramid import DropPath, Pyramid, Stage, init_linear, stage_rates
from .dialects import OURS, Dialect, rename

__all__ = ["BiFormer", "BiLevelRoutingAttention"]

for _function in ("_attend_softly", "_checked", "_fitting"):  # the size decides how they run
    torch.fx.wrap(_function)


class BiLevelRoutingAttention(nn.Module):
    """Bi-level routing attention (BRA) with its local enhancement (LePE), on [B, H, W, C].

    Args:
        dim: channels.
        num_heads: attention heads; the logits' scale is qk_dim ** -0.5, of all heads together, as published.
        n_win: regions per axis.
        topk: key regions that a region attends to.
        qk_dim: width of queries and keys; default dim.
        side_dwconv: kernel size of LePE, a depthwise convolution of the values; 0 leaves it out.
        auto_pad: zero-pad the input (before the projection) to a multiple of n_win.
        pad_keys: the NCHW form instead: regions of the floored size, zero keys beyond the map.
        kv_per_win: pool keys and values of a region to kv_per_win x kv_per_win; 0 keeps all tokens.
        soft_routing: weigh the gathered keys and values by the softmax of their regions' affinities.
        diff_routing: let the gradient through these weights (only with soft_routing).
        attn_backend: backend of the op.

    Raises:
        ValueError: num_heads does not divide dim and qk_dim; or, in forward, n_win does not divide the map and
            auto_pad is off.

    Source: arXiv:2303.08810 section 3.2; ops/bra_legacy.py and, with pad_keys, ops/bra_nchw.py.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        n_win: int = 7,
        topk: int = 4,
        qk_dim: int | None = None,
        side_dwconv: int = 5,
        auto_pad: bool = True,
        pad_keys: bool = False,
        kv_per_win: int = 0,
        soft_routing: bool = False,
        diff_routing: bool = False,
        attn_backend: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.qk_dim = qk_dim or dim
        if dim % num_heads or self.qk_dim % num_heads:
            raise ValueError(f"num_heads {num_heads} must divide dim {dim} and qk_dim {self.qk_dim}")
        if pad_keys and (kv_per_win or soft_routing):
            raise ValueError("pad_keys goes with neither kv_per_win nor soft_routing")
        if diff_routing and not soft_routing:
            raise ValueError("diff_routing needs soft_routing: a hard choice has no gradient")
        self.dim = dim
        self.num_heads = num_heads
        self.n_win = n_win
        self.topk = topk
        self.scale = self.qk_dim**-0.5
        self.auto_pad = auto_pad
        self.pad_keys = pad_keys
        self.kv_per_win = kv_per_win
        self.soft_routing = soft_routing
        self.diff_routing = diff_routing
        self.attn_backend = attn_backend
        self.qkv = nn.Linear(dim, 2 * self.qk_dim + dim, **dd)
        self.lepe = _lepe(dim, side_dwconv, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        _, H, W, _ = x.shape
        n = self.n_win
        if not self.pad_keys:
            x = pad_map(x, n) if self.auto_pad else _checked(x, n)
        q, k, v = self.qkv(x).split([self.qk_dim, self.qk_dim, self.dim], dim=-1)
        out = self.attend(q.unflatten(-1, (self.num_heads, -1)), k.unflatten(-1, (self.num_heads, -1)), v)
        out = out + self.lepe(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return crop_map(self.proj(out), H, W)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        _, H, W, nh, _ = q.shape
        n = self.n_win
        topk = _fitting(self.topk, n, H, W) if self.pad_keys else min(self.topk, n * n)
        v = v.unflatten(-1, (nh, -1))
        if self.soft_routing:
            return _attend_softly(q, k, v, n, topk, self.scale, self.kv_per_win, self.diff_routing)
        padding = "zero" if self.pad_keys else "none"
        index = routing_index(q, k, n, topk, padding=padding, backend=self.attn_backend)
        if self.kv_per_win > 0:
            size = n * self.kv_per_win
            k, v = _pooled(k, size), _pooled(v, size)
        out = routing_attention(
            q, k, v, n, topk, scale=self.scale, index=index, padding=padding, backend=self.attn_backend
        )
        return out.flatten(3)


def _checked(x: Tensor, n_win: int) -> Tensor:
    """A map whose sides are multiples of n_win."""
    H, W = x.shape[1], x.shape[2]
    if H % n_win > 0 or W % n_win > 0:
        raise ValueError(f"without auto_pad the map must be a multiple of n_win={n_win} on both sides, got {H} x {W}")
    return x


def _fitting(topk: int, n_win: int, height: int, width: int) -> int:
    """topk, or the number of regions of a small map."""
    rows, cols = max(height // n_win, 1), max(width // n_win, 1)
    return min(topk, ((height + rows - 1) // rows) * ((width + cols - 1) // cols))


def _pooled(x: Tensor, size: int) -> Tensor:
    pooled = F.adaptive_avg_pool2d(x.flatten(3).permute(0, 3, 1, 2), size)
    return pooled.permute(0, 2, 3, 1).unflatten(-1, (x.shape[3], -1))


@torch.jit.unused
def _attend_softly(
    q: Tensor, k: Tensor, v: Tensor, n: int, topk: int, scale: float, kv_per_win: int, diff_routing: bool
) -> Tensor:
    """Attention to regions whose keys and values are weighted by their affinity."""
    B, H, W, nh, _ = q.shape
    region = (H // n, W // n)
    q_mean, k_mean = (to_regions(t, region).mean(2).flatten(2) for t in (q, k))
    if not diff_routing:
        q_mean, k_mean = q_mean.detach(), k_mean.detach()
    affinity = (q_mean * scale) @ k_mean.transpose(1, 2)  # (B, R, R)
    affinity, index = affinity.sort(dim=-1, descending=True, stable=True)
    index = index[..., :topk]
    weight = affinity[..., :topk].softmax(-1)
    if kv_per_win > 0:
        k, v = _pooled(k, n * kv_per_win), _pooled(v, n * kv_per_win)
    key_region = (k.shape[1] // n, k.shape[2] // n)
    picked = (index + n * n * torch.arange(B, device=q.device).view(-1, 1, 1)).flatten()
    k, v = (
        (to_regions(t, key_region).flatten(0, 1).index_select(0, picked) * weight.reshape(-1, 1, 1, 1))
        .reshape(B * n * n, -1, nh, t.shape[-1])
        .transpose(1, 2)
        for t in (k, v)
    )  # (B * R, nh, topk * tokens, d)
    out = F.scaled_dot_product_attention(
        to_regions(q, region).flatten(0, 1).transpose(1, 2), k, v, scale=scale
    ).transpose(1, 2)
    return from_regions(out.unflatten(0, (B, n * n)), region, (H, W)).flatten(3)


class AttentionLePE(nn.Module):
    """Global attention with LePE, on [B, H, W, C]; the last stage.

    LePE convolves the block's input, or the values where `lepe_of_value` (the NCHW form).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        side_dwconv: int = 5,
        lepe_of_value: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads {num_heads} must divide dim {dim}")
        self.num_heads = num_heads
        self.lepe_of_value = lepe_of_value
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.lepe = _lepe(dim, side_dwconv, **dd)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        qkv = self.qkv(x)
        lepe = self.lepe((qkv[..., 2 * C :] if self.lepe_of_value else x).permute(0, 3, 1, 2))
        q, k, v = qkv.reshape(B, H * W, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, H, W, C)
        return self.proj(out + lepe.permute(0, 2, 3, 1))


def _lepe(dim: int, kernel_size: int, device: Any = None, dtype: Any = None) -> nn.Module:
    if kernel_size <= 0:
        return _Zero()
    return nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, device=device, dtype=dtype)


class _Zero(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class Block(nn.Module):
    """x + pos_embed(x) where there is one, then pre-norm attention and MLP, each with its shortcut; on NCHW."""

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float = 3.0,
        before_attn_dwconv: int = 3,
        drop_path: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        k = before_attn_dwconv
        self.pos_embed = nn.Conv2d(dim, dim, k, padding=k // 2, groups=dim, **dd) if k > 0 else None
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = Mlp(dim, int(mlp_ratio * dim), **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.pos_embed is not None:
            x = x + self.pos_embed(x)
        x = x.permute(0, 2, 3, 1)  # (B, H, W, C)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x.permute(0, 3, 1, 2)


class ChannelsLast(nn.Module):
    """The same (B, C, H, W) map with its channels last in memory: else every LayerNorm of the blocks would copy."""

    def forward(self, x: Tensor) -> Tensor:
        return channels_last(x)


def _patch_embed(in_chans: int, dim: int, stl: bool, device: Any = None, dtype: Any = None) -> nn.Sequential:
    dd = {"device": device, "dtype": dtype}
    if stl:
        return nn.Sequential(nn.Conv2d(in_chans, dim, 4, stride=4, **dd), nn.BatchNorm2d(dim, **dd), ChannelsLast())
    return nn.Sequential(
        nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd),
        nn.BatchNorm2d(dim // 2, **dd),
        nn.GELU(),
        nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd),
        nn.BatchNorm2d(dim, **dd),
        ChannelsLast(),
    )


def _downsample(in_dim: int, dim: int, stl: bool, device: Any = None, dtype: Any = None) -> nn.Sequential:
    dd = {"device": device, "dtype": dtype}
    if stl:
        return nn.Sequential(nn.BatchNorm2d(in_dim, **dd), nn.Conv2d(in_dim, dim, 2, stride=2, **dd), ChannelsLast())
    return nn.Sequential(
        nn.Conv2d(in_dim, dim, 3, stride=2, padding=1, **dd), nn.BatchNorm2d(dim, **dd), ChannelsLast()
    )


class BiFormer(Pyramid):
    """BiFormer, BiFormer-STL and the NCHW form of the latter.

    Args:
        in_chans: input channels.
        num_classes: classes of the head; 0 for none.
        global_pool: pooling of the head.
        depths: blocks per stage.
        embed_dims: channels per stage.
        head_dim: channels of a head in the routed stages.
        topks: key regions per region and stage; a stage with 0 or less attends globally, with 8 heads.
        n_win: regions per axis, one for all stages or one per stage.
        mlp_ratio: MLP width over channels.
        side_dwconv: kernel size of LePE.
        before_attn_dwconv: kernel size of the convolutional position encoding; 0 for none.
        stl: Swin-T layout: a 4x4 patch embedding, and BatchNorm before 2x2 downsampling.
        nchw: semantics of the original's NCHW form (see BiLevelRoutingAttention's pad_keys).
        auto_pad: zero-pad the input of a routed attention to a multiple of n_win. Off, as the original trains, H and
            W must be multiples of 16 * n_win.
        out_norms: dense form: a LayerNorm on every stage's output (not fed to the next stage) and none at the end.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, rising linearly.
        attn_backend: backend of the routing attention op.
    """

    out_norms = (0, 1, 2, 3)
    out_norm_eps = 1e-6

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: tuple[int, ...] = (2, 2, 8, 2),
        embed_dims: tuple[int, ...] = (64, 128, 256, 512),
        head_dim: int = 32,
        topks: tuple[int, ...] = (1, 4, 16, -2),
        n_win: int | tuple[int, ...] = 7,
        mlp_ratio: float = 3.0,
        side_dwconv: int = 5,
        before_attn_dwconv: int = 3,
        stl: bool = False,
        nchw: bool = False,
        auto_pad: bool = True,
        out_norms: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        attn_backend: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        n_wins = (n_win,) * len(depths) if isinstance(n_win, int) else tuple(n_win)
        if not len(depths) == len(embed_dims) == len(topks) == len(n_wins):
            raise ValueError(
                f"depths {depths}, embed_dims {embed_dims}, topks {topks}, n_win {n_wins} differ in length"
            )
        super().__init__(in_chans, embed_dims[-1])
        self.stem = _patch_embed(in_chans, embed_dims[0], stl, **dd)
        stages = []
        for i, (dim, rates) in enumerate(zip(embed_dims, stage_rates(drop_path_rate, depths), strict=True)):
            blocks = []
            for rate in rates:
                attn: nn.Module
                if topks[i] > 0:
                    attn = BiLevelRoutingAttention(
                        dim,
                        num_heads=dim // head_dim,
                        n_win=n_wins[i],
                        topk=topks[i],
                        side_dwconv=side_dwconv,
                        auto_pad=auto_pad,
                        pad_keys=nchw,
                        attn_backend=attn_backend,
                        **dd,
                    )
                else:
                    attn = AttentionLePE(dim, side_dwconv=side_dwconv, lepe_of_value=nchw, **dd)
                blocks.append(Block(dim, attn, mlp_ratio, before_attn_dwconv, rate, **dd))
            downsample = _downsample(embed_dims[i - 1], dim, stl, **dd) if i > 0 else None
            out_norm = LayerNorm2d(dim, eps=1e-6, **dd) if out_norms else None
            stages.append(Stage(blocks, downsample, out_norm=out_norm))
        self.add_stages(stages, embed_dims)
        self.norm = nn.Identity() if out_norms else nn.BatchNorm2d(self.num_features, **dd)
        self.add_head(num_classes, global_pool, drop_rate, **dd)
        self.apply(init_linear)


def _original(name: str, blocks: str, qkv: str, proj: str) -> Dialect:
    """The original's names; its blocks with plain attention call the projections as we do."""
    return Dialect(
        name,
        (
            (r"^stem\.", "downsample_layers.0."),
            (r"^stages\.(\d+)\.downsample\.", r"downsample_layers.\1."),
            (r"^stages\.(\d+)\.out_norm\.", r"extra_norms.\1."),
            (r"^stages\.(\d+)\.blocks\.", blocks),
            (r"\.attn\.qkv\.", f".attn.<{qkv}|qkv>."),
            (r"\.attn\.proj\.", f".attn.<{proj}|proj>."),
            (r"\.mlp\.fc1\.", ".mlp.0."),
            (r"\.mlp\.fc2\.", ".mlp.<2|3>."),
            (r"^head\.fc\.", "head."),
        ),
    )


DIALECTS = (
    OURS,
    _original("the original", r"stages.\1.", "qkv.qkv", "wo"),
    _original("the original's STL", r"stages.\1.blocks.", "qkv.qkv", "wo"),
    _original("the original's NCHW form", r"stages.\1.blocks.", "qkv_linear", "output_linear"),
)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Published parameters -> ours: names, and 1x1 convolutions of the NCHW form as Linear weights.

    A classification checkpoint fits the dense form, as in the original: its last norm is dropped and the norms of the
    outputs stay fresh.
    """
    own = model.state_dict()
    renamed = rename(state_dict, model)
    for key, value in own.items():  # files written by very old PyTorch lack these counters
        if key.endswith("num_batches_tracked"):
            renamed.setdefault(key, value)
    if any(".out_norm." in k for k in own):
        renamed = {k: v for k, v in renamed.items() if not k.startswith("norm.")}
        if not any(".out_norm." in k for k in renamed):
            renamed.update({k: v for k, v in own.items() if ".out_norm." in k})
    return renamed


def _cfg(share: str, **kwargs: Any) -> dict[str, Any]:
    return published_cfg(
        f"https://api.onedrive.com/v1.0/shares/{share}/root/content",
        first_conv="stem.0",
        classifier="head.fc",
        license="mit",
        paper_name="BiFormer: Vision Transformer with Bi-Level Routing Attention",
        paper_ids=("arXiv:2303.08810",),
        origin_url="https://github.com/rayleizhu/BiFormer",
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {
        "biformer_tiny.in1k": _cfg("s!AkBbczdRlZvChHEOoGkgwgQzEDlM", top1=81.4, params="13.1M", flops="2.2G"),
        "biformer_small.in1k": _cfg("s!AkBbczdRlZvChHDyM-x9KWRBZ832", top1=83.8, params="25.5M", flops="4.5G"),
        "biformer_base.in1k": _cfg("s!AkBbczdRlZvChHI_XPhoadjaNxtO", top1=84.3, params="56.8M", flops="9.8G"),
        "biformer_stl.in1k": _cfg("s!AkBbczdRlZvChSf-m7ujkvx9lIQ1", top1=82.7, params="28.4M", flops="4.6G"),
        "biformer_stl_nchw.in1k": _cfg("s!AkBbczdRlZvChWYrKbWbMgqd2Ai0", top1=82.7, params="28.4M", flops="4.6G"),
    }
)

_TINY: dict[str, Any] = {}
_SMALL: dict[str, Any] = {"depths": (4, 4, 18, 4)}
_BASE: dict[str, Any] = {"depths": (4, 4, 18, 4), "embed_dims": (96, 192, 384, 768)}
_STL: dict[str, Any] = {
    "depths": (2, 2, 6, 2),
    "embed_dims": (96, 192, 384, 768),
    "mlp_ratio": 4.0,
    "before_attn_dwconv": 0,
    "stl": True,
}


def _create(variant: str, pretrained: bool, args: dict[str, Any], kwargs: dict[str, Any]) -> BiFormer:
    return build_model(BiFormer, variant, pretrained, filter_fn=checkpoint_filter_fn, **{**args, **kwargs})


@register_model
def biformer_tiny(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    return _create("biformer_tiny", pretrained, _TINY, kwargs)


@register_model
def biformer_small(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    return _create("biformer_small", pretrained, _SMALL, kwargs)


@register_model
def biformer_base(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    return _create("biformer_base", pretrained, _BASE, kwargs)


@register_model
def biformer_stl(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    return _create("biformer_stl", pretrained, _STL, kwargs)


@register_model
def biformer_stl_nchw(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    return _create("biformer_stl_nchw", pretrained, {**_STL, "nchw": True}, kwargs)

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

import re
from typing import Any, cast

import torch
from timm.layers import (
    ClassifierHead,
    DropPath,
    LayerNorm2d,
    Mlp,
    calculate_drop_path_rates,
    get_device_dtype,
)
from timm.models import (
    checkpoint,
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
    register_notrace_function,
    register_notrace_module,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.ops.routing import routing_attention, routing_index
from zoo.ops.routing.layout import from_regions, to_regions

from ._build import build_model, published_cfg
from ._layers import init_linear

__all__ = ["BiFormer", "BiLevelRoutingAttention"]

register_notrace_function(routing_attention)
register_notrace_function(routing_index)


@register_notrace_module
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
        if not self.pad_keys and (H % n > 0 or W % n > 0):
            if not self.auto_pad:
                raise ValueError(
                    f"without auto_pad the map must be a multiple of n_win={n} on both sides, got {H} x {W}"
                )
            x = F.pad(x, (0, 0, 0, -W % n, 0, -H % n))
        q, k, v = self.qkv(x).split([self.qk_dim, self.qk_dim, self.dim], dim=-1)
        out = self.attend(q.unflatten(-1, (self.num_heads, -1)), k.unflatten(-1, (self.num_heads, -1)), v)
        out = out + self.lepe(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.proj(out)[:, :H, :W]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        _, H, W, nh, _ = q.shape
        n = self.n_win
        rh, rw = max(H // n, 1), max(W // n, 1)
        topk = min(self.topk, ((H + rh - 1) // rh) * ((W + rw - 1) // rw))
        v = v.unflatten(-1, (nh, -1))
        if self.soft_routing:
            return self.attend_softly(q, k, v, topk)
        if torch.jit.is_scripting():
            index = torch.ops.zoo.routing_index(q, k, rh, rw, topk, "auto")
        else:
            padding = "zero" if self.pad_keys else "none"
            index = routing_index(q, k, n, topk, padding=padding, backend=self.attn_backend)
        if self.kv_per_win > 0:
            k, v = self.pool(k), self.pool(v)
        if torch.jit.is_scripting():
            out, _ = torch.ops.zoo.routing_attention(q, k, v, index, rh, rw, self.scale, "auto")
        else:
            out = routing_attention(
                q, k, v, n, topk, scale=self.scale, index=index, padding=padding, backend=self.attn_backend
            )
        return out.flatten(3)

    def pool(self, x: Tensor) -> Tensor:
        size = self.n_win * self.kv_per_win
        pooled = F.adaptive_avg_pool2d(x.flatten(3).permute(0, 3, 1, 2), size)
        return pooled.permute(0, 2, 3, 1).unflatten(-1, (x.shape[3], -1))

    @torch.jit.unused
    def attend_softly(self, q: Tensor, k: Tensor, v: Tensor, topk: int) -> Tensor:
        B, H, W, nh, _ = q.shape
        n = self.n_win
        region = (H // n, W // n)
        q_mean, k_mean = (to_regions(t, region).mean(2).flatten(2) for t in (q, k))
        if not self.diff_routing:
            q_mean, k_mean = q_mean.detach(), k_mean.detach()
        affinity = (q_mean * self.scale) @ k_mean.transpose(1, 2)  # (B, R, R)
        affinity, index = affinity.sort(dim=-1, descending=True, stable=True)
        index = index[..., :topk]
        weight = affinity[..., :topk].softmax(-1)
        if self.kv_per_win > 0:
            k, v = self.pool(k), self.pool(v)
        key_region = (k.shape[1] // n, k.shape[2] // n)
        picked = (index + n * n * torch.arange(B, device=q.device).view(-1, 1, 1)).flatten()
        k, v = (
            (to_regions(t, key_region).flatten(0, 1).index_select(0, picked) * weight.reshape(-1, 1, 1, 1))
            .reshape(B * n * n, -1, nh, t.shape[-1])
            .transpose(1, 2)
            for t in (k, v)
        )  # (B * R, nh, topk * tokens, d)
        out = F.scaled_dot_product_attention(
            to_regions(q, region).flatten(0, 1).transpose(1, 2), k, v, scale=self.scale
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


class BiFormerStage(nn.Module):
    """A downsampling layer, then blocks. `out_norm` is for the stage's output, the next stage does not see it."""

    def __init__(self, downsample: nn.Module, blocks: list[nn.Module], out_norm: nn.Module) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.out_norm = out_norm

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def forward(self, x: Tensor) -> Tensor:
        # blocks work on channels last: without this every LayerNorm would copy
        x = self.downsample(x).contiguous(memory_format=torch.channels_last)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


class BiFormer(nn.Module):
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
        super().__init__()
        n_wins = (n_win,) * len(depths) if isinstance(n_win, int) else tuple(n_win)
        if not len(depths) == len(embed_dims) == len(topks) == len(n_wins):
            raise ValueError(
                f"depths {depths}, embed_dims {embed_dims}, topks {topks}, n_win {n_wins} differ in length"
            )
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = embed_dims[-1]
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.feature_info = []

        self.stem = _patch_embed(in_chans, embed_dims[0], stl, **dd)
        rates = cast(list[float], calculate_drop_path_rates(drop_path_rate, sum(depths)))
        stages = []
        for i, (depth, dim, topk, windows) in enumerate(zip(depths, embed_dims, topks, n_wins, strict=True)):
            blocks: list[nn.Module] = []
            for j in range(depth):
                attn: nn.Module
                if topk > 0:
                    attn = BiLevelRoutingAttention(
                        dim,
                        num_heads=dim // head_dim,
                        n_win=windows,
                        topk=topk,
                        side_dwconv=side_dwconv,
                        auto_pad=auto_pad,
                        pad_keys=nchw,
                        attn_backend=attn_backend,
                        **dd,
                    )
                else:
                    attn = AttentionLePE(dim, side_dwconv=side_dwconv, lepe_of_value=nchw, **dd)
                rate = rates[sum(depths[:i]) + j]
                blocks.append(Block(dim, attn, mlp_ratio, before_attn_dwconv, rate, **dd))
            downsample = _downsample(embed_dims[i - 1], dim, stl, **dd) if i > 0 else nn.Identity()
            stages.append(
                BiFormerStage(downsample, blocks, LayerNorm2d(dim, eps=1e-6, **dd) if out_norms else nn.Identity())
            )
            self.feature_info.append({"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)

        self.norm = nn.Identity() if out_norms else nn.BatchNorm2d(self.num_features, **dd)
        self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.apply(init_linear)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks: Any = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^stages\.(\d+)\.out_norm", (99999,)),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else blocks}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable
        for stage in self.stages:
            cast(BiFormerStage, stage).set_grad_checkpointing(enable)

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool, in_features=self.num_features, **get_device_dtype(self))
        self.head_hidden_size = self.head.num_features

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The stages' maps, and the final map unless `intermediates_only`.

        Args:
            x: images [B, in_chans, H, W].
            indices: the last n stages, or these stages; all by default.
            norm: apply the final norm to the last stage's map. The dense form normalises every map anyway.
            stop_early: compute no stage after the last one asked for.
            output_fmt: only "NCHW".
            intermediates_only: leave out the final map.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be NCHW, got {output_fmt}")
        take, last = feature_take_indices(len(self.stages), indices)
        x = self.stem(x)
        final = len(self.stages) - 1
        if torch.jit.is_scripting() or not stop_early:  # TorchScript cannot slice, nor choose in an expression
            stages = self.stages
        else:
            stages = self.stages[: last + 1]
        maps = []
        i = 0
        out = x
        for i, stage in enumerate(stages):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(stage, x)
            else:
                x = stage(x)
            out = stage.out_norm(x)  # type: ignore[operator]
            if i in take:
                maps.append(self.norm(out) if norm and i == final else out)
        if intermediates_only:
            return maps
        return self.norm(out) if i == final else out, maps

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the given intermediates do not need; the indices that are kept."""
        take, last = feature_take_indices(len(self.stages), indices)
        shortened = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if prune_norm or shortened:
            self.norm = nn.Identity()
        if shortened:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.stages, x)
        else:
            x = self.stages(x)
        return self.norm(self.stages[-1].out_norm(x))  # type: ignore[operator]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _patch_embed(in_chans: int, dim: int, stl: bool, device: Any = None, dtype: Any = None) -> nn.Sequential:
    dd = {"device": device, "dtype": dtype}
    if stl:
        return nn.Sequential(nn.Conv2d(in_chans, dim, 4, stride=4, **dd), nn.BatchNorm2d(dim, **dd))
    return nn.Sequential(
        nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd),
        nn.BatchNorm2d(dim // 2, **dd),
        nn.GELU(),
        nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd),
        nn.BatchNorm2d(dim, **dd),
    )


def _downsample(in_dim: int, dim: int, stl: bool, device: Any = None, dtype: Any = None) -> nn.Sequential:
    dd = {"device": device, "dtype": dtype}
    if stl:
        return nn.Sequential(nn.BatchNorm2d(in_dim, **dd), nn.Conv2d(in_dim, dim, 2, stride=2, **dd))
    return nn.Sequential(nn.Conv2d(in_dim, dim, 3, stride=2, padding=1, **dd), nn.BatchNorm2d(dim, **dd))


_RENAMED = [
    (re.compile(pattern), ours)
    for pattern, ours in (
        (r"^downsample_layers\.0\.", "stem."),
        (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
        (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
        (r"^extra_norms\.(\d+)\.", r"stages.\1.out_norm."),
        (r"\.attn\.(?:qkv\.qkv|qkv_linear)\.", ".attn.qkv."),
        (r"\.attn\.(?:wo|output_linear)\.", ".attn.proj."),
        (r"\.mlp\.0\.", ".mlp.fc1."),
        (r"\.mlp\.[23]\.", ".mlp.fc2."),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
    )
]


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Published parameters -> ours: names, and 1x1 convolutions of the NCHW form as Linear weights.

    A classification checkpoint fits the dense form, as in the original: its last norm is dropped and the norms of the
    outputs stay fresh.
    """
    own = model.state_dict()
    renamed = {}
    for key, value in state_dict.items():
        for pattern, ours in _RENAMED:
            key = pattern.sub(ours, key)
        if value.ndim == 4 and key in own and own[key].ndim == 2:
            value = value.flatten(1)
        renamed[key] = value
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

_STL = {
    "depths": (2, 2, 6, 2),
    "embed_dims": (96, 192, 384, 768),
    "mlp_ratio": 4.0,
    "before_attn_dwconv": 0,
    "stl": True,
}


def _create_biformer(variant: str, pretrained: bool, **kwargs: Any) -> BiFormer:
    return build_model(BiFormer, variant, pretrained, filter_fn=checkpoint_filter_fn, **kwargs)


@register_model
def biformer_tiny(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    args = {"depths": (2, 2, 8, 2), "embed_dims": (64, 128, 256, 512)}
    return _create_biformer("biformer_tiny", pretrained, **dict(args, **kwargs))


@register_model
def biformer_small(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    args = {"depths": (4, 4, 18, 4), "embed_dims": (64, 128, 256, 512)}
    return _create_biformer("biformer_small", pretrained, **dict(args, **kwargs))


@register_model
def biformer_base(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    args = {"depths": (4, 4, 18, 4), "embed_dims": (96, 192, 384, 768)}
    return _create_biformer("biformer_base", pretrained, **dict(args, **kwargs))


@register_model
def biformer_stl(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    return _create_biformer("biformer_stl", pretrained, **dict(_STL, **kwargs))


@register_model
def biformer_stl_nchw(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    args = dict(_STL, nchw=True)
    return _create_biformer("biformer_stl_nchw", pretrained, **dict(args, **kwargs))

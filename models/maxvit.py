"""MaxViT: Multi-Axis Vision Transformer (https://arxiv.org/abs/2204.01697).

Original: https://github.com/google-research/maxvit (TensorFlow, Apache-2.0), variants `tf`. The variants `rw`, `rmlp`
and `pm` are those of https://github.com/huggingface/pytorch-image-models (Apache-2.0), whose conversions of the
original weights these models read too: parameter names and numbers are timm's. The variant `tv` is torchvision's
(https://github.com/pytorch/vision, BSD-3-Clause) and gives its numbers; the two biases that it has more are zero there.
A stage halves the map in its first block, so it has no downsampling of its own.

What differs: attention runs through `zoo.ops.window`, so every input size is accepted (windows and grids that do not
fill the map see no padding), convolutions run channels-last, and an odd side is pooled over the pixels that are there.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    LayerScale,
    Mlp,
    NormMlpClassifierHead,
    SEModule,
    get_act_layer,
    get_norm_act_layer,
    get_norm_layer,
    make_divisible,
    resize_rel_pos_bias_table,
    to_2tuple,
    trunc_normal_,
)
from timm.models import generate_default_cfgs, named_apply, register_model
from timm.models._input import update_model_input_size
from torch import Tensor, nn

from zoo.ops.maps import pad_map, pad_same
from zoo.ops.scriptable import window_attention_qkvpacked

from ._build import build_model, published_cfg
from ._modules import channels_last
from ._pyramid import CeilAvgPool2d, DropPath, Pyramid, Stage, stage_rates
from .dialects import Dialect, rename

__all__ = ["MaxViT"]


def _around(x: Tensor) -> Tensor:
    """A map with TensorFlow's padding for a 3x3 convolution of stride 2, whose place depends on the sides' parity."""
    return pad_same(x.permute(0, 2, 3, 1), 3, 2).permute(0, 3, 1, 2)


class Downsample2d(nn.Module):
    """Mean over 2x2 pixels, then a 1x1 convolution where the width changes; with overlap over 3x3, and always."""

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        padding: str = "",
        bias: bool = True,
        overlap: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.same = padding == "same" and not overlap
        self.pool: nn.Module = nn.AvgPool2d(2) if self.same else CeilAvgPool2d()
        if overlap:
            self.pool = nn.AvgPool2d(3, 2, padding=1)
        unchanged = in_chs == out_chs and not overlap
        self.expand = (
            nn.Identity() if unchanged else nn.Conv2d(in_chs, out_chs, 1, bias=bias, device=device, dtype=dtype)
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.same:
            x = pad_map(x.permute(0, 2, 3, 1), 2).permute(0, 3, 1, 2)
        return self.expand(self.pool(x))


class MbConv(nn.Module):
    """Inverted bottleneck with pre-norm and squeeze-and-excitation (section 3.1)."""

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        stride: int = 1,
        expand_output: bool = True,
        output_bias: bool = True,
        se_ratio: float = 0.25,
        act: str = "gelu_tanh",
        norm_eps: float = 1e-3,
        padding: str = "",
        overlap: bool = False,
        drop_path: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        norm_act = partial(get_norm_act_layer("batchnorm2d", act), eps=norm_eps)
        mid_chs = make_divisible((out_chs if expand_output else in_chs) * 4)
        self.shortcut: nn.Module = nn.Identity()
        if stride == 2:
            self.shortcut = Downsample2d(in_chs, out_chs, padding, output_bias, overlap, **dd)
        self.pre_norm = norm_act(in_chs, apply_act=False, **dd)
        self.conv1_1x1 = nn.Conv2d(in_chs, mid_chs, 1, bias=False, **dd)
        self.norm1 = norm_act(mid_chs, **dd)
        self.same = padding == "same" and stride == 2
        self.conv2_kxk = nn.Conv2d(
            mid_chs, mid_chs, 3, stride, padding=0 if self.same else 1, groups=mid_chs, bias=False, **dd
        )
        self.norm2 = norm_act(mid_chs, **dd)
        squeezed = int(se_ratio * (out_chs if expand_output else mid_chs))
        self.se = SEModule(mid_chs, rd_channels=squeezed, act_layer=nn.SiLU, **dd)
        self.conv3_1x1 = nn.Conv2d(mid_chs, out_chs, 1, bias=output_bias, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.shortcut(x)
        x = self.norm1(self.conv1_1x1(self.pre_norm(x)))
        x = self.norm2(self.conv2_kxk(_around(x) if self.same else x))
        x = self.conv3_1x1(self.se(x))
        return self.drop_path(x) + shortcut


class RelPosTable(nn.Module):
    """The original's bias table (heads, 2 * height - 1, 2 * width - 1), key - query."""

    def __init__(self, window: tuple[int, int], heads: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.window = window
        shape = (heads, 2 * window[0] - 1, 2 * window[1] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        nn.init.normal_(self.relative_position_bias_table, std=0.02)

    def resized(self, table: Tensor, window: tuple[int, int]) -> Tensor:
        """Bilinear, as tf.image.resize does for the original's 384 and 512 fine-tuning."""
        size = (2 * window[0] - 1, 2 * window[1] - 1)
        if tuple(table.shape[-2:]) == size:
            return table
        if table.is_meta:
            return table.new_empty((table.shape[0], *size))
        return F.interpolate(table[None].float(), size=size, mode="bilinear", align_corners=False)[0].to(table.dtype)

    @torch.jit.ignore
    def set_window_size(self, window: tuple[int, int]) -> None:
        table = self.relative_position_bias_table
        with torch.no_grad():
            self.relative_position_bias_table = nn.Parameter(self.resized(table, window), table.requires_grad)
        self.window = window

    def forward(self) -> Tensor:
        return self.relative_position_bias_table.clone()  # FSDP frees a parameter when its module has run


class RelPosBias(RelPosTable):
    """Swin's flat table ((2 * height - 1) * (2 * width - 1), heads), query - key."""

    def __init__(self, window: tuple[int, int], heads: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__((1, 1), heads, device, dtype)
        self.window = window
        shape = ((2 * window[0] - 1) * (2 * window[1] - 1), heads)
        self.relative_position_bias_table = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        trunc_normal_(self.relative_position_bias_table, std=0.02)

    def resized(self, table: Tensor, window: tuple[int, int]) -> Tensor:
        """timm's interpolation over geometrically spaced positions; a source other than our window is square."""
        shape = ((2 * window[0] - 1) * (2 * window[1] - 1), table.shape[1])
        ours = table.shape[0] == (2 * self.window[0] - 1) * (2 * self.window[1] - 1)
        old = self.window if ours else None
        return resize_rel_pos_bias_table(table, window, shape, old_window_size=old)

    def forward(self) -> Tensor:
        table = self.relative_position_bias_table
        heads = table.shape[1]
        return table.view(2 * self.window[0] - 1, 2 * self.window[1] - 1, heads).permute(2, 0, 1).flip(1, 2)


class RelPosMlp(nn.Module):
    """A small MLP over log-spaced relative positions (query - key) in place of a table."""

    rel_coords_log: Tensor

    def __init__(
        self, window: tuple[int, int], heads: int, hidden_dim: int = 512, device: Any = None, dtype: Any = None
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        self.window = window
        self.mlp = Mlp(2, hidden_dim, heads, act_layer=nn.ReLU, drop=(0.125, 0.0), **dd)
        coords = torch.empty((2 * window[0] - 1, 2 * window[1] - 1, 2), **dd)
        self.register_buffer("rel_coords_log", coords, persistent=False)
        self.init_non_persistent_buffers()

    @torch.jit.ignore
    def init_non_persistent_buffers(self) -> None:
        y = torch.arange(1 - self.window[0], self.window[0], device=self.rel_coords_log.device)
        x = torch.arange(1 - self.window[1], self.window[1], device=self.rel_coords_log.device)
        coords = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).float()
        self.rel_coords_log.copy_(coords.sign() * torch.log(1 + coords.abs()))

    @torch.jit.ignore
    def set_window_size(self, window: tuple[int, int]) -> None:
        self.window = window
        shape = (2 * window[0] - 1, 2 * window[1] - 1, 2)
        self.register_buffer("rel_coords_log", self.rel_coords_log.new_empty(shape), persistent=False)
        self.init_non_persistent_buffers()

    def forward(self) -> Tensor:
        return self.mlp(self.rel_coords_log).permute(2, 0, 1).flip(1, 2)


class Attention(nn.Module):
    """Attention inside the windows or grids of a (B, H, W, C) map, with relative position bias."""

    def __init__(
        self,
        dim: int,
        dim_out: int,
        partition_size: tuple[int, int],
        grid: bool,
        dim_head: int = 32,
        head_first: bool = False,
        width_scale: bool = False,
        rel_pos: Callable[..., RelPosTable | RelPosMlp] = RelPosTable,
        proj_drop: float = 0.0,
        attn_backend: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        if dim % dim_head:
            raise ValueError(f"MaxViT: dim_head {dim_head} must divide the width {dim} of every stage")
        self.num_heads = dim // dim_head
        self.dim_head = dim_head
        self.head_first = head_first
        self.scale = (dim if width_scale else dim_head) ** -0.5
        self.partition_size = partition_size
        self.grid = grid
        self.attn_backend = attn_backend
        self.qkv = nn.Linear(dim, dim * 3, **dd)
        self.rel_pos = rel_pos(partition_size, self.num_heads, **dd)
        self.proj = nn.Linear(dim, dim_out, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    @torch.jit.ignore
    def set_partition_size(self, partition_size: tuple[int, int]) -> None:
        self.partition_size = partition_size
        self.rel_pos.set_window_size(partition_size)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, _ = x.shape
        qkv = self.qkv(x)
        if self.head_first:
            qkv = qkv.view(B, H, W, self.num_heads, 3, self.dim_head).transpose(3, 4)
        else:
            qkv = qkv.view(B, H, W, 3, self.num_heads, self.dim_head)
        x = window_attention_qkvpacked(
            qkv,
            self.partition_size,
            grid=self.grid,
            bias=self.rel_pos(),
            scale=self.scale,
            backend=self.attn_backend,
        )
        return self.proj_drop(self.proj(x.flatten(3)))  # (B, H, W, dim_out)


class PartitionAttention(nn.Module):
    """Window or grid attention, then an MLP, on a (B, H, W, C) map."""

    def __init__(
        self,
        dim: int,
        grid: bool,
        act: str = "gelu",
        norm_eps: float = 1e-6,
        init_values: float | None = None,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        device: Any = None,
        dtype: Any = None,
        **attn_kwargs: Any,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        norm = partial(get_norm_layer("layernorm"), eps=norm_eps)
        self.norm1 = norm(dim, **dd)
        self._init_attn(dim, grid, **attn_kwargs, proj_drop=proj_drop, **dd)
        self.ls1 = LayerScale(dim, init_values, **dd) if init_values else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = norm(dim, **dd)
        self.mlp = Mlp(dim, 4 * dim, act_layer=get_act_layer(act), drop=proj_drop, **dd)
        self.ls2 = LayerScale(dim, init_values, **dd) if init_values else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def _init_attn(self, dim: int, grid: bool, **kwargs: Any) -> None:
        self.attn = Attention(dim, dim, grid=grid, **kwargs)

    def attend(self, x: Tensor) -> Tensor:
        return self.attn(x)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attend(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class ParallelPartitionAttention(PartitionAttention):
    """Window and grid attention side by side, each projected to half the width, then one MLP (timm's `pm`)."""

    def _init_attn(self, dim: int, grid: bool, **kwargs: Any) -> None:
        self.attn_block = Attention(dim, dim // 2, grid=False, **kwargs)
        self.attn_grid = Attention(dim, dim // 2, grid=True, **kwargs)

    def attend(self, x: Tensor) -> Tensor:
        return torch.cat([self.attn_block(x), self.attn_grid(x)], dim=-1)


class MaxVitBlock(nn.Module):
    """MBConv, window attention, grid attention (figure 2)."""

    def __init__(
        self, dim: int, dim_out: int, stride: int, conv: dict[str, Any], attn: dict[str, Any], **kwargs: Any
    ) -> None:
        super().__init__()
        self.conv = MbConv(dim, dim_out, stride, **conv, **kwargs)
        self.attn_block = PartitionAttention(dim_out, grid=False, **attn, **kwargs)
        self.attn_grid = PartitionAttention(dim_out, grid=True, **attn, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).permute(0, 2, 3, 1)  # (B, H, W, C)
        return self.attn_grid(self.attn_block(x)).permute(0, 3, 1, 2)


class ParallelMaxVitBlock(nn.Module):
    """Two MBConv, then window and grid attention side by side."""

    def __init__(
        self, dim: int, dim_out: int, stride: int, conv: dict[str, Any], attn: dict[str, Any], **kwargs: Any
    ) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            MbConv(dim, dim_out, stride, **conv, **kwargs), MbConv(dim_out, dim_out, **conv, **kwargs)
        )
        self.attn = ParallelPartitionAttention(dim_out, grid=False, **attn, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).permute(0, 2, 3, 1)  # (B, H, W, C)
        return self.attn(x).permute(0, 3, 1, 2)


class Stem(nn.Module):
    """3x3 with stride 2, norm, activation, 3x3."""

    def __init__(
        self,
        in_chs: int,
        widths: tuple[int, int],
        bias: bool,
        act: str,
        norm_eps: float,
        padding: str,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        self.same = padding == "same"
        self.conv1 = nn.Conv2d(in_chs, widths[0], 3, 2, padding=0 if self.same else 1, bias=bias, **dd)
        self.norm1 = get_norm_act_layer("batchnorm2d", act)(widths[0], eps=norm_eps, **dd)
        self.conv2 = nn.Conv2d(widths[0], widths[1], 3, padding=1, bias=bias, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = channels_last(x)
        x = self.conv1(_around(x) if self.same else x)
        # One input channel has no order of its own, so the convolution may answer in the other layout.
        x = channels_last(x)
        return self.conv2(self.norm1(x))


class MaxViT(Pyramid):
    """MaxViT: a stem and four stages of blocks with convolution, window attention and grid attention.

    Args:
        img_size: sets the partition (img_size // 32) and so the size of the bias tables; inputs may have any size.
        in_chans: channels of the input.
        num_classes: 0 leaves the classifier out.
        global_pool: timm's pooling names; "" leaves the map.
        embed_dims: width of every stage.
        depths: blocks of every stage.
        stem_width: width of the stem's convolutions, one number or both.
        stem_bias: bias in the stem's convolutions.
        parallel: window and grid attention side by side.
        head_hidden_size: width of the hidden layer of the head (norm after pooling); None for a plain head.
        expand_output: MBConv expands to four times its output, not input, width.
        output_bias: bias in MBConv's last convolution and shortcut.
        se_ratio: squeeze-and-excitation width relative to the output width (the expanded one without expand_output).
        overlap: the shortcut of a stage's first block pools 3x3 pixels and always projects, as torchvision's does.
        conv_act, conv_norm_eps, padding: activation, BatchNorm epsilon, padding ("" or "same") of convolutions.
        act, norm_eps: MLP activation and LayerNorm epsilon of the attention blocks.
        dim_head: width of a head.
        head_first: order of the qkv channels, (heads, 3, dim) in place of (3, heads, dim).
        width_scale: scores are divided by the root of the width, not of a head's width, as torchvision's are.
        rel_pos: "table" (the original's), "bias" (Swin's) or "mlp".
        rel_pos_dim: hidden width of the "mlp" bias.
        init_values: initial layer scale, None for none.
        partition_size: window and grid size in place of img_size // 32.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout after projections.
        drop_path_rate: stochastic depth rate of the last block, rising linearly.
        attn_backend: passed to `zoo.ops.window`.

    Raises:
        ValueError: an option is unknown or does not fit.
    """

    stem_feature = True
    no_decay = ("relative_position_bias_table", "rel_pos.mlp")

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 5, 2),
        stem_width: int | tuple[int, int] = 64,
        stem_bias: bool = True,
        parallel: bool = False,
        head_hidden_size: int | None = None,
        expand_output: bool = True,
        output_bias: bool = True,
        se_ratio: float = 0.25,
        conv_act: str = "gelu_tanh",
        conv_norm_eps: float = 1e-3,
        padding: str = "same",
        overlap: bool = False,
        act: str = "gelu_tanh",
        norm_eps: float = 1e-5,
        dim_head: int = 32,
        head_first: bool = False,
        width_scale: bool = False,
        rel_pos: str = "table",
        rel_pos_dim: int = 512,
        init_values: float | None = None,
        partition_size: int | tuple[int, int] | None = None,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        attn_backend: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if len(embed_dims) != len(depths):
            raise ValueError(f"MaxViT: embed_dims {embed_dims} and depths {depths} must have one entry per stage")
        rel_pos_cls = {
            "table": RelPosTable,
            "bias": RelPosBias,
            "mlp": partial(RelPosMlp, hidden_dim=rel_pos_dim),
        }.get(rel_pos)
        if rel_pos_cls is None:
            raise ValueError(f"MaxViT: rel_pos must be 'table', 'bias' or 'mlp', got {rel_pos!r}")
        super().__init__(in_chans, embed_dims[-1])
        self.img_size = to_2tuple(img_size)
        partition = to_2tuple(partition_size) if partition_size else tuple(max(1, s // 32) for s in self.img_size)
        widths = to_2tuple(stem_width)
        self.stem = Stem(in_chans, widths, stem_bias, conv_act, conv_norm_eps, padding, **dd)
        self.feature_info.append({"num_chs": widths[1], "reduction": 2, "module": "stem"})
        conv = {
            "expand_output": expand_output,
            "output_bias": output_bias,
            "se_ratio": se_ratio,
            "act": conv_act,
            "norm_eps": conv_norm_eps,
            "padding": padding,
            "overlap": overlap,
        }
        attn = {
            "act": act,
            "norm_eps": norm_eps,
            "init_values": init_values,
            "proj_drop": proj_drop_rate,
            "partition_size": partition,
            "dim_head": dim_head,
            "head_first": head_first,
            "width_scale": width_scale,
            "rel_pos": rel_pos_cls,
            "attn_backend": attn_backend,
        }
        block = ParallelMaxVitBlock if parallel else MaxVitBlock
        stages = []
        in_chs = widths[1]
        for dim, rates in zip(embed_dims, stage_rates(drop_path_rate, depths), strict=True):
            blocks = [
                block(dim if j else in_chs, dim, stride=1 if j else 2, drop_path=rate, conv=conv, attn=attn, **dd)
                for j, rate in enumerate(rates)
            ]
            stages.append(Stage(blocks))
            in_chs = dim
        self.add_stages(stages, embed_dims)

        norm = partial(get_norm_layer("layernorm2d"), eps=norm_eps)
        if head_hidden_size:
            head: dict[str, Any] = {"head": NormMlpClassifierHead, "hidden_size": head_hidden_size, "norm_layer": norm}
            self.add_head(num_classes, global_pool, drop_rate, **head, **dd)
        else:
            self.norm = norm(in_chs, **dd)
            self.add_head(num_classes, global_pool, drop_rate, **dd)
        for part in (self.stem, self.stages):
            named_apply(_init_weights, part)

    @torch.jit.ignore
    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        partition_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Change the partition to partition_size, or to img_size // 32, and resize the bias tables."""
        if img_size is not None:
            self.img_size = to_2tuple(img_size)
        partition = to_2tuple(partition_size) if partition_size else tuple(max(1, s // 32) for s in self.img_size)
        for module in self.modules():
            if isinstance(module, Attention):
                module.set_partition_size(partition)
        update_model_input_size(self, self.img_size, partition_size=partition)


def _init_weights(module: nn.Module, name: str) -> None:
    if isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, 0, math.sqrt(2.0 / fan_out))
    elif isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
    if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
        if isinstance(module, nn.Linear) and "mlp" in name:
            nn.init.normal_(module.bias, std=1e-6)
        else:
            nn.init.zeros_(module.bias)


DIALECTS = (
    Dialect("timm, whose names are ours"),
    Dialect(
        "torchvision",
        (
            (r"^stem\.conv1\.", "stem.0.0."),
            (r"^stem\.norm1\.", "stem.0.1."),
            (r"^stem\.conv2\.", "stem.1.0."),
            (r"^stages\.(\d+)\.blocks\.(\d+)\.conv\.", r"blocks.\1.layers.\2.layers.MBconv.layers."),
            (r"\.layers\.shortcut\.expand\.", ".proj.1."),
            (r"\.conv1_1x1\.", ".conv_a.0."),
            (r"(\.MBconv\.layers)\.norm1\.", r"\1.conv_a.1."),
            (r"\.conv2_kxk\.", ".conv_b.0."),
            (r"(\.MBconv\.layers)\.norm2\.", r"\1.conv_b.1."),
            (r"\.se\.", ".squeeze_excitation."),
            (r"\.conv3_1x1\.", ".conv_c."),
            (r"^stages\.(\d+)\.blocks\.(\d+)\.attn_block\.", r"blocks.\1.layers.\2.layers.window_attention."),
            (r"^stages\.(\d+)\.blocks\.(\d+)\.attn_grid\.", r"blocks.\1.layers.\2.layers.grid_attention."),
            (r"(_attention)\.norm1\.", r"\1.attn_layer.0."),
            (r"(_attention)\.attn\.qkv\.", r"\1.attn_layer.1.to_qkv."),
            (r"(_attention)\.attn\.proj\.", r"\1.attn_layer.1.merge."),
            (r"(_attention)\.attn\.rel_pos\.", r"\1.attn_layer.1."),
            (r"(_attention)\.norm2\.", r"\1.mlp_layer.0."),
            (r"(_attention)\.mlp\.fc1\.", r"\1.mlp_layer.1."),
            (r"(_attention)\.mlp\.fc2\.", r"\1.mlp_layer.3."),
            (r"^head\.norm\.", "classifier.2."),
            (r"^head\.pre_logits\.fc\.", "classifier.3."),
            (r"^head\.fc\.", "classifier.5."),
        ),
        ignored=r"\.relative_position_index$",
        zero=r"^(?:stem\.conv1|head\.fc)\.bias$",
    ),
)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Any dialect's names to ours, bias tables in the model's size, linear and 1x1 convolution weights in its shape."""
    state_dict = rename(state_dict, model)
    own = model.state_dict()
    out = {}
    for k, v in state_dict.items():
        if k.endswith("relative_position_bias_table") and k in own:
            rel_pos: Any = model.get_submodule(k.rpartition(".")[0])
            if v.shape != own[k].shape and v.ndim == own[k].ndim:
                v = rel_pos.resized(v, rel_pos.window)
        out[k] = v
    return out


def _cfg(
    size: int, top1: float | None = None, params: str | None = None, flops: str | None = None, **kwargs: Any
) -> dict[str, Any]:
    fine_tuned = {"crop_pct": 1.0, "crop_mode": "squash"} if size >= 384 else {"crop_pct": 0.95}
    defaults = {
        "input_size": (3, size, size),
        "pool_size": (size // 32, size // 32),
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "first_conv": "stem.conv1",
        "classifier": "head.fc",
        "license": "apache-2.0",
        "paper_name": "MaxViT: Multi-Axis Vision Transformer",
        "paper_ids": "arXiv:2204.01697",
        "origin_url": "https://github.com/google-research/maxvit",
    }
    return published_cfg(top1=top1, params=params, flops=flops, **{**defaults, **fine_tuned, **kwargs})


def _rw(size: int, *figures: Any, file: str = "", **kwargs: Any) -> dict[str, Any]:
    release = "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-weights-maxx/"
    origin = "https://github.com/huggingface/pytorch-image-models"
    return _cfg(size, *figures, url=release + file if file else "", origin_url=origin, **kwargs)


_STATS: dict[str, Any] = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}

# By timm's checkpoint name: size, top-1, parameters, multiply-adds. The top-1 of ImageNet-1k `tf` variants is that of
# the original's table, otherwise that of timm's evaluation.
_PUBLISHED: dict[str, dict[str, Any]] = {
    "maxvit_tiny_tf_224.in1k": _cfg(224, 83.62, "31M", "5.6G", **_STATS),
    "maxvit_tiny_tf_384.in1k": _cfg(384, 85.24, "31M", "17.7G"),
    "maxvit_tiny_tf_512.in1k": _cfg(512, 85.72, "31M", "33.7G"),
    "maxvit_small_tf_224.in1k": _cfg(224, 84.45, "69M", "11.7G", **_STATS),
    "maxvit_small_tf_384.in1k": _cfg(384, 85.74, "69M", "36.1G"),
    "maxvit_small_tf_512.in1k": _cfg(512, 86.19, "69M", "67.6G"),
    "maxvit_base_tf_224.in1k": _cfg(224, 84.95, "119M", "24.2G", **_STATS),
    "maxvit_base_tf_384.in1k": _cfg(384, 86.34, "119M", "74.2G"),
    "maxvit_base_tf_512.in1k": _cfg(512, 86.66, "119M", "138.5G"),
    "maxvit_large_tf_224.in1k": _cfg(224, 85.17, "212M", "43.9G", **_STATS),
    "maxvit_large_tf_384.in1k": _cfg(384, 86.4, "212M", "133.1G"),
    "maxvit_large_tf_512.in1k": _cfg(512, 86.7, "212M", "245.4G"),
    "maxvit_base_tf_224.in21k": _cfg(224, None, "119M", "24.2G", num_classes=21843),
    "maxvit_base_tf_384.in21k_ft_in1k": _cfg(384, 87.93, "119M", "74.2G"),
    "maxvit_base_tf_512.in21k_ft_in1k": _cfg(512, 88.214, "119M", "138.5G"),
    "maxvit_large_tf_224.in21k": _cfg(224, None, "212M", "43.9G", num_classes=21843),
    "maxvit_large_tf_384.in21k_ft_in1k": _cfg(384, 87.994, "212M", "133.1G"),
    "maxvit_large_tf_512.in21k_ft_in1k": _cfg(512, 88.236, "212M", "245.4G"),
    "maxvit_xlarge_tf_224.in21k": _cfg(224, None, "475M", "97.8G", num_classes=21843),
    "maxvit_xlarge_tf_384.in21k_ft_in1k": _cfg(384, 88.302, "475M", "293.7G"),
    "maxvit_xlarge_tf_512.in21k_ft_in1k": _cfg(512, 88.54, "475M", "535.2G"),
    "maxvit_nano_rw_256.sw_in1k": _rw(256, 82.934, "15.45M", "4.26G", file="maxvit_nano_rw_256_sw-fb127241.pth"),
    "maxvit_tiny_rw_224.sw_in1k": _rw(224, 83.522, "29.06M", "4.93G", file="maxvit_tiny_rw_224_sw-7d0dffeb.pth"),
    "maxvit_rmlp_pico_rw_256.sw_in1k": _rw(
        256, 80.55, "7.52M", "1.69G", file="maxvit_rmlp_pico_rw_256_sw-8d82f2c6.pth"
    ),
    "maxvit_rmlp_nano_rw_256.sw_in1k": _rw(
        256, 82.978, "15.50M", "4.28G", file="maxvit_rmlp_nano_rw_256_sw-c17bb0d6.pth"
    ),
    "maxvit_rmlp_tiny_rw_256.sw_in1k": _rw(
        256, 84.226, "29.15M", "6.47G", file="maxvit_rmlp_tiny_rw_256_sw-bbef0ff5.pth"
    ),
    "maxvit_rmlp_small_rw_224.sw_in1k": _rw(
        224, 84.488, "64.90M", "10.48G", file="maxvit_rmlp_small_rw_224_sw-6ef0ae4f.pth", crop_pct=0.9
    ),
    "maxvit_rmlp_base_rw_224.sw_in12k_ft_in1k": _rw(224, 86.908, "116.14M", "22.63G"),
    "maxvit_rmlp_base_rw_384.sw_in12k_ft_in1k": _rw(384, 87.81, "116.14M", "66.51G"),
    "maxvit_rmlp_base_rw_224.sw_in12k": _rw(224, None, "116.14M", "22.63G", num_classes=11821),
}
_UNTRAINED: dict[str, dict[str, Any]] = {
    "maxvit_pico_rw_256": _rw(256, None, "7.46M"),
    "maxvit_tiny_rw_256": _rw(256, None, "29.07M"),
    "maxvit_tiny_pm_256": _rw(256, None, "30.09M"),
    "maxvit_rmlp_small_rw_256": _rw(256, None, "64.90M"),
}
default_cfgs = generate_default_cfgs(
    {
        **{f"zoo_{name}": {**cfg, "hf_hub_id": f"timm/{name}"} for name, cfg in _PUBLISHED.items()},
        **{f"zoo_{name}.untrained": cfg for name, cfg in _UNTRAINED.items()},
        "zoo_maxvit_tiny_tv_224.tv_in1k": _cfg(
            224,
            83.7,
            "31M",
            "5.6G",
            **_STATS,
            url="https://download.pytorch.org/models/maxvit_t-bc5ab103.pth",
            crop_pct=1.0,
            license="bsd-3-clause",
            origin_url="https://github.com/pytorch/vision",
        ),
    }
)

_RW: dict[str, Any] = {
    "stem_width": (32, 64),
    "stem_bias": False,
    "expand_output": False,
    "output_bias": False,
    "se_ratio": 1 / 16,
    "conv_act": "silu",
    "conv_norm_eps": 1e-5,
    "padding": "",
    "act": "gelu",
    "norm_eps": 1e-6,
    "head_first": True,
    "rel_pos": "bias",
}
_RMLP: dict[str, Any] = {**_RW, "rel_pos": "mlp"}
_PICO: dict[str, Any] = {"embed_dims": (32, 64, 128, 256), "stem_width": (24, 32)}
_NANO: dict[str, Any] = {"depths": (1, 2, 3, 1)}
_SMALL: dict[str, Any] = {"embed_dims": (96, 192, 384, 768)}
_BASE: dict[str, Any] = {"embed_dims": (96, 192, 384, 768), "depths": (2, 6, 14, 2), "head_hidden_size": 768}
_TINY_TF: dict[str, Any] = {"head_hidden_size": 512}
_TINY_TV: dict[str, Any] = {
    "head_hidden_size": 512,
    "conv_act": "gelu",
    "padding": "",
    "overlap": True,
    "act": "gelu",
    "width_scale": True,
    "rel_pos": "bias",
}
_SMALL_TF: dict[str, Any] = {**_SMALL, "head_hidden_size": 768}
_LARGE_TF: dict[str, Any] = {
    "embed_dims": (128, 256, 512, 1024),
    "depths": (2, 6, 14, 2),
    "stem_width": 128,
    "head_hidden_size": 1024,
}
_XLARGE_TF: dict[str, Any] = {
    "embed_dims": (192, 384, 768, 1536),
    "depths": (2, 6, 14, 2),
    "stem_width": 192,
    "head_hidden_size": 1536,
}


def _create(variant: str, pretrained: bool, args: dict[str, Any], img_size: int, kwargs: dict[str, Any]) -> MaxViT:
    args = {**args, "img_size": img_size, **kwargs}
    feature_cfg = {"out_indices": (0, 1, 2, 3, 4)}
    return build_model(MaxViT, variant, pretrained, filter_fn=checkpoint_filter_fn, feature_cfg=feature_cfg, **args)


@register_model
def zoo_maxvit_pico_rw_256(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    return _create("zoo_maxvit_pico_rw_256", pretrained, {**_RW, **_PICO}, 256, kwargs)


@register_model
def zoo_maxvit_nano_rw_256(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    return _create("zoo_maxvit_nano_rw_256", pretrained, {**_RW, **_NANO}, 256, kwargs)


@register_model
def zoo_maxvit_tiny_rw_224(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    return _create("zoo_maxvit_tiny_rw_224", pretrained, _RW, 224, kwargs)


@register_model
def zoo_maxvit_tiny_rw_256(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    return _create("zoo_maxvit_tiny_rw_256", pretrained, _RW, 256, kwargs)


@register_model
def zoo_maxvit_tiny_pm_256(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    return _create("zoo_maxvit_tiny_pm_256", pretrained, {**_RW, "parallel": True}, 256, kwargs)


@register_model
def zoo_maxvit_rmlp_pico_rw_256(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    return _create("zoo_maxvit_rmlp_pico_rw_256", pretrained, {**_RMLP, **_PICO}, 256, kwargs)


@register_model
def zoo_maxvit_rmlp_nano_rw_256(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    return _create("zoo_maxvit_rmlp_nano_rw_256", pretrained, {**_RMLP, **_NANO}, 256, kwargs)


@register_model
def zoo_maxvit_rmlp_tiny_rw_256(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    return _create("zoo_maxvit_rmlp_tiny_rw_256", pretrained, _RMLP, 256, kwargs)


@register_model
def zoo_maxvit_rmlp_small_rw_224(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    return _create("zoo_maxvit_rmlp_small_rw_224", pretrained, {**_RMLP, **_SMALL, "init_values": 1e-6}, 224, kwargs)


@register_model
def zoo_maxvit_rmlp_small_rw_256(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    return _create("zoo_maxvit_rmlp_small_rw_256", pretrained, {**_RMLP, **_SMALL, "init_values": 1e-6}, 256, kwargs)


@register_model
def zoo_maxvit_rmlp_base_rw_224(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    return _create("zoo_maxvit_rmlp_base_rw_224", pretrained, {**_RMLP, **_BASE}, 224, kwargs)


@register_model
def zoo_maxvit_rmlp_base_rw_384(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    return _create("zoo_maxvit_rmlp_base_rw_384", pretrained, {**_RMLP, **_BASE}, 384, kwargs)


@register_model
def zoo_maxvit_tiny_tf_224(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    return _create("zoo_maxvit_tiny_tf_224", pretrained, _TINY_TF, 224, kwargs)


@register_model
def zoo_maxvit_tiny_tv_224(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    return _create("zoo_maxvit_tiny_tv_224", pretrained, _TINY_TV, 224, kwargs)


@register_model
def zoo_maxvit_tiny_tf_384(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    return _create("zoo_maxvit_tiny_tf_384", pretrained, _TINY_TF, 384, kwargs)


@register_model
def zoo_maxvit_tiny_tf_512(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    return _create("zoo_maxvit_tiny_tf_512", pretrained, _TINY_TF, 512, kwargs)


@register_model
def zoo_maxvit_small_tf_224(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    return _create("zoo_maxvit_small_tf_224", pretrained, _SMALL_TF, 224, kwargs)


@register_model
def zoo_maxvit_small_tf_384(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    return _create("zoo_maxvit_small_tf_384", pretrained, _SMALL_TF, 384, kwargs)


@register_model
def zoo_maxvit_small_tf_512(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    return _create("zoo_maxvit_small_tf_512", pretrained, _SMALL_TF, 512, kwargs)


@register_model
def zoo_maxvit_base_tf_224(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    return _create("zoo_maxvit_base_tf_224", pretrained, _BASE, 224, kwargs)


@register_model
def zoo_maxvit_base_tf_384(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    return _create("zoo_maxvit_base_tf_384", pretrained, _BASE, 384, kwargs)


@register_model
def zoo_maxvit_base_tf_512(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    return _create("zoo_maxvit_base_tf_512", pretrained, _BASE, 512, kwargs)


@register_model
def zoo_maxvit_large_tf_224(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    return _create("zoo_maxvit_large_tf_224", pretrained, _LARGE_TF, 224, kwargs)


@register_model
def zoo_maxvit_large_tf_384(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    return _create("zoo_maxvit_large_tf_384", pretrained, _LARGE_TF, 384, kwargs)


@register_model
def zoo_maxvit_large_tf_512(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    return _create("zoo_maxvit_large_tf_512", pretrained, _LARGE_TF, 512, kwargs)


@register_model
def zoo_maxvit_xlarge_tf_224(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    return _create("zoo_maxvit_xlarge_tf_224", pretrained, _XLARGE_TF, 224, kwargs)


@register_model
def zoo_maxvit_xlarge_tf_384(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    return _create("zoo_maxvit_xlarge_tf_384", pretrained, _XLARGE_TF, 384, kwargs)


@register_model
def zoo_maxvit_xlarge_tf_512(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    return _create("zoo_maxvit_xlarge_tf_512", pretrained, _XLARGE_TF, 512, kwargs)

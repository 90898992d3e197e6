"""What three or more of the model files share: neighborhood attention and its block, stages, the classifier."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, create_classifier, get_device_dtype, trunc_normal_
from timm.models import checkpoint_seq, register_notrace_module
from torch import Tensor, nn

from zoo.ops.neighborhood import neighborhood_attention_qkvpacked
from zoo.ops.neighborhood.reference import axis_windows

__all__ = [
    "Block",
    "Classifier",
    "Dilations",
    "NeighborhoodAttention",
    "NormLayer",
    "Stage",
    "check_image_size",
    "init_linear",
    "neighborhood_stage",
    "per_block",
    "per_level",
    "resize_bias_tables",
    "resize_table",
]

NormLayer = Callable[..., nn.Module]
Dilations = int | Sequence[int | Sequence[int]] | None


@register_notrace_module  # padding depends on the size, and TorchScript needs a branch of its own
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
        # a scripted model can call registered ops only, and the definition is none: "" leaves the choice to the op
        self.script_backend = "" if attn_backend in (None, "reference") else attn_backend
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.rpb = nn.Parameter(torch.zeros(num_heads, 2 * kernel_size - 1, 2 * kernel_size - 1, **dd))
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        trunc_normal_(self.rpb, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        kernel, dilation = self.kernel_size, self.dilation
        height, width = max(H, kernel * dilation), max(W, kernel * dilation)
        if height > H or width > W:
            x = F.pad(x, (0, 0, 0, width - W, 0, height - H))
        qkv = self.qkv(x).reshape(B, height, width, 3, self.num_heads, self.head_dim)
        if torch.jit.is_scripting():
            if self.training and self.attn_drop > 0.0:
                raise NotImplementedError("attention dropout is not available in TorchScript")
            x = torch.ops.zoo.neighborhood_attention_qkvpacked(
                qkv,
                self.rpb,
                [kernel, kernel],
                [dilation, dilation],
                [1, 1],
                [False, False],
                self.scale,
                self.script_backend,
            )[0]
        elif self.training and self.attn_drop > 0.0:
            x = _attention_with_dropout(qkv, self.rpb, kernel, dilation, self.scale, self.attn_drop)
        else:
            x = neighborhood_attention_qkvpacked(
                qkv, kernel, dilation=dilation, bias=self.rpb, scale=self.scale, backend=self.attn_backend
            )
        x = x.reshape(B, height, width, C)
        if height > H or width > W:
            x = x[:, :H, :W]
        return self.proj_drop(self.proj(x))


@torch.jit.ignore
def _attention_with_dropout(
    qkv: Tensor, bias: Tensor, kernel_size: int, dilation: int, scale: float, drop: float
) -> Tensor:
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
        if layer_scale is None:
            self.register_parameter("gamma1", None)
            self.register_parameter("gamma2", None)
        else:
            self.gamma1 = nn.Parameter(torch.full((dim,), float(layer_scale), **dd))
            self.gamma2 = nn.Parameter(torch.full((dim,), float(layer_scale), **dd))

    def forward(self, x: Tensor) -> Tensor:
        y = self.attn(self.norm1(x))
        x = x + self.drop_path(y if self.gamma1 is None else self.gamma1 * y)
        y = self.mlp(self.norm2(x))
        return x + self.drop_path(y if self.gamma2 is None else self.gamma2 * y)


class Stage(nn.Module):
    """Blocks, and the downsampling towards the next stage."""

    def __init__(self, blocks: Iterable[nn.Module], downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.blocks = nn.Sequential(*blocks)
        self.downsample = nn.Identity() if downsample is None else downsample

    def forward_blocks(self, x: Tensor) -> Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(self.forward_blocks(x))


def neighborhood_stage(
    dim: int,
    num_heads: int,
    kernel_size: int,
    dilations: list[int],
    drop_path_rates: list[float],
    downsample: nn.Module | None = None,
    mlp_ratio: float = 4.0,
    qkv_bias: bool = True,
    qk_scale: float | None = None,
    attn_drop: float = 0.0,
    proj_drop: float = 0.0,
    layer_scale: float | None = None,
    norm_layer: NormLayer = nn.LayerNorm,
    attn_backend: str | None = None,
    device: Any = None,
    dtype: Any = None,
) -> Stage:
    """A stage of neighborhood attention on [B, H, W, C]."""
    dd = {"device": device, "dtype": dtype}
    blocks = []
    for dilation, rate in zip(dilations, drop_path_rates, strict=True):
        attn = NeighborhoodAttention(
            dim, num_heads, kernel_size, dilation, qkv_bias, qk_scale, attn_drop, proj_drop, attn_backend, **dd
        )
        blocks.append(Block(dim, attn, mlp_ratio, proj_drop, rate, layer_scale, norm_layer, **dd))
    return Stage(blocks, downsample)


class Classifier(nn.Module):
    """Base of the models that end in global_pool, head_drop and head: their part of timm's contract.

    A subclass calls `add_classifier` in its constructor and has `forward_features`; where pruning changes the number of
    channels it sets `head_dim` before `reset_classifier`.
    """

    def add_classifier(
        self, dim: int, num_classes: int, global_pool: str, drop_rate: float, device: Any = None, dtype: Any = None
    ) -> None:
        """Add the classifier for features of `dim` channels."""
        self.drop_rate = drop_rate
        self.head_drop = nn.Dropout(drop_rate)
        self._set_classifier(dim, num_classes, global_pool, device, dtype)

    def _set_classifier(self, dim: int, num_classes: int, pool_type: str, device: Any, dtype: Any) -> None:
        self.num_classes = num_classes
        self.head_dim = dim
        self.global_pool, self.head = create_classifier(
            dim, num_classes, pool_type=pool_type, device=device, dtype=dtype
        )
        self.head_hidden_size = dim * self.global_pool.feat_mult()

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for module in self.modules():
            if isinstance(module, Stage):
                module.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the model a fresh classifier, and another pooling if one is named."""
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        self._set_classifier(self.head_dim, num_classes, pool_type, **get_device_dtype(self))
        self.global_pool.train(self.training)
        self.head.train(self.training)

    def forward_features(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def init_linear(module: nn.Module) -> None:
    """For nn.Module.apply: truncated normal weights of deviation 0.02 and zero biases in every Linear."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def per_level(name: str, value: int | Sequence[int], levels: int) -> list[int]:
    """One positive int per level from an int or a sequence.

    Raises:
        ValueError: there is not one value per level, or one is no positive int.
    """
    values = list(value) if isinstance(value, Sequence) else [value] * levels
    if len(values) != levels or not all(map(_is_size, values)):
        raise ValueError(f"{name} must be a positive int or {levels} of them, one per level; got {value!r}")
    return values


def per_block(dilations: Dilations, depths: Sequence[int]) -> list[list[int]]:
    """The dilation of every block of every level.

    Args:
        dilations: None (no dilation), an int for all blocks, or for each level an int or a sequence, which is repeated
            over the level's blocks: (1, 8) in a level of three blocks means 1, 8, 1.
        depths: blocks of each level.

    Raises:
        ValueError: there is not one entry per level, or a value is no positive int.
    """
    common = 1 if dilations is None else dilations
    entries = list(common) if isinstance(common, Sequence) else [common] * len(depths)
    patterns = [list(entry) if isinstance(entry, Sequence) else [entry] for entry in entries]
    if len(patterns) != len(depths) or not all(p and all(map(_is_size, p)) for p in patterns):
        raise ValueError(
            f"dilations must be None, a positive int, or for each of the {len(depths)} levels a positive int or a "
            f"sequence of them; got {dilations!r}"
        )
    return [[pattern[i % len(pattern)] for i in range(depth)] for pattern, depth in zip(patterns, depths, strict=True)]


def check_image_size(value: int | Sequence[int]) -> tuple[int, int]:
    """Height and width from an int or a pair.

    Raises:
        ValueError: it is neither.
    """
    sizes = list(value) if isinstance(value, Sequence) else [value, value]
    if len(sizes) != 2 or not all(map(_is_size, sizes)):
        raise ValueError(f"img_size must be a positive int or a pair of them, got {value!r}")
    return sizes[0], sizes[1]


def resize_table(table: Tensor, height: int, width: int) -> Tensor:
    """Bicubic interpolation of a [heads, ., .] bias table, as Swin does; offset 0 stays in the middle."""
    dtype = torch.float64 if table.dtype == torch.float64 else torch.float32
    resized = F.interpolate(table.to(dtype).unsqueeze(0), size=[height, width], mode="bicubic", align_corners=False)
    return resized.squeeze(0).to(table.dtype)


def resize_bias_tables(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Fit the bias tables of a state_dict to the kernel or map sizes of a model."""
    own = {name: tensor.shape for name, tensor in model.state_dict().items() if name.endswith("attn.rpb")}
    return {
        name: resize_table(value, own[name][1], own[name][2])
        if value.dim() == 3 and own.get(name, value.shape) != value.shape
        else value
        for name, value in state_dict.items()
    }

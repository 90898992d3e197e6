"""SpectFormer: blocks that filter the map in the frequency domain, then blocks with attention.

Paper: "SpectFormer: Frequency and Attention is what you need in a Vision Transformer" (WACV 2025),
       https://arxiv.org/abs/2304.06446
Original: https://github.com/badripatro/SpectFormers (hierarchical_architecture/spectformer.py and
          vanilla_architecture/spectformer.py; no licence file, no published checkpoints).

Numbers are the original's. What differs:
- every image size runs, where the original takes that of its gates only: a gate is interpolated over the frequencies
  of the map (`resize_gate`), the position embedding of the vanilla form bicubically; a checkpoint of another `img_size`
  is loaded in the same way;
- `num_heads` of the vanilla form is an argument (the original says 6 for every width, which does not divide 256 or
  512): 4, 6, 6 and 8 heads. The 8 of `spectformer_vanilla_b` are a guess, no published number says them;
- hierarchical: q and kv of the attention are one Linear; the class block, the last norm and both classifiers are the
  head, so that `forward_features` gives the map of the last stage. Without pooling every pixel is classified by itself;
- training gives the logits of evaluation, too: the original's mixing of token labels is a matter of its loss.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from timm.layers import Mlp, SelectAdaptivePool2d, get_device_dtype, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.ops.maps import is_symbolic, pad_map

from ._build import build_isotropic, build_model, published_cfg
from ._modules import DWMlp, global_attention
from ._pyramid import DropPath, Isotropic, Pyramid, Stage, init_linear, stage_rates
from ._tables import as_map, check_image_size, halved, resize_map
from .dialects import Dialect, moved_by, rename

__all__ = ["SpectFormer", "SpectFormerVanilla"]

torch.fx.wrap("spectral_gate")  # its spectrum depends on the size
torch.fx.wrap("resize_map")  # whether there is anything to do, too


def resize_gate(gate: Tensor, height: int, width: int) -> Tensor:
    """A gate for a map of another size: linear interpolation over the frequencies, which are cycles per pixel.

    Along both axes the gate is periodic, and rows of negative frequency follow those of positive; beyond its last
    column it continues as the spectrum of a real kernel does, G(-u, -v) = conj G(u, v). As the columns do not say
    whether the gate's map was of even or odd width, it is taken to be as the asked one: a gate that has the asked
    size's number of columns is used as it is, as in the original.

    Args:
        gate: (h, w // 2 + 1, C, 2), real and imaginary parts at the frequencies that `rfft2` gives of (h, w) maps.
        height, width: of the map.

    Returns:
        (height, width // 2 + 1, C, 2); the gate itself where that is its shape.
    """
    rows, columns = gate.shape[0], gate.shape[1]
    if not is_symbolic(height, width) and rows == height and columns == width // 2 + 1:
        return gate
    old_width = 2 * (columns - 1) + width % 2
    mirrored = (rows - torch.arange(rows, device=gate.device)) % rows
    beyond = gate[mirrored, torch.full_like(mirrored, old_width - columns)]
    real, imaginary = beyond.unbind(-1)
    gate = torch.cat((gate, torch.stack((real, -imaginary), -1).unsqueeze(1)), dim=1)
    # positions in the old gate, in integers, so that a frequency that both have is exactly the old value
    position = torch.arange(height, device=gate.device) * rows
    lower = position.div(height, rounding_mode="floor")
    share = (position - lower * height).to(gate.dtype) / height
    gate = torch.lerp(gate[lower], gate[(lower + 1) % rows], share[:, None, None, None])
    position = torch.arange(width // 2 + 1, device=gate.device) * old_width
    lower = position.div(width, rounding_mode="floor")
    share = (position - lower * width).to(gate.dtype) / width
    return torch.lerp(gate[:, lower], gate[:, lower + 1], share[:, None, None])


def spectral_gate(x: Tensor, gate: Tensor) -> Tensor:
    """The map whose spectrum is multiplied by a gate: a circular convolution with a kernel as large as the map.

    Computed in float32 whatever the dtype, as in the original, or in float64.

    Args:
        x: (B, H, W, C).
        gate: (h, w // 2 + 1, C, 2), of another size interpolated.
    """
    height, width = x.shape[1], x.shape[2]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    gate = resize_gate(gate.to(dtype), height, width)
    if not torch.jit.is_scripting():  # noqa: SIM102 (on a line of its own, as TorchScript wants it)
        if torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export():
            return gate_by_products(x.to(dtype), gate).to(x.dtype)
    # an odd width is not to be told from the spectrum; a factor before the first transform or after the second is one,
    # and that of norm="ortho" would be the square root of a size, which no exported program leaves open
    spectrum = torch.fft.rfft2(x.to(dtype), dim=(1, 2)) * torch.view_as_complex(gate.contiguous())
    return torch.fft.irfft2(spectrum, s=(height, width), dim=(1, 2)).to(x.dtype)


def gate_by_products(x: Tensor, gate: Tensor) -> Tensor:
    """`spectral_gate` by products with the matrices of the transforms, for ONNX, whose DFT does not take every size.

    Args:
        x: (B, H, W, C).
        gate: (H, W // 2 + 1, C, 2).
    """
    cos_rows, sin_rows = _waves(x.shape[1], x.shape[1], x)
    cos_columns, sin_columns = _waves(x.shape[2], gate.shape[1], x)
    columns = torch.arange(gate.shape[1], device=x.device)
    width = torch.scalar_tensor(x.shape[2], device=x.device, dtype=torch.int64)
    # every frequency but the first, and of an even width the last, stands for its negative too
    shares = (2 - (columns == 0).to(x.dtype) - (2 * columns == width).to(x.dtype)) / width.to(x.dtype)
    height = torch.scalar_tensor(x.shape[1], device=x.device, dtype=x.dtype)
    x = x.permute(0, 3, 1, 2)
    real, imaginary = x @ cos_columns, -(x @ sin_columns)  # (B, C, H, W // 2 + 1)
    real, imaginary = cos_rows @ real + sin_rows @ imaginary, cos_rows @ imaginary - sin_rows @ real
    factor, other = gate.permute(3, 2, 0, 1).unbind(0)
    real, imaginary = real * factor - imaginary * other, real * other + imaginary * factor
    real, imaginary = cos_rows @ real - sin_rows @ imaginary, cos_rows @ imaginary + sin_rows @ real
    x = (real * shares) @ cos_columns.t() - (imaginary * shares) @ sin_columns.t()
    return (x / height).permute(0, 2, 3, 1)


def _waves(size: int, frequencies: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of 2 pi n k / size, (size, frequencies)."""
    length = torch.scalar_tensor(size, device=like.device, dtype=torch.int64)
    turns = torch.arange(size, device=like.device).unsqueeze(1) * torch.arange(frequencies, device=like.device)
    angle = 2 * math.pi * (turns % length).to(like.dtype) / length.to(like.dtype)
    return angle.cos(), angle.sin()


class SpectralGatingNetwork(nn.Module):
    """A learned complex factor for each frequency and channel of (B, H, W, C); `size` is the H, W that it is for."""

    def __init__(self, dim: int, size: tuple[int, int], device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.size = size
        shape = (size[0], size[1] // 2 + 1, dim, 2)
        self.complex_weight = nn.Parameter(0.02 * torch.randn(shape, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return spectral_gate(x, self.complex_weight)


class Attention(nn.Module):
    """Global self-attention on (B, H, W, C)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide {dim} channels; give a divisor")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_drop(self.proj(global_attention(self.qkv(x), self.num_heads)))


class Block(nn.Module):
    """Gate or attention, and an MLP, pre-norm, each residual; `joined` leaves one residual around both."""

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp: nn.Module,
        joined: bool = False,
        drop_path: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.joined = joined
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.attn(self.norm1(x))
        if self.joined:
            return x + self.drop_path(self.mlp(self.norm2(y)))
        x = x + self.drop_path(y)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ClassAttention(nn.Module):
    """Attention of the first token over all, (B, N, C) to (B, C)."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, device: Any = None, dtype: Any = None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, **dd)
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        B, N, _ = x.shape
        kv = self.kv(x).reshape(B, N, 2, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        k, v = kv.unbind(0)  # (B, nh, N, d)
        q = self.q(x[:, 0]).reshape(B, self.num_heads, 1, self.head_dim)
        return self.proj(F.scaled_dot_product_attention(q, k, v).flatten(1))


class ClassBlock(nn.Module):
    """The class token, first of (B, N, C), after attention over all tokens and an MLP, each residual; (B, C)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.attn = ClassAttention(dim, num_heads, qkv_bias, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)

    def forward(self, x: Tensor) -> Tensor:
        token = x[:, 0] + self.attn(self.norm1(x))
        return token + self.mlp(self.norm2(token))


class ClassHead(nn.Module):
    """Pooling to a class token, the class block, a norm, and classifiers of that token and of all others.

    The logits are those of the class token and half of the largest that the others have, class by class. The map comes
    as (B, C, H, W). Without pooling there is no class token, and the logits of a pixel are its own by both classifiers.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        token_label: bool = True,
        pool_type: str = "avg",
        drop_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.in_features = self.num_features = in_features
        self.token_label = token_label
        self.use_conv = False  # the classifiers are Linear in every form
        self.global_pool = _pooling(pool_type)
        self.class_block: nn.Module = ClassBlock(in_features, num_heads, mlp_ratio, qkv_bias, **dd)
        self.norm: nn.Module = nn.LayerNorm(in_features, eps=1e-6, **dd)
        self.drop = nn.Dropout(drop_rate)
        self._add_classifiers(num_classes, dd)

    def _add_classifiers(self, num_classes: int, dd: dict[str, Any]) -> None:
        width = self.num_features
        self.num_classes = num_classes
        self.has_aux = self.token_label and num_classes > 0
        self.fc = nn.Linear(width, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.aux = nn.Linear(width, num_classes, **dd) if self.has_aux else nn.Identity()

    def reset(
        self,
        num_classes: int,
        pool_type: str | None = None,
        reset_other: bool = False,
        in_features: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        """Fresh classifiers; `reset_other` drops class block, norm and the classifier of the other tokens."""
        dd = get_device_dtype(self, device=device, dtype=dtype)
        if pool_type is not None:
            self.global_pool = _pooling(pool_type).train(self.training)
        if reset_other:
            self.class_block = FirstToken()
            self.norm = nn.Identity()
            self.token_label = False
        if in_features is not None:
            self.in_features = self.num_features = in_features
        self._add_classifiers(num_classes, dd)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if self.global_pool.is_identity():
            x = self.drop(self.norm(x.permute(0, 2, 3, 1)))
            if not pre_logits:
                x = self.fc(x) + 0.5 * self.aux(x) if self.has_aux else self.fc(x)
            return x.permute(0, 3, 1, 2)
        tokens = x.flatten(2).transpose(1, 2)
        token = self.class_block(torch.cat((self.global_pool(x).unsqueeze(1), tokens), dim=1))
        if pre_logits or not self.has_aux:
            token = self.drop(self.norm(token))
            return token if pre_logits else self.fc(token)
        normed = self.norm(torch.cat((token.unsqueeze(1), tokens), dim=1))
        return self.fc(self.drop(normed[:, 0])) + 0.5 * self.aux(normed[:, 1:]).amax(1)


class FirstToken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0]


def _pooling(pool_type: str) -> SelectAdaptivePool2d:
    pool = SelectAdaptivePool2d(pool_type=pool_type, flatten=bool(pool_type))
    if pool.feat_mult() != 1:
        raise ValueError(f"global_pool {pool_type!r} would make the class token wider; use 'avg', 'max' or 'avgmax'")
    return pool


class ConvStem(nn.Module):
    """7x7 of stride 2, two 3x3 with batch norm and ReLU, 3x3 of stride 2, norm; (B, C, H, W) to (B, H/4, W/4, dim)."""

    def __init__(self, in_chans: int, hidden_dim: int, dim: int, device: Any = None, dtype: Any = None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        layers: list[nn.Module] = []
        for kernel, stride in ((7, 2), (3, 1), (3, 1)):
            layers.append(nn.Conv2d(in_chans, hidden_dim, kernel, stride, kernel // 2, bias=False, **dd))
            layers += [nn.BatchNorm2d(hidden_dim, **dd), nn.ReLU()]
            in_chans = hidden_dim
        self.conv = nn.Sequential(*layers)
        self.proj = nn.Conv2d(hidden_dim, dim, 3, 2, 1, **dd)
        self.norm = nn.LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(self.conv(x)).permute(0, 2, 3, 1))


class DownSamples(nn.Module):
    """3x3 convolution of stride 2 and a norm on (B, H, W, C)."""

    def __init__(self, dim: int, out_dim: int, device: Any = None, dtype: Any = None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.proj = nn.Conv2d(dim, out_dim, 3, 2, 1, **dd)
        self.norm = nn.LayerNorm(out_dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class SpectFormer(Pyramid):
    """Hierarchical SpectFormer: gates in the first stages, attention in the last.

    Args:
        in_chans: channels of the image.
        num_classes: classes; 0 leaves the classifiers out and gives the class token.
        global_pool: how the class token begins, timm's pooling names; "" keeps the map.
        img_size: the image size in pixels, an int or a pair, that the gates are made for; every size runs.
        stem_hidden_dim: channels of the stem's first convolutions.
        embed_dims: channels of each stage.
        depths: blocks of each stage.
        num_heads: attention heads of each stage, where it has attention, and of the class block.
        mlp_ratios: hidden width of the MLP over its input's, for each stage.
        spectral_stages: how many of the stages, from the first, have gates.
        qkv_bias: whether the qkv projections have a bias.
        token_label: whether the other tokens are classified, too; a checkpoint with that classifier loads without it.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout after the attention projections and the MLPs.
        drop_path_rate: stochastic depth, growing linearly to this rate at the last block.

    Raises:
        ValueError: img_size, num_heads or global_pool do not fit.
    """

    channels_last = True

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] = 224,
        stem_hidden_dim: int = 32,
        embed_dims: Sequence[int] = (64, 128, 320, 448),
        depths: Sequence[int] = (3, 4, 6, 3),
        num_heads: Sequence[int] = (2, 4, 10, 14),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        spectral_stages: int = 2,
        qkv_bias: bool = True,
        token_label: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(in_chans, embed_dims[-1])
        self.img_size = check_image_size(img_size)
        self.stem = ConvStem(in_chans, stem_hidden_dim, embed_dims[0], **dd)
        last = len(depths) - 1
        stages = []
        for i, (dim, rates) in enumerate(zip(embed_dims, stage_rates(drop_path_rate, depths), strict=True)):
            downsample = DownSamples(embed_dims[i - 1], dim, **dd) if i else None
            blocks = []
            for rate in rates:
                attn: nn.Module
                if i < spectral_stages:
                    attn = SpectralGatingNetwork(dim, halved(self.img_size, i + 2), **dd)
                else:
                    attn = Attention(dim, num_heads[i], qkv_bias, proj_drop_rate, **dd)
                mlp = DWMlp(dim, int(dim * mlp_ratios[i]), proj_drop_rate, **dd)
                blocks.append(Block(dim, attn, mlp, drop_path=rate, **dd))
            norm = nn.LayerNorm(dim, eps=1e-6, **dd) if i < last else None
            stages.append(Stage(blocks, downsample, norm))
        self.add_stages(stages, embed_dims)
        head_args = {"num_heads": num_heads[-1], "mlp_ratio": mlp_ratios[-1], "qkv_bias": qkv_bias}
        self.add_head(num_classes, global_pool, drop_rate, ClassHead, token_label=token_label, **head_args, **dd)
        self.apply(init_linear)


class PositionedPatches(nn.Module):
    """Patches and a learned embedding of their positions: (B, C, H, W) to (B, H/p, W/p, dim).

    Images are zero-padded on the right and bottom to multiples of the patch; the embedding is interpolated for maps of
    another size.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        patch_size: int,
        img_size: tuple[int, int],
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.patch_size = patch_size
        self.grid_size = (-(-img_size[0] // patch_size), -(-img_size[1] // patch_size))
        self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size, **dd)
        self.pos_embed = nn.Parameter(torch.zeros(1, *self.grid_size, dim, **dd))
        trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_map(x.permute(0, 2, 3, 1), self.patch_size).permute(0, 3, 1, 2)
        x = self.proj(x).permute(0, 2, 3, 1)
        return x + resize_map(self.pos_embed, x.shape[1], x.shape[2])


class SpectFormerVanilla(Isotropic):
    """SpectFormer of one resolution: gates in the first blocks, attention in the rest, the mean of all tokens.

    Args:
        in_chans: channels of the image.
        num_classes: classes; 0 leaves the classifier out.
        global_pool: timm's pooling names; "" keeps the map.
        img_size: the image size in pixels, an int or a pair, that gates and positions are made for; every size runs.
        patch_size: side of a patch in pixels.
        embed_dim: channels.
        depth: blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP over its input's.
        alpha: how many of the blocks, from the first, have gates.
        qkv_bias: whether the qkv projections have a bias.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout after the attention projections and in the MLPs.
        drop_path_rate: stochastic depth, growing linearly to this rate at the last block.

    Raises:
        ValueError: img_size or num_heads do not fit.
    """

    no_decay = (".pos_embed",)

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        alpha: int = 4,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(in_chans, embed_dim)
        self.img_size = check_image_size(img_size)
        self.stem = PositionedPatches(in_chans, embed_dim, patch_size, self.img_size, **dd)
        blocks = []
        for i, rate in enumerate(stage_rates(drop_path_rate, [depth])[0]):
            attn: nn.Module
            if i < alpha:
                attn = SpectralGatingNetwork(embed_dim, self.stem.grid_size, **dd)
            else:
                attn = Attention(embed_dim, num_heads, qkv_bias, proj_drop_rate, **dd)
            mlp = Mlp(embed_dim, int(embed_dim * mlp_ratio), drop=proj_drop_rate, **dd)
            blocks.append(Block(embed_dim, attn, mlp, i < alpha, rate, **dd))
        self.add_blocks(blocks, embed_dim, patch_size)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6, **dd)
        self.add_head(num_classes, global_pool, drop_rate, **dd)
        self.apply(init_linear)


DIALECTS = (
    Dialect("ours", ignored=r"^head\.aux\."),
    Dialect(
        "the original",
        (
            (r"^stem\.", "patch_embed1."),
            (r"^stages\.(\d+)\.downsample\.", moved_by(1, "patch_embed{}.")),
            (r"^stages\.(\d+)\.blocks\.", moved_by(1, "block{}.")),
            (r"^stages\.(\d+)\.norm\.", moved_by(1, "norm{}.")),
            (r"\.attn\.qkv\.", ".attn.{q,kv}."),
            (r"\.mlp\.dwconv\.", ".mlp.dwconv.dwconv."),
            (r"^head\.class_block\.", "post_network.0."),
            (r"^head\.norm\.", "norm4."),
            (r"^head\.fc\.", "head."),
            (r"^head\.aux\.", "aux_head."),
        ),
        ignored=r"^aux_head\.",
    ),
    Dialect(
        "the original's vanilla form",
        (
            (r"^stem\.pos_embed$", "pos_embed"),
            (r"^stem\.", "patch_embed."),
            (r"^stages\.0\.blocks\.", "blocks."),
            (r"\.attn\.complex_weight$", ".filter.complex_weight"),
            (r"^head\.fc\.", "head."),
        ),
    ),
)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Any dialect's names to ours, gates and position embeddings to the sizes that the model is made for."""
    state = rename(state_dict, model)
    for name, module in model.named_modules():
        if isinstance(module, SpectralGatingNetwork) and (key := f"{name}.complex_weight") in state:
            state[key] = resize_gate(state[key].float(), *module.size).to(state[key].dtype)
        if isinstance(module, PositionedPatches) and (key := f"{name}.pos_embed") in state:
            state[key] = resize_map(as_map(state[key], key), *module.grid_size)
    return state


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return published_cfg(
        license="none",
        paper_name="SpectFormer: Frequency and Attention is what you need in a Vision Transformer",
        paper_ids=("arXiv:2304.06446",),
        origin_url="https://github.com/badripatro/SpectFormers",
        **kwargs,
    )


def _hierarchical(**kwargs: Any) -> dict[str, Any]:
    return _cfg(crop_pct=0.96, first_conv="stem.conv.0", classifier=("head.fc", "head.aux"), **kwargs)


def _vanilla(**kwargs: Any) -> dict[str, Any]:
    return _cfg(pool_size=(14, 14), first_conv="stem.proj", classifier="head.fc", **kwargs)


default_cfgs = generate_default_cfgs(
    {
        "spectformer_s": _hierarchical(top1=84.3, params="22.2M", flops="3.9G"),
        "spectformer_b": _hierarchical(top1=85.0, params="33.1M", flops="6.3G"),
        "spectformer_l": _hierarchical(top1=85.7, params="54.7M", flops="12.7G"),
        "spectformer_vanilla_t": _vanilla(top1=76.9, params="9M", flops="1.8G"),
        "spectformer_vanilla_xs": _vanilla(top1=80.2, params="20M", flops="4.0G"),
        "spectformer_vanilla_s": _vanilla(top1=81.7, params="32M", flops="6.6G"),
        "spectformer_vanilla_b": _vanilla(top1=82.1, params="57M", flops="11.5G"),
    }
)

_SMALL: dict[str, Any] = {"drop_path_rate": 0.1}
_BASE: dict[str, Any] = {
    "stem_hidden_dim": 64,
    "embed_dims": (64, 128, 320, 512),
    "depths": (3, 4, 12, 3),
    "num_heads": (2, 4, 10, 16),
    "drop_path_rate": 0.1,
}
_LARGE: dict[str, Any] = {
    "stem_hidden_dim": 64,
    "embed_dims": (96, 192, 384, 512),
    "depths": (3, 6, 18, 3),
    "num_heads": (3, 6, 12, 16),
    "drop_path_rate": 0.3,
}


def _create(variant: str, pretrained: bool, args: dict[str, Any], kwargs: dict[str, Any]) -> SpectFormer:
    return build_model(SpectFormer, variant, pretrained, filter_fn=checkpoint_filter_fn, **{**args, **kwargs})


def _create_vanilla(variant: str, pretrained: bool, kwargs: dict[str, Any], **args: Any) -> SpectFormerVanilla:
    return build_isotropic(
        SpectFormerVanilla, variant, pretrained, filter_fn=checkpoint_filter_fn, **{**args, **kwargs}
    )


@register_model
def spectformer_s(pretrained: bool = False, **kwargs: Any) -> SpectFormer:
    return _create("spectformer_s", pretrained, _SMALL, kwargs)


@register_model
def spectformer_b(pretrained: bool = False, **kwargs: Any) -> SpectFormer:
    return _create("spectformer_b", pretrained, _BASE, kwargs)


@register_model
def spectformer_l(pretrained: bool = False, **kwargs: Any) -> SpectFormer:
    return _create("spectformer_l", pretrained, _LARGE, kwargs)


@register_model
def spectformer_vanilla_t(pretrained: bool = False, **kwargs: Any) -> SpectFormerVanilla:
    return _create_vanilla("spectformer_vanilla_t", pretrained, kwargs, embed_dim=256, num_heads=4)


@register_model
def spectformer_vanilla_xs(pretrained: bool = False, **kwargs: Any) -> SpectFormerVanilla:
    return _create_vanilla("spectformer_vanilla_xs", pretrained, kwargs)


@register_model
def spectformer_vanilla_s(pretrained: bool = False, **kwargs: Any) -> SpectFormerVanilla:
    return _create_vanilla("spectformer_vanilla_s", pretrained, kwargs, depth=19, drop_path_rate=0.15)


@register_model
def spectformer_vanilla_b(pretrained: bool = False, **kwargs: Any) -> SpectFormerVanilla:
    args = {"embed_dim": 512, "num_heads": 8, "depth": 19, "drop_path_rate": 0.25}
    return _create_vanilla("spectformer_vanilla_b", pretrained, kwargs, **args)

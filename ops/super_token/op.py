"""The public super-token functions: checks, registration with torch.library, and the choice of path."""

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.types import Number

from zoo.ops._backend import resolve_backend, run_reference, runs_triton, without_triton
from zoo.ops._checks import check_agreement, check_layout, compute_dtype, pair, require, resolve_scale
from zoo.ops._overrides import overridable
from zoo.ops._register import call, register_pair

from . import cpu, reference

__all__ = ["super_token_attention", "super_token_mapping", "super_token_sampling"]

_SAMPLING = "super_token_sampling"
_MAPPING = "super_token_mapping"
_MAP = "[B, H, W, C]"


@overridable
def super_token_sampling(
    x: Tensor,
    token_size: int | tuple[int, int],
    *,
    n_iter: int = 1,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Gather a map into super tokens, one for each cell of token_size pixels.

    Tokens start as the cells' means. An iteration computes every pixel's softmax over the 3 x 3 tokens around its cell
    (tokens outside the map have logit 0 and keep their share) and takes the weighted mean of the pixels as the new
    tokens. A map that is no multiple of the cell is zero-padded at the bottom and right; padded pixels take part.

    Args:
        x: [B, H, W, C], float16, bfloat16, float32 or float64.
        token_size: pixels of a cell, one int or (height, width).
        n_iter: number of iterations, at least 1.
        scale: factor on the logits; C ** -0.5 unless given.
        backend: None chooses; "reference" or "cpu" names a path.

    Returns:
        tokens [B, ceil(H / th), ceil(W / tw), C] and affinity [B, H, W, 9], rows summing to 1, neighbours in row-major
        order. The affinity is a constant for autograd: gradients reach x through the last weighted mean only.

    Raises:
        ValueError: an argument has the wrong shape, dtype or value.
        RuntimeError: the named backend cannot run this call.

    Source: Huang et al., "Vision Transformer with Super Token Sampling", arXiv:2211.11167, section 3.2;
        models/stvit.py of hhb072/STViT.
    """
    th, tw = pair(_SAMPLING, "token_size", token_size)
    _check_sampling(_SAMPLING, x, th, tw, n_iter)
    scale = resolve_scale(scale, x.shape[-1])
    path = resolve_backend(_SAMPLING, backend, x, without_triton(x))
    if path == "reference":
        tokens, affinity = run_reference(_reference_sampling, x, th, tw, n_iter, scale)
        return tokens, affinity
    tokens, affinity, _ = call("super_token_sampling", x, th, tw, n_iter, scale, path)
    return tokens, affinity.detach()


@overridable
def super_token_mapping(
    tokens: Tensor, affinity: Tensor, token_size: int | tuple[int, int], *, backend: str | None = None
) -> Tensor:
    """Spread super tokens back over the pixels: every pixel takes the 3 x 3 tokens around its cell under its affinity.

    Args:
        tokens: [B, hh, ww, C]; tokens outside the map count as zeros.
        affinity: [B, H, W, 9] as `super_token_sampling` returns it, with hh = ceil(H / th) and ww = ceil(W / tw).
        token_size: pixels of a cell, one int or (height, width).
        backend: None chooses; "reference" or "cpu" names a path.

    Returns:
        [B, H, W, C] in the tokens' dtype; differentiable in tokens and affinity.

    Raises:
        ValueError: an argument has the wrong shape, dtype or value.
        RuntimeError: the named backend cannot run this call.

    Source: arXiv:2211.11167, section 3.2 (token upsampling); models/stvit.py of hhb072/STViT.
    """
    th, tw = pair(_MAPPING, "token_size", token_size)
    _check_mapping(_MAPPING, tokens, affinity, th, tw)
    path = resolve_backend(_MAPPING, backend, tokens, without_triton(tokens))
    if path == "reference":
        return run_reference(_reference_mapping, tokens, affinity, th, tw)
    out: Tensor = call("super_token_mapping", tokens, affinity, th, tw, path)
    return out


@overridable
def super_token_attention(
    x: Tensor,
    qkv_weight: Tensor | None,
    qkv_bias: Tensor | None,
    proj_weight: Tensor | None,
    proj_bias: Tensor | None,
    num_heads: int,
    token_size: int | tuple[int, int],
    *,
    n_iter: int = 1,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Super-token attention: sampling, multi-head self-attention among the super tokens, mapping back.

    With token_size 1 the pixels attend to each other directly.

    Args:
        x: [B, H, W, C].
        qkv_weight, qkv_bias: [3 C, C] and [3 C], rows head by head: q, k and v of head 0, then of head 1, and so on.
            A weight of None leaves the attention among the super tokens out.
        proj_weight, proj_bias: [C, C] and [C], the output projection of that attention.
        num_heads: heads of the attention among the super tokens, a divisor of C.
        token_size: pixels of a cell, one int or (height, width).
        n_iter: iterations of the sampling.
        scale: factor on the sampling's logits; C ** -0.5 unless given.
        backend: None chooses; "reference" or "cpu" names a path.

    Returns:
        [B, H, W, C].

    Raises:
        ValueError: an argument has the wrong shape, dtype or value.
        RuntimeError: the named backend cannot run this call.

    Source: arXiv:2211.11167, equations 3 to 9; class StokenAttention in models/stvit.py of hhb072/STViT.
    """
    op = "super_token_attention"
    size = pair(op, "token_size", token_size)
    check_layout(op, "x", x, _MAP)
    C = x.shape[-1]
    if qkv_weight is not None:
        require(num_heads >= 1 and C % num_heads == 0, op, "num_heads {} does not divide {} channels", num_heads, C)
        fits = tuple(qkv_weight.shape[:2]) == (3 * C, C)
        require(fits, op, "qkv_weight must be [3 C, C] = {}, got {}", (3 * C, C), qkv_weight.shape)
        require(proj_weight is not None, op, "proj_weight is None beside a qkv_weight")
    path = resolve_backend(op, backend, x, without_triton(x))
    direct = size == (1, 1)
    tokens, affinity = (x, x) if direct else super_token_sampling(x, size, n_iter=n_iter, scale=scale, backend=backend)
    if qkv_weight is not None and proj_weight is not None:
        attend = reference.attention if path == "reference" else F.scaled_dot_product_attention
        qkv = F.linear(tokens.flatten(1, 2), qkv_weight.flatten(1), qkv_bias)
        q, k, v = qkv.unflatten(-1, (num_heads, 3, C // num_heads)).transpose(1, 2).unbind(3)  # (B, nh, N, d)
        tokens = attend(q, k, v).transpose(1, 2).reshape(tokens.shape)
        tokens = F.linear(tokens, proj_weight.flatten(1), proj_bias)
    return tokens if direct else super_token_mapping(tokens, affinity, size, backend=backend)


def _reference_sampling(x: Tensor, th: int, tw: int, n_iter: int, scale: float) -> tuple[Tensor, Tensor]:
    tokens, affinity = reference.super_token_sampling(x.to(compute_dtype(x)), th, tw, n_iter, scale)
    return tokens.to(x.dtype), affinity.to(x.dtype)


def _reference_mapping(tokens: Tensor, affinity: Tensor, th: int, tw: int) -> Tensor:
    dtype = compute_dtype(tokens)
    return reference.super_token_mapping(tokens.to(dtype), affinity.to(dtype), th, tw).to(tokens.dtype)


def _check_sampling(op: str, x: Tensor, token_height: int, token_width: int, n_iter: int, *_: Any) -> None:
    check_layout(op, "x", x, _MAP)
    pair(op, "token_size", (token_height, token_width))
    require(n_iter >= 1, op, "n_iter must be at least 1, got {}", n_iter)


def _check_mapping(op: str, tokens: Tensor, affinity: Tensor, token_height: int, token_width: int, *_: Any) -> None:
    check_layout(op, "tokens", tokens, _MAP)
    check_layout(op, "affinity", affinity, "[B, H, W, 9]")
    pair(op, "token_size", (token_height, token_width))
    require(affinity.shape[-1] == 9, op, "affinity must be [B, H, W, 9], got {}", affinity.shape)
    batch, height, width, _nine = affinity.shape
    expected = (batch, (height + token_height - 1) // token_height, (width + token_width - 1) // token_width)
    message = "an affinity of shape {} with token_size {} needs tokens of shape {}, got {}"
    size = (token_height, token_width)
    fits = tuple(tokens.shape[:3]) == expected
    require(fits, op, message, affinity.shape, size, (*expected, "C"), tokens.shape)
    check_agreement(op, {"tokens": tokens}, dtypes=False, affinity=affinity)


def _sample(
    x: Tensor, token_height: int, token_width: int, n_iter: int, scale: Number, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    if runs_triton(_SAMPLING, backend, x):
        from .kernels import sampling_triton

        return sampling_triton(x, token_height, token_width, n_iter, scale)
    return cpu.sampling(x, token_height, token_width, n_iter, scale)


def _sample_backward(
    grad: Tensor, affinity: Tensor, mass: Tensor, token_height: int, token_width: int, backend: str
) -> Tensor:
    if runs_triton(_SAMPLING, backend, grad):
        from .kernels import sampling_backward_triton

        return sampling_backward_triton(grad, affinity, mass, token_height, token_width)
    return cpu.sampling_backward(grad, affinity, mass, token_height, token_width)


def _sample_fake(x: Tensor, token_height: int, token_width: int, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    B, H, W, C = x.shape
    hh, ww = (H + token_height - 1) // token_height, (W + token_width - 1) // token_width
    return x.new_empty(B, hh, ww, C), x.new_empty(B, H, W, 9), x.new_empty(B, hh, ww, 1, dtype=compute_dtype(x))


def _spread(tokens: Tensor, affinity: Tensor, token_height: int, token_width: int, backend: str) -> Tensor:
    if runs_triton(_MAPPING, backend, tokens):
        from .kernels import mapping_triton

        return mapping_triton(tokens, affinity, token_height, token_width)
    return cpu.mapping(tokens, affinity, token_height, token_width)


def _spread_backward(
    grad: Tensor, tokens: Tensor, affinity: Tensor, token_height: int, token_width: int, need_affinity: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if runs_triton(_MAPPING, backend, grad):
        from .kernels import mapping_backward_triton

        return mapping_backward_triton(grad, tokens, affinity, token_height, token_width, need_affinity)
    return cpu.mapping_backward(grad, tokens, affinity, token_height, token_width, need_affinity)


register_pair(
    _SAMPLING, _sample, _sample_backward, _sample_fake,
    outputs=("tokens", "affinity", "mass"),
    backward_fake=lambda grad, affinity, *_: grad.new_empty(*affinity.shape[:3], grad.shape[-1]),
    flops=lambda x, n_iter: 36 * math.prod(x) * n_iter,
    backward_flops=lambda grad, affinity: 2 * math.prod(affinity) * grad[-1],
    check=_check_sampling,
)  # fmt: skip
register_pair(
    _MAPPING, _spread, _spread_backward,
    lambda tokens, affinity, *_: tokens.new_empty(*affinity.shape[:3], tokens.shape[-1]),
    outputs=("out",),
    flops=lambda tokens, affinity: 2 * math.prod(affinity) * tokens[-1],
    backward_flops=2,
    check=_check_mapping,
)  # fmt: skip

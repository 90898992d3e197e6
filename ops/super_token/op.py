"""The public super-token functions: checks, registration with torch.library, and the choice of path."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.ops._dispatch import register_op, require, resolve_backend, resolve_scale, runs_triton, without_triton

from . import cpu, reference

__all__ = ["super_token_attention", "super_token_mapping", "super_token_sampling"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
    op = "super_token_sampling"
    th, tw = _check_cells(op, token_size)
    _check_map(op, "x", x)
    require(n_iter >= 1, f"{op}: n_iter must be at least 1, got {n_iter}")
    scale = resolve_scale(scale, x.shape[-1])
    path = resolve_backend(op, backend, x, without_triton(x))
    if path == "reference":
        tokens, affinity = reference.super_token_sampling(_computed(x), th, tw, n_iter, scale)
        return tokens.to(x.dtype), affinity.to(x.dtype)
    tokens, affinity, _ = _sampling(x, th, tw, n_iter, scale, path)
    return tokens, affinity.detach()


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
    op = "super_token_mapping"
    th, tw = _check_cells(op, token_size)
    _check_map(op, "tokens", tokens)
    _check_map(op, "affinity", affinity)
    require(affinity.shape[-1] == 9, f"{op}: affinity must be [B, H, W, 9], got {tuple(affinity.shape)}")
    H, W = affinity.shape[1:3]
    expected = (affinity.shape[0], (H + th - 1) // th, (W + tw - 1) // tw)
    require(
        tuple(tokens.shape[:3]) == expected,
        f"{op}: an affinity of shape {tuple(affinity.shape)} with token_size {(th, tw)} needs tokens of shape "
        f"{(*expected, 'C')}, got {tuple(tokens.shape)}",
    )
    path = resolve_backend(op, backend, tokens, without_triton(tokens))
    if path == "reference":
        dtype = _computed(tokens).dtype
        return reference.super_token_mapping(tokens.to(dtype), affinity.to(dtype), th, tw).to(tokens.dtype)
    return _mapping(tokens, affinity, th, tw, path)


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
    size = _check_cells(op, token_size)
    _check_map(op, "x", x)
    C = x.shape[-1]
    if qkv_weight is not None:
        require(num_heads >= 1 and C % num_heads == 0, f"{op}: num_heads {num_heads} does not divide {C} channels")
        require(
            qkv_weight.shape[:2] == (3 * C, C),
            f"{op}: qkv_weight must be [3 C, C] = {(3 * C, C)}, got {tuple(qkv_weight.shape)}",
        )
        require(proj_weight is not None, f"{op}: proj_weight is None beside a qkv_weight")
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


def _check_cells(op: str, token_size: int | tuple[int, int]) -> tuple[int, int]:
    size = (token_size, token_size) if isinstance(token_size, int) else tuple(token_size)
    require(
        len(size) == 2 and all(isinstance(s, int) and s >= 1 for s in size),
        f"{op}: token_size must be a positive int or a pair of them, got {token_size!r}",
    )
    return size[0], size[1]


def _check_map(op: str, name: str, x: Tensor) -> None:
    require(x.ndim == 4, f"{op}: {name} must be 4-D, channels last, got shape {tuple(x.shape)}")
    require(x.shape[1] > 0 and x.shape[2] > 0 and x.shape[3] > 0, f"{op}: {name} has shape {tuple(x.shape)}")
    require(x.dtype in _FLOATS, f"{op}: {name} has dtype {x.dtype}; float16, bfloat16, float32 or float64 is needed")


def _computed(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _sampling_impl(
    x: Tensor, token_height: int, token_width: int, n_iter: int, scale: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    if runs_triton("super_token_sampling", backend, x):
        from .kernels import sampling_triton

        return sampling_triton(x, token_height, token_width, n_iter, scale)
    return cpu.sampling(x, token_height, token_width, n_iter, scale)


def _sampling_fake(
    x: Tensor, token_height: int, token_width: int, n_iter: int, scale: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    B, H, W, C = x.shape
    hh, ww = (H + token_height - 1) // token_height, (W + token_width - 1) // token_width
    mass = x.new_empty(B, hh, ww, 1, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    return x.new_empty(B, hh, ww, C), x.new_empty(B, H, W, 9), mass


def _sampling_backward_impl(
    grad: Tensor, affinity: Tensor, mass: Tensor, token_height: int, token_width: int, backend: str
) -> Tensor:
    if runs_triton("super_token_sampling", backend, grad):
        from .kernels import sampling_backward_triton

        return sampling_backward_triton(grad, affinity, mass, token_height, token_width)
    return cpu.sampling_backward(grad, affinity, mass, token_height, token_width)


def _sampling_backward_fake(
    grad: Tensor, affinity: Tensor, mass: Tensor, token_height: int, token_width: int, backend: str
) -> Tensor:
    return grad.new_empty(*affinity.shape[:3], grad.shape[-1])


def _sampling_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, ctx.token_height, ctx.token_width, _, _, ctx.backend = inputs
    _, affinity, mass = output
    ctx.mark_non_differentiable(affinity, mass)
    ctx.save_for_backward(affinity, mass)


def _sampling_gradient(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    dx = _sampling_backward(grad, *ctx.saved_tensors, ctx.token_height, ctx.token_width, ctx.backend)
    return dx, None, None, None, None, None


def _mapping_impl(tokens: Tensor, affinity: Tensor, token_height: int, token_width: int, backend: str) -> Tensor:
    if runs_triton("super_token_mapping", backend, tokens):
        from .kernels import mapping_triton

        return mapping_triton(tokens, affinity, token_height, token_width)
    return cpu.mapping(tokens, affinity, token_height, token_width)


def _mapping_fake(tokens: Tensor, affinity: Tensor, token_height: int, token_width: int, backend: str) -> Tensor:
    return tokens.new_empty(*affinity.shape[:3], tokens.shape[-1])


def _mapping_backward_impl(
    grad: Tensor,
    tokens: Tensor,
    affinity: Tensor,
    token_height: int,
    token_width: int,
    need_affinity: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if runs_triton("super_token_mapping", backend, grad):
        from .kernels import mapping_backward_triton

        return mapping_backward_triton(grad, tokens, affinity, token_height, token_width, need_affinity)
    return cpu.mapping_backward(grad, tokens, affinity, token_height, token_width, need_affinity)


def _mapping_backward_fake(
    grad: Tensor,
    tokens: Tensor,
    affinity: Tensor,
    token_height: int,
    token_width: int,
    need_affinity: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return tokens.new_empty(tokens.shape), affinity.new_empty(affinity.shape if need_affinity else (0,))


def _mapping_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, affinity, ctx.token_height, ctx.token_width, ctx.backend = inputs
    ctx.save_for_backward(tokens, affinity)


def _mapping_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    need_affinity = ctx.needs_input_grad[1]
    dtokens, daffinity = _mapping_backward(
        grad, *ctx.saved_tensors, ctx.token_height, ctx.token_width, need_affinity, ctx.backend
    )
    return dtokens, daffinity if need_affinity else None, None, None, None


_sampling = register_op(
    "super_token_sampling(Tensor x, int token_height, int token_width, int n_iter, float scale, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _sampling_impl,
    _sampling_fake,
    setup_context=_sampling_context,
    backward=_sampling_gradient,
)
_sampling_backward = register_op(
    "super_token_sampling_backward(Tensor grad, Tensor affinity, Tensor mass, int token_height, int token_width,"
    " str backend) -> Tensor",
    _sampling_backward_impl,
    _sampling_backward_fake,
    autocast=False,
)
_mapping = register_op(
    "super_token_mapping(Tensor tokens, Tensor affinity, int token_height, int token_width, str backend) -> Tensor",
    _mapping_impl,
    _mapping_fake,
    setup_context=_mapping_context,
    backward=_mapping_gradient,
)
_mapping_backward = register_op(
    "super_token_mapping_backward(Tensor grad, Tensor tokens, Tensor affinity, int token_height, int token_width,"
    " bool need_affinity, str backend) -> (Tensor, Tensor)",
    _mapping_backward_impl,
    _mapping_backward_fake,
    autocast=False,
)

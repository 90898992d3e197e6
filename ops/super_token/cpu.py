"""Super-token attention on a CPU: batched GEMMs over cells, and their own backward.

Sampling and mapping are linear in the features once the affinity is known, and each is the transpose of the other:
the backward of sampling is a mapping of the tokens' gradients, the backward of mapping a sampling of the pixels'.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.ops._checks import compute_dtype

from .reference import EPS

# Images per pass: their cells (2 MB in float32) stay in the cache between the products that read them.
_CHUNK = 1 << 19


def _images(x: Tensor, channels: int) -> int:
    return max(1, _CHUNK // max(1, x.shape[1] * x.shape[2] * channels))


def _to_cells(x: Tensor, th: int, tw: int, dtype: torch.dtype) -> Tensor:
    B, H, W, C = x.shape
    hh, ww = -(-H // th), -(-W // tw)
    if H % th or W % tw:
        x = F.pad(x, (0, 0, 0, -W % tw, 0, -H % th))
    cells = x.reshape(B, hh, th, ww, tw, C).transpose(2, 3)
    return cells.to(dtype, memory_format=torch.contiguous_format).reshape(B * hh * ww, th * tw, C)


def _put_cells(out: Tensor, cells: Tensor, th: int, tw: int) -> None:
    """Write (B, hh, th, ww, tw, C) cells, in any memory order, into the map `out`, cropping the padding."""
    B, H, W, C = out.shape
    if H % th or W % tw:
        out.copy_(cells.reshape(B, -(-H // th) * th, -(-W // tw) * tw, C)[:, :H, :W])
    else:
        out.view(B, H // th, th, W // tw, tw, C).copy_(cells)


def _unfold(tokens: Tensor) -> Tensor:
    B, hh, ww, C = tokens.shape
    padded = F.pad(tokens, (0, 0, 1, 1, 1, 1))
    return padded.unfold(1, 3, 1).unfold(2, 3, 1).permute(0, 1, 2, 4, 5, 3).reshape(B * hh * ww, 9, C)


def _fold(parts: Tensor, B: int, hh: int, ww: int) -> Tensor:
    """Sum the contributions (B * hh * ww, 9, C) that a token gets from the cells around it: columns, then rows."""
    C = parts.shape[-1]
    parts = parts.view(B, hh, ww, 3, 3 * C)
    columns = parts.new_zeros(B, hh + 2, ww, 3 * C)
    for i in range(3):
        columns[:, i : i + hh] += parts[:, :, :, i]
    rows = columns[:, 1:-1].unflatten(-1, (3, C))
    out = parts.new_zeros(B, hh, ww + 2, C)
    for j in range(3):
        out[:, :, j : j + ww] += rows[:, :, :, j]
    return out[:, :, 1:-1]


def sampling(x: Tensor, th: int, tw: int, n_iter: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [B, hh, ww, C], affinity [B, H, W, 9] and the mass [B, hh, ww, 1] that every token gathered."""
    B, H, W, C = x.shape
    hh, ww = -(-H // th), -(-W // tw)
    dtype = compute_dtype(x)
    tokens = x.new_empty(B, hh, ww, C)
    affinity = x.new_empty(B, H, W, 9)
    mass = x.new_empty(B, hh, ww, 1, dtype=dtype)
    step = _images(x, C)
    for b in range(0, B, step):
        part = slice(b, b + step)
        pixels = _to_cells(x[part], th, tw, dtype)  # (n * hh * ww, th * tw, C)
        n = mass[part].shape[0]
        current = pixels.mean(1).view(n, hh, ww, C)
        for _ in range(n_iter):
            # The 9 neighbours on the middle axis: the softmax then runs along vectors of th * tw pixels.
            weights = torch.bmm(_unfold(current), pixels.mT).mul_(scale).softmax(1)  # (n * hh * ww, 9, th * tw)
            shares = weights.sum(-1).view(n, hh * ww, 9).mT
            total = F.fold(shares, (hh, ww), 3, padding=1).view(n, hh, ww, 1) + EPS
            current = _fold(torch.bmm(weights, pixels), n, hh, ww) / total
        tokens[part] = current
        mass[part] = total
        _put_cells(affinity[part], weights.view(n, hh, ww, 9, th, tw).permute(0, 1, 4, 2, 5, 3), th, tw)
    return tokens, affinity, mass


def sampling_backward(grad: Tensor, affinity: Tensor, mass: Tensor, th: int, tw: int) -> Tensor:
    """dx [B, H, W, C] from the tokens' gradient; the affinity counts as constant."""
    return mapping((grad.to(mass.dtype) / mass), affinity, th, tw).to(grad.dtype)


def mapping(tokens: Tensor, affinity: Tensor, th: int, tw: int) -> Tensor:
    """Pixels [B, H, W, C]: every one the mean of 9 tokens under its affinity. The dtype is the tokens'."""
    B, hh, ww, C = tokens.shape
    dtype = compute_dtype(tokens)
    out = tokens.new_empty(B, affinity.shape[1], affinity.shape[2], C)
    step = _images(affinity, C)
    for b in range(0, B, step):
        part = slice(b, b + step)
        cells = torch.bmm(_to_cells(affinity[part], th, tw, dtype), _unfold(tokens[part].to(dtype)))
        _put_cells(out[part], cells.view(-1, hh, ww, th, tw, C).transpose(2, 3), th, tw)
    return out


def mapping_backward(
    grad: Tensor, tokens: Tensor, affinity: Tensor, th: int, tw: int, need_affinity: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the tokens and, if needed (else an empty tensor), of the affinity."""
    B, hh, ww, C = tokens.shape
    dtype = compute_dtype(tokens)
    dtokens = tokens.new_empty(B, hh, ww, C)
    daffinity = affinity.new_empty(affinity.shape if need_affinity else (0,))
    step = _images(affinity, C)
    for b in range(0, B, step):
        part = slice(b, b + step)
        pixels = _to_cells(grad[part], th, tw, dtype)
        weights = _to_cells(affinity[part], th, tw, dtype)
        dtokens[part] = _fold(torch.bmm(weights.mT, pixels), dtokens[part].shape[0], hh, ww)
        if need_affinity:
            dweights = torch.bmm(pixels, _unfold(tokens[part].to(dtype)).mT)
            _put_cells(daffinity[part], dweights.view(-1, hh, ww, th, tw, 9).transpose(2, 3), th, tw)
    return dtokens, daffinity

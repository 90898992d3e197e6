"""Super-token attention in plain PyTorch: the definition (Huang et al., arXiv:2211.11167, section 3.2).

A map [B, H, W, C] is cut into cells of th x tw pixels, zero-padded at the bottom and right; every cell owns one token.
A pixel associates with the 3 x 3 tokens around its own cell; tokens outside the map are zeros and keep their weight.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-12


def to_cells(x: Tensor, th: int, tw: int) -> Tensor:
    B, H, W, C = x.shape
    x = F.pad(x, (0, 0, 0, -W % tw, 0, -H % th))
    hh, ww = x.shape[1] // th, x.shape[2] // tw
    return x.view(B, hh, th, ww, tw, C).transpose(2, 3).reshape(B, hh, ww, th * tw, C)


def from_cells(x: Tensor, th: int, tw: int, H: int, W: int) -> Tensor:
    B, hh, ww, _, C = x.shape
    x = x.view(B, hh, ww, th, tw, C).transpose(2, 3).reshape(B, hh * th, ww * tw, C)
    return x[:, :H, :W].contiguous()


def unfold(tokens: Tensor) -> Tensor:
    padded = F.pad(tokens, (0, 0, 1, 1, 1, 1))
    return padded.unfold(1, 3, 1).unfold(2, 3, 1).flatten(-2).transpose(-1, -2)  # (B, hh, ww, 9, C)


def fold(parts: Tensor) -> Tensor:
    padded = [F.pad(p, (0, 0, k % 3, 2 - k % 3, k // 3, 2 - k // 3)) for k, p in enumerate(parts.unbind(3))]
    return torch.stack(padded).sum(0)[:, 1:-1, 1:-1]


def super_token_sampling(x: Tensor, th: int, tw: int, n_iter: int, scale: float) -> tuple[Tensor, Tensor]:
    pixels = to_cells(x, th, tw)  # (B, hh, ww, th * tw, C)
    with torch.no_grad():
        tokens = pixels.mean(3)
        for i in range(n_iter):
            affinity = (pixels @ unfold(tokens).mT * scale).softmax(-1)
            mass = fold(affinity.sum(3).unsqueeze(-1)) + EPS
            if i < n_iter - 1:
                tokens = fold(affinity.mT @ pixels) / mass
    tokens = fold(affinity.mT @ pixels) / mass
    return tokens, from_cells(affinity, th, tw, x.shape[1], x.shape[2])


def super_token_mapping(tokens: Tensor, affinity: Tensor, th: int, tw: int) -> Tensor:
    return from_cells(to_cells(affinity, th, tw) @ unfold(tokens), th, tw, affinity.shape[1], affinity.shape[2])


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v

"""The definition of window attention, in plain PyTorch: pad, roll, cut into windows, mask, attend, put back."""

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.ops._checks import compute_dtype


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    window: tuple[int, int],
    shift: tuple[int, int],
    grid: bool,
    scale: float,
) -> Tensor:
    """See `zoo.ops.window.window_attention`; every argument is given and checked."""
    height, width = q.shape[1:3]
    wh, ww = window
    nh, nw = -(-height // wh), -(-width // ww)
    padded = (nh * wh, nw * ww)
    given, dtype = q.dtype, compute_dtype(q)

    def cut(x: Tensor) -> Tensor:  # (B, H, W, ...) -> (B, windows, tokens of a window, ...)
        tail = x.ndim - 3
        x = F.pad(x, (0, 0) * tail + (0, padded[1] - width, 0, padded[0] - height))
        x = x.roll((-shift[0], -shift[1]), (1, 2))
        if grid:
            x = x.unflatten(2, (ww, nw)).unflatten(1, (wh, nh)).movedim((2, 4), (1, 2))
        else:
            x = x.unflatten(2, (nw, ww)).unflatten(1, (nh, wh)).movedim(3, 2)
        return x.flatten(3, 4).flatten(1, 2)

    def join(x: Tensor) -> Tensor:  # the inverse of cut
        x = x.unflatten(2, (wh, ww)).unflatten(1, (nh, nw))
        x = x.movedim((1, 2), (2, 4)) if grid else x.movedim(2, 3)
        x = x.flatten(3, 4).flatten(1, 2).roll(shift, (1, 2))
        return x[:, :height, :width]

    # A token's region: 1 to 4 by the sides of the image that the roll brought together, 0 in the padding.
    rows = torch.arange(padded[0], device=q.device) < shift[0]
    columns = torch.arange(padded[1], device=q.device) < shift[1]
    region = 1 + 2 * rows[:, None] + columns
    region = cut(region[None, :height, :width])[0]  # (windows, tokens)
    visible = region[:, :, None] == region[:, None, :]

    q, k, v = (cut(x.to(dtype)).transpose(2, 3) for x in (q, k, v))  # (B, windows, heads, tokens, d)
    scores = scale * q @ k.transpose(-2, -1)
    if bias is not None:
        y, x = torch.meshgrid(torch.arange(wh), torch.arange(ww), indexing="ij")
        dy = y.flatten()[None, :] - y.flatten()[:, None] + wh - 1
        dx = x.flatten()[None, :] - x.flatten()[:, None] + ww - 1
        scores = scores + bias.to(dtype)[:, dy.to(q.device), dx.to(q.device)]
    scores = scores.masked_fill(~visible[:, None], float("-inf"))
    return join((scores.softmax(-1) @ v).transpose(2, 3)).to(given).contiguous()

"""A small call of every op in every form, for the tests that go over all of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo import ops

__all__ = ["FORMS", "Form"]


@dataclass(frozen=True)
class Form:
    """A call on named tensors. `constants` have no gradient; `tables` have no batch axis."""

    op: str
    shapes: dict[str, tuple[int, ...]]
    call: Callable[..., Any]
    tables: tuple[str, ...] = ()
    constants: tuple[str, ...] = ()

    def inputs(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        made = {n: torch.randn(shape, generator=generator, dtype=torch.float64) for n, shape in self.shapes.items()}
        if "index" in made:  # region numbers
            made["index"] = made["index"].argsort(1).argsort(1)
        return {n: x if n == "index" else x.to(dtype) for n, x in made.items()}

    def run(self, tensors: dict[str, Tensor], **options: Any) -> Tensor:
        """The differentiable result."""
        out = self.call(**tensors, **options)
        return out[0] if isinstance(out, tuple) else out


QKV = dict.fromkeys("qkv", (2, 6, 5, 2, 4))
PACKED = {"qkv": (2, 6, 5, 3, 2, 4)}
WEIGHTS = {
    "conv0_weight": (3, 1, 3, 3), "conv0_bias": (3,), "conv_spatial_weight": (3, 1, 3, 3), "conv_spatial_bias": (3,),
    "conv1_weight": (3, 3, 1, 1), "conv1_bias": (3,),
}  # fmt: skip


def neighborhood(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    return ops.neighborhood_attention(q, k, v, 3, dilation=(2, 1), bias=bias, **options)


def neighborhood_packed(qkv: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    return ops.neighborhood_attention_qkvpacked(qkv, 3, is_causal=(True, False), bias=bias, **options)


def window(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    return ops.window_attention(q, k, v, 3, shift=1, bias=bias, **options)


def window_packed(qkv: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    return ops.window_attention_qkvpacked(qkv, 3, grid=True, bias=bias, **options)


def halo(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return ops.halo_attention(q, k, v, 2, 1, **options)


def halo_mask(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return ops.halo_attention(q, k, v, 2, 1, border="mask", **options)


def routing(q: Tensor, k: Tensor, v: Tensor, index: Tensor, **options: Any) -> Any:
    return ops.routing_attention(q, k, v, (3, 2), 2, index=index[..., :2], padding="zero", **options)


def large_kernel(x: Tensor, **options: Any) -> Tensor:
    weights = {n: options.pop(n, None) for n in WEIGHTS}
    return ops.large_kernel_attention(x, **weights, dilation=2, **options)


FORMS: dict[str, Form] = {
    "neighborhood": Form("neighborhood_attention", QKV, neighborhood),
    "neighborhood-bias": Form("neighborhood_attention", {**QKV, "bias": (2, 5, 5)}, neighborhood, ("bias",)),
    "neighborhood-packed": Form("neighborhood_attention_qkvpacked", PACKED, neighborhood_packed),
    "neighborhood-packed-bias": Form(
        "neighborhood_attention_qkvpacked", {**PACKED, "bias": (2, 5, 5)}, neighborhood_packed, ("bias",)
    ),
    "window": Form("window_attention", QKV, window),
    "window-bias": Form("window_attention", {**QKV, "bias": (2, 5, 5)}, window, ("bias",)),
    "window-packed": Form("window_attention_qkvpacked", PACKED, window_packed),
    "window-packed-bias": Form(
        "window_attention_qkvpacked", {**PACKED, "bias": (2, 5, 5)}, window_packed, ("bias",)
    ),
    "halo": Form("halo_attention", QKV, halo_mask),
    "halo-tables": Form(
        "halo_attention", {**QKV, "rel_height": (7, 4), "rel_width": (7, 4)}, halo, ("rel_height", "rel_width")
    ),
    "halo-rows": Form("halo_attention", {**QKV, "rel_height": (7, 4)}, halo, ("rel_height",)),
    "routing": Form("routing_attention", {**QKV, "index": (2, 9, 2)}, routing, constants=("index",)),
    "sampling": Form(
        "super_token_sampling", {"x": (2, 5, 6, 3)}, lambda x, **o: ops.super_token_sampling(x, (3, 2), **o)
    ),
    "mapping": Form(
        "super_token_mapping",
        {"tokens": (2, 2, 3, 3), "affinity": (2, 5, 6, 9)},
        lambda tokens, affinity, **o: ops.super_token_mapping(tokens, affinity, (3, 2), **o),
    ),
    "channel": Form("channel_attention", dict.fromkeys("qkv", (2, 7, 2, 3)), ops.channel_attention),
    "channel-packed": Form("channel_attention_qkvpacked", {"qkv": (2, 7, 3, 2, 3)}, ops.channel_attention_qkvpacked),
    "large-kernel": Form("large_kernel_attention", {"x": (2, 3, 6, 5), **WEIGHTS}, large_kernel, tuple(WEIGHTS)),
    "large-kernel-plain": Form(
        "large_kernel_attention",
        {"x": (2, 3, 6, 5), **{n: s for n, s in WEIGHTS.items() if n.endswith("weight")}},
        large_kernel,
        tuple(n for n in WEIGHTS if n.endswith("weight")),
    ),
}  # fmt: skip

"""Attention ops on tensors, usable with no model at all: one function each, forward and backward.

Layouts are channels-last with the heads apart, `[B, H, W, heads, dim]`, except where a function says otherwise.
`backend=None` chooses the path: Triton on a GPU, the fast CPU path on a CPU, the plain-PyTorch reference elsewhere.
"""

if __name__ == "ops":  # from a checkout's root, where every op would be registered a second time
    raise ImportError("`ops` is a folder of the package zoo; import zoo.ops", name=__name__)

from zoo.ops._backend import resolve_backend as resolve_backend
from zoo.ops._backend import without_triton as without_triton
from zoo.ops.channel import channel_attention, channel_attention_qkvpacked
from zoo.ops.decompositions import decompose as decompose
from zoo.ops.halo import halo_attention
from zoo.ops.large_kernel import large_kernel_attention
from zoo.ops.neighborhood import neighborhood_attention, neighborhood_attention_qkvpacked
from zoo.ops.routing import routing_attention, routing_index
from zoo.ops.super_token import super_token_attention, super_token_mapping, super_token_sampling
from zoo.ops.window import window_attention, window_attention_qkvpacked

__all__ = [
    "channel_attention",
    "channel_attention_qkvpacked",
    "halo_attention",
    "large_kernel_attention",
    "neighborhood_attention",
    "neighborhood_attention_qkvpacked",
    "routing_attention",
    "routing_index",
    "super_token_attention",
    "super_token_mapping",
    "super_token_sampling",
    "window_attention",
    "window_attention_qkvpacked",
]

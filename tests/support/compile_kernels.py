"""Compile every Triton kernel for a GPU that is not there; run in a process of its own, without the interpreter.

usage: python compile_kernels.py CAPABILITY DTYPE...   (90 bfloat16 float32); prints a line per kernel: shared memory,
registers of a thread, and the stack that it spills to, in bytes.
"""

import importlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import triton
from offline import compile_only

from zoo.ops._local.geometry import halo_axis, neighborhood_axis, window_axis
from zoo.ops._local.launch import Relative, local_backward, local_forward

MODULES = {
    "zoo.ops._local.launch": [
        "forward_kernel", "rows_kernel", "columns_kernel", "bias_gradient_kernel", "fold_kernel",
        "square_kernel",
    ],
    "zoo.ops.routing.kernels": [
        "_forward_kernel", "_dq_kernel", "_dkv_kernel", "_table_kernel", "_pickers_kernel", "_mean_kernel",
        "_nearest_kernel",
    ],
    "zoo.ops.channel.kernels": ["_product_kernel", "_map_kernel", "_apply_kernel"],
    "zoo.ops.super_token.kernels": ["_affinity_kernel", "_mean_kernel", "_aggregate_kernel", "_spread_kernel"],
    "zoo.ops.large_kernel.kernels": [
        "_depthwise_kernel", "_depthwise_weight_kernel", "_pointwise_kernel", "_pointwise_weight_kernel",
    ],
}  # fmt: skip
MOST_STACK = {90: 1024}  # where the tiles were chosen for the architecture
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}


def run(dtype: torch.dtype) -> None:
    """Launch every op once, at sizes of a real backbone stage."""

    def maps(heads: int, dim: int, size: int = 28, count: int = 3) -> list[torch.Tensor]:
        return [torch.randn(2, size, size, heads, dim, dtype=dtype) for _ in range(count)]

    for size, kernel, dim in ((28, 7, 32), (24, 11, 32), (28, 13, 64)):
        q, k, v = maps(2, dim, size)
        axis = neighborhood_axis(size, kernel, 1, 1, False)
        bias = torch.randn(2, 2 * kernel - 1, 2 * kernel - 1)
        out, lse = local_forward(q, k, v, bias, axis, axis, 0.2)
        local_backward(out, q, k, v, bias, out, lse, axis, axis, 0.2)
    q, k, v = maps(2, 32)
    axis = window_axis(28, 7, 3, False)
    for bias in (None, torch.randn(2, 13, 13)):
        out, lse = local_forward(q, k, v, bias, axis, axis, 0.2)
        local_backward(out, q, k, v, bias, out, lse, axis, axis, 0.2)

    q, k, v = maps(2, 16, 32)
    axis = halo_axis(32, 8, 3, 1)
    embeddings = torch.randn(27, 16, dtype=dtype)
    relative = Relative(embeddings, embeddings, 8, 3, 1)
    out, lse = local_forward(q, k, v, None, axis, axis, 0.2, relative)
    local_backward(out, q, k, v, None, out, lse, axis, axis, 0.2, relative)

    routing = importlib.import_module("zoo.ops.routing.kernels")
    q, k, v = maps(2, 32)
    few = [x[:, :14, :14] for x in (q, k, v)]
    for tensors, region, topk in (((q, k, v), (4, 4), 4), ((q, k, v), (2, 2), 16), (few, (2, 2), 16)):
        index = routing.routing_index_triton(*tensors[:2], region, topk)
        out, lse = routing.routing_forward_triton(*tensors, index, region, 0.2)
        routing.routing_backward_triton(out, *tensors, index, out, lse, region, 0.2)

    channel = importlib.import_module("zoo.ops.channel.kernels")
    q, k, v = (x.flatten(1, 2) for x in maps(3, 32))
    out, scores = channel.channel_forward_triton(q, k, v, 0.2)
    channel.channel_backward_triton(out, q, k, v, scores, 0.2, (q.clone(), k.clone(), v.clone()))

    tokens = importlib.import_module("zoo.ops.super_token.kernels")
    x = torch.randn(2, 28, 28, 96, dtype=dtype)
    for cell in ((8, 8), (4, 4)):
        t, affinity, mass = tokens.sampling_triton(x, *cell, 1, 0.1)
        tokens.sampling_backward_triton(t, affinity, mass, *cell)
        y = tokens.mapping_triton(t, affinity, *cell)
        tokens.mapping_backward_triton(y, t, affinity, *cell, True)

    lka = importlib.import_module("zoo.ops.large_kernel.kernels")
    x = torch.randn(2, 64, 28, 28, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weights = []
    for shape in ((64, 1, 5, 5), (64, 1, 7, 7), (64, 64, 1, 1)):
        weights += [torch.randn(shape, dtype=dtype), torch.randn(64, dtype=dtype)]
    out, spatial = torch.empty_like(x), torch.empty_like(x)
    lka.large_kernel_attention_triton(x, *weights, 3, out=out, spatial=spatial)
    lka.large_kernel_attention_backward_triton(out, x, *weights, spatial, 3, dx=torch.empty_like(x))


def usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found is not None, said
    return int(found[1]), int(found[2])


def main() -> int:
    capability = int(sys.argv[1])
    limit = SHARED_LIMIT[capability]
    for name in sys.argv[2:]:
        patch = pytest.MonkeyPatch()
        try:
            with compile_only(
                [(importlib.import_module(m), k) for m, k in MODULES.items()], patch, capability
            ) as compiled:
                run(getattr(torch, name))
        finally:
            patch.undo()
        expected = {kernel for kernels in MODULES.values() for kernel in kernels}
        assert expected == {kernel for kernel, _ in compiled}, expected - {kernel for kernel, _ in compiled}
        for kernel, binary in compiled:
            shared = binary.metadata.shared
            registers, stack = usage(binary.asm["cubin"])
            much = "" if shared <= limit and stack <= MOST_STACK.get(capability, stack) else "  TOO MUCH"
            print(
                f"sm_{capability} {name:9} {kernel:26} shared {shared:6d} "
                f"registers {registers:3d} stack {stack:4d}{much}"
            )
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())

"""Compile every Triton kernel for a GPU that is not there; run in a process of its own, without the interpreter.

usage: python compile_kernels.py CAPABILITY DTYPE...   (90 bfloat16 float32); prints a line per kernel: shared memory,
registers of a thread, and the stack that it spills to, in bytes.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from offline import compile_only, kernels

from zoo.ops import examples

MOST_STACK = {90: 1024}  # where the tiles were chosen for the architecture
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}


def run(dtype: torch.dtype) -> None:
    """Launch every op, forward and backward, at sizes of a real backbone stage."""
    for example in examples.select("compile"):
        leaves = [x.to(dtype).requires_grad_() for x in example.inputs()]
        out = example.call(leaves, backend="triton")
        torch.autograd.grad(out, leaves, torch.ones_like(out))


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
        with compile_only(capability) as compiled:
            run(getattr(torch, name))
        launched = {id(kernel) for kernel, _ in compiled}
        missing = sorted(f"{k.__module__}.{k.__name__}" for k in kernels() if id(k) not in launched)
        assert not missing, f"no example tagged 'compile' launches {', '.join(missing)}"
        for kernel, binary in compiled:
            shared = binary.metadata.shared
            registers, stack = usage(binary.asm["cubin"])
            much = "" if shared <= limit and stack <= MOST_STACK.get(capability, stack) else "  TOO MUCH"
            print(
                f"sm_{capability} {name:9} {kernel.__name__:26} shared {shared:6d} "
                f"registers {registers:3d} stack {stack:4d}{much}"
            )
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())

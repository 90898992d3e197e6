"""Compile every Triton kernel for GPUs that are not there; run in a process of its own, without the interpreter.

usage: python compile_kernels.py TARGET DTYPE... [--out FILE.json]   (sm_90 bfloat16 float32; gfx942 bfloat16)

Prints a line per kernel: bytes of shared memory, registers of a thread, and bytes of stack that it spills to; all
variants of a kernel that the examples launch count, and the largest figures are shown. With --out they are added to a
table, `benchmarks/results/compiled.json`, which is in the repository.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton

if sys.argv[1].startswith("gfx"):
    torch.version.hip = "offline"  # the kernels ask it for the precision of their products
from offline import TARGETS, compile_only, kernels, name_of

from zoo.ops import examples

FORMS = ("boxes_kernel", "square_kernel")  # kernels of one of two forms, which not every dtype launches


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


def usage_amd(assembly: str) -> tuple[int, int]:
    """The same of a kernel for AMD's GPUs: vector registers and private memory."""
    registers = re.search(r"\.vgpr_count:\s+(\d+)", assembly)
    stack = re.search(r"\.private_segment_fixed_size:\s+(\d+)", assembly)
    assert registers is not None, "the assembly does not say how many registers it takes"
    assert stack is not None, "the assembly does not say how much private memory it takes"
    return int(registers[1]), int(stack[1])


def table(target: str, dtype: str) -> dict[str, dict[str, int]]:
    """The largest figures of every kernel."""
    with compile_only(target) as compiled:
        run(getattr(torch, dtype))
    launched = {id(kernel) for kernel, _ in compiled}
    missing = sorted(name_of(k) for k in kernels() if id(k) not in launched)
    missing = [name for name in missing if not name.endswith(FORMS)]
    assert not missing, f"no example tagged 'compile' launches {', '.join(missing)}"
    found: dict[str, dict[str, int]] = {}
    for kernel, binary in compiled:
        asm = binary.asm
        registers, stack = usage(asm["cubin"]) if "cubin" in asm else usage_amd(asm["amdgcn"])
        row = {"shared": binary.metadata.shared, "registers": registers, "stack": stack}
        name = name_of(kernel)
        known = found.setdefault(name, row)
        found[name] = {key: max(known[key], row[key]) for key in row}
    return found


def main(arguments: list[str]) -> int:
    out = Path(arguments.pop(arguments.index("--out") + 1)) if "--out" in arguments else None
    target, *dtypes = (a for a in arguments if a != "--out")
    for dtype in dtypes:
        rows = table(target, dtype)
        for name, row in rows.items():
            much = "  TOO MUCH" if row["stack"] > TARGETS[target].stack else ""
            figures = "  ".join(f"{key} {value:6d}" for key, value in row.items())
            print(f"{target:6} {dtype:9} {name:42} {figures}{much}", flush=True)
        if out is not None:
            known: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
            known[f"{target} {dtype}"] = {"torch": torch.__version__, "triton": triton.__version__, "kernels": rows}
            out.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert sys.argv[1] in TARGETS, f"there are {', '.join(TARGETS)}"
    sys.exit(main(sys.argv[1:]))

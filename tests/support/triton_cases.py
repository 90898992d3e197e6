"""Calls of every op on its Triton kernels, and the rule by which their errors are judged; shared by several files.

The error rule: at most twice the error that plain PyTorch makes in the same dtype, plus a small absolute term.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zoo.ops import examples
from zoo.ops.examples import Example

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Call = Callable[..., Any]
Case = tuple[Call, list[Tensor]]


def first(x: Any) -> Tensor:
    return x[0] if isinstance(x, tuple) else x


def run(call: Call, inputs: list[Tensor], backend: str, dtype: torch.dtype) -> list[Tensor]:
    """Output and every gradient, in float64; memory that a path leaves unwritten is NaN."""
    leaves = [x.to(DEVICE, dtype).requires_grad_() for x in inputs]
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    try:
        out = first(call(*leaves, backend=backend))
        weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=DEVICE).view_as(out)
        grads = torch.autograd.grad(out, leaves, weight.to(dtype))
    finally:
        torch.use_deterministic_algorithms(False)
    return [x.detach().double() for x in (out, *grads)]


def check(case: Case, dtype: torch.dtype = torch.float32) -> None:
    """Assert the error rule for the output and every gradient, and the same bits twice."""
    call, inputs = case
    exact = run(call, [x.to(dtype).double() for x in inputs], "reference", torch.float64)
    plain = run(call, inputs, "reference", dtype)
    actual = run(call, inputs, "triton", dtype)
    floor = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    largest = max(float(e.abs().max()) for e in exact)
    for i, (a, p, e) in enumerate(zip(actual, plain, exact, strict=True)):
        size = float(e.abs().max())
        if size < 1e-12 * largest:
            # zero but for float64's rounding, as dq and dk are where a query sees one key alone: what remains is the
            # rounding of terms that cancel, and a sum over the queries adds many
            size = 4 * largest
        allowed = 2 * float((p - e).abs().max()) + floor * size
        error = float((a - e).abs().max())
        assert error <= allowed, f"tensor {i}: error {error:.2e} of {size:.2e}, allowed {allowed:.2e}"
    for a, b in zip(actual, run(call, inputs, "triton", dtype), strict=True):
        assert torch.equal(a, b), "not the same bits twice"


def made(example: Example) -> Case:
    """Inputs in float64, and the call on them."""
    inputs = example.inputs(torch.float64)
    return example.bound(inputs), inputs


def _builder(describe: Callable[..., Example]) -> Callable[..., Case]:
    """A call that is not in the catalogue, described as it describes its own."""
    return lambda *args, **options: made(describe("", *args, **options))


neighborhood, window, halo, routing, channel, sampling, mapping, large_kernel = map(
    _builder,
    (
        examples.neighborhood, examples.window, examples.halo, examples.routing, examples.channel, examples.sampling,
        examples.mapping, examples.large_kernel,
    ),
)  # fmt: skip

CASES: dict[str, Callable[[], Case]] = {e.name: functools.partial(made, e) for e in examples.select("test")}
HALF = [e.name for e in examples.select("test") if torch.bfloat16 in e.dtypes]


def with_new_ops(*names: str) -> list[str]:
    """These cases, and the first one of every op that has none among them."""
    folders = {e.name: e.folder for e in examples.select("test")}
    missing = dict.fromkeys(f for f in folders.values() if f not in {folders[name] for name in names})
    return [*names, *(next(n for n, folder in folders.items() if folder == f) for f in missing)]

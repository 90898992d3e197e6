"""The Triton kernels, run by the interpreter on a CPU or by the GPU that is there, against the definitions.

The error rule: at most twice the error that plain PyTorch makes in the same dtype, plus a small absolute term.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from triton_cases import (
    CASES,
    DEVICE,
    HALF,
    Case,
    channel,
    check,
    first,
    halo,
    large_kernel,
    mapping,
    neighborhood,
    routing,
    sampling,
    window,
)

from zoo import ops

pytest.importorskip("triton")
from offline import TARGETS, kernels, name_of

ROOT = Path(__file__).parents[2]
DTYPES = ("bfloat16", "float16", "float32")
COMPILED = ROOT / "benchmarks" / "results" / "compiled.json"


@pytest.mark.parametrize("name", CASES)
def test_float32(name: str) -> None:
    check(CASES[name]())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("name", HALF)
def test_half(name: str, dtype: torch.dtype) -> None:
    check(CASES[name](), dtype)


def test_packed_views() -> None:
    """q, k and v as views of one packed tensor; the gradient is one dense tensor."""
    qkv = torch.randn(2, 9, 8, 3, 2, 8, device=DEVICE)
    results = []
    for backend in ("reference", "triton"):
        leaf = qkv.clone().requires_grad_()
        out = ops.neighborhood_attention_qkvpacked(leaf, 3, backend=backend)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaf)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_independent_of_the_other_images() -> None:
    call, inputs = neighborhood((9, 10), 5, batch=3, heads=2)
    whole = first(call(*(x.float().to(DEVICE) for x in inputs), backend="triton"))
    alone = first(
        call(*(x[1:2].float().to(DEVICE) for x in inputs[:3]), inputs[3].float().to(DEVICE), backend="triton")
    )
    assert torch.equal(whole[1:2], alone)


def test_empty_batch() -> None:
    call, inputs = neighborhood((9, 10), 3)
    leaves = [x.float().to(DEVICE)[:0].requires_grad_() for x in inputs[:3]]
    bias = inputs[3].float().to(DEVICE).requires_grad_()
    out = call(*leaves, bias, backend="triton")
    assert out.shape == (0, 9, 10, 1, 8)
    grads = torch.autograd.grad(out.sum(), [*leaves, bias])
    assert not grads[-1].any()


def test_float64_says_why() -> None:
    x = torch.randn(1, 8, 8, 1, 8, dtype=torch.float64, device=DEVICE)
    with pytest.raises(RuntimeError, match="'triton' cannot run this call: .*float64"):
        ops.neighborhood_attention(x, x, x, 3, backend="triton")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the reason concerns machines without a GPU")
def test_no_gpu_says_why() -> None:
    code = (
        "import torch; from zoo import ops; x = torch.randn(1, 8, 8, 1, 8)\n"
        "try: ops.window_attention(x, x, x, 4, backend='triton')\n"
        "except RuntimeError as error: print(error)"
    )
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert "the tensors are on the CPU" in done.stdout


def test_compiles_for_a_gpu_that_is_not_there() -> None:
    _compile("sm_90", "bfloat16")


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_compiles_for_more_gpus(target: str, dtype: str, tmp_path: Path) -> None:
    """No kernel spills more than the target's bound, nor, with the same compiler, more than the committed table says;
    what one asks for beyond the GPU's shared memory has a smaller form.
    """
    _compile(target, dtype, "--out", str(tmp_path / "compiled.json"))
    (found,) = json.loads((tmp_path / "compiled.json").read_text()).values()
    known = json.loads(COMPILED.read_text())[f"{target} {dtype}"]
    if (found["torch"], found["triton"]) == (known["torch"], known["triton"]):
        more = {n: r["stack"] for n, r in found["kernels"].items() if r["stack"] > known["kernels"][n]["stack"]}
        assert not more, f"{more}: more stack than in {COMPILED.name}"


def test_committed_table_of_machine_code() -> None:
    """Every GPU and dtype is in it, every kernel in half precision, none above the bound of its GPU."""
    table = json.loads(COMPILED.read_text())
    assert sorted(table) == sorted(f"{target} {dtype}" for target in TARGETS for dtype in DTYPES)
    names = {name_of(kernel) for kernel in kernels()}
    assert len(names) > 20
    for key, entry in table.items():
        target, dtype = key.split()
        if dtype != "float32":
            assert names <= set(entry["kernels"]), key
        worst = max(entry["kernels"], key=lambda name: entry["kernels"][name]["stack"])
        assert entry["kernels"][worst]["stack"] <= TARGETS[target].stack, (key, worst)


def _compile(target: str, dtype: str, *more: str) -> None:
    support = ROOT / "tests" / "support"
    env = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": f"{support}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-W", "ignore", str(support / "compile_kernels.py"), target, dtype, *more]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "TOO MUCH" not in done.stdout, done.stdout


def _random_case(op: str, r: random.Random) -> tuple[str, Case]:
    def side(low: int, high: int) -> int:
        return r.randint(low, high)

    batch, heads, dim = r.choice((1, 1, 2)), r.choice((1, 2)), r.choice((8, 16, 24, 32, 48))
    if op == "neighborhood":
        rank = r.choice((1, 2, 2))
        kernel = tuple(side(1, 7) for _ in range(rank))
        dilation = tuple(side(1, 3) for _ in range(rank))
        size = tuple(k * d + side(0, 6) for k, d in zip(kernel, dilation, strict=True))
        stride = tuple(side(1, k) for k in kernel)
        causal = tuple(r.random() < 0.25 for _ in kernel)
        options: dict[str, Any] = {
            "dilation": dilation,
            "stride": stride,
            "is_causal": causal,
            "bias": r.random() < 0.6,
        }
        call = neighborhood(size, kernel, batch=batch, heads=heads, dim=dim, dim_v=r.choice((None, 8, 20)), **options)
        return f"{size} {kernel} {options}", call
    if op == "window":
        sides = (side(1, 8), side(1, 8))
        size2 = (side(1, 15), side(1, 15))
        grid = r.random() < 0.4
        shift = (r.randrange(sides[0]), r.randrange(sides[1])) if not grid and r.random() < 0.6 else 0
        return f"{size2} {sides} {shift} {grid}", window(
            size2, sides, batch=batch, heads=heads, dim=dim, shift=shift, grid=grid, bias=r.random() < 0.6
        )
    if op == "halo":
        stride = r.choice((1, 1, 2))
        block, reach = stride * side(1, 8 // stride), side(0, 3)
        size2 = (side(1, 17), side(1, 17))
        relative, border = r.choice(("", "h", "w", "hw")), r.choice(("zero", "mask"))
        return f"{size2} {block} {reach} {stride} {relative} {border}", halo(
            size2, block, reach, batch=batch, heads=heads, dim=dim, stride=stride, relative=relative, border=border
        )
    if op == "routing":
        regions, size2 = (side(1, 4), side(1, 4)), (side(4, 18), side(4, 18))
        topk = side(1, regions[0] * regions[1])
        return f"{size2} {regions} {topk}", routing(
            size2, regions, topk, batch=batch, heads=heads, dim=dim, padding="zero", dim_v=r.choice((None, 8, 20))
        )
    if op == "channel":
        return "", channel(side(1, 200), heads=heads, dim=dim, batch=batch)
    if op == "super_token":
        size2, cell = (side(1, 18), side(1, 18)), side(1, 8)
        if r.random() < 0.5:
            return f"{size2} {cell}", mapping(size2, cell, channels=dim, batch=batch)
        return f"{size2} {cell}", sampling(size2, cell, channels=dim, batch=batch, n_iter=r.choice((1, 1, 2)))
    kernels = (r.choice((1, 3, 5)), r.choice((3, 5, 7)))
    return f"{kernels}", large_kernel(
        (side(1, 12), side(1, 12)), side(1, 40), batch=batch, kernels=kernels, dilation=side(1, 3)
    )


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("op", ["neighborhood", "window", "halo", "routing", "channel", "super_token", "large_kernel"])
def test_random_sweep(op: str) -> None:
    """Random calls; ZOO_SWEEP_SEED and ZOO_SWEEP_COUNT choose others. The seed of a failure is in its message."""
    first = int(os.environ.get("ZOO_SWEEP_SEED", "0"))
    for seed in range(first, first + int(os.environ.get("ZOO_SWEEP_COUNT", "300"))):
        torch.manual_seed(seed)
        description, case = _random_case(op, random.Random(seed))
        try:
            check(case)
        except Exception as error:
            raise AssertionError(f"{op}, seed {seed}: {description}") from error

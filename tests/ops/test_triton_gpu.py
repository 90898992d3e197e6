"""What needs a real GPU: every dtype, whole models, a training run, CUDA graphs, huge tensors, compute-sanitizer."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from families import FAMILIES, Small
from torch import Tensor, nn
from triton_cases import CASES, check, first, with_new_ops

import zoo  # noqa: F401  registers the models
from zoo import ops
from zoo.ops import examples
from zoo.ops.examples import Example

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]
HALF = [torch.float16, torch.bfloat16]
TINY = {key: row.on_gpu or Small(row.recorded.name, (64, 64)) for key, row in FAMILIES.items() if row.kernels}


@pytest.fixture(autouse=True)
def _full_precision() -> Any:
    """float32 is compared with float32: TF32 convolutions and products would hide an error of the kernels."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_case(name: str, dtype: torch.dtype) -> None:
    check(CASES[name](), dtype)


def build(family: str, backend: str) -> tuple[nn.Module, Tensor]:
    name, size, options = TINY[family]
    torch.manual_seed(0)
    model = timm.create_model(name, attn_backend=backend, drop_path_rate=0.0, **options)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    return model.cuda().eval(), images.cuda()


def logits_and_gradients(family: str, backend: str) -> dict[str, Tensor]:
    model, images = build(family, backend)
    logits = model(images)
    logits.square().mean().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **found}


@pytest.mark.parametrize("family", TINY)
def test_model(family: str) -> None:
    """Logits and the gradient of every parameter, Triton against the reference, in float32."""
    expected, actual = logits_and_gradients(family, "reference"), logits_and_gradients(family, "triton")
    assert set(expected) == set(actual)
    largest = max(float(x.abs().max()) for name, x in expected.items() if name != "logits")
    for name, e in expected.items():
        # a gradient that is zero but for rounding is compared with the largest one
        size = max(float(e.abs().max()), 0.0 if name == "logits" else 1e-3 * largest)
        error = float((actual[name] - e).abs().max())
        assert error <= 2e-3 * size, f"{name}: {error:.2e} of {size:.2e}"


@pytest.mark.parametrize("family", TINY)
def test_the_models_of_this_file_exist(family: str) -> None:
    assert timm.is_model(TINY[family][0])


def train(backend: str | None, steps: int = 200) -> list[float]:
    """Losses of a small NAT on handwritten digits; the batches are the same each time."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    images = F.interpolate(torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, size=(32, 32))
    images = images.expand(-1, 3, -1, -1).cuda()
    labels = torch.tensor(digits.target).cuda()
    torch.manual_seed(0)
    model = timm.create_model(
        "nat_mini", num_classes=10, depths=(1, 1, 1, 1), embed_dim=32, num_heads=(1, 2, 4, 8), kernel_size=3,
        drop_path_rate=0.0, attn_backend=backend,
    ).cuda()  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    order = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(steps):
        batch = torch.randint(0, len(labels), (128,), generator=order).cuda()
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses


def test_training_with_triton_follows_training_with_the_reference() -> None:
    """200 steps: the first losses are equal, later ones drift by rounding alone, and both learn as far."""
    reference, kernels = train("reference"), train("triton")
    assert kernels[:5] == pytest.approx(reference[:5], rel=1e-3)
    smooth = [torch.tensor(x).unfold(0, 20, 20).mean(1) for x in (reference, kernels)]
    assert float((smooth[0] - smooth[1]).abs().max()) < 0.05
    assert float(smooth[1][-1]) < 0.3 < 1.5 < kernels[0]


@pytest.mark.parametrize("example", examples.select("tiny"), ids=lambda e: e.op)
def test_cuda_graph(example: Example) -> None:
    """Forward and backward are captured (so nothing waits for the host) and replayed on other inputs."""
    leaves = [x.cuda().requires_grad_() for x in example.inputs(generator=torch.Generator().manual_seed(0))]

    def step() -> list[Tensor]:
        out = example.call(leaves, backend="triton")
        return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x in leaves:
            x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    for a, e in zip(captured, step(), strict=True):
        assert (a is None) == (e is None)
        if a is not None:
            assert torch.equal(a, e)


@pytest.mark.parametrize("example", [e for e in examples.select("tiny") if e.folder in ("neighborhood", "halo")])
def test_reduce_overhead(example: Example) -> None:
    """torch.compile's CUDA graphs, forward and backward, at two batches: nothing made inside an op outlives it."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: example.call(x), fullgraph=True, mode="reduce-overhead")
    for batch in (1, 2):
        leaves = [x.cuda().requires_grad_() for x in example.with_batch(batch, 1).inputs()]
        expected = example.call(leaves, backend="triton")
        gradients = torch.autograd.grad(expected, leaves, torch.ones_like(expected))
        for _ in range(3):
            torch.compiler.cudagraph_mark_step_begin()
            out = compiled(*leaves)
            assert torch.equal(out, expected)
            for a, e in zip(torch.autograd.grad(out, leaves, torch.ones_like(out)), gradients, strict=True):
                torch.testing.assert_close(a, e)


def test_a_captured_graph_outlives_other_map_sizes() -> None:
    """300 other sizes later a graph still finds the tables that it points to; a size not seen before says so."""

    def call(x: Tensor) -> Tensor:
        return ops.neighborhood_attention(x, x, x, 3, backend="triton")

    x = torch.randn(1, 12, 13, 1, 16, device="cuda")
    expected = call(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(x)
    for i in range(300):
        call(torch.randn(1, 6 + i % 20, 6 + i // 20, 1, 16, device="cuda"))
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)
    never = torch.randn(1, 331, 337, 1, 16, device="cuda")
    with (
        pytest.raises(RuntimeError, match="call once with tensors of this size"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        call(never)


def test_variants_of_kernels_do_not_grow_with_map_sizes() -> None:
    """40 random maps of multi-scale detection: six variants of a kernel at most."""
    from zoo.ops._local import kernels

    names = ("forward_kernel", "rows_kernel", "columns_kernel", "bias_gradient_kernel", "table_kernel", "fold_kernel")
    bias = torch.randn(2, 13, 13, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def variants() -> dict[str, int]:
        return {n: sum(len(c[0]) for c in getattr(kernels, n).device_caches.values()) for n in names}

    before = variants()
    sizes = torch.Generator().manual_seed(0)
    for _ in range(40):
        height, width = (int(torch.randint(100, most, (), generator=sizes)) for most in (201, 305))
        q = torch.randn(1, height, width, 2, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        ops.neighborhood_attention(q, q, q, 7, bias=bias, backend="triton").sum().backward()
    assert max(n - before[name] for name, n in variants().items()) <= 6


def needs(gib: float) -> None:
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"it needs {gib} GiB of GPU memory, {free:.0f} are free")


HUGE: dict[str, tuple[tuple[int, ...], Callable[..., Any]]] = {
    # more than 2^31 elements each; the last image lies wholly beyond that offset
    "neighborhood": ((345, 448, 448, 1, 32), lambda x: ops.neighborhood_attention(x, x, x, 3, backend="triton")),
    "window": ((345, 448, 448, 1, 32), lambda x: ops.window_attention(x, x, x, 7, backend="triton")),
    "halo": ((345, 448, 448, 1, 32), lambda x: ops.halo_attention(x, x, x, 8, 3, backend="triton")),
    "routing": ((345, 448, 448, 1, 32), lambda x: first(ops.routing_attention(x, x, x, 56, 1, backend="triton"))),
    "channel": ((345, 200704, 1, 32), lambda x: ops.channel_attention(x, x, x, backend="triton")),
    "sampling": ((345, 448, 448, 32), lambda x: ops.super_token_sampling(x, 8, backend="triton")[0]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HUGE)
def test_past_two_to_the_31_elements(name: str) -> None:
    """The last image of a huge tensor gets what it gets alone, forward and backward."""
    shape, call = HUGE[name]
    needs(60)
    x = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
    assert x[:-1].numel() > 2**31
    x.zero_()
    x[-1].normal_()
    leaf = x[-1:].clone().requires_grad_()
    alone = call(leaf)
    grad = torch.randn_like(alone)
    (expected,) = torch.autograd.grad(alone, leaf, grad)
    x.requires_grad_()
    out = call(x)
    assert torch.equal(out[-1:], alone)
    whole = torch.zeros_like(out)
    whole[-1:] = grad
    (dx,) = torch.autograd.grad(out, x, whole)
    assert torch.equal(dx[-1:], expected)


@pytest.mark.slow
def test_large_kernel_past_two_to_the_31_elements() -> None:
    needs(60)
    x = torch.zeros(345, 32, 448, 448, dtype=torch.bfloat16, device="cuda")
    x[-1].normal_()
    weights = []
    for shape in ((32, 1, 5, 5), (32, 1, 7, 7), (32, 32, 1, 1)):
        weights += [torch.randn(shape, device="cuda").bfloat16() / 8, torch.zeros(32, device="cuda").bfloat16()]
    out = ops.large_kernel_attention(x, *weights, backend="triton")
    assert torch.equal(out[-1:], ops.large_kernel_attention(x[-1:].clone(), *weights, backend="triton"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    with_new_ops(
        "na-3-odd-map", "window-odd-shifted", "halo-strided", "routing", "channel", "sampling", "mapping",
        "large-kernel-33-channels",
    ),
)  # fmt: skip
def test_memcheck(name: str) -> None:
    """compute-sanitizer finds no access out of bounds, forward and backward."""
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    code = f"from triton_cases import CASES, run; import torch; run(*CASES[{name!r}](), 'triton', torch.float32)"
    # without its cache PyTorch allocates each tensor by itself, so that an access past one is seen
    env = {
        **os.environ,
        "PYTHONPATH": f"{ROOT / 'tests' / 'support'}{os.pathsep}{ROOT}",
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    }
    command = [sanitizer, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout

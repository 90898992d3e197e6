"""The Triton kernels under torch.compile, torch.export and torch.func, in the interpreter or on a GPU."""

import pytest
import torch
from torch import Tensor, nn
from triton_cases import CASES, DEVICE, Case, first, with_new_ops

from zoo import ops

pytest.importorskip("triton")
NAMES = with_new_ops(
    "na-3-odd-map", "window", "halo-plain", "routing", "channel", "mapping", "large-kernel-33-channels"
)


def prepare(name: str) -> tuple[Case, list[Tensor]]:
    case = CASES[name]()
    return case, [x.to(DEVICE, torch.float32) for x in case[1]]


@pytest.mark.parametrize("name", NAMES)
def test_compiles_without_a_graph_break(name: str) -> None:
    """Forward and backward are the same bits as uncompiled."""
    (call, _), tensors = prepare(name)

    def function(*tensors: Tensor) -> Tensor:
        return first(call(*tensors, backend="triton"))

    results = []
    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in tensors]
        out = run(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    torch._dynamo.reset()
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_export(name: str) -> None:
    (call, _), tensors = prepare(name)

    class Module(nn.Module):
        def forward(self, tensors: list[Tensor]) -> Tensor:
            return first(call(*tensors, backend="triton"))

    program = torch.export.export(Module(), (tensors,))
    assert any(str(node.target).startswith("zoo.") for node in program.graph.nodes)
    assert torch.equal(program.module()(tensors), Module()(tensors))


@pytest.mark.parametrize("name", NAMES)
def test_vmap_is_a_loop_of_calls(name: str) -> None:
    (call, _), tensors = prepare(name)
    other = [x.flip(0) for x in tensors]
    out = torch.func.vmap(lambda *x: first(call(*x, backend="triton")))(
        *(torch.stack(pair) for pair in zip(tensors, other, strict=True))
    )
    for i, alone in enumerate((tensors, other)):
        assert torch.equal(out[i], first(call(*alone, backend="triton")))


@pytest.mark.parametrize("name", NAMES)
def test_derivatives_by_torch_func_say_what_works(name: str) -> None:
    (call, _), tensors = prepare(name)

    def loss(*tensors: Tensor) -> Tensor:
        return first(call(*tensors, backend="triton")).square().sum()

    with pytest.raises(RuntimeError, match=r"'triton' cannot run this call: torch.func.grad works through the ref"):
        torch.func.grad(loss)(*tensors)
    with pytest.raises(RuntimeError, match=r"'triton' cannot run this call: forward-mode differentiation \(jvp\)"):
        torch.func.jvp(loss, tuple(tensors), tuple(tensors))


def test_without_a_backend_torch_func_takes_the_reference() -> None:
    q = torch.randn(1, 8, 9, 1, 8, device=DEVICE)

    def loss(q: Tensor, backend: str | None = None) -> Tensor:
        return ops.neighborhood_attention(q, q, q, 3, backend=backend).square().sum()

    leaf = q.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf, "reference"), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(q), expected)
    value, slope = torch.func.jvp(loss, (q,), (q,))
    torch.testing.assert_close(value, loss(q, "reference"))
    torch.testing.assert_close(slope, (expected * q).sum(), rtol=1e-4, atol=1e-4)
    each = torch.func.vmap(torch.func.grad(loss))(torch.stack([q, 2 * q]))
    torch.testing.assert_close(each[0], expected)


def test_dual_tensors_are_not_dropped() -> None:
    q = torch.randn(1, 8, 8, 1, 8, device=DEVICE)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(RuntimeError, match="forward-mode differentiation"):
            ops.window_attention(dual, dual, dual, 4, backend="triton")
        out = torch.autograd.forward_ad.unpack_dual(ops.window_attention(dual, dual, dual, 4))
        assert out.tangent is not None

"""The ATen form of every registered op against its definition, and programs that are left with nothing of zoo's."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from zoo import ops
from zoo.ops.decompositions import DECOMPOSITIONS, decompose, table
from zoo.ops.examples import Example, select
from zoo.ops.maps import crop_map, pad_map

EXAMPLES = select("test")
DYNAMIC = torch.export.Dim.DYNAMIC


class Decomposed(TorchDispatchMode):
    """Run registered ops as their ATen form."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in table():
            return func(*args, **(kwargs or {}))
        self.seen.add(func.name())
        return table()[func](*args, **(kwargs or {}))


def registered() -> set[str]:
    names = torch._C._dispatch_get_all_op_names()
    return {n.removeprefix("zoo::") for n in names if n.startswith("zoo::") and "_backward" not in n}


def test_every_op_has_one() -> None:
    """CONTRIBUTING.md, "How to add an op"."""
    assert set(DECOMPOSITIONS) == registered()


@pytest.mark.parametrize("example", EXAMPLES, ids=[e.name for e in EXAMPLES])
def test_it_is_the_definition(example: Example) -> None:
    inputs = example.inputs(torch.float64, generator=torch.Generator().manual_seed(0))
    call = example.bound(inputs)
    expected = call(*inputs, backend="reference")
    with torch.no_grad(), Decomposed() as mode:
        actual = call(*inputs, backend="cpu")
    assert mode.seen
    assert actual.is_contiguous() == expected.is_contiguous()
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12 * expected.abs().max().item())


@pytest.mark.parametrize("example", [e for e in select("tiny")], ids=lambda e: e.folder)
def test_half_precision_is_computed_in_float32(example: Example) -> None:
    inputs = [x.to(torch.bfloat16) for x in example.inputs(generator=torch.Generator().manual_seed(0))]
    call = example.bound(inputs)
    expected = call(*(x.double() for x in inputs), backend="reference")
    with torch.no_grad(), Decomposed():
        actual = call(*inputs, backend="cpu")
    assert actual.dtype == torch.bfloat16
    assert (actual.double() - expected).abs().max() <= 2**-7 * expected.abs().max()


def test_routing_index() -> None:
    """Also of equal regions, which come in their order."""
    q, k = torch.randn(2, 2, 8, 12, 2, 4, generator=torch.Generator().manual_seed(0)).unbind(0)
    for keys in (k, torch.zeros_like(k)):
        with torch.no_grad(), Decomposed() as mode:
            actual = ops.routing_index(q, keys, (4, 3), 5, backend="cpu")
        assert mode.seen == {"zoo::routing_index"}
        assert torch.equal(actual, ops.routing_index(q, keys, (4, 3), 5, backend="reference"))


class Small(nn.Module):
    """Maps that are padded, attended to and cropped, for any size."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        x = pad_map(x, 4, 12)
        qkv = x.unflatten(-1, (3, 2, 4))
        x = ops.neighborhood_attention_qkvpacked(qkv, 3, dilation=(2, 1))
        x = ops.window_attention(x, x, x, 4, shift=(1, 2)) + ops.halo_attention(x, x, x, 4, 1)
        tokens, affinity = ops.super_token_sampling(x.flatten(3), 3)
        x = ops.super_token_mapping(tokens, affinity, 3).unflatten(-1, (2, 4))
        x = x + ops.routing_attention(x, x, x, 4, 2) + ops.routing_attention(x, x, x, 5, 2, padding="zero")
        out = ops.channel_attention(x.flatten(1, 2), x.flatten(1, 2), x.flatten(1, 2)).view(x.shape)
        return crop_map(out.flatten(3), height, width)


@pytest.fixture(scope="module")
def program() -> torch.export.ExportedProgram:
    axes = ({0: DYNAMIC, 1: DYNAMIC, 2: DYNAMIC},)
    return torch.export.export(Small(), (torch.randn(2, 14, 17, 24),), dynamic_shapes=axes, strict=False)


@pytest.mark.parametrize("size", [(1, 14, 17), (3, 8, 9), (2, 23, 12), (5, 12, 30), (1, 49, 65)])
def test_a_program_for_every_size_without_zoo(program: torch.export.ExportedProgram, size: tuple[int, ...]) -> None:
    free = decompose(program)
    assert any("zoo." in str(node.target) for node in program.graph.nodes)
    assert not any("zoo." in str(node.target) for node in free.graph.nodes)
    x = torch.randn(*size, 24, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(free.module()(x), Small()(x), rtol=1e-5, atol=1e-5)


def test_layers_share_tables() -> None:
    """Of equal sizes in one trace; another trace has its own."""

    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                x = ops.window_attention(x, x, x, 4)
            return x

    def nodes() -> int:
        x = torch.randn(2, 9, 10, 2, 4)
        exported = torch.export.export(Twice(), (x,), dynamic_shapes=({1: DYNAMIC, 2: DYNAMIC},), strict=False)
        graph = decompose(exported).graph
        return sum("arange" in str(node.target) for node in graph.nodes)

    once = nodes()
    assert once == nodes()
    assert once <= 12


def test_backward_is_refused() -> None:
    def loss(x: Tensor) -> Tensor:
        return torch.ops.zoo.channel_attention_backward(x, x, x, x, torch.randn(1, 2, 4, 4), 1.0, "cpu")[0]

    class Differentiates(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return loss(x)

    exported = torch.export.export(Differentiates(), (torch.randn(1, 5, 2, 4),), strict=False)
    with pytest.raises(ValueError, match=r"zoo.channel_attention_backward.* has no ATen form"):
        decompose(exported)

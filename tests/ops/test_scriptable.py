"""`zoo.ops.scriptable` inside TorchScript: the public functions' numbers, on the backend that was named."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from zoo import ops
from zoo.ops import scriptable

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

MAP = (2, 9, 8, 2, 4)


def cases() -> dict[str, tuple[str, str, list[tuple[int, ...]]]]:
    """Case -> function, its arguments after the tensors as code, shapes of the tensors a, b, c and so on."""
    qkv, packed = [MAP] * 3, [(2, 9, 8, 3, 2, 4)]
    return {
        "neighborhood": ("neighborhood_attention_qkvpacked", "a, 3, 2, bias=b, scale=0.3", [*packed, (2, 5, 5)]),
        "neighborhood-causal": (
            "neighborhood_attention_qkvpacked", "a, (3, 4), (2, 1), (1, 2), (False, True)", packed,
        ),
        "neighborhood-all-causal": ("neighborhood_attention_qkvpacked", "a, 3, is_causal=True", packed),
        "window": ("window_attention", "a, b, c, 4, 2, bias=d", [*qkv, (2, 7, 7)]),
        "window-grid": ("window_attention", "a, b, c, (3, 4), grid=True, scale=0.2", qkv),
        "window-packed": ("window_attention_qkvpacked", "a, (4, 3), (1, 2), bias=b", [*packed, (2, 7, 5)]),
        "halo": ("halo_attention", "a, b, c, 4, 1, d, e", [*qkv, (11, 4), (11, 4)]),
        "halo-strided": ("halo_attention", "a, b, c, 4, 1, border='mask', scale=0.2", [(2, 5, 4, 2, 4), *qkv[1:]]),
        "routing-index": ("routing_index", "a, b, (3, 4), 2", qkv[:2]),
        "routing": ("routing_attention", "a, b, c, (3, 4), 2, 0.3", qkv),
        "routing-padded": ("routing_attention", "a, b, c, 4, 2, padding='zero'", qkv),
        "sampling": ("super_token_sampling", "a, (4, 3), 2", [(2, 9, 8, 6)]),
        "mapping": ("super_token_mapping", "a, b, 4", [(2, 3, 2, 6), (2, 9, 8, 9)]),
        "channel": ("channel_attention", "a, b, c, 0.4", [(2, 9, 2, 4)] * 3),
        "channel-packed": ("channel_attention_qkvpacked", "a", [(2, 9, 3, 2, 4)]),
        "large-kernel": (
            "large_kernel_attention", "a, b, c, d, None, e, f, 2",
            [(2, 4, 9, 8), (4, 1, 5, 5), (4,), (4, 1, 7, 7), (4, 4, 1, 1), (4,)],
        ),
    }  # fmt: skip


CASES = cases()


def make(tmp_path: Any, name: str, function: str, arguments: str, backend: str | None) -> Callable[..., Any]:
    """A function of the tensors alone, in a file of its own: TorchScript reads the source."""
    signature = ", ".join(f"{x}: Tensor" for x in "abcdefg"[: len(CASES[name][2])])
    returns = "tuple[Tensor, Tensor]" if function == "super_token_sampling" else "Tensor"
    source = (
        "from torch import Tensor\nfrom zoo.ops import scriptable\n\n"
        f"def call({signature}) -> {returns}:\n"
        f"    return scriptable.{function}({arguments}, backend={backend!r})\n"
    )
    path = tmp_path / f"{name.replace('-', '_')}_{backend}.py"
    path.write_text(source)
    scope: dict[str, Any] = {"__file__": str(path), "__name__": path.stem}
    exec(compile(source, str(path), "exec"), scope)
    call: Callable[..., Any] = scope["call"]
    return call


def tensors_of(name: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in CASES[name][2]]


@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
@pytest.mark.parametrize("name", CASES)
def test_scripted_equals_public(tmp_path: Any, name: str, backend: str | None) -> None:
    function, arguments, _ = CASES[name]
    tensors = tensors_of(name)
    call = make(tmp_path, name, function, arguments, backend)
    expected = call(*tensors)
    actual = torch.jit.script(call)(*tensors)
    expected, actual = (x if isinstance(x, tuple) else (x,) for x in (expected, actual))
    for a, e in zip(actual, expected, strict=True):
        if backend == "reference":  # TorchScript reaches registered ops alone
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(a, e)


class Backends(TorchDispatchMode):
    """The backends that registered ops are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "zoo":
            self.seen.append(args[-1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CASES)
def test_the_named_backend_arrives(tmp_path: Any, name: str) -> None:
    function, arguments, _ = CASES[name]
    for backend, expected in (("cpu", "cpu"), ("triton", "triton"), (None, ""), ("reference", "")):
        scripted = torch.jit.script(make(tmp_path, name, function, arguments, backend))
        with Backends() as backends:
            try:
                scripted(*tensors_of(name))
            except RuntimeError:
                assert backend == "triton"  # names what it lacks where there is no GPU
        assert set(backends.seen) == {expected}


def test_gradients_in_a_script(tmp_path: Any) -> None:
    call = make(tmp_path, "window", *CASES["window"][:2], None)
    runs = []
    for run in (call, torch.jit.script(call)):
        leaves = [x.requires_grad_() for x in tensors_of("window")]
        runs.append(torch.autograd.grad(run(*leaves).square().sum(), leaves))
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


class Bad(nn.Module):
    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return scriptable.routing_attention(q, k, k, 5, 1)


class BadHalo(nn.Module):
    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return scriptable.halo_attention(q, k, k, 4, 1)


def test_a_script_refuses_what_the_public_functions_refuse() -> None:
    q, small = torch.randn(MAP), torch.randn(2, 2, 2, 2, 4)
    with pytest.raises(Exception, match="regions 5 x 5 do not divide the map 9 x 8"):
        torch.jit.script(Bad())(q, q)
    with pytest.raises(Exception, match="no stride takes a map"):
        torch.jit.script(BadHalo())(small, q)


@pytest.mark.parametrize("name", scriptable.__all__)
def test_signatures_follow_the_public_functions(name: str) -> None:
    """Same names in the same order with the same defaults, `return_index` aside."""
    own = inspect.signature(getattr(scriptable, name)).parameters
    public = inspect.signature(getattr(ops, name)).parameters
    assert list(own) == [p for p in public if p != "return_index"]
    assert all(own[p].default == public[p].default for p in own)
    assert list(own)[-1] == "backend"

"""Reading the recorded outputs of the original implementations; tests/goldens/README.md says where they come from."""

import importlib.util
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

GOLDENS = Path(__file__).parent.parent / "goldens"

_spec = importlib.util.spec_from_file_location("golden_fill", GOLDENS / "fill.py")
assert _spec is not None
assert _spec.loader is not None
_fill = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_fill)
fill: Callable[..., dict[str, Tensor]] = _fill.fill_state_dict


def npz(name: str) -> dict[str, Any]:
    """The arrays of tests/goldens/<name>, e.g. "nat/nat_mini.224x224.npz"; numeric ones as tensors."""
    with np.load(GOLDENS / name, allow_pickle=False) as data:
        arrays = {k: data[k] for k in data.files}
    return {k: torch.from_numpy(v) if v.dtype.kind in "fiub" and v.ndim else v[()] for k, v in arrays.items()}


def keys(name: str) -> list[tuple[str, list[int], str]]:
    """The original state_dict's entries of tests/goldens/<name>.keys.json."""
    entries = json.loads((GOLDENS / f"{name}.keys.json").read_text())
    return [tuple(item) for item in (entries["keys"] if isinstance(entries, dict) else entries)]


def filled(name: str, adjust: Callable[[str, Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """A state_dict with the original's keys, every tensor determined by its key alone (see goldens/fill.py)."""
    weights: dict[str, Tensor] = _fill.fill_state_dict(keys(name))
    return {k: adjust(k, v) for k, v in weights.items()} if adjust else weights


def published(name: str, gain: float = 1.0) -> dict[str, Tensor]:
    """The original's file: beside what is filled its constants and counters; HaloNet's recordings scale batch norms."""
    weights = filled(name, lambda k, v: v * gain if k.endswith("bn.weight") else v)
    constant = torch.eye(9).view(9, 1, 3, 3)
    return {k: weights.get(k, constant if "fold" in k else torch.tensor(0)) for k, *_ in keys(name)}


def save_checkpoint(path: Path, state_dict: Mapping[str, Tensor], wrapper: str | None) -> str:
    """Write a state_dict the way the published file is wrapped; the path as a string."""
    torch.save(dict(state_dict) if wrapper is None else {wrapper: dict(state_dict)}, path)
    return str(path)


def image(height: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """The input that every recorded model output was computed from."""
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def samples(x: Tensor, indices: Iterable[int] | Tensor) -> Tensor:
    """The values of an NCHW tensor at recorded flat indices."""
    return x.contiguous().flatten()[torch.as_tensor(indices, dtype=torch.long)]


def assert_matches(actual: Tensor, expected: Tensor, std: float, tolerance: float, what: str) -> None:
    """Assert that the largest difference is at most `tolerance` of the recorded tensor's standard deviation."""
    error = (actual.double() - expected.double()).abs().max().item()
    assert error <= tolerance * std, f"{what}: largest difference {error:.3e} exceeds {tolerance:g} x std {std:.3e}"


def assert_op(
    file: str,
    run: Callable[[Tensor, dict[str, Any]], Tensor],
    model: Callable[[dict[str, Any]], torch.nn.Module] | None = None,
    ours: Callable[[str], str] = str,
    tolerance: float = 1e-9,
    state: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
) -> None:
    """Assert that a recorded operation of an original gives its output and every gradient, in float64.

    Args:
        file: under tests/goldens/ops, without suffix.
        run: the output for the input and the recording.
        model: the module that the recorded weights belong to, which `run` finds in the recording as "module".
        ours: the recorded name of a weight to ours.
        tolerance: largest difference, of the standard deviation of what was recorded.
        state: further changes of weights, or of their gradients, in our names.
    """
    data = npz(f"ops/{file}.npz")
    parameters: dict[str, Tensor] = {}
    if model is not None:
        module = data["module"] = model(data).double()
        weights = {ours(k[2:]): v for k, v in data.items() if k.startswith("w/")}
        module.load_state_dict(state(weights))
        parameters = dict(module.named_parameters())
    x = data["x"].clone().requires_grad_()
    y = run(x, data)
    assert y.shape == data["y"].shape
    assert_matches(y, data["y"], float(data["y"].std()), tolerance, "output")
    (y * data["grad_y"]).sum().backward()
    assert x.grad is not None
    assert_matches(x.grad, data["grad_x"], float(data["grad_x"].std()), tolerance, "gradient of the input")
    grads = state({ours(k[2:]): v for k, v in data.items() if k.startswith("g/")})
    assert grads.keys() == parameters.keys()
    largest = max((float(g.std(correction=0)) for g in grads.values()), default=0.0)
    for name, expected in grads.items():
        grad = parameters[name].grad
        assert grad is not None, name
        assert_matches(grad, expected, largest, tolerance, f"gradient of {name}")

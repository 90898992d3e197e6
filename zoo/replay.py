"""Run an exported program on saved inputs, in a process of its own that has its runtime and nothing else.

    python replay.py onnx|pt2|aoti FILE INPUTS.npz OUTPUTS.npz [MODULE ...]

MODULEs are imported first: the operators that the program calls. `zoo.programs` starts this file by its path.
"""

import importlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

Run = Callable[[Any], list[Any]]


def _onnx(file: str) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (name,) = (x.name for x in session.get_inputs())
    return lambda x: list(session.run(None, {name: x}))


def _torch(kind: str, file: str) -> Run:
    import torch

    program: Callable[..., Any]
    if kind == "aoti":
        from torch._inductor import aoti_load_package

        program = aoti_load_package(file)
    else:
        program = torch.export.load(file).module()

    def run(x: Any) -> list[Any]:
        with torch.inference_mode():
            made = program(torch.from_numpy(x))
        return [y.numpy() for y in (made if isinstance(made, list | tuple) else [made])]

    return run


def main(kind: str, file: str, inputs: str, outputs: str, *modules: str) -> None:
    """Write the program's outputs for every array of INPUTS.npz, "<input>.<output>"."""
    for module in modules:
        importlib.import_module(module)
    run = _onnx(file) if kind == "onnx" else _torch(kind, file)
    with np.load(inputs) as given:
        made = {name: run(given[name]) for name in given.files}
    arrays: dict[str, Any] = {f"{name}.{i}": y for name, ys in made.items() for i, y in enumerate(ys)}
    np.savez(outputs, **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Models as programs for other runtimes: ONNX, torch.export and AOTInductor, each compared with the model it is of.

A program takes one batch of images [B, C, H, W], normalized, and gives logits or a list of maps.
"""

import copy
import importlib.util
import logging
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .errors import UserError, first_line
from .ops.decompositions import decompose

__all__ = ["DYNAMIC", "PROGRAMS", "Form", "Parity", "check_parity", "has_compiler", "write_program"]

DYNAMIC = {
    "auto": "batch, height and width, or what the model allows",
    "all": "batch, height and width",
    "batch": "batch",
    "none": "none",
}
_FILES = {"onnx": "model.onnx", "pt2": "model.pt2", "aoti": "model.pt2"}
_LEAST = 128  # pixels of a side that a program for every size is made from
_SLACK = {torch.float32: 1e-4, torch.float16: 4e-3}  # of a standard deviation


@dataclass(frozen=True)
class Form:
    """What a program is to be.

    Attributes:
        channels, size: of its images; the only ones that it takes where they are not dynamic.
        dynamic: "all", "batch" or "none".
        dtype: of weights, images and outputs: float32 or float16.
        opset: of ONNX; None takes PyTorch's own.
        decompose: torch.export and AOTInductor: in ATen's operators alone, so that zoo is not needed to run it.
        outputs: their names.
    """

    channels: int
    size: tuple[int, int]
    dynamic: str = "all"
    dtype: torch.dtype = torch.float32
    opset: int | None = None
    decompose: bool = False
    outputs: tuple[str, ...] = ("logits",)

    @property
    def traced(self) -> tuple[int, ...]:
        """Of the images that it is made from.

        Sides that stand for any are unequal, and so large that no map has a side of one, which PyTorch treats apart.
        """
        height, width = self.size
        if self.dynamic == "all":
            height, width = max(height, _LEAST), max(width, _LEAST) + 32
        return (1 if self.dynamic == "none" else 2), self.channels, height, width

    @property
    def shapes(self) -> Sequence[tuple[int, ...]]:
        """Of images to compare it on: three sizes and batches where they are dynamic, two draws where not."""
        height, width = self.size
        lower = max(32, height * 5 // 8 + 3), max(32, width + 21)
        larger = height * 5 // 4 + 10, width * 9 // 8 + 33
        return {
            "all": [(batch, self.channels, *s) for batch, s in ((1, self.size), (3, lower), (2, larger))],
            "batch": [(1, self.channels, height, width), (3, self.channels, height, width)],
            "none": [(1, self.channels, height, width)] * 2,
        }[self.dynamic]


@dataclass(frozen=True)
class Parity:
    """The largest difference between a program and its model, in standard deviations of an output.

    Attributes:
        program: of the program, from the model in float64.
        model: of the model itself, in the program's dtype.
        allowed: what the first may be: four times the second, and a little.
        shapes: of the images.
    """

    program: float
    model: float
    allowed: float
    shapes: Sequence[tuple[int, ...]]

    def __str__(self) -> str:
        sizes = " and ".join("x".join(map(str, shape)) for shape in dict.fromkeys(self.shapes))
        return f"{self.program:.1e} of a standard deviation (the model's own rounding: {self.model:.1e}), on {sizes}"


def has_compiler() -> bool:
    """Whether AOTInductor has a C++ compiler here."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        subprocess.run([get_cpp_compiler(), "--version"], capture_output=True, check=True)
    except (InvalidCxxCompiler, OSError, subprocess.SubprocessError):
        return False
    return True


def write_program(kind: str, model: nn.Module, form: Form, folder: Path) -> tuple[Path, dict[str, str]]:
    """Write a model as a program.

    Args:
        kind: a key of PROGRAMS.
        model: in evaluation mode, float32.
        form: what it is to be.
        folder: where to.

    Returns:
        The file, and what is to be said of it.

    Raises:
        UserError: what writes this kind is not installed, the model does not take images of this size, or it cannot
            be written in this form.
    """
    program = PROGRAMS[kind]
    for module in program.needs:
        if importlib.util.find_spec(module) is None:
            raise UserError(f"format={kind} needs the package {module}; pip install 'attention-zoo[export]' brings it")
    if kind == "aoti" and not has_compiler():
        raise UserError("format=aoti needs a C++ compiler, and there is none; install g++, or take format=pt2")
    file = folder / _FILES[kind]
    try:
        with torch.inference_mode():
            model(torch.zeros(1, form.channels, *form.size))
    except (ValueError, RuntimeError, AssertionError) as error:
        size = "x".join(map(str, form.size))
        raise UserError(f"img_size={size}: the model does not take it: {first_line(error)}; give another") from error
    model = model.to(form.dtype)
    images = torch.randn(form.traced, dtype=form.dtype)
    try:
        with _quiet(), torch.no_grad():
            facts = program.write(model, images, form, file)
    except UserError:
        raise
    except Exception as error:  # of exporters, which raise anything
        cause = first_line(error.__cause__ or error)
        other = " with dynamic=batch, or none" if form.dynamic == "all" else ""
        raise UserError(
            f"format={kind}: this model cannot be written so: {cause}; try another format{other}"
        ) from error
    return file, facts


def check_parity(kind: str, file: Path, model: nn.Module, form: Form) -> Parity:
    """Run a program in a fresh process on new images and compare it with its model.

    Raises:
        UserError: it does not run there, or differs by more than rounding does.
    """
    generator = torch.Generator().manual_seed(int.from_bytes(file.name.encode(), "big") % 2**31)
    images = [torch.randn(shape, generator=generator).to(form.dtype) for shape in form.shapes]
    made = _replay(kind, file, images, form, () if kind == "onnx" or form.decompose else ("zoo.ops",))
    worst = Parity(0.0, 0.0, _SLACK[form.dtype], form.shapes)
    model = model.to(form.dtype)
    exact_model = copy.deepcopy(model).double()
    with torch.inference_mode():
        for x, outputs in zip(images, made, strict=True):
            own, exact = _several(model(x)), _several(exact_model(x.double()))
            if len(outputs) != len(exact):
                raise UserError(f"format={kind}: the program gives {len(outputs)} outputs, the model {len(exact)}")
            for name, y, mine, truth in zip(form.outputs, outputs, own, exact, strict=True):
                if y.shape != truth.shape:
                    raise UserError(
                        f"format={kind}: {name} of {tuple(x.shape)} is {tuple(y.shape)} in the program and "
                        f"{tuple(truth.shape)} in the model"
                    )
                scale = float(truth.std()) or float(truth.abs().max()) or 1.0
                errors = [float((z.double() - truth).abs().max()) / scale for z in (y, mine)]
                allowed = 4 * errors[1] + _SLACK[form.dtype]
                if not errors[0] <= allowed:
                    raise UserError(
                        f"format={kind}: {name} differs from the model by {errors[0]:.1e} of its standard deviation on "
                        f"{tuple(x.shape)}, and {allowed:.1e} are rounding; nothing was written"
                    )
                if errors[0] >= worst.program:
                    worst = Parity(errors[0], errors[1], allowed, form.shapes)
    return worst


def _several(y: Any) -> list[Tensor]:
    return list(y) if isinstance(y, list | tuple) else [y]


def _replay(kind: str, file: Path, images: Sequence[Tensor], form: Form, modules: Sequence[str]) -> list[list[Tensor]]:
    with tempfile.TemporaryDirectory() as folder:
        inputs, outputs = Path(folder) / "inputs.npz", Path(folder) / "outputs.npz"
        arrays: dict[str, Any] = {str(i): x.numpy() for i, x in enumerate(images)}
        np.savez(inputs, **arrays)
        script = Path(__file__).with_name("replay.py")
        # -P: the script's folder, which has modules of many names, is not where it imports from
        command = [sys.executable, "-P", str(script), kind, str(file), str(inputs), str(outputs), *modules]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = [line for line in done.stderr.strip().splitlines() if line.strip()] or [
                f"exit code {done.returncode}"
            ]
            raise UserError(f"format={kind}: the program does not run in a fresh process: {said[-1]}")
        with np.load(outputs) as made:
            count = len(form.outputs)
            keys = [[f"{i}.{j}" for j in range(count) if f"{i}.{j}" in made.files] for i in range(len(images))]
            return [[torch.from_numpy(made[key]) for key in names] for names in keys]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters print and log for their own authors."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _axes(form: Form, make: Callable[[str], Any]) -> tuple[dict[int, Any]]:
    names = {"all": {0: "batch", 2: "height", 3: "width"}, "batch": {0: "batch"}, "none": {}}[form.dynamic]
    return ({axis: make(name) for axis, name in names.items()},)


def _exported(model: nn.Module, images: Tensor, form: Form) -> torch.export.ExportedProgram:
    axes = _axes(form, lambda _name: torch.export.Dim.DYNAMIC)
    return torch.export.export(model, (images,), dynamic_shapes=axes, strict=False)


def _write_onnx(model: nn.Module, images: Tensor, form: Form, file: Path) -> dict[str, str]:
    program = torch.onnx.export(
        model, (images,), dynamo=True, verbose=False, opset_version=form.opset, input_names=["images"],
        output_names=list(form.outputs), dynamic_shapes=_axes(form, str), optimize=False,
    )  # fmt: skip
    assert program is not None
    _simplify(program.model)
    foreign = sorted({f"{node.domain}::{node.op_type}" for node in program.model.graph if node.domain})
    if foreign:
        raise UserError(f"format=onnx: {foreign[0]} is no operator of ONNX")
    program.save(str(file))
    return {"opset": str(program.model.opset_imports[""]), "operators": "ONNX's own"}


def _simplify(model: Any) -> None:
    """Fold constants and share what is equal; the exporter's own rewriting is quadratic in the nodes."""
    import onnx_ir.passes.common as common
    from onnxscript.optimizer import fold_constants_ir

    common.InlinePass()(model)
    fold_constants_ir(model)
    for simplification in (
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    ):
        simplification(model)


def _write_pt2(model: nn.Module, images: Tensor, form: Form, file: Path) -> dict[str, str]:
    program = _exported(model, images, form)
    if form.decompose:
        program = decompose(program)
    torch.export.save(program, str(file))
    return {"PyTorch": torch.__version__, "operators": _operators(form)}


def _write_aoti(model: nn.Module, images: Tensor, form: Form, file: Path) -> dict[str, str]:
    program = _exported(model, images, form)
    if form.decompose:
        program = decompose(program)
    torch._inductor.aoti_compile_and_package(program, package_path=str(file))
    return {"PyTorch": torch.__version__, "device": images.device.type, "operators": _operators(form)}


def _operators(form: Form) -> str:
    return "ATen's own" if form.decompose else "ATen's and zoo's (`import zoo.ops` first)"


@dataclass(frozen=True)
class _Program:
    """What writes a kind of program, and the packages that it takes."""

    write: Callable[[nn.Module, Tensor, Form, Path], dict[str, str]]
    needs: tuple[str, ...] = ()


PROGRAMS = {
    "onnx": _Program(_write_onnx, ("onnx", "onnxscript", "onnxruntime")),
    "pt2": _Program(_write_pt2),
    "aoti": _Program(_write_aoti),
}

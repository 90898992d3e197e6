"""Models of every family as programs: what other runtimes compute, at sizes they were not made from."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from families import FAMILIES
from golden import fill
from torch import nn

from zoo.errors import UserError
from zoo.programs import Form, Parity, check_parity, has_compiler, write_program

pytest.importorskip("onnxruntime")
import onnx
import onnxruntime

# Every kind of block once, of the rows of FAMILIES that have it several times; of HaloNet and LITv2 there is no less.
ONCE: dict[str, dict[str, Any]] = {
    "nat": {"depths": (1, 1), "num_heads": (1, 2)},
    "dinat": {"depths": (1, 1), "num_heads": (1, 2), "dilations": (4, 2)},
    "dinat_s": {"depths": (1, 1), "num_heads": (1, 2), "dilations": (4, 2)},
    "nat_isotropic": {"depth": 1},
    "maxvit": {"depths": (1,), "embed_dims": (32,)},
    "davit": {"depths": (1,), "embed_dims": (16,), "num_heads": (2,)},
    "biformer": {"depths": (1, 1), "embed_dims": (16, 16), "topks": (2, -2)},
    "van": {"depths": (1, 1), "embed_dims": (8, 16), "mlp_ratios": (8, 4)},
    "stvit": {"depths": (1, 1), "embed_dim": (16, 16), "num_heads": (1, 2), "stoken_size": (8, 1), "n_iter": (2, 1)},
}
SIZE = (96, 128)


def built(family: str, **more: Any) -> nn.Module:
    """A small model whose every block counts: at first many a residual branch is zero."""
    small = FAMILIES[family].shrunk
    model = timm.create_model(small.name, **{**small.args, **ONCE.get(family, {}), **more}).eval()
    model.load_state_dict(fill([(k, v.shape, str(v.dtype)) for k, v in model.state_dict().items()]), strict=False)
    return model


def written(kind: str, model: nn.Module, form: Form, folder: Path) -> tuple[Path, Parity]:
    file, _facts = write_program(kind, model, form, folder)
    return file, check_parity(kind, file, model, form)


def families(*quick: str) -> list[Any]:
    """All rows of FAMILIES, most of which `make test` leaves out: an export for every size takes half a minute."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]


@pytest.mark.parametrize("family", families("nat", "biformer", "stvit"))
def test_onnx(family: str, tmp_path: Path) -> None:
    """For every batch and size, smaller and larger than what it is made from, in ONNX's own operators."""
    form = Form(3, SIZE)
    file, parity = written("onnx", built(family), form, tmp_path)
    _, lower, larger = parity.shapes
    assert lower[2] < form.traced[2] < larger[2]
    assert lower[3] < form.traced[3] < larger[3]
    assert parity.program <= 1e-4
    stored = onnx.load(file)
    assert {entry.domain for entry in stored.opset_import} == {""}
    (images,) = stored.graph.input
    assert [bool(d.dim_param) for d in images.type.tensor_type.shape.dim] == [True, False, True, True]


@pytest.mark.parametrize("decompose", [False, True], ids=["zoo", "plain"])
@pytest.mark.parametrize("family", families("van"))
def test_pt2(family: str, decompose: bool, tmp_path: Path) -> None:
    """With zoo's ops or without, also where a stage that had several tiles has one, and the other way round."""
    form = Form(3, SIZE, decompose=decompose)
    file, parity = written("pt2", built(family), form, tmp_path)
    assert parity.program <= 1e-4
    program = torch.export.load(file)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any(t.startswith("zoo.") for t in targets) != decompose


@pytest.mark.parametrize("family", families("davit"))
def test_half_precision(family: str, tmp_path: Path) -> None:
    file, parity = written("onnx", built(family), Form(3, SIZE, dynamic="batch", dtype=torch.float16), tmp_path)
    assert parity.program <= parity.allowed
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert {x.type for x in (*session.get_inputs(), *session.get_outputs())} == {"tensor(float16)"}
    assert {x.data_type for x in onnx.load(file).graph.initializer} >= {onnx.TensorProto.FLOAT16}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not has_compiler(), reason="AOTInductor needs a C++ compiler")
@pytest.mark.parametrize("family", ["nat", "maxvit", "davit", "halonet", "biformer", "van", "stvit"])
def test_aoti(family: str, tmp_path: Path) -> None:
    _file, parity = written("aoti", built(family), Form(3, SIZE, dynamic="batch"), tmp_path)
    assert parity.program <= 1e-4


def test_a_size_that_the_family_cannot_take(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"img_size=96x100: .*multiple.*; give another"):
        write_program("onnx", built("biformer", auto_pad=False), Form(3, (96, 100)), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("kind", "module"), [("onnx", "onnx"), ("onnx", "onnxscript"), ("onnx", "onnxruntime")])
def test_an_exporter_that_is_not_installed(
    kind: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else find(name))
    with pytest.raises(UserError, match=rf"needs the package {module}; pip install 'attention-zoo\[export\]'"):
        write_program(kind, nn.Identity(), Form(3, SIZE), tmp_path)


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"^format=aoti needs a C\+\+ compiler, and there is none; .* format=pt2$"):
        write_program("aoti", nn.Identity(), Form(3, SIZE), tmp_path)

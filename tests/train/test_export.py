"""`zoo export`: a run's weights come back through timm, bit for bit."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch

from zoo import programs
from zoo.cli import main
from zoo.train.export import FORMATS
from zoo.train.runs import load_run, save_checkpoint, select_weights

SMALL = ["model.kwargs.depths=[1,1]", "model.kwargs.num_heads=[2,4]"]
ARGUMENTS = ["dry_run=true", "batch_size=16", "ema.enabled=true", *SMALL]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "run"
    assert main(["train", *ARGUMENTS, f"run_dir={folder}"]) == 0
    return folder


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_round_trip(run: Path, tmp_path: Path, weights: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "exported"
    assert main(["export", f"run={run}", f"out={out}", f"weights={weights}"]) == 0
    assert "local-dir:" in capsys.readouterr().out
    assert {p.name for p in out.iterdir()} == {"model.safetensors", "config.json", "README.md"}

    opened = load_run(run)
    state, kind = select_weights(opened.checkpoint("last")[1], weights)
    assert kind == weights
    expected = timm.create_model(
        opened.config["model"]["name"], num_classes=10, in_chans=opened.config["model"]["in_chans"],
        **opened.config["model"]["kwargs"],
    ).eval()  # fmt: skip
    expected.load_state_dict(state)
    loaded = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    size = opened.config["data"]["img_size"]
    images = torch.randn(4, opened.config["model"]["in_chans"], size, size)
    with torch.no_grad():
        assert torch.equal(loaded(images), expected(images))
    assert loaded.num_classes == 10


def test_configuration_describes_these_weights(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "exported"
    assert main(["export", f"run={run}", f"out={out}"]) == 0
    data = load_run(run).config["data"]
    config = json.loads((out / "config.json").read_text())
    cfg = config["pretrained_cfg"]
    assert cfg["input_size"][1:] == [data["img_size"]] * 2
    assert cfg["mean"] == pytest.approx(data["mean"])
    assert cfg.get("notes") is None  # the published checkpoint's accuracy is not this one's
    assert cfg.get("tag") is None
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm\n")
    assert "digits" in card


def test_overwrite(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An earlier export is replaced; nothing that is none, or that holds more, is."""
    out = tmp_path / "exported"
    out.mkdir()
    (out / "mine.txt").write_text("keep me")
    assert main(["export", f"run={run}", f"out={out}"]) == 2
    assert "overwrite=true" in capsys.readouterr().err
    assert main(["export", f"run={run}", f"out={out}", "overwrite=true"]) == 2
    assert "no earlier export" in capsys.readouterr().err
    assert (out / "mine.txt").read_text() == "keep me"
    (out / "mine.txt").unlink()
    assert main(["export", f"run={run}", f"out={out}", "weights=raw"]) == 0
    raw = (out / "model.safetensors").read_bytes()
    assert main(["export", f"run={run}", f"out={out}", "weights=ema", "overwrite=true"]) == 0
    assert json.loads((out / "config.json").read_text())["exported_by"].startswith("attention-zoo ")
    again = tmp_path / "again"
    assert main(["export", f"run={run}", f"out={again}", "weights=raw"]) == 0
    assert (again / "model.safetensors").read_bytes() == raw
    for name in ("mine.txt", "sub"):
        (out / name).mkdir() if name == "sub" else (out / name).write_text("keep me")
        capsys.readouterr()
        assert main(["export", f"run={run}", f"out={out}", "overwrite=true"]) == 2
        assert f"such as {name}" in capsys.readouterr().err
        (out / name).rmdir() if name == "sub" else (out / name).unlink()
    (out / "README.md").unlink()
    (out / "README.md").symlink_to(run / "config.yaml")
    assert main(["export", f"run={run}", f"out={out}", "overwrite=true"]) == 2
    assert {p.name for p in tmp_path.iterdir()} == {"exported", "again"}


def test_what_is_never_overwritten(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "parent" / "runs" / "run"
    shutil.copytree(run, copy)
    export = tmp_path / "export"
    assert main(["export", f"run={run}", f"out={export}"]) == 0
    (tmp_path / "home" / "me").mkdir(parents=True)
    (tmp_path / "here" / "deep").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "me"))
    monkeypatch.chdir(tmp_path / "here" / "deep")
    (tmp_path / "link").symlink_to(export)
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "file").write_text("keep me")
    for folder in (copy, copy.parent, Path.cwd(), Path.home()):  # even where they look like an export
        (folder / "config.json").write_text((export / "config.json").read_text())
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    outs = ["/", ".", "..", "../deep", "~", "~/..", copy, copy.parent, copy.parent.parent, copy / "checkpoints"]
    outs += [tmp_path / name for name in ("link", "dangling", "file")]
    for out in outs:
        for more in ([], ["overwrite=true"]):
            capsys.readouterr()
            assert main(["export", f"run={copy}", f"out={out}", *more]) == 2, out
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith("zoo: out=")
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before


def _damage(copy: Path, name: str, content: bytes | None) -> None:
    file = copy / name
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)


@pytest.mark.parametrize(
    "name",
    [
        "config.yaml",
        "summary.json",
        "checkpoints/last.pt",
        "checkpoints/last.manifest.json",
        "metrics.csv",
        "checkpoints",
    ],
)
@pytest.mark.parametrize("content", [None, b"", b"[", b"{}", b"[1]", b"null", b'"x"', b"\xff\xfe\x00", b"model: 1\n"])
def test_any_damage_is_one_line_or_none_of_the_export(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes | None
) -> None:
    copy, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(run, copy)
    if name == "checkpoints":
        shutil.rmtree(copy / name)
    if name != "checkpoints" or content is not None:
        _damage(copy, name, content)
    code = main(["export", f"run={copy}", f"out={out}"])
    err = capsys.readouterr().err
    if name in ("summary.json", "metrics.csv"):  # which an export does not need
        assert code == 0
        return
    assert code == 2
    assert err.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"num_classes": "ten"},
        {"num_classes": None},
        {"state_dict": None},
        {"state_dict": [1]},
        {"state_dict": {"a": 1}},
        {"state_dict_ema": "x"},
        {"label_names": 3},
        {"history": "none"},
        {"history": [3]},
        {"step": "x", "epoch": None},
        {"config": None},
    ],
)
def test_a_checkpoint_of_odd_types(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any]
) -> None:
    copy, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(run, copy)
    state = {**load_run(run).checkpoint("last")[1], **change}
    save_checkpoint(copy / "checkpoints" / "last.pt", state)
    code = main(["export", f"run={copy}", f"out={out}"])
    err = capsys.readouterr().err
    assert code in (0, 2)
    assert err.count("\n") == (1 if code else 0)
    assert out.exists() == (code == 0)


def test_the_card_says_what_was_measured(run: Path, tmp_path: Path) -> None:
    """The figure is that of the exported weights in the verified checkpoint, whatever summary.json says."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    state = load_run(run).checkpoint("last")[1]
    row = {"epoch": 1, "step": state["step"], "top1": 12.5, "ema_top1": 34.25, "held_out": 359}
    save_checkpoint(copy / "checkpoints" / "last.pt", {**state, "history": [row]})
    (copy / "summary.json").write_text('{"top1": 99.99, "weights": "ema"}')
    for weights, expected in (("raw", "12.50 %"), ("ema", "34.25 %")):
        assert main(["export", f"run={copy}", f"out={tmp_path / weights}", f"weights={weights}"]) == 0
        card = (tmp_path / weights / "README.md").read_text()
        assert f"| top-1 | {expected} on 359 held-out images |" in card
        assert "99.99" not in card
    save_checkpoint(copy / "checkpoints" / "last.pt", {**state, "history": [], "step": 5})
    assert main(["export", f"run={copy}", f"out={tmp_path / 'none'}"]) == 0
    assert "| top-1 | not measured |" in (tmp_path / "none" / "README.md").read_text()


def test_damaged_checkpoint(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    file = copy / "checkpoints" / "last.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert main(["export", f"run={copy}", f"out={tmp_path / 'out'}"]) == 2
    assert "damaged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out=x"], "needs run=FOLDER or model=NAME"),
        (["run=x"], "needs out="),
        (["run=/nowhere", "out=x"], "no run folder at /nowhere"),
        (["rnu=x"], "unknown key 'rnu'; the nearest keys are run"),
        (["run"], "arguments are key=value"),
        (["format=onnxx"], "the choices are timm, onnx, pt2, aoti"),
        (["dynamic=some"], "the choices are auto, all, batch, none"),
        (["opset=18"], "opset= is of format=onnx, not of format=timm"),
        (["format=pt2", "push=me/it"], "push= is of format=timm"),
        (["format=onnx", "out_indices=[1]"], "give features=true"),
        (["format=pt2", "model=van_b0", "out=x", "pretrained=/nowhere"], "no checkpoint file at /nowhere"),
        (["format=onnx", "img_size=big"], "img_size=big is no size; give 224, or 192x256"),
        (["dtype=float64"], "the choices are float32, float16"),
        (["overwrite=perhaps"], "perhaps"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_run_of_a_detector(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text() + "detector:\n  name: retinanet\n")
    assert main(["export", f"run={tmp_path}", f"out={tmp_path / 'out'}"]) == 2
    assert "zoo detect" in capsys.readouterr().err


def test_run_of_a_detector_without_mmdet(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text() + "detector:\n  name: retinanet\n")
    for name in [n for n in sys.modules if n.startswith("zoo.train.detection")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mmdet", None)
    assert main(["export", f"run={tmp_path}", f"out={tmp_path / 'out'}", "format=pt2"]) == 2
    err = capsys.readouterr().err
    assert "detection needs mmdet" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("fails", [False, True])
def test_push(
    run: Path, tmp_path: Path, fails: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder is uploaded as it is; where that fails it stays, and the line says how it is sent later."""
    sent: list[tuple[str, set[str]]] = []

    def upload(repo_id: str, folder_path: Path, **_: Any) -> str:
        if fails:
            raise OSError("no route to the hub")
        sent.append((repo_id, {path.name for path in folder_path.iterdir()}))
        return f"hub:{repo_id}"

    monkeypatch.setattr(huggingface_hub, "create_repo", lambda *_a, **_k: None)
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload)
    out = tmp_path / "out"
    assert main(["export", f"run={run}", f"out={out}", "push=me/digits"]) == (2 if fails else 0)
    said = capsys.readouterr()
    assert {path.name for path in out.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    if fails:
        assert said.err.count("\n") == 1
        assert "push=me/digits: no route to the hub" in said.err
        assert f"hf upload me/digits {out}" in said.err
    else:
        assert sent == [("me/digits", {"model.safetensors", "config.json", "README.md"})]
        assert "uploaded to hub:me/digits" in said.out


def test_every_format_is_one_of_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--help"]) == 0
    usage = capsys.readouterr().out
    assert all(f" {name}: " in usage for name in FORMATS)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("pt2", []),
        ("pt2", ["decompose=true", "dynamic=batch"]),
        ("pt2", ["features=true", "dynamic=none"]),
        ("onnx", ["dynamic=batch"]),
    ],
)
def test_programs(run: Path, tmp_path: Path, kind: str, more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Written, run in a fresh process, and described."""
    out = tmp_path / "exported"
    assert main(["export", f"run={run}", f"out={out}", f"format={kind}", *more]) == 0
    assert "largest difference" in capsys.readouterr().out
    config = json.loads((out / "config.json").read_text())
    assert {p.name for p in out.iterdir()} == {f"model.{kind}", "config.json", "README.md"}
    assert config["parity"]["program"] < 1e-4
    assert config["outputs"] == (["map0", "map1"] if "features=true" in more else ["logits"])
    card = (out / "README.md").read_text()
    library = "onnx" if kind == "onnx" else "pytorch"
    task = "image-feature-extraction" if "features=true" in more else "image-classification"
    assert card.startswith(f"---\nlibrary_name: {library}\ntags:\n- {task}\n- {library}\n- attention-zoo\n---\n")
    assert main(["export", f"run={run}", f"out={out}", "overwrite=true"]) == 0


def test_a_program_that_differs_is_not_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replay = programs._replay
    monkeypatch.setattr(programs, "_replay", lambda *a: [[y + 0.01 for y in ys] for ys in replay(*a)])
    arguments = ["export", f"run={run}", f"out={tmp_path / 'out'}", "format=pt2", "dynamic=none"]
    assert main(arguments) == 2
    assert "differs from the model" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

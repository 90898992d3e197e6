"""Tables of tile configurations: what a call finds in one, and what happens where there is none."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_cases import CASES, DEVICE, first, with_new_ops

pytest.importorskip("triton")

from zoo.ops import _tuning as tuning
from zoo.ops.tuning import Config, Key

PROBLEM = Key("window", "forward", "float32", 16, (7, 7), 8)
TABLED = Config(4, 32, 2, 1)
HEURISTIC = [Config(8, 64, 4, 2), Config(4, 16, 2, 1)]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A GPU called "Fake GPU 9000", and an empty folder of tables."""
    monkeypatch.setattr(tuning, "gpu_name", lambda device: "Fake GPU 9000")
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    monkeypatch.setattr(tuning, "_FITTED", {})
    tuning._lookup.cache_clear()
    yield tmp_path
    tuning._lookup.cache_clear()


def write(folder: Path, *entries: tuple[Key, Config]) -> None:
    tuning.save_table(folder / "fake-gpu-9000.json", dict(entries), {"gpu": "Fake GPU 9000"})


def chosen(problem: Key) -> Config:
    """What a launch tries first."""
    ran: list[Config] = []
    tuning.launch(problem, HEURISTIC, CPU, ran.append)
    return ran[0]


def test_no_table_is_the_heuristic() -> None:
    assert chosen(PROBLEM) == HEURISTIC[0]


def test_exact(folder: Path) -> None:
    near = Key("window", "forward", "float32", 16, (7, 7), 9)
    write(folder, (near, Config(16, 16, 1, 1)), (PROBLEM, TABLED))
    assert chosen(PROBLEM) == TABLED


@pytest.mark.parametrize(
    ("near", "far"),
    [
        (("float32", 16, (7, 7), 14), ("float32", 16, (9, 7), 8)),
        (("float32", 16, (11, 11), 8), ("float32", 32, (7, 7), 8)),
        (("float32", 64, (11, 11), 1), ("float16", 16, (7, 7), 8)),
    ],
    ids=["size-matters-least", "box-before-dim", "other-dtype-is-no-match"],
)
def test_nearest(folder: Path, near: Any, far: Any) -> None:
    write(folder, (Key("window", "forward", *far), Config(16, 16, 1, 1)), (Key("window", "forward", *near), TABLED))
    assert chosen(PROBLEM) == TABLED


@pytest.mark.parametrize("other", [("halo", "forward"), ("window", "rows")])
def test_other_kinds_and_passes_do_not_count(folder: Path, other: tuple[str, str]) -> None:
    write(folder, (Key(*other, "float32", 16, (7, 7), 8), TABLED))
    assert chosen(PROBLEM) == HEURISTIC[0]


def test_too_little_shared_memory_falls_back_and_is_remembered(folder: Path) -> None:
    write(folder, (PROBLEM, TABLED))
    tried: list[Config] = []

    def run(config: Config) -> None:
        tried.append(config)
        if config != HEURISTIC[1]:
            raise tuning.OutOfResources(300_000, 100_000, "shared memory")

    tuning.launch(PROBLEM, HEURISTIC, CPU, run, "shape")
    assert tried == [TABLED, *HEURISTIC]
    tuning.launch(PROBLEM, HEURISTIC, CPU, run, "shape")
    assert tried == [TABLED, *HEURISTIC, HEURISTIC[1]]


def test_nothing_fits_raises() -> None:
    def run(config: Config) -> None:
        raise tuning.OutOfResources(300_000, 100_000, "shared memory")

    with pytest.raises(tuning.OutOfResources):
        tuning.launch(PROBLEM, HEURISTIC, CPU, run)


MALFORMED = {
    "no JSON": ("{", "cannot be read"),
    "no entries": ('{"environment": {}}', "cannot be read: KeyError"),
    "missing field": ('{"entries": [{"kind": "window"}]}', "entry 0: its fields are"),
    "tile is no power of two": ({"tile": 6}, "entry 0: tile"),
    "a number is text": ({"warps": "4"}, "entry 0: box must hold"),
    "box of one side": ({"box": [7]}, "entry 0: box must hold"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed(folder: Path, name: str) -> None:
    text, message = MALFORMED[name]
    write(folder, (PROBLEM, TABLED))
    path = folder / "fake-gpu-9000.json"
    if isinstance(text, dict):
        table = json.loads(path.read_text())
        table["entries"][0] |= text
        text = json.dumps(table)
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{path}.*{message}"):
        chosen(PROBLEM)


def test_saving_keeps_the_entries_of_other_problems(folder: Path) -> None:
    other = Key("halo", "forward", "float32", 16, (7, 7), 8)
    write(folder, (other, TABLED), (PROBLEM, TABLED))
    write(folder, (PROBLEM, HEURISTIC[0]))
    assert tuning.load_table(folder / "fake-gpu-9000.json") == {other: TABLED, PROBLEM: HEURISTIC[0]}


NAMES = with_new_ops("window", "halo-zero", "routing", "channel", "sampling", "large-kernel")


def outcome(name: str) -> tuple[list[Tensor], dict[Key, None]]:
    torch.manual_seed(0)
    call, inputs = CASES[name]()
    leaves = [x.to(DEVICE, torch.float32).requires_grad_() for x in inputs]
    with tuning.observed() as keys:
        out = first(call(*leaves, backend="triton"))
        grads = torch.autograd.grad(out.square().sum(), leaves)
    return [out.detach(), *grads], keys


# minutes of the interpreter in small tiles
LONG = ("halo-zero", "large-kernel", "routing")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in NAMES])
def test_kernels_run_what_the_table_says(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table with small tiles for every pass: other configurations run, and the results stay the same."""
    expected, keys = outcome(name)
    assert keys
    write(folder, *((key, TABLED) for key in keys))
    ran: list[Config] = []
    launch = tuning.launch

    def spy(problem: Any, heuristic: Any, device: Any, run: Any, *shape: Any) -> None:
        launch(problem, heuristic, device, lambda config: (ran.append(config), run(config))[1], *shape)

    monkeypatch.setattr(tuning, "launch", spy)
    actual, _ = outcome(name)
    assert ran
    assert set(ran) == {TABLED}
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["channel", "sampling", "mapping", "large-kernel", "na-3-odd-map"])
def test_an_image_does_not_depend_on_the_batch(name: str) -> None:
    call, inputs = CASES[name]()
    per_image = [x.shape[0] == 2 and x.dim() > 3 for x in inputs]
    if name == "mapping":
        inputs, per_image = [torch.cat([x, x.flip(1)]) for x in inputs], [True, True]
    tensors = [x.to(DEVICE, torch.float32) for x in inputs]
    whole = first(call(*tensors, backend="triton"))
    alone = first(call(*(x[:1] if own else x for x, own in zip(tensors, per_image, strict=True)), backend="triton"))
    assert whole.shape[0] == 2
    assert torch.equal(whole[:1], alone)

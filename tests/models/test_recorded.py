"""Every family against the recorded outputs of its original implementation, stage by stage.

The weights are filled in the original's names and loaded from a file as the original wrote it, so the renaming is part
of what is compared. How a recording is read stands in `RECORDINGS`: one row for the files that a pattern names.
"""

import fnmatch
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from families import RECORDINGS, Tap
from golden import GOLDENS, assert_matches, image, npz, published, samples, save_checkpoint
from torch import Tensor, nn

import zoo  # noqa: F401
from zoo.models._pyramid import Pyramid

SLOW = ("dinat_large_21k.*", "dinat_s_large_384.*", "DaViT_large*", "DaViT_small.192*", "stvit_large.*")
FILES = sorted(p.relative_to(GOLDENS).as_posix() for p in GOLDENS.glob("*/*.npz") if p.parent.name != "ops")


def recorded_parts(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """For each recorded part shape, std, flat indices and the values there, and the mean in float32 recordings."""
    parts: dict[str, dict[str, Any]] = {}
    for key, value in data.items():
        part, dot, what = key.rpartition(".") if "." in key else key.rpartition("_")
        if what in ("shape", "std", "idx", "val_f64", "sample") or what == "mean" and dot == "_":
            parts.setdefault(part, {})[{"val_f64": "sample"}.get(what, what)] = value
    # originals number their embeddings
    names = {"embed1": "stem", **{f"embed{i + 1}": f"down{i}" for i in range(1, 4)}}
    return {names.get(part, part): values for part, values in parts.items() if "shape" in values}


def watched(model: nn.Module, taps: dict[str, Tap]) -> dict[str, Tensor]:
    """Filled, when the model runs, with the outputs of its stem, between its stages, NCHW, and of named modules."""
    seen: dict[str, Tensor] = {}
    pyramid = isinstance(model, Pyramid)
    last = pyramid and model.channels_last

    def keep(part: str) -> Any:
        if part in taps:
            return lambda *_: None
        return lambda _module, _inputs, y: seen.__setitem__(part, y.permute(0, 3, 1, 2) if last else y)

    def keep_input(part: str) -> Any:
        return lambda module, inputs: keep(part)(module, (), inputs[0])

    model.stem.register_forward_hook(keep("stem"))
    for i, stage in enumerate(model.stages):
        if not pyramid:
            stage.register_forward_hook(keep(f"stage{i + 1}"))
            continue
        stage.downsample.register_forward_hook(keep(f"down{i}"))
        stage.norm.register_forward_pre_hook(keep_input(f"stage{i + 1}_prenorm"))
    if pyramid and hasattr(model.norm, "act"):
        model.norm.act.register_forward_hook(lambda _module, _inputs, y: seen.__setitem__("final_act", y))
    for part, (name, read) in taps.items():
        model.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, y, p=part, r=read: seen.__setitem__(p, r(y))
        )
    return seen


def test_every_recording_is_compared() -> None:
    used = [next((r for r in RECORDINGS if fnmatch.fnmatch(file, r.pattern)), None) for file in FILES]
    assert len(FILES) == 61
    assert None not in used
    assert all(recording in used for recording in RECORDINGS)


@pytest.mark.parametrize(
    "file",
    [
        pytest.param(f, marks=pytest.mark.slow if any(fnmatch.fnmatch(f.split("/")[1], s) for s in SLOW) else ())
        for f in FILES
    ],
    ids=lambda f: f.removesuffix(".npz"),
)
def test_recorded(file: str, tmp_path: Path) -> None:
    how = next(r for r in RECORDINGS if fnmatch.fnmatch(file, r.pattern))
    family, original, size = file.removesuffix(".npz").replace("/", ".").split(".")
    data = npz(file)
    gain = float(data.get("bn_weight_gain", 1.0))
    path = save_checkpoint(tmp_path / "file.pth", published(f"{family}/{how.weights(original)}", gain), how.wrapper)
    classes = {"num_classes": 0} if how.dense else {}
    overlay = {"file": path}
    model = timm.create_model(
        how.name(original), pretrained=True, pretrained_cfg_overlay=overlay, **how.args, **classes
    ).eval()
    dtype = torch.float64 if how.double else torch.float32
    x = image(*map(int, size.split("x")), seed=int(data.get("input_seed", 0)), dtype=dtype)
    seen = watched(model.to(dtype), how.taps)
    with torch.inference_mode():
        features, maps = model.forward_intermediates(x, how.indices)
        logits = model.forward_head(features)
        assert torch.equal(model(x), logits)
    if isinstance(model, Pyramid):
        seen |= {f"stage{i}": m for i, m in enumerate(maps[-4:], 1)}
    seen.setdefault("final_norm", features)

    parts = recorded_parts(data)
    assert set(parts) == how.parts
    usual = 1e-9 if how.double else 2e-5
    for part, recorded in parts.items():
        y, std, tolerance = seen[part], float(recorded["std"]), how.loose.get(part, usual)
        assert list(y.shape) == recorded["shape"].tolist(), part
        assert len(recorded["idx"]) >= 16
        assert_matches(samples(y, recorded["idx"]), recorded["sample"], std, tolerance, part)
        if "mean" in recorded:
            assert_matches(y.double().mean(), torch.as_tensor(recorded["mean"]), std, tolerance, f"mean of {part}")
    expected = data.get("logits_f64", data.get("logits")) if how.double else data.get("logits")
    assert (expected is None) == how.dense
    if expected is not None:
        assert logits.shape == expected.shape
        assert_matches(logits, expected, expected.double().std().item(), how.loose.get("logits", usual), "logits")

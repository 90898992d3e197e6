"""Every family against the recorded outputs of its original implementation, stage by stage.

The weights are filled in the original's names and loaded from a file as the original wrote it, so the renaming is part
of what is compared. How a recording is read stands in `RECORDINGS`: one row for the files that a pattern names.
"""

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from golden import GOLDENS, assert_matches, image, npz, published, samples, save_checkpoint
from torch import Tensor, nn

import zoo  # noqa: F401
from zoo.models._pyramid import Pyramid

STAGES = {f"stage{i}" for i in range(1, 5)}
DOWN = {f"down{i}" for i in range(1, 4)}  # outputs of the downsampling between two stages
PRENORM = {f"stage{i}_prenorm" for i in range(1, 5)}
SLOW = ("dinat_large_21k.*", "dinat_s_large_384.*", "DaViT_large*", "DaViT_small.192*", "stvit_large.*")


@dataclass(frozen=True)
class Recording:
    """How to read the recordings whose path matches a pattern."""

    pattern: str
    parts: set[str]  # what was recorded beside the logits
    name: Callable[[str], str] = str  # the recorded name to ours
    weights: Callable[[str], str] = str  # the recorded name to that of the file's keys
    wrapper: str | None = None  # of the file
    args: dict[str, Any] = field(default_factory=dict)
    indices: list[int] | None = None
    double: bool = False  # compared in float64, to 1e-9 of the standard deviation and not 2e-5
    loose: dict[str, float] = field(default_factory=dict)  # tolerances of single parts
    dense: bool = False  # a backbone without classifier


def _ours(name: str) -> str:
    return f"zoo_{name}"


_LITV2: dict[str, Any] = {"parts": STAGES | DOWN | {"final_norm"}, "wrapper": "model", "double": True}
# Recorded float32 outputs of timm lie this far from timm's own float64 ones where attention saturates.
_SATURATED = {"stage3": 1e-3, "stage4": 1e-3, "logits": 1e-4}

# the first row that matches counts
RECORDINGS = (
    Recording("dinat/*isotropic*", STAGES | {"stem"}, indices=[2, 5, 8, 11]),
    Recording("dinat/vitrpb*", STAGES | {"stem"}, indices=[2, 5, 8, 11]),
    Recording("nat/*", STAGES | DOWN | {"stem"}),
    Recording("dinat/*", STAGES | DOWN | {"stem"}),
    Recording("dinat_s/*", STAGES | DOWN | {"stem"}),
    Recording("davit/timm_*", STAGES | {"stem"}, lambda n: f"zoo_{n.removeprefix('timm_')}"),
    Recording("davit/*", STAGES | DOWN | {"stem"}, lambda n: f"zoo_{n.lower()}", wrapper="state_dict"),
    Recording(
        "biformer/*_det_nwin16_*",
        STAGES,
        lambda n: "biformer_tiny",
        wrapper="model",
        args={"n_win": 16, "out_norms": True, "depths": (1, 1, 2, 1)},
        double=True,
        dense=True,
    ),
    Recording("biformer/*", STAGES | {"final_norm"}, wrapper="model", double=True),
    Recording("litv2/*_alpha0.*", **_LITV2, name=lambda n: "litv2_s", args={"alpha": 0.0}),
    Recording("litv2/*_alpha1.*", **_LITV2, name=lambda n: "litv2_s", args={"alpha": 1.0}),
    Recording(
        "litv2/*_det_ws2.*",
        STAGES,
        lambda n: "litv2_s",
        args={"dense": True, "local_ws": 2},
        double=True,
        dense=True,
    ),
    Recording("litv2/*", **_LITV2),
    Recording("svit/*", STAGES | {"stem", "final_act"}, wrapper="model", double=True),
    Recording(
        "van/*_seg_backbone.*",
        STAGES,
        lambda n: "van_b0",
        wrapper="state_dict",
        args={"norm_eps": 1e-5},
        double=True,
        dense=True,
    ),
    Recording("van/*", STAGES | PRENORM, wrapper="state_dict", double=True),
    Recording("halonet/lamhalobotnet50ts*", STAGES | {"stem"}, _ours, loose=_SATURATED),
    Recording("halonet/*", STAGES | {"stem"}, _ours),
    Recording(
        "maxvit/TF_original_*", set(), lambda n: "zoo_maxvit_tiny_tf_224", weights=lambda n: "maxvit_tiny_tf_224"
    ),
    Recording("maxvit/*", STAGES | {"stem"}, _ours, wrapper="state_dict"),
)
FILES = sorted(p.relative_to(GOLDENS).as_posix() for p in GOLDENS.glob("*/*.npz") if p.parent.name != "ops")


def recorded_parts(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """For each recorded part shape, std, flat indices and the values there, and the mean in float32 recordings."""
    parts: dict[str, dict[str, Any]] = {}
    for key, value in data.items():
        part, dot, what = key.rpartition(".") if "." in key else key.rpartition("_")
        if what in ("shape", "std", "idx", "val_f64", "sample") or what == "mean" and dot == "_":
            parts.setdefault(part, {})[{"val_f64": "sample"}.get(what, what)] = value
    # the original DaViT numbers its embeddings
    names = {"embed1": "stem", **{f"embed{i + 1}": f"down{i}" for i in range(1, 4)}}
    return {names.get(part, part): values for part, values in parts.items() if "shape" in values}


def watched(model: nn.Module) -> dict[str, Tensor]:
    """Filled, when the model runs, with the outputs of its stem and between its stages, NCHW."""
    seen: dict[str, Tensor] = {}
    pyramid = isinstance(model, Pyramid)
    last = pyramid and model.channels_last

    def keep(part: str) -> Any:
        return lambda _module, _inputs, y: seen.__setitem__(part, y.permute(0, 3, 1, 2) if last else y)

    model.stem.register_forward_hook(keep("stem"))
    for i, stage in enumerate(model.stages):
        if not pyramid:
            stage.register_forward_hook(keep(f"stage{i + 1}"))
            continue
        stage.downsample.register_forward_hook(keep(f"down{i}"))
        stage.norm.register_forward_pre_hook(lambda _module, x, i=i: seen.__setitem__(f"stage{i + 1}_prenorm", x[0]))
    if hasattr(model.head, "act"):
        model.head.act.register_forward_hook(lambda _module, _inputs, y: seen.__setitem__("final_act", y))
    return seen


def test_every_recording_is_compared() -> None:
    used = [next((r for r in RECORDINGS if fnmatch.fnmatch(file, r.pattern)), None) for file in FILES]
    assert len(FILES) == 49
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
    seen = watched(model.to(dtype))
    with torch.inference_mode():
        features, maps = model.forward_intermediates(x, how.indices)
        logits = model.forward_head(features)
        assert torch.equal(model(x), logits)
    if isinstance(model, Pyramid):
        seen |= {f"stage{i}": m for i, m in enumerate(maps[-4:], 1)}
    seen["final_norm"] = features

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
    expected = data.get("logits_f64" if how.double else "logits")
    assert (expected is None) == how.dense
    if expected is not None:
        assert logits.shape == expected.shape
        assert_matches(logits, expected, expected.double().std().item(), how.loose.get("logits", usual), "logits")

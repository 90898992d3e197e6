"""Weights of other programs: their recorded keys and numbers, every dialect in any wrapper, and what is refused."""

import functools
import itertools
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from dialects import written
from families import FAMILIES
from golden import GOLDENS, fill, image
from torch import Tensor, nn

import zoo  # noqa: F401
from zoo.models.checkpoints import CheckpointError, read_checkpoint, read_source
from zoo.models.dialects import Dialect, dialects_of, nearest, recognise

RECORDED = {path.stem: json.loads(path.read_text()) for path in sorted((GOLDENS / "dialects").glob("*.json"))}
SMALL: dict[str, Any] = {"depths": (1, 2, 1, 1), "embed_dim": 16, "num_heads": (1, 2, 2, 4), "kernel_size": 3}


def filled(name: str, source: Callable[[str], str] = str) -> dict[str, Tensor]:
    """A recorded state_dict, each tensor a function of its key, or of the key that `source` gives for it."""
    shapes = {k: [int(n) for n in s.split("x") if n] for k, s in RECORDED[name]["keys"].items()}
    values = fill([(source(k), shape) for k, shape in shapes.items()])
    return {k: values.get(source(k), torch.zeros(shape)) for k, shape in shapes.items()}


def load(name: str, path: Path, checkpoint: Any, **kwargs: Any) -> nn.Module:
    torch.save(checkpoint, path / "w.pth")
    overlay = {"file": str(path / "w.pth")}
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()


def load_recorded(name: str, path: Path, source: Callable[[str], str] = str, **kwargs: Any) -> nn.Module:
    recorded = RECORDED[name]
    return load(recorded["model"], path, {"state_dict": filled(name, source)}, **recorded["args"], **kwargs)


def pointwise(x: Tensor) -> Tensor:
    """The weight of a 1x1 convolution as that of the Linear layer which it may be here."""
    return x.flatten(1) if x.ndim == 4 and x.shape[2:] == (1, 1) else x


def assert_equal(found: nn.Module, expected: dict[str, Tensor], but: tuple[str, ...] = ()) -> None:
    own = {k: v for k, v in found.state_dict().items() if not k.startswith(but)} if but else found.state_dict()
    assert own.keys() <= expected.keys()
    assert all(torch.equal(pointwise(v), pointwise(expected[k])) for k, v in own.items())


# recorded keys and numbers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, recorded in RECORDED.items() if "output" in recorded])
def test_numbers(name: str, tmp_path: Path) -> None:
    """The other implementation's own output; of DaViT the mean over the last map."""
    model = load_recorded(name, tmp_path, num_classes=8).double()
    x = image(*RECORDED[name]["size"], dtype=torch.float64)
    with torch.no_grad():
        if "davit" in RECORDED[name]["model"]:
            found = model.forward_intermediates(x, intermediates_only=True)[-1].mean((2, 3))
        else:
            found = model(x)
    torch.testing.assert_close(found, torch.tensor(RECORDED[name]["output"], dtype=torch.float64), rtol=0, atol=1e-9)


# another form of a program's model -> the recorded one that has numbers, and its key for a key
FORMS: dict[str, tuple[str, Callable[[str], str], dict[str, Any]]] = {
    "transformers_dinat_model": ("transformers_dinat", lambda k: f"dinat.{k}", {"num_classes": 0}),
    "transformers_oneformer_dinat": (
        "transformers_dinat",
        lambda k: f"dinat.{k.removeprefix('model.pixel_level_module.encoder.')}",
        {"features_only": True},
    ),
    "transformers_van_model": ("transformers_van", lambda k: f"van.{k}", {"num_classes": 0}),
    "mmpretrain_davit_detector": ("mmpretrain_davit", lambda k: f"backbone.{k}", {"features_only": True}),
    "florence2": (
        "transformers_florence2",
        dict(zip(RECORDED["florence2"]["keys"], RECORDED["transformers_florence2"]["keys"], strict=True)).__getitem__,
        {"num_classes": 0},
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_other_forms(name: str, tmp_path: Path) -> None:
    whole, source, kwargs = FORMS[name]
    found = load_recorded(name, tmp_path, source, **kwargs)
    expected = load_recorded(whole, tmp_path, num_classes=8).state_dict()
    assert_equal(getattr(found, "model", found), expected, but=("norm.", "head.") if "features_only" in kwargs else ())


# our names -> those that files of this package had before one scheme held for all
EARLIER: dict[str, list[tuple[str, Any]]] = {
    "ours_earlier_van": [
        (r"^stem\.", "stages.0.patch_embed."),
        (r"\.downsample\.", ".patch_embed."),
        (r"\.ls([12])\.gamma$", r".layer_scale_\1"),
    ],
    "ours_earlier_stvit": [
        (r"^stem\.", "patch_embed.proj."),
        (r"^stages\.(\d)\.downsample\.", lambda m: f"layers.{int(m[1]) - 1}.downsample.proj."),
        (r"^stages\.", "layers."),
        (r"\.mlp\.", ".mlp2."),
        (r"\.ls([12])\.gamma$", r".gamma_\1"),
        (r"^norm\.(proj|norm)\.", r"\1."),
        (r"^head\.fc\.", "head."),
    ],
    "ours_earlier_litv2": [
        (r"^stem\.", "patch_embed."),
        (r"^stages\.(\d)\.out_norm\.", r"out_norms.\1."),
        (r"downsample\.norm\.", "downsample.norm_layer."),
        (r"^stages\.(\d)\.downsample\.", lambda m: f"layers.{int(m[1]) - 1}.downsample."),
        (r"^stages\.", "layers."),
        (r"\.dwconv\.", ".dwconv.dwconv."),
    ],
    "ours_earlier_davit": [
        (r"(\.blocks\.\d+)\.0\.", r"\1.spatial_block."),
        (r"(\.blocks\.\d+)\.1\.", r"\1.channel_block."),
    ],
}


def test_names_of_the_head_that_stvit_had(tmp_path: Path) -> None:
    model = timm.create_model("stvit_small", depths=(1, 1, 1, 1))
    then = {re.sub(r"^norm\.(proj|norm)\.", r"head.\1.", k): v for k, v in model.state_dict().items()}
    torch.save(then, tmp_path / "then.pth")
    loaded = timm.create_model(
        "stvit_small", pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "then.pth")}, depths=(1, 1, 1, 1)
    )
    assert_equal(loaded, model.state_dict())


@pytest.mark.parametrize("name", EARLIER)
def test_earlier_names(name: str, tmp_path: Path) -> None:
    kwargs = {} if name.endswith("litv2") else {"num_classes": 8}
    model = load_recorded(name, tmp_path, **kwargs)
    values = filled(name)
    then = {k: functools.reduce(lambda key, rule: re.sub(*rule, key), EARLIER[name], k) for k in model.state_dict()}
    assert set(then.values()) == set(values)
    assert_equal(model, {k: values[old] for k, old in then.items()})


# detectors of the originals' own, whose backbones are the classifiers' with norms on the outputs
DETECTORS = ("oneformer_detectron2_dinat", "davit_mmdet")


@pytest.mark.parametrize("name", DETECTORS)
def test_detectors_of_the_originals(name: str, tmp_path: Path) -> None:
    """As detectron2 stores them, a pickle of arrays."""
    recorded, values = RECORDED[name], filled(name)
    file = {"model": {k: v.numpy() for k, v in values.items()}, "__author__": "third_party"}
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(file))
    overlay, kwargs = {"file": str(tmp_path / "w.pkl")}, recorded["args"]
    found = timm.create_model(
        recorded["model"], pretrained=True, features_only=True, pretrained_cfg_overlay=overlay, **kwargs
    )
    body = found.model.state_dict()
    match = nearest(read_source(tmp_path / "w.pkl"), found.model)
    assert match is not None
    assert (match.dialect.name, match.prefix) == ("the original", "backbone.")
    assert_equal(found.model, match.state(), but=("norm.", "head."))
    norms = match.output_norms()
    assert all(torch.equal(norms[i]["bias"], values[f"backbone.norm{i}.bias"]) for i in range(4))
    others = {k for k in values if not k.startswith("backbone.")}
    assert set(match.dropped) == others
    assert sum(v.numel() for k, v in body.items() if not k.startswith(("norm.", "head."))) == sum(
        v.numel() for k, v in values.items() if k not in others and not re.match(r"backbone\.norm\d", k)
    )


def test_sources_are_named() -> None:
    assert all(recorded["source"] and recorded["keys"] for recorded in RECORDED.values())
    named = [*EARLIER, *FORMS, *DETECTORS, "transformers_nat_backbone"]
    assert set(RECORDED) == {*named, *(name for name, recorded in RECORDED.items() if "output" in recorded)}


# implementations that are installed -----------------------------------------------------------------------------------


def randomised(model: nn.Module) -> nn.Module:
    """A model with values of every kind in parameters and running statistics, in evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    for name, value in model.state_dict().items():
        if value.is_floating_point() and value.numel():
            noise = torch.randn(value.shape, generator=generator) * 0.05
            base = 1.0 if name.endswith(("running_var", "norm.weight", "bn.weight")) else value
            value.copy_(base + (noise.abs() if name.endswith("running_var") else noise))
    return model.eval()


@pytest.mark.parametrize("size", [224, 448])
def test_torchvision(size: int, tmp_path: Path) -> None:
    theirs = randomised(torchvision.models.maxvit_t(input_size=(size, size), num_classes=11))
    ours = load("zoo_maxvit_tiny_tv_224", tmp_path, theirs.state_dict(), num_classes=11)
    x = image(size, size)[: 448 // size]
    with torch.no_grad():
        expected = theirs(x)
        torch.testing.assert_close(ours(x), expected, rtol=0, atol=2e-5 * float(expected.std()))
    assert "zoo_maxvit_tiny_tv_224" in timm.list_models("zoo_maxvit*")
    with pytest.raises(CheckpointError, match="the nearest dialect is torchvision"):
        load("zoo_maxvit_tiny_tf_224", tmp_path, theirs.state_dict(), num_classes=11)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("davit_tiny", {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 64), "num_heads": (1, 2, 2, 4)}),
        ("davit_base_fl", {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 64), "num_heads": (1, 2, 2, 4)}),
        ("halonet26t", {}),
        ("maxvit_pico_rw_256", {}),
    ],
)
def test_timm(name: str, kwargs: dict[str, Any], tmp_path: Path) -> None:
    theirs = randomised(timm.create_model(name, num_classes=7, **kwargs))
    ours = load(
        f"zoo_{name}", tmp_path, {"state_dict_ema": theirs.state_dict(), "state_dict": {}}, num_classes=7, **kwargs
    )
    x = image(256, 256, dtype=torch.float64)[:1]
    with torch.no_grad():
        expected = theirs.double()(x)
        torch.testing.assert_close(ours.double()(x), expected, rtol=0, atol=1e-8 * float(expected.std()))


# every dialect, in any wrapper ----------------------------------------------------------------------------------------

# what speaks a dialect, where the family's smallest model does not
SPEAKERS = {
    "torchvision": "zoo_maxvit_tiny_tv_224",
    "the original's STL": "biformer_stl",
    "the original's NCHW form": "biformer_stl_nchw",
    "Florence-2's own code": "zoo_davit_base_fl",
    "transformers' Florence-2": "zoo_davit_base_fl",
}


def every_dialect() -> list[Any]:
    rows = []
    for family, row in FAMILIES.items():
        if row.smallest is None:
            continue
        for dialect in dialects_of(timm.create_model(row.smallest, device="meta")):
            rows.append(pytest.param(row.smallest, row.shrunk.args, dialect, id=f"{family}-{dialect.name}"))
    return rows


@pytest.mark.parametrize(("name", "kwargs", "dialect"), every_dialect())
def test_every_dialect(name: str, kwargs: dict[str, Any], dialect: Dialect, tmp_path: Path) -> None:
    """A model's weights, written in a dialect under a prefix that nobody knows, come back bit by bit."""
    name = SPEAKERS.get(dialect.name, name)
    kwargs = {k: v for k, v in kwargs.items() if k != "num_classes"}
    source = randomised(timm.create_model(name, num_classes=5, **kwargs))
    blank = {k for k in source.state_dict() if any(p and re.search(p, k) for p in (dialect.absent, dialect.zero))}
    state = written({k: v for k, v in source.state_dict().items() if k not in blank}, dialect)
    wrapped = {"some": {"thing": {f"a.b_c.{k}": v for k, v in state.items()}}, "epoch": 3, "lr": torch.ones(1)}
    loaded = load(name, tmp_path, wrapped, num_classes=5, **kwargs).state_dict()
    assert all(torch.equal(v, loaded[k]) for k, v in source.state_dict().items() if k not in blank)
    assert all(not loaded[k].any() for k in blank if dialect.zero)
    if not blank:
        again = load(name, tmp_path, {"model": loaded}, num_classes=5, **kwargs)
        assert_equal(again, loaded)


@functools.cache
def nat() -> nn.Module:
    return randomised(timm.create_model("nat_mini", num_classes=5, **SMALL))


def original(prefix: str = "", scale: float = 1.0) -> dict[str, Tensor]:
    dialect = next(d for d in dialects_of(nat()) if d.name == "the original")
    return {prefix + k: v * scale for k, v in written(nat().state_dict(), dialect).items()}


EXTRA = {"criterion.weight": torch.ones(3), "val_loss.total": torch.ones(1)}
HEADS = {
    "neck.convs.0.weight": torch.ones(2),
    "roi_head.bbox_head.fc.weight": torch.ones(2),
    "pixel_mean": torch.ones(3),
}
WRAPPED: dict[str, Callable[[], Any]] = {
    "bare": original,
    "DDP": lambda: {"model": original("module."), "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
    "compiled": lambda: original("_orig_mod."),
    "compiled inside": lambda: {
        k.replace("levels.0.", "levels.0._orig_mod."): v for k, v in original("module.").items()
    },
    "Lightning": lambda: {"state_dict": {**original("model."), **EXTRA}, "hyper_parameters": {"lr": 1.0}},
    "Lightning of a compiled DDP": lambda: {"state_dict": original("model.module._orig_mod.")},
    "Lightning net": lambda: {"state_dict": original("net._orig_mod."), "epoch": 2},
    "Lightning's averaging": lambda: {"state_dict": original("model."), "current_model_state": original("model.", 2)},
    "EMA in the module": lambda: {"state_dict": {**original("model.", 2), **original("ema_model.module.")}},
    "EMA of ema-pytorch": lambda: {
        "state_dict": {
            **original("model.", 2),
            **original("ema.online_model.", 2),
            **original("ema.ema_model."),
            "ema.initted": torch.tensor(True),
        }
    },
    "EMA under a module": lambda: {"model": original("", 2), "ema": {"module": original(), "updates": 3}},
    "timm's EMA": lambda: {"state_dict": original("", 2), "state_dict_ema": original()},
    "an original's EMA": lambda: {"model": original(), "model_ema": original("", 2)},
    "EMA of torch": lambda: {**original("module."), "n_averaged": torch.tensor(3)},
    "EMA of mmengine": lambda: {
        "state_dict": original(),
        "ema_state_dict": {**original("module.", 2), "steps": torch.tensor(3)},
    },
    "EMA of mmcv": lambda: {
        "state_dict": {**original(), **{f"ema_{k.replace('.', '_')}": v for k, v in original().items()}}
    },
    "profiled": lambda: {**original(), "total_ops": torch.ones(1), "levels.0.total_params": torch.ones(1)},
    "checkpointed": lambda: {
        k.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."): v for k, v in original().items()
    },
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_wrappers(wrapper: str, tmp_path: Path) -> None:
    assert_equal(load("nat_mini", tmp_path, WRAPPED[wrapper](), num_classes=5, **SMALL), nat().state_dict())


def detector(prefix: str = "backbone.") -> dict[str, Tensor]:
    body = {k: v for k, v in original(prefix).items() if not k.removeprefix(prefix).startswith(("norm.", "head."))}
    return {
        **body,
        **{f"{prefix}norm{i}.{p}": torch.ones(16 * 2**i) for i in range(4) for p in ("weight", "bias")},
        **HEADS,
    }


@pytest.mark.parametrize("prefix", ["backbone.", "model.backbone.", "module.detector.backbone.", "student.backbone."])
def test_backbone_of_a_detector(prefix: str, tmp_path: Path) -> None:
    found = load("nat_mini", tmp_path, {"state_dict": detector(prefix)}, features_only=True, **SMALL)
    assert_equal(found.model, nat().state_dict(), but=("norm.", "head."))
    for kwargs in ({"num_classes": 5}, {"num_classes": 0}, {}):
        with pytest.raises(CheckpointError, match=r"norm\.weight.*a backbone alone, which features_only=True"):
            load("nat_mini", tmp_path, detector(prefix), **SMALL, **kwargs)


def test_head_follows_timm(tmp_path: Path) -> None:
    body = {k: v for k, v in original().items() if not k.startswith("head.")}
    with pytest.raises(CheckpointError, match="no classifier; pass num_classes=0"):
        load("nat_mini", tmp_path, body, **SMALL)
    assert_equal(load("nat_mini", tmp_path, body, num_classes=0, **SMALL), nat().state_dict())
    for classes in (3, 1000):
        fresh = load("nat_mini", tmp_path, body, num_classes=classes, **SMALL)
        assert fresh.head.fc.out_features == classes
        assert_equal(fresh, nat().state_dict(), but=("head.",))
    transformers = written(nat().state_dict(), dialects_of(nat())[2])
    assert "classifier.weight" in transformers
    assert load("nat_mini", tmp_path, transformers, num_classes=3, **SMALL).head.fc.out_features == 3
    with pytest.raises(CheckpointError, match="head has 5 classes, the model's 1000"):
        load("nat_mini", tmp_path, transformers, **SMALL)
    grey = load("nat_mini", tmp_path, transformers, num_classes=5, in_chans=1, **SMALL)
    assert grey.stem.proj[0].weight.shape[1] == 1


# what is refused ------------------------------------------------------------------------------------------------------


def halves() -> dict[str, Tensor]:
    """The first half of the parameters in our names, the second in the original's."""
    state, dialect = nat().state_dict(), dialects_of(nat())[1]
    first = dict(itertools.islice(state.items(), len(state) // 2))
    return {**first, **written({k: v for k, v in state.items() if k not in first}, dialect)}


def changed(**changes: Tensor | None) -> dict[str, Tensor]:
    return {k: v for k, v in {**original(), **changes}.items() if v is not None}


REFUSED: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "two dialects, half each": (halves, ["it is of two dialects", "of ours", "keys of the model are not in the file"]),
    "two dialects, both whole": (
        lambda: {**nat().state_dict(), **original()},
        ["of two dialects", "both mean"],
    ),
    "two models": (
        lambda: {**original("student."), **original("teacher.", 2)},
        ["two models", "'student.'", "'teacher.'", "part=student"],
    ),
    "two models, nested": (lambda: {"a": original(), "b": original("", 2)}, ["two models", "'a.'", "'b.'"]),
    "a key too many": (lambda: changed(**{"extra.weight": torch.ones(1)}), ["1 keys of the file", "extra.weight"]),
    "an unknown part beside the model": (
        lambda: {**original("model."), "distilled.weight": torch.ones(1)},
        ["distilled.weight"],
    ),
    "a key too few": (
        lambda: changed(**{"levels.1.blocks.0.attn.rpb": None}),
        ["1 keys of the model", "stages.1.blocks.0.attn.rpb", "the original"],
    ),
    "a file of another family": (
        lambda: {"stages.0.downsample.norm.weight": torch.ones(1), "patch_embed.norm.weight": torch.ones(1)},
        ["the nearest dialect is", "stem.proj.0.weight"],
    ),
    "a shape of the stem": (
        lambda: changed(**{"patch_embed.proj.0.weight": torch.ones(3, 3)}),
        ["another shape", "stem.proj.0.weight: (3, 3) in the file"],
    ),
    "a head of another width": (
        lambda: changed(**{"head.weight": torch.ones(5, 3)}),
        ["another shape", "head.fc.weight: (5, 3) in the file, (5, 128) in the model"],
    ),
    "a head in two sizes": (lambda: changed(**{"head.bias": torch.ones(3)}), ["head.fc.bias: (3,) in the file"]),
    "a scalar for a head": (lambda: changed(**{"head.weight": torch.ones(())}), ["head.fc.weight: () in the file"]),
    "a shape": (lambda: changed(**{"norm.bias": torch.ones(3)}), ["another shape", "norm.bias: (3,) in the file"]),
    "part of a fused tensor": (
        lambda: {
            k: v for k, v in written(nat().state_dict(), dialects_of(nat())[2]).items() if not k.endswith("0.key.bias")
            and "levels.0.layers.0.attention.self.key" not in k
        },
        ["stages.0.blocks.0.attn.qkv.weight", "nat.encoder.levels.0.layers.0.attention.self.query.weight"],
    ),
    "another program": (
        lambda: {"conv1.weight": torch.ones(1), "layer1.0.bn1.weight": torch.ones(1)},
        ["no dialect", "conv1.weight", "stem.proj.0.weight", "transformers' NatForImageClassification"],
    ),
    "no tensors": (lambda: {"epoch": 3}, ["no dialect", "none"]),
}  # fmt: skip


FUSED = "nat.encoder.levels.0.layers.0.attention.self.key.weight"
SCALES = "nat.encoder.levels.0.layers.0.layer_scale_parameters"


@pytest.mark.parametrize("key", [FUSED, SCALES])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (1, 16), (2, 3, 4)])
def test_parts_of_other_shapes(key: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    """Tensors that do not join, and rows that are not there, are one line too."""
    scaled = timm.create_model("nat_mini", num_classes=5, layer_scale=0.1, **SMALL)
    state = written(scaled.state_dict(), dialects_of(scaled)[2])
    state[key] = torch.ones(shape)
    with pytest.raises(CheckpointError, match="shape") as caught:
        load("nat_mini", tmp_path, state, num_classes=5, layer_scale=0.1, **SMALL)
    assert "\n" not in str(caught.value)


def test_no_false_mixture() -> None:
    """Names that two families share do not make a file one of two dialects."""
    van = timm.create_model("van_b0", depths=(1, 1, 1, 1))
    file = written(van.state_dict(), dialects_of(van)[2])
    own = timm.create_model("zoo_davit_tiny", device="meta")
    with pytest.raises(CheckpointError) as caught:
        recognise(file, own.state_dict(), dialects_of(own), "x")
    assert "two dialects" not in str(caught.value)


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case: str, tmp_path: Path) -> None:
    make, words = REFUSED[case]
    with pytest.raises(CheckpointError) as caught:
        load("nat_mini", tmp_path, make(), num_classes=5, **SMALL)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("nat_mini: the checkpoint does not fit;")
    assert all(word in message for word in words), message
    assert isinstance(caught.value, ValueError)


def test_what_is_dropped_is_listed() -> None:
    own = timm.create_model("nat_mini", num_classes=5, device="meta", **SMALL).state_dict()
    match = recognise({"state_dict": {**original("model."), **EXTRA}}, own, dialects_of(nat()), "x")
    assert (match.where, match.dialect.name) == ("state_dict.model.", "the original")
    assert sorted(match.dropped) == sorted(EXTRA)
    found = recognise(
        detector(), own, dialects_of(nat()), "x", optional=lambda k: k[:4] in ("norm", "head"), droppable=lambda k: True
    )
    assert sorted(found.dropped) == sorted(HEADS)
    assert sorted(found.extra()) == sorted(f"stages.{i}.out_norm.{p}" for i in range(4) for p in ("weight", "bias"))
    assert [norm["weight"].numel() for norm in found.output_norms().values()] == [16, 32, 64, 128]


def test_without_a_model(tmp_path: Path) -> None:
    """Where the model is not known, the wrappers' names alone say what is meant."""
    for checkpoint in (
        WRAPPED["timm's EMA"](),
        WRAPPED["an original's EMA"](),
        {"unknown": original(), "x": torch.ones(1)},
    ):
        torch.save(checkpoint, tmp_path / "w.pth")
        found = read_checkpoint(tmp_path / "w.pth")
        assert found.keys() == original().keys()
        assert torch.equal(found["norm.weight"], original()["norm.weight"])

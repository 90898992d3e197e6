"""zoo.Backbone, its optimizer and published checkpoints, in detectors of mmdet."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mmdet")

import mmdet
import timm
import torch
from golden import filled, keys
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.runner import Runner
from mmengine.runner.checkpoint import load_state_dict
from torch import Tensor, nn

from zoo.errors import UserError
from zoo.models.nat import checkpoint_filter_fn
from zoo.train.detection import Backbone, feature_channels, read_detector_checkpoint
from zoo.train.detection.checkpoints import adapt_backbone_keys
from zoo.train.detection.config import BackboneConfig, DetectConfig
from zoo.train.detection.digits_coco import CLASSES, DigitsCoco, build_digits_coco
from zoo.train.detection.mmdet_config import _optimizer
from zoo.train.runs import save_checkpoint

NAT = {"depths": (1, 1, 1), "num_heads": (1, 2, 4), "embed_dim": 16, "kernel_size": 3, "out_indices": (0, 1, 2)}
ROOT = Path(__file__).parents[2]
CONFIGS = Path(mmdet.__file__).parent / ".mim/configs"


def build(**kwargs: Any) -> Backbone:
    backbone = MODELS.build({"type": "zoo.Backbone", **kwargs})
    assert isinstance(backbone, Backbone)
    return backbone


def test_the_import_alone_registers_everything() -> None:
    script = (
        "import mmengine.registry as r; import zoo.train.mmdet;"
        "assert all((r.MODELS.get('zoo.Backbone'), r.DATASETS.get('zoo.SeededDataset'), r.LOOPS.get('zoo.TrainLoop'),"
        "r.DATA_SAMPLERS.get('zoo.EpochBatchSampler'), r.METRICS.get('zoo.CocoMetric'),"
        "r.OPTIM_WRAPPER_CONSTRUCTORS.get('zoo.LayerDecayOptimWrapperConstructor')))"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_custom_imports_of_mmengine_bring_the_wing(tmp_path: Path) -> None:
    """What a user's mmdetection config says, read by mmengine in a fresh process."""
    config = tmp_path / "config.py"
    config.write_text(
        "custom_imports = dict(imports=['zoo.train.mmdet'])\n"
        "backbone = dict(type='zoo.Backbone', name='nat_mini', out_indices=(0,))\n"
    )
    script = (
        "import sys; from mmengine.config import Config; config = Config.fromfile(sys.argv[1]);"
        "from mmdet.registry import MODELS; found = MODELS.build(config.backbone);"
        "import zoo.train.detection, zoo.train.mmdet as mmdet;"
        "assert type(found) is zoo.train.detection.Backbone is mmdet.Backbone"
    )
    subprocess.run([sys.executable, "-c", script, str(config)], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 97, 131), (3, 64, 33), (2, 32, 32)])
def test_any_size_and_batch(batch: int, height: int, width: int) -> None:
    backbone = build(name="nat_mini", **NAT).eval()
    with torch.no_grad():
        features = backbone(torch.randn(batch, 3, height, width))
    sides = [(-(-height // s), -(-width // s)) for s in (4, 8, 16)]
    assert [tuple(f.shape) for f in features] == [(batch, c, *s) for c, s in zip((16, 32, 64), sides, strict=True)]
    assert all(f.is_contiguous() or f.stride(1) == 1 for f in features)


@pytest.mark.parametrize(
    ("name", "kwargs", "channels"),
    [
        ("resnet18", {"out_indices": (1, 2, 3, 4)}, [64, 128, 256, 512]),
        ("convnext_atto", {}, [40, 80, 160, 320]),
        ("vgg11", {"out_indices": (2, 3, 4)}, [256, 512, 512]),
        ("nat_mini", {"dilations": [[1, 4, 1], [1, 2, 1, 2], 1, 1]}, [64, 128, 256, 512]),
        ("van_b0", {}, [32, 64, 160, 256]),
        ("biformer_tiny", {"n_win": 16}, [64, 128, 256, 512]),
        ("litv2_s", {"local_ws": [0, 0, 4, 1]}, [96, 192, 384, 768]),
    ],
)
def test_any_timm_name(name: str, kwargs: dict[str, Any], channels: list[int]) -> None:
    backbone = build(name=name, **kwargs).eval()
    with torch.no_grad():
        features = backbone(torch.randn(1, 3, 64, 96))
    assert [f.shape[1] for f in features] == backbone.channels == channels
    assert [64 // f.shape[2] for f in features] == backbone.reductions


ORDERS: list[Any] = [(2, 0), (-1,), (-1, 0), (1, 1), (0, -1, 1), [-2, -2, 0], 2]


@pytest.mark.parametrize("out_indices", ORDERS, ids=str)
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("nat_mini", {"depths": (1, 1, 1), "num_heads": (1, 2, 4), "embed_dim": 16, "kernel_size": 3}),
        ("biformer_tiny", {"depths": (1, 1, 1, 1)}),
        ("litv2_s", {"depths": (1, 1, 1, 1)}),
        ("zoo_halonet26t", {}),
        ("zoo_maxvit_pico_rw_256", {}),
        ("nat_isotropic_small", {"depth": 3, "embed_dim": 64, "num_heads": 2}),
        ("resnet18", {}),
        ("convnext_atto", {}),
    ],
)
def test_maps_come_in_the_order_asked_for(name: str, kwargs: dict[str, Any], out_indices: Any) -> None:
    torch.manual_seed(0)
    backbone = build(name=name, out_indices=out_indices, **kwargs).eval()
    torch.manual_seed(0)
    every = timm.create_model(name, **kwargs).eval()
    count = len(every.feature_info)
    levels = [i % count for i in (range(-out_indices, 0) if isinstance(out_indices, int) else out_indices)]
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        found, plain = backbone(x), every.forward_intermediates(x, intermediates_only=True)
    assert backbone.out_indices == tuple(levels)
    assert [f.shape[1] for f in found] == backbone.channels == [every.feature_info[i]["num_chs"] for i in levels]
    assert [64 // f.shape[2] for f in found] == backbone.reductions
    assert feature_channels(name, out_indices, **kwargs) == backbone.channels
    for level, feature in zip(levels, found, strict=True):
        norm = getattr(backbone, f"norm{level}", nn.Identity())
        assert hasattr(backbone, f"norm{level}") == (level in getattr(type(every), "out_norms", ()))
        expected = norm(plain[level])
        torch.testing.assert_close(feature, expected, rtol=1e-4, atol=1e-5)
    if type(every).__module__.startswith("zoo."):  # and through timm alone
        torch.manual_seed(0)
        wrapper = timm.create_model(name, features_only=True, out_indices=out_indices, **kwargs).eval()
        with torch.no_grad():
            maps = wrapper(x)
        assert [m.shape[1] for m in maps] == wrapper.feature_info.channels()
        for level, feature in zip(levels, maps, strict=True):
            torch.testing.assert_close(feature, plain[level], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("out_indices", [(), (9,), (-9,), (0.5,), "01", (True,), 0, None, ("a",), 99], ids=str)
def test_levels_that_are_none_are_named(out_indices: Any) -> None:
    for name in ("nat_mini", "zoo_halonet26t", "resnet18"):
        with pytest.raises(ValueError, match="out_indices is|has no outputs"), torch.device("meta"):
            build(name=name, out_indices=out_indices)


def test_features_are_those_of_timm() -> None:
    torch.manual_seed(0)
    backbone = build(name="nat_mini", out_norms=False, **NAT).eval()
    torch.manual_seed(0)
    expected = timm.create_model("nat_mini", features_only=True, **NAT).eval()
    x = torch.randn(1, 3, 48, 64)
    with torch.no_grad():
        for ours, theirs in zip(backbone(x), expected(x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_output_norms_follow_the_originals() -> None:
    def norms(**kwargs: Any) -> list[str]:
        with torch.device("meta"):
            return [n for n, _ in build(**kwargs).named_children() if n.startswith("norm")]

    assert norms(name="nat_mini") == ["norm0", "norm1", "norm2", "norm3"]
    assert norms(name="zoo_davit_tiny") == ["norm0", "norm1", "norm2", "norm3"]
    assert norms(name="biformer_tiny") == ["norm0", "norm1", "norm2", "norm3"]
    assert norms(name="litv2_s") == ["norm1", "norm2", "norm3"]
    assert norms(name="van_b0") == norms(name="resnet18") == []
    assert norms(name="nat_mini", out_norms=False) == []
    assert norms(name="nat_mini", out_norms=[3], out_indices=(2, 3)) == ["norm3"]
    with pytest.raises(ValueError, match="out_norms"):
        norms(name="nat_mini", out_norms=[0], out_indices=(2, 3))
    backbone = build(name="nat_mini", **NAT)
    assert backbone.norm0.eps == 1e-5
    with torch.no_grad():
        first = backbone.eval()(torch.randn(2, 3, 32, 32))[0]
    torch.testing.assert_close(first.mean(1), torch.zeros_like(first[:, 0]), atol=1e-5, rtol=0)


# One of every kind of every family: the levels that get a norm, and its epsilon, as the originals have them.
NORMS = {
    "nat_mini": ((0, 1, 2, 3), 1e-5),
    "dinat_mini": ((0, 1, 2, 3), 1e-5),
    "dinat_s_tiny": ((0, 1, 2, 3), 1e-5),
    "nat_isotropic_small": ((), 1e-5),
    "dinat_isotropic_small": ((), 1e-5),
    "biformer_tiny": ((0, 1, 2, 3), 1e-6),
    "biformer_stl": ((0, 1, 2, 3), 1e-6),
    "zoo_davit_tiny": ((0, 1, 2, 3), 1e-5),
    "litv2_s": ((1, 2, 3), 1e-5),
    "van_b0": ((), 1e-6),
    "stvit_small": ((), 1e-6),
    "zoo_halonet26t": ((), 1e-6),
    "zoo_maxvit_tiny_tf_224": ((), 1e-6),
    "zoo_maxvit_rmlp_pico_rw_256": ((), 1e-6),
    "davit_tiny": ((), 1e-6),
    "convnext_atto": ((), 1e-6),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_and_groups_of_every_family(name: str) -> None:
    levels, eps = NORMS[name]
    with torch.device("meta"):
        backbone = build(name=name)
        everywhere = build(name=name, out_norms=True)
    assert [n for n, _ in backbone.named_children() if n.startswith("norm")] == [f"norm{i}" for i in levels]
    assert {m.eps for n, m in everywhere.named_children() if n.startswith("norm")} == {eps}
    # which parameters have another rate or decay, by the names that the published recipes know them by
    published = {k: {"decay_mult": 0.0} for k in ("rpb", "relative_position_bias_table", "pos_embed")}
    published["dconv.conv_offset"] = {"lr_mult": 0.01}
    for factor in (1.0, 0.1):
        cfg = DetectConfig(model=BackboneConfig(name))
        cfg.schedule.backbone_lr = factor
        expected = {k: dict(v) for k, v in published.items()}
        if factor != 1:
            for value in expected.values():
                value["lr_mult"] = value.get("lr_mult", 1.0) * factor
            expected["backbone"] = {"lr_mult": factor}
        found = _optimizer(cfg)["paramwise_cfg"]["custom_keys"]

        def rule(keys: dict[str, Any], parameter: str) -> dict[str, float]:
            """mmengine's: the longest key that is a part of the name."""
            return next((keys[k] for k in sorted(sorted(keys), key=len, reverse=True) if k in parameter), {})

        for parameter, _ in backbone.named_parameters(prefix="backbone"):
            assert rule(found, parameter) == rule(expected, parameter), parameter


@pytest.mark.parametrize("frozen", [-1, 0, 1, 2])
def test_frozen_stages(frozen: int) -> None:
    backbone = build(name="resnet18", out_indices=(1, 2, 3, 4), frozen_stages=frozen).train()
    backbone.init_weights()
    stages = ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"]
    still = {-1: [], 0: stages[:2], 1: stages[:3], 2: stages[:4]}[frozen]
    sum(f.sum() for f in backbone(torch.randn(2, 3, 64, 64))).backward()
    for name, parameter in backbone.body.named_parameters():
        assert (parameter.grad is None) == (name.split(".")[0] in still), name
    for name, module in backbone.body.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.training == (name.split(".")[0] not in still), name


def test_frozen_stages_of_nat_and_vgg() -> None:
    backbone = build(name="nat_mini", frozen_stages=1, **NAT)
    frozen = {n for n, p in backbone.named_parameters() if not p.requires_grad}
    assert {n.split(".")[0] for n in frozen} == {"body", "norm0"}
    assert all(n.startswith(("body.stem.", "body.stages.0.", "norm0.")) for n in frozen)
    assert not any(p.requires_grad for p in backbone.body.stages[0].blocks.parameters())
    vgg = build(name="vgg11", out_indices=(2, 3), frozen_stages=1)  # its levels end in pooling layers without weights
    assert [n for n, p in vgg.named_parameters() if p.requires_grad][0].startswith("body.features.")
    with pytest.raises(ValueError, match="frozen_stages is 9; nat_mini has 3 stages"):
        build(name="nat_mini", frozen_stages=9, **NAT)


def test_norm_eval_and_checkpointing() -> None:
    backbone = build(name="resnet18", out_indices=(1, 2), norm_eval=True).train()
    assert not any(m.training for m in backbone.modules() if isinstance(m, nn.BatchNorm2d))
    torch.manual_seed(0)
    plain = build(name="nat_mini", **NAT)
    torch.manual_seed(0)
    saving = build(name="nat_mini", with_cp=True, **NAT)
    x = torch.randn(1, 3, 32, 32)
    grads = []
    for backbone in (plain, saving):
        sum(f.square().sum() for f in backbone.train()(x)).backward()
        grads.append(torch.cat([p.grad.flatten() for p in backbone.parameters() if p.grad is not None]))
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


def test_pretrained_file_and_run_folder(tmp_path: Path) -> None:
    model = timm.create_model("nat_mini", num_classes=10, **{k: v for k, v in NAT.items() if k != "out_indices"})
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "file.pth")
    run = tmp_path / "run"
    save_checkpoint(run / "checkpoints/last.pt", {"state_dict": model.state_dict(), "step": 1})
    (run / "config.yaml").write_text("model: {name: nat_mini}\n")
    for source in (tmp_path / "file.pth", str(run)):
        backbone = build(name="nat_mini", pretrained=source, **NAT)
        backbone.init_weights()
        for name, value in backbone.body.state_dict().items():
            assert torch.equal(value, model.state_dict()[name]), name
    backbone = build(name="nat_mini", init_cfg={"type": "Pretrained", "checkpoint": str(tmp_path / "file.pth")}, **NAT)
    assert torch.equal(backbone.body.stem.proj[0].weight, model.stem.proj[0].weight)
    with pytest.raises(UserError, match="trained nat_mini, and the backbone is nat_tiny"):
        build(name="nat_tiny", pretrained=run)
    with pytest.raises(UserError, match="/no/such"):
        build(name="nat_mini", pretrained="/no/such", **NAT)
    with pytest.raises(RuntimeError, match="does not fit"):
        build(name="nat_mini", pretrained=tmp_path / "file.pth", **{**NAT, "depths": (1, 2, 1)})
    with pytest.raises(UserError, match="nat_minni"):
        build(name="nat_minni")


def detector(**kwargs: Any) -> nn.Module:
    register_all_modules()
    config = Config.fromfile(CONFIGS / "retinanet/retinanet_r50_fpn_1x_coco.py").model
    config.backbone = {"type": "zoo.Backbone", "name": "nat_mini", **NAT, **kwargs}
    config.neck.in_channels = [16, 32, 64]
    return MODELS.build(config)


def test_layer_decay() -> None:
    model = detector(frozen_stages=0)
    wrapper = build_optim_wrapper(
        model,
        {
            "constructor": "zoo.LayerDecayOptimWrapperConstructor",
            "paramwise_cfg": {"layer_decay": 0.5},
            "optimizer": {"type": "AdamW", "lr": 0.1, "weight_decay": 0.05},
        },
    )
    rate: dict[int, float] = {}
    decay: dict[int, float] = {}
    for group in wrapper.optimizer.param_groups:
        for parameter in group["params"]:
            assert id(parameter) not in rate, "a parameter is in two groups"
            rate[id(parameter)], decay[id(parameter)] = group["lr"], group["weight_decay"]
    named = dict(model.named_parameters())
    assert set(rate) == {id(p) for p in named.values() if p.requires_grad}
    stages = [f"backbone.body.stages.{i}.blocks.0.mlp.fc1.weight" for i in range(3)]
    rates = [rate[id(named[s])] for s in stages]
    assert rates == pytest.approx([0.1 * 0.5**3, 0.1 * 0.5**2, 0.1 * 0.5])
    assert rate[id(named["neck.lateral_convs.0.conv.weight"])] == rate[id(named["backbone.norm1.weight"])] == 0.1
    assert decay[id(named[stages[0]])] == 0.05
    assert decay[id(named["bbox_head.retina_cls.bias"])] == decay[id(named["backbone.norm1.weight"])] == 0
    assert not any(".stem." in n and id(p) in rate for n, p in named.items())
    with pytest.raises(ValueError, match="layer_decay alone"):
        build_optim_wrapper(
            model,
            {
                "constructor": "zoo.LayerDecayOptimWrapperConstructor",
                "paramwise_cfg": {"decay_rate": 0.5},
                "optimizer": {"type": "AdamW", "lr": 0.1},
            },
        )


# Backbones of published detectors: (model, its arguments, key list, what the detection file has beside it).
PUBLISHED = [
    ("nat_base", {}, "nat/nat_base", [128, 256, 512, 1024]),
    ("dinat_small", {"dilations": [[1, 28, 1], [1, 7, 1, 14], 1, 1]}, "dinat/dinat_small", [96, 192, 384, 768]),
    ("dinat_s_tiny", {}, "dinat_s/dinat_s_tiny", [96, 192, 384, 768]),
    ("zoo_davit_tiny", {}, "davit/DaViT_tiny", [96, 192, 384, 768]),
    ("zoo_davit_base", {}, "davit/DaViT_base", [128, 256, 512, 1024]),
    ("biformer_small", {"n_win": 16}, "biformer/biformer_small_det_nwin16", None),
    ("litv2_s", {"local_ws": [0, 0, 2, 1]}, "litv2/litv2_s_det_ws2", None),
    ("litv2_s", {"local_ws": [0, 0, 4, 1], "dense": True}, "litv2/litv2_s_det_ws4", None),
]


def published_state(name: str, channels: list[int] | None) -> dict[str, Tensor]:
    """The backbone part of a detector file, as shapes: classifiers lose head and final norm and gain norm0 to norm3."""
    entries = {k: s for k, s, _ in keys(name)}
    if channels is not None:
        entries = {k: s for k, s in entries.items() if not k.startswith(("head.", "norm.", "norms."))}
        entries |= {f"norm{i}.{p}": [c] for i, c in enumerate(channels) for p in ("weight", "bias")}
    return {f"backbone.{k}": torch.empty(s, device="meta") for k, s in entries.items()}


@pytest.mark.parametrize(
    ("name", "kwargs", "golden", "channels"), PUBLISHED, ids=lambda v: v if isinstance(v, str) else ""
)
def test_published_detector_keys_fit_strictly(
    name: str, kwargs: dict[str, Any], golden: str, channels: list[int] | None
) -> None:
    with torch.device("meta"):
        backbone = build(name=name, **kwargs)
    state = published_state(golden, channels)
    assert len(state) > 50
    other = {"neck.lateral_convs.0.conv.weight": torch.empty(1)}
    mixed = {**state, **other}
    adapt_backbone_keys(backbone, mixed, "backbone.")
    own = {f"backbone.{k}": v for k, v in backbone.state_dict().items() if "num_batches_tracked" not in k}
    assert {k for k in mixed if "num_batches_tracked" not in k} == {*own, *other}
    assert all(mixed[k].shape == v.shape for k, v in own.items())
    again = dict(mixed)
    adapt_backbone_keys(backbone, again, "backbone.")
    assert again.keys() == mixed.keys()
    lost = dict(list(state.items())[1:])
    with pytest.raises(RuntimeError, match=r"(?s)does not fit .*1 keys of the backbone are not in the file"):
        adapt_backbone_keys(backbone, lost, "backbone.")


def test_published_detector_loads_through_mmengine(tmp_path: Path) -> None:
    """Values, not only keys: a file as mmdet 2.x wrote it gives the backbone of the original classifier."""
    weights = filled("nat/nat_mini")
    body = {f"backbone.{k}": v for k, v in weights.items() if not k.startswith(("head.", "norm."))}
    norms = {f"backbone.norm{i}.{p}": torch.randn(64 * 2**i) for i in range(4) for p in ("weight", "bias")}
    torch.save(
        {"meta": {"mmdet_version": "2.19.0", "CLASSES": ("a",)}, "state_dict": {**body, **norms}}, tmp_path / "d.pth"
    )
    torch.save({"state_dict": {f"x.{k}": v for k, v in norms.items()}}, tmp_path / "e.pth")
    with pytest.raises(RuntimeError, match="holds no detector"):
        read_detector_checkpoint(tmp_path / "e.pth")
    state = read_detector_checkpoint(tmp_path / "d.pth")

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = build(name="nat_mini")

    original = checkpoint_filter_fn(weights, timm.create_model("nat_mini", device="meta"))
    for load in (lambda m: m.load_state_dict(dict(state)), lambda m: load_state_dict(m, dict(state), strict=True)):
        holder = Holder()
        load(holder)
        expected = timm.create_model("nat_mini").state_dict()
        for key, value in holder.backbone.body.state_dict().items():
            assert key in expected
            assert torch.equal(value, original[key]), key
        assert torch.equal(holder.backbone.norm2.weight, norms["backbone.norm2.weight"])


def stock_config(root: Path, work_dir: Path) -> Config:
    """mmdet's own file with the backbone swapped, on small data."""
    config = Config.fromfile(CONFIGS / "mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py")
    config.custom_imports = {"imports": ["zoo.train.mmdet"]}
    config.model.backbone = {
        "type": "zoo.Backbone",
        "name": "resnet14t",
        "out_indices": (1, 2, 3, 4),
        "frozen_stages": 1,
        "norm_eval": True,
    }
    folder = build_digits_coco(root, DigitsCoco(canvas=64, train_images=2, val_images=1, size=(24, 40)))
    for split, loader in (
        ("train", config.train_dataloader),
        ("val", config.val_dataloader),
        ("val", config.test_dataloader),
    ):
        loader.num_workers, loader.persistent_workers = 0, False
        loader.dataset.update(
            data_root=str(folder),
            ann_file=f"annotations/{split}.json",
            data_prefix={"img": f"{split}/"},
            metainfo={"classes": CLASSES},
        )
        for transform in loader.dataset.pipeline:
            if transform.type == "Resize":
                transform.scale = (64, 64)
    for evaluator in (config.val_evaluator, config.test_evaluator):
        evaluator.ann_file = str(folder / "annotations/val.json")
    config.model.roi_head.bbox_head.num_classes = config.model.roi_head.mask_head.num_classes = len(CLASSES)
    config.model.test_cfg.rcnn.score_thr = 0.0  # an untrained detector is sure of nothing
    config.train_cfg.max_epochs = 1
    config.work_dir = str(work_dir)
    config.log_level = "ERROR"
    return config


def test_stock_config_trains_evaluates_and_resumes(tmp_path: Path) -> None:
    """Nothing of zoo detect: mmengine's own loop, hooks and checkpoints, which its loader must read back."""
    config = stock_config(tmp_path / "data", tmp_path / "work")
    runner = Runner.from_cfg(config)
    runner.train()
    assert (runner.epoch, runner.iter) == (1, 1)
    config.train_cfg.max_epochs = 2
    config.resume, config.load_from = True, str(tmp_path / "work/epoch_1.pth")
    resumed = Runner.from_cfg(config)
    resumed.train()
    assert (resumed.epoch, resumed.iter) == (2, 2)
    assert {"coco/bbox_mAP", "coco/segm_mAP"} <= resumed.val_loop.run().keys()

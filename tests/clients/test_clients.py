"""Programs that take timm's models take ours: each over one small model of every family, timm's DaViT beside them.

The packages are the extra `clients`; `make test-clients` installs them, runs this file and writes docs/clients.md.
"""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from families import FAMILIES
from torch import Tensor, nn

import zoo  # noqa: F401
from zoo.train.export import FORMATS, ExportConfig, Exported

pytestmark = pytest.mark.slow

CONTROL = "timm's DaViT"
SIZE = (72, 56)
every = pytest.mark.parametrize("family", [CONTROL, *FAMILIES])


def client(module: str) -> Any:
    """A client's module; a test without it is skipped."""
    return pytest.importorskip(module, reason=f'{module} is missing; pip install "attention-zoo[clients]"')


def named(family: str) -> tuple[str, dict[str, Any]]:
    if family == CONTROL:
        widths = {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 64), "num_heads": (1, 2, 2, 4)}
        return "davit_tiny", {**widths, "num_classes": 7}
    small = FAMILIES[family].shrunk
    widths = {"head_hidden_size": 64} if family == "maxvit" else {}  # as wide as its last stage, as in every variant
    return small.name, {**small.args, **widths}


def built(family: str, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    name, args = named(family)
    return timm.create_model(name, **{**args, **kwargs}).eval()


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def registered(family: str) -> str:
    """A name for clients that take no arguments, of the family's smallest model."""
    if family == CONTROL:
        return "davit_tiny"
    return FAMILIES[family].smallest or FAMILIES[family].recorded.name


def last_stage(model: Any) -> nn.Module:
    found: nn.Module = model.get_submodule(model.feature_info[-1]["module"])
    return found


def levels_or_skip(family: str) -> None:
    """Skip a test of programs that want maps of several resolutions where a family has one."""
    if len({level["reduction"] for level in built(family).feature_info}) == 1:
        pytest.skip("a model of one resolution has no levels")


def channels_first(model: Any, x: Tensor) -> Tensor:
    """What a stage gives, with the channels in front."""
    width = model.feature_info[-1]["num_chs"]
    return x if x.shape[1] == width else x.permute(0, 3, 1, 2)


@every
def test_transformers(family: str, tmp_path: Path) -> None:
    transformers = client("transformers")
    model = built(family)
    labels = [f"class {i}" for i in range(model.num_classes)]
    shape = timm.data.resolve_data_config(model=model)
    FORMATS["timm"](
        Exported(named(family)[0], model, shape, {"top-1": "not measured"}, labels), tmp_path, ExportConfig()
    )
    found = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(found(images()).logits, model(images()))
    assert found.config.id2label == dict(enumerate(labels))
    assert isinstance(transformers.AutoImageProcessor.from_pretrained(tmp_path), transformers.TimmWrapperImageProcessor)
    body = transformers.AutoModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(body(images()).last_hidden_state, model.forward_features(images()))


@every
def test_transformers_backbone(family: str) -> None:
    transformers = client("transformers")
    levels_or_skip(family)
    levels = built(family, features_only=True)
    indices = tuple(range(len(levels.feature_info)))
    config = transformers.TimmBackboneConfig(
        backbone=registered(family), out_indices=indices, use_pretrained_backbone=False, features_only=True
    )
    backbone = transformers.AutoBackbone.from_config(config)
    maps = backbone(torch.randn(1, 3, 64, 96)).feature_maps
    assert [m.shape[1] for m in maps] == list(backbone.channels)
    assert maps[-1].shape[2:] == (2, 3)


@every
def test_smp(family: str) -> None:
    smp = client("segmentation_models_pytorch")
    name = registered(family)
    levels_or_skip(family)
    net = smp.Unet(f"tu-{name}", encoder_weights=None, classes=3)
    out = net(torch.randn(2, 3, 64, 96))
    assert out.shape == (2, 3, 64, 96)
    out.square().mean().backward()
    assert all(p.grad is not None for p in net.decoder.parameters())


@every
def test_fastai(family: str) -> None:
    client("fastai")
    from fastai.vision.learner import TimmBody, create_timm_model

    net, cfg = create_timm_model(registered(family), n_out=5, pretrained=False)
    body = next(m for m in net.modules() if isinstance(m, TimmBody))
    assert cfg["input_size"][0] == 3
    out = net(torch.randn(2, 3, 64, 64))
    assert out.shape == (2, 5)
    out.sum().backward()
    assert next(body.parameters()).grad is not None


@every
def test_lightning(family: str, tmp_path: Path) -> None:
    lightning = client("lightning")

    class Classifier(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.body = built(family, num_classes=0)
            self.head = nn.Linear(self.body.num_features, 3)  # as Lightning's own examples do

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return nn.functional.cross_entropy(self.head(self.body(batch[0])), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    module = Classifier()
    before = [p.clone() for p in module.body.parameters()]
    data = torch.utils.data.TensorDataset(images(4), torch.tensor([0, 1, 2, 0]))
    trainer = lightning.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=2))
    changed = [not torch.equal(a, b) for a, b in zip(before, module.body.parameters(), strict=True)]
    assert sum(changed) > len(changed) * 0.8


@every
def test_torchvision_detection(family: str) -> None:
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.feature_extraction import create_feature_extractor
    from torchvision.ops import MultiScaleRoIAlign

    model = built(family)
    info = model.feature_info[-1]

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = create_feature_extractor(model, {info["module"]: "0"})
            self.out_channels = info["num_chs"]

        def forward(self, x: Tensor) -> Tensor:
            return channels_first(model, self.body(x)["0"])

    detector = FasterRCNN(
        Body(), 3, rpn_anchor_generator=AnchorGenerator(((16, 32),), ((0.5, 1.0, 2.0),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], 7, 2), min_size=96, max_size=128,
    )  # fmt: skip
    target = {"boxes": torch.tensor([[8.0, 8.0, 60.0, 50.0]]), "labels": torch.tensor([1])}
    losses = detector.train()([torch.rand(3, 90, 110)], [target])
    sum(losses.values()).backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert set(detector.eval()([torch.rand(3, 90, 110)])[0]) == {"boxes", "labels", "scores"}


@every
def test_grad_cam(family: str) -> None:
    cam = client("pytorch_grad_cam")
    model = built(family)
    target, tokens = last_stage(model), 0
    if FAMILIES.get(family, FAMILIES["nat"]).tokens:
        # the class token alone is asked, as in timm's ViT, and the program's README names its last block's first norm
        target, tokens = model.stages[-1].blocks[-1].norm1, 1

    def spread(x: Tensor) -> Tensor:
        return channels_first(model, x[:, tokens:].unflatten(1, (-1, -(-SIZE[1] // 32))) if tokens else x)

    with cam.GradCAM(model, [target], reshape_transform=spread) as watch:
        heat = watch(images(), None)
    assert heat.shape == (2, *SIZE)
    assert heat.max() > 0


@every
def test_captum(family: str) -> None:
    attr = client("captum.attr")
    # published SOFT-Norm gives an image other logits in other batches, and the program makes batches of its own
    model = built(family, **({"newton_per_image": True} if family == "soft_norm" else {})).double()
    x, base = images().double(), images(4)[2:].double()  # norms are not smooth at an image of zeros
    method = attr.IntegratedGradients(model)
    found, delta = method.attribute(x, base, target=3, n_steps=128, return_convergence_delta=True)
    change = (model(x) - model(base))[:, 3]
    assert found.shape == x.shape
    assert (delta.abs() < 0.1 * change.abs() + 1e-2).all()
    assert attr.LayerActivation(model, last_stage(model)).attribute(images().double()).abs().sum() > 0


@every
def test_fvcore(family: str) -> None:
    fvcore = client("fvcore.nn")
    model = built(family)
    counted = fvcore.FlopCountAnalysis(model, images(1)).unsupported_ops_warnings(False).by_module()
    layers = [name for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert not [name for name in layers if not counted.get(name)]


@every
def test_peft(family: str) -> None:
    peft = client("peft")
    model = built(family)
    head = model.get_classifier()
    # timm's DaViT asks its convolutions for their kernel size, which an adapter does not have
    kinds = (nn.Linear,) if family == CONTROL else (nn.Linear, nn.Conv2d)
    layers = [
        name
        for name, m in model.named_modules()
        if m is not head and isinstance(m, kinds) and getattr(m, "groups", 1) == 1
    ]
    config = peft.LoraConfig(r=2, lora_alpha=0.02, target_modules=layers, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.ones_(norm.weight)  # HaloNet's branches begin at zero, which lets no gradient into them
    adapted(images()).square().sum().backward()
    adapters = {name: p for name, p in adapted.named_parameters() if "lora_" in name}
    assert len(adapters) == 2 * len(layers)
    assert not [name for name, p in adapters.items() if p.grad is None or not p.grad.abs().sum() > 0]


@every
@pytest.mark.parametrize("to", ["cpu", "disk"])
def test_accelerate(family: str, to: str, tmp_path: Path) -> None:
    accelerate = client("accelerate")
    expected = built(family)(images())
    model = built(family)
    if to == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
    assert all(p.is_meta for p in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(model(images()), expected)


@every
def test_torchao(family: str) -> None:
    quantization = client("torchao.quantization")
    model = built(family)
    with torch.no_grad():
        expected = model(images())
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig(version=2))
        layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
        assert layers
        assert all(type(m.weight.data) is not Tensor for m in layers if isinstance(m.weight, nn.Parameter))
        error = (model(images()) - expected).abs().max() / expected.abs().max()
    assert 0 < error < 0.1


@every
def test_open_clip(family: str) -> None:
    client("open_clip")
    from open_clip.timm_model import TimmModel

    tower = TimmModel(registered(family), embed_dim=12, image_size=64, pool="avg", proj="linear", pretrained=False)
    tower.lock(unlocked_groups=1, freeze_bn_stats=True)
    assert tower(torch.randn(2, 3, 64, 64)).shape == (2, 12)
    kinds = {p.requires_grad for p in tower.trunk.parameters()}
    assert kinds == {True, False}


@every
def test_effdet(family: str) -> None:
    effdet = client("effdet")
    levels_or_skip(family)
    levels = built(family).feature_info
    config = effdet.get_efficientdet_config("tf_efficientdet_lite0")
    config.update({
        "backbone_name": registered(family), "backbone_args": {}, "image_size": [128, 128],
        "backbone_indices": tuple(range(len(levels)))[-3:], "norm_kwargs": {"eps": 1e-3, "momentum": 0.01},
    })  # fmt: skip
    net = effdet.EfficientDet(config, pretrained_backbone=False).eval()
    classes, boxes = net(torch.randn(1, 3, 128, 128))
    assert len(classes) == len(boxes) == config.num_levels


@every
def test_mmseg(family: str) -> None:
    client("mmseg")
    importlib.import_module("zoo.train.detection")  # first: mmcv's operators, which mmcv-lite leaves out
    models = importlib.import_module("mmseg.models")
    levels_or_skip(family)
    backbone = models.BACKBONES.build(
        {"type": "TIMMBackbone", "model_name": registered(family), "features_only": True, "pretrained": False}
    )
    maps = backbone(torch.randn(1, 3, 64, 96))
    assert [m.shape[1] for m in maps] == backbone.timm_model.feature_info.channels()
    assert maps[-1].shape[2:] == (2, 3)


@every
def test_fsdp2(family: str) -> None:
    program = Path(__file__).with_name("fsdp_program.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    path = os.pathsep.join([*sys.path, str(program.parent)])
    ended = subprocess.run(
        [*launch, str(program), family],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]

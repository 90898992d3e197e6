"""The part of a trained detector that becomes a program: its backbone and neck, from images to maps."""

from dataclasses import dataclass
from typing import Any

import torch
from mmdet.registry import MODELS
from mmengine.config import ConfigDict
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from zoo.errors import UserError, first_line
from zoo.train.compose import from_container
from zoo.train.runs import Run

from .config import DETECT, DetectConfig
from .mmdet_config import detector_config

__all__ = ["Maps", "backbone_and_neck"]

_SIZE = (320, 448)  # of the images that it is made from; any other is taken too


class _Maps(nn.Module):
    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.backbone = detector.backbone
        self.neck = detector.neck if detector.with_neck else nn.Identity()

    def forward(self, images: Tensor) -> list[Tensor]:
        return list(self.neck(self.backbone(images)))


@dataclass(frozen=True)
class Maps:
    """The backbone and neck of a run's detector.

    Attributes:
        name: of the backbone's model.
        model: from normalized images [B, 3, H, W] to a list of maps.
        size: of images to begin with.
        mean, std: of RGB images of 0 to 255.
        count: of the maps.
        classes: of the detector.
        facts: what the card says of it.
    """

    name: str
    model: nn.Module
    size: tuple[int, int]
    mean: list[float]
    std: list[float]
    count: int
    classes: list[str]
    facts: dict[str, str]


def backbone_and_neck(run: Run, checkpoint: str) -> Maps:
    """Build them with the weights of a checkpoint: "last", "best" or "previous".

    Raises:
        UserError: the run has no such checkpoint, or it is not of this detector.
    """
    cfg: DetectConfig = from_container(run.config, DETECT)
    path, state = run.checkpoint(checkpoint)
    classes = ((state.get("meta") or {}).get("dataset_meta") or {}).get("classes")
    if state.get("kind") != "detector" or not classes:
        raise UserError(f"checkpoint {path} is not of a run of `zoo detect`; give the folder of one")
    cfg.model.pretrained = False
    config = ConfigDict(detector_config(cfg, len(classes)))
    with DefaultScope.overwrite_default_scope("mmdet"):
        detector: Any = MODELS.build(config)
    try:
        detector.load_state_dict(state["state_dict"])
    except RuntimeError as error:
        raise UserError(f"{path} does not fit the detector of its config.yaml: {first_line(error)}") from error
    model = _Maps(detector.eval())
    with torch.inference_mode():
        count = len(model(torch.zeros(1, 3, *_SIZE)))
    processing = config["data_preprocessor"]
    return Maps(
        cfg.model.name,
        model,
        _SIZE,
        list(processing["mean"]),
        list(processing["std"]),
        count,
        [str(name) for name in classes],
        {
            "part": f"backbone and neck of a {cfg.detector.name}",
            "trained on": f"{cfg.data.name}, {len(classes)} classes",
            "weights": f"checkpoint `{path.stem}`",
        },
    )

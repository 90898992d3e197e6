"""Backbones of this package in mmdet. Importing it registers everything, so a stock mmdet config needs two lines:

    custom_imports = dict(imports=["zoo.train.mmdet"])
    model = dict(backbone=dict(_delete_=True, type="zoo.Backbone", name=NAME, pretrained=PATH), neck=...)

It works with mmcv-lite alone: the operators that mmdet needs come from torchvision (see operators.py).
"""

from zoo.errors import UserError

try:
    import mmdet  # noqa: F401
    import mmengine  # noqa: F401
except ImportError as error:
    raise UserError(f"detection needs mmdet ({error}): pip install 'attention-zoo[detection]'") from error

from .operators import install_operators

install_operators()  # before anything imports mmcv.ops

import zoo.registry  # noqa: E402, F401  registers the models with timm

from .backbone import Backbone, feature_channels  # noqa: E402
from .checkpoints import read_detector_checkpoint  # noqa: E402
from .digits_coco import build_digits_coco  # noqa: E402
from .loading import LoadImage  # noqa: E402
from .loops import EpochBatchSampler, SeededDataset, TrainLoop  # noqa: E402
from .metrics import CocoMetric, coco_average_precision  # noqa: E402
from .optim import LayerDecayOptimWrapperConstructor  # noqa: E402
from .safe_load import allow_mmengine_checkpoints  # noqa: E402

allow_mmengine_checkpoints()

__all__ = [
    "Backbone",
    "CocoMetric",
    "EpochBatchSampler",
    "LayerDecayOptimWrapperConstructor",
    "LoadImage",
    "SeededDataset",
    "TrainLoop",
    "build_digits_coco",
    "coco_average_precision",
    "feature_channels",
    "install_operators",
    "read_detector_checkpoint",
]

"""mmengine registries of the scope `zoo`: a config names what is in them `zoo.Backbone`, `zoo.CocoMetric` and so on."""

from mmengine import registry as root
from mmengine.registry import Registry

__all__ = [
    "MODELS",
    "OPTIM_WRAPPER_CONSTRUCTORS",
    "DATASETS",
    "DATA_SAMPLERS",
    "HOOKS",
    "LOOPS",
    "METRICS",
    "TRANSFORMS",
]

MODELS = Registry("model", parent=root.MODELS, scope="zoo")
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    "optimizer wrapper constructor", parent=root.OPTIM_WRAPPER_CONSTRUCTORS, scope="zoo"
)
DATASETS = Registry("dataset", parent=root.DATASETS, scope="zoo")
DATA_SAMPLERS = Registry("data sampler", parent=root.DATA_SAMPLERS, scope="zoo")
HOOKS = Registry("hook", parent=root.HOOKS, scope="zoo")
LOOPS = Registry("loop", parent=root.LOOPS, scope="zoo")
METRICS = Registry("metric", parent=root.METRICS, scope="zoo")
TRANSFORMS = Registry("transform", parent=root.TRANSFORMS, scope="zoo")

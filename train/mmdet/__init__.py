"""The name under which mmdetection's configs import the detection wing: `custom_imports = dict(imports=[...])`."""

from zoo.train.detection import *  # noqa: F403
from zoo.train.detection import __all__  # noqa: F401

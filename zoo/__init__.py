"""Vision backbones with local, routed and sparse attention; importing the package registers its models with timm."""

from . import models as models
from ._version import __version__ as __version__

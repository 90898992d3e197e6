"""Vision backbones with local, routed and sparse attention; importing the package registers its models with timm."""

from . import _links as _links  # first, for nothing else can be imported without links
from . import models as models
from ._version import __version__ as __version__

"""Vision backbones with local, routed and sparse attention; importing the package registers its models with timm.

With ZOO_WITHOUT_MODELS=1 in the environment it does not: `zoo.ops` then needs PyTorch alone, and no timm. Nor does it
as a command: a command that needs the models imports them, and `zoo --help` waits for nothing.
"""

import os

from . import _links as _links  # first, for nothing else can be imported without links
from ._version import __version__ as __version__

if os.environ.get("ZOO_WITHOUT_MODELS") != "1" and not _links.is_command():
    from . import models as models

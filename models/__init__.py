"""The backbone families. Importing this package registers every variant with timm."""

if __name__ == "models":  # from a checkout's root, where every model would be registered a second time
    raise ImportError("`models` is a folder of the package zoo; import zoo.models", name=__name__)

from . import biformer as biformer
from . import davit as davit
from . import dinat_s as dinat_s
from . import halonet as halonet
from . import litv2 as litv2
from . import maxvit as maxvit
from . import nat as nat
from . import nat_isotropic as nat_isotropic
from . import stvit as stvit
from . import van as van

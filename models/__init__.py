"""The backbone families. Importing this package registers every variant with timm."""

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

"""The backbone families. Importing this package registers every variant with timm: a file is a family."""

import importlib
import pkgutil

if __name__ == "models":  # from a checkout's root, where every model would be registered a second time
    raise ImportError("`models` is a folder of the package zoo; import zoo.models", name=__name__)

for _file in pkgutil.iter_modules(__path__):
    if not _file.name.startswith("_"):
        importlib.import_module(f"{__name__}.{_file.name}")

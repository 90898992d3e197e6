"""Which models this package registers with timm, and what is known of each; importing this registers them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

import timm
import torch
from timm.models import get_arch_pretrained_cfgs
from timm.models._registry import _model_entrypoints
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from zoo.errors import UserError
from zoo.models.checkpoints import published_figures
from zoo.names import nearest_names
from zoo.ops import resolve_backend, without_triton

__all__ = [
    "ModelInfo",
    "model_class",
    "model_info",
    "models_table",
    "names_table",
    "package_models",
    "require_model",
    "table_row",
]


@dataclass(frozen=True)
class ModelInfo:
    """What `zoo info` prints of a model."""

    name: str
    family: str
    parameters: int  # measured
    macs: int  # measured multiply-adds at input_size, batch 1
    input_size: tuple[int, int, int]
    accepted_sizes: str
    num_classes: int
    ops: dict[str, str]  # op -> the backend that this machine takes
    checkpoints: dict[str, dict[str, Any]]  # tag -> its configuration
    top1: str | None
    licence: str | None
    paper: str | None
    origin: str | None


def package_models(patterns: Iterable[str] = ()) -> list[str]:
    """Names of the models that this package registers, sorted; all of them or those that match a wildcard."""
    own = {n for n, entry in _model_entrypoints.items() if entry.__module__.startswith("zoo.models.")}
    patterns = list(patterns)
    return [n for n in (timm.list_models(patterns) if patterns else timm.list_models()) if n in own]


def require_model(name: str) -> None:
    """Raise UserError, naming the nearest names, unless timm knows the model and its tag."""
    architecture, dot, tag = name.partition(".")
    if timm.is_model(name):
        tagged = list(get_arch_pretrained_cfgs(architecture)) if dot else []
        if dot and name not in tagged:
            known = [found for found in tagged if "." in found]
            hint = f"the tags are {', '.join(known)}" if known else f"it has none; say {architecture}"
            raise UserError(f"unknown tag {tag!r} of model {architecture}; {hint}")
        return
    near = nearest_names(name.split(".")[0], timm.list_models())
    hint = f"the nearest names are {', '.join(near)}" if near else "`zoo list` prints the names"
    raise UserError(f"unknown model {name!r}; {hint}")


def model_class(name: str) -> type[nn.Module] | None:
    """The class that a registered model is of, by its entry point's annotation; None where timm knows or says none.

    What a family wants training to know, such as `out_norms` or `no_decay`, are attributes of this class.
    """
    if not timm.is_model(name):
        return None
    found = get_type_hints(timm.model_entrypoint(name)).get("return")
    return found if isinstance(found, type) and issubclass(found, nn.Module) else None


class _OpRecorder(TorchDispatchMode):
    """Notes which of this package's ops run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "zoo":
            self.names.add(func._schema.name.removeprefix("zoo::").removesuffix("_qkvpacked"))
        return func(*args, **(kwargs or {}))


def model_info(name: str) -> ModelInfo:
    """Measure and look up what is known of a model.

    Raises:
        UserError: timm knows no such model.
    """
    require_model(name)
    model: Any = timm.create_model(name, pretrained=False, device="meta").eval()
    cfg = model.pretrained_cfg
    size = tuple(cfg["input_size"])
    recorder = _OpRecorder()
    image = torch.empty(1, *size, device="meta")
    with recorder, torch.no_grad():
        model(image)
    with FlopCounterMode(display=False) as counter, torch.no_grad():  # its hooks have every layer called
        model(image)
    architecture = name.split(".")[0]
    configurations = get_arch_pretrained_cfgs(architecture)
    fixed = cfg.get("fixed_input_size", False)
    papers = cfg.get("paper_ids") or ()
    return ModelInfo(
        name=name,
        family=type(model).__name__,
        parameters=sum(p.numel() for p in model.parameters()),
        macs=counter.get_total_flops() // 2,
        input_size=size,
        accepted_sizes=f"{size[1]} x {size[2]} only" if fixed else "any H, W >= 32",
        num_classes=model.num_classes,
        ops={op: _backend_here(op) for op in sorted(recorder.names)},
        checkpoints={tag: c.to_dict() for tag, c in configurations.items()},
        top1=published_figures(cfg).get("top1"),
        licence=cfg.get("license"),
        paper=_paper(cfg.get("paper_name"), [papers] if isinstance(papers, str) else list(papers)),
        origin=cfg.get("origin_url"),
    )


def _paper(name: str | None, identifiers: list[str]) -> str | None:
    return f"{name} ({', '.join(identifiers)})" if name and identifiers else name or ", ".join(identifiers) or None


TABLE_HEADER = (
    "| model | family | parameters | multiply-adds | at | ImageNet-1k top-1 | checkpoints | licence |",
    "|---|---|---:|---:|---|---:|---|---|",
)


def table_row(name: str) -> str:
    """The model's row of MODELS.md: measured size and cost, published accuracy and tags."""
    info = model_info(name)
    weights = [(n, c) for n, c in info.checkpoints.items() if c.get("url") or c.get("hf_hub_id")]
    tags = ", ".join(n.split(".", 1)[1] if "." in n else n for n, _ in weights) or "none published"
    return (
        f"| `{name}` | {info.family} | {info.parameters / 1e6:.1f} M | {info.macs / 1e9:.2f} G "
        f"| {info.input_size[1]} x {info.input_size[2]} | {info.top1 or ''} | {tags} | {info.licence or ''} |"
    )


def models_table(names: Sequence[str]) -> str:
    """The text of MODELS.md about these models."""
    intro = (
        "# Models\n\nWritten by `make models-table`. Parameters and multiply-adds are measured at the default head and "
        "input size;\naccuracy is what the authors published for the default checkpoint.\n"
    )
    return "\n".join([intro, *TABLE_HEADER, *(table_row(name) for name in names)]) + "\n"


def _backend_here(op: str) -> str:
    x = torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu")
    return resolve_backend(op, None, x, without_triton(x))


def names_table() -> str:
    """zoo/_names.py: every model of this package, and under it its checkpoints as model.tag."""
    lines = [f"    {name!r}: {tuple(get_arch_pretrained_cfgs(name))!r}," for name in package_models()]
    return "\n".join(
        (
            '"""Written by `make models-table`, so that a command lists models without importing them."""',
            "",
            "# ruff: noqa: E501",
            "# fmt: off",
            "NAMES: dict[str, tuple[str, ...]] = {",
            *(line.replace("'", '"') for line in lines),
            "}",
            "",
        )
    )

"""model.freeze: which parameters are not trained, and that their modules are not either."""

from collections.abc import Iterable

from timm.models import group_parameters
from torch import nn

from zoo.errors import UserError
from zoo.train.config import parse_freeze

__all__ = ["Frozen", "freeze"]


class Frozen:
    """The modules whose parameters are all frozen: their statistics, dropout and drop path are those of evaluation."""

    def __init__(self, model: nn.Module) -> None:
        self.modules: list[nn.Module] = []
        self._find(model)

    def _find(self, module: nn.Module) -> None:
        own = list(module.parameters())
        if own and not any(p.requires_grad for p in own):
            self.modules.append(module)
            return
        for child in module.children():
            self._find(child)

    def hold(self) -> None:
        """Put them into evaluation mode; every `train()` of the model asks for it anew."""
        for module in self.modules:
            module.eval()


def _names_of_norms(model: nn.Module) -> Iterable[str]:
    for name, module in model.named_modules():
        if "norm" in type(module).__name__.lower():
            yield from (f"{name}.{own}" for own, _ in module.named_parameters(recurse=False))


def _stages(model: nn.Module, count: int, name: str) -> list[str]:
    """The parameters of the stem and of the first stages, as the model's group_matcher divides it."""
    matcher = getattr(model, "group_matcher", None)
    if matcher is None:
        raise UserError(f"model.freeze={count} stages: {name} does not say its stages; choose backbone or norms")
    groups = list(group_parameters(model, matcher(coarse=True)).values())
    known = len(groups) - 2  # without the stem before and the head behind
    if count > known:
        raise UserError(f"model.freeze={count} stages: {name} has {known}; give 1 to {known}, or backbone")
    return [parameter for group in groups[: count + 1] for parameter in group]


def freeze(model: nn.Module, what: object, name: str) -> Frozen:
    """Take parameters out of training.

    Args:
        model: timm's.
        what: the value of model.freeze; None freezes nothing.
        name: of the model, for messages.

    Raises:
        UserError: the model has no such parts, or nothing would be left to train.
    """
    asked = parse_freeze(what)
    if not asked:
        return Frozen(nn.Module())
    parameters = dict(model.named_parameters())
    frozen: set[str] = set()
    for part in asked:
        if part == "backbone":
            heads = model.get_classifier()  # type: ignore[operator]
            heads = heads if isinstance(heads, tuple | list) else (heads,)
            kept = {id(p) for head in heads if head is not None for p in head.parameters()}
            if not kept:
                raise UserError(f"model.freeze=backbone: {name} has no head, which alone would be trained")
            frozen |= {n for n, p in parameters.items() if id(p) not in kept}
        elif part == "norms":
            frozen |= set(_names_of_norms(model))
        else:
            frozen |= set(_stages(model, int(part), name))
    if not frozen:
        raise UserError(f"model.freeze={what}: {name} has no such parameters; leave it out")
    if len(frozen) == len(parameters):
        raise UserError(f"model.freeze={what} leaves {name} nothing to train")
    for parameter in frozen:
        parameters[parameter].requires_grad_(False)
    return Frozen(model)

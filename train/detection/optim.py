"""Layer-wise learning-rate decay for mmdet, on timm's parameter groups."""

from typing import Any

from mmengine.optim import DefaultOptimWrapperConstructor
from timm.optim import param_groups_layer_decay
from torch import nn

from .backbone import Backbone
from .registry import OPTIM_WRAPPER_CONSTRUCTORS

__all__ = ["LayerDecayOptimWrapperConstructor"]


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Every layer of a `zoo.Backbone` learns `layer_decay` times as fast as the next one, the rest at full rate.

    The layers are those of timm (`group_matcher` of the model); the detector's neck and heads stand where a
    classifier's head stands, one step above the deepest layer. One-dimensional parameters and those that the model
    names in `no_weight_decay` get no weight decay, in the whole detector.

        optim_wrapper = dict(
            constructor="zoo.LayerDecayOptimWrapperConstructor",
            paramwise_cfg=dict(layer_decay=0.8),
            optimizer=dict(type="AdamW", lr=1e-4, weight_decay=0.05),
        )

    Raises:
        ValueError: paramwise_cfg has other keys than layer_decay, or the detector's backbone is no zoo.Backbone.
    """

    def add_params(self, params: list[dict[str, Any]], module: nn.Module, **kwargs: Any) -> None:
        """Append the parameter groups of a detector to params."""
        unknown = set(self.paramwise_cfg) - {"layer_decay"}
        if unknown or "layer_decay" not in self.paramwise_cfg:
            raise ValueError(f"zoo layer decay: paramwise_cfg takes layer_decay alone, got {dict(self.paramwise_cfg)}")
        backbone = getattr(module, "backbone", None)
        if not isinstance(backbone, Backbone):
            raise ValueError(f"zoo layer decay: the backbone is {type(backbone).__name__}, not zoo.Backbone")
        layer_decay = float(self.paramwise_cfg["layer_decay"])
        exempt = getattr(backbone.body, "no_weight_decay", None)
        groups = param_groups_layer_decay(
            backbone.body,
            weight_decay=self.base_wd or 0.0,
            no_weight_decay_list=exempt() if callable(exempt) else (),
            layer_decay=layer_decay,
        )
        for group in groups:
            scale = group["lr_scale"] * layer_decay
            params.append({**group, "lr_scale": scale, "lr": self.base_lr * scale})
        seen = {id(p) for g in groups for p in g["params"]} | {id(p) for p in backbone.body.parameters()}
        rest = [p for p in module.parameters() if p.requires_grad and id(p) not in seen]
        for decay, chosen in (
            (0.0, [p for p in rest if p.ndim <= 1]),
            (self.base_wd or 0.0, [p for p in rest if p.ndim > 1]),
        ):
            if chosen:
                params.append({"params": chosen, "lr": self.base_lr, "lr_scale": 1.0, "weight_decay": decay})

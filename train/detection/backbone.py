"""`zoo.Backbone`: any model that timm can build, as the backbone of an mmdet detector."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from mmengine.model import BaseModule
from timm.layers import LayerNorm2d
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from zoo.errors import UserError
from zoo.models.checkpoints import output_norms
from zoo.registry import require_model
from zoo.train.runs import load_run, select_weights

from .checkpoints import adapt_backbone_keys
from .registry import MODELS

__all__ = ["Backbone", "feature_channels", "feature_levels"]

_EPS = 1e-6  # of norms on outputs, where the family has no own


class _NoIntermediates(Exception):
    """The model has no forward_intermediates."""


def _wrap_features(model: nn.Module, **cfg: Any) -> FeatureGetterNet:
    """timm's feature wrapper that leaves a model's parameter names alone."""
    if not hasattr(model, "forward_intermediates"):
        raise _NoIntermediates
    return FeatureGetterNet(model, out_indices=cfg["out_indices"])


def _create(name: str, out_indices: Sequence[int], pretrained: Any = False, **model_args: Any) -> Any:
    require_model(name)
    model_args = {
        "features_only": True,
        "out_indices": tuple(out_indices),
        **_weights_source(pretrained, name),
        **model_args,
    }
    try:
        try:
            return timm.create_model(name, feature_cls=_wrap_features, **model_args)
        except _NoIntermediates:
            return timm.create_model(name, **model_args)
    except (IndexError, AssertionError) as error:
        raise ValueError(f"zoo.Backbone: {name} has no outputs {tuple(out_indices)}: {error}") from error


def _run_weights(folder: Path, name: str) -> dict[str, Tensor]:
    """The weights of a `zoo train` run, from its best checkpoint where there is one.

    Raises:
        UserError: the folder holds no run, no intact checkpoint, or another model.
    """
    run = load_run(folder)
    trained = run.config["model"]["name"]
    if trained.split(".")[0] != name.split(".")[0]:
        raise UserError(f"run {folder} trained {trained}, and the backbone is {name}; give model={trained}")
    best = (folder / "checkpoints/best.pt").is_file()
    weights, _ = select_weights(run.checkpoint("best" if best else "last")[1])
    return weights


def _weights_source(pretrained: Any, name: str) -> dict[str, Any]:
    """The arguments of timm.create_model for `pretrained`: a bool, a file, an address or a run folder."""
    if not pretrained or pretrained is True:
        return {"pretrained": bool(pretrained)}
    source = str(pretrained)
    if source.startswith(("https://", "http://")):
        return {"pretrained": True, "pretrained_cfg_overlay": {"url": source, "hf_hub_id": None}}
    path = Path(source).expanduser()
    if (path / "config.yaml").is_file() or (path / "checkpoints").is_dir():
        return {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": _run_weights(path, name)}}
    if not path.exists():
        raise UserError(f"pretrained={source}: there is no such file or run folder")
    return {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}}


def _levels(name: str, out_indices: int | Sequence[int], **model_args: Any) -> tuple[int, ...]:
    """The feature levels that `out_indices` means, counted from 0, in their order.

    Raises:
        UserError: timm knows no such model.
        ValueError: the model has no such levels, or they are no list of whole numbers.
    """
    wrong = ValueError(
        f"zoo.Backbone: out_indices is {out_indices!r}; it takes the numbers of levels, or how many of the last"
    )
    if isinstance(out_indices, int) and not isinstance(out_indices, bool) and out_indices > 0:
        out_indices = range(-out_indices, 0)
    if isinstance(out_indices, int | str) or not isinstance(out_indices, Iterable):
        raise wrong
    asked = list(out_indices)
    if not asked or any(isinstance(i, bool) or not isinstance(i, int) for i in asked):
        raise wrong
    if min(asked) >= 0:
        return tuple(asked)
    with torch.device("meta"):
        count = len(_create(name, (0,), **model_args).feature_info.info)
    if min(asked) < -count:
        raise ValueError(f"zoo.Backbone: {name} has no outputs {tuple(asked)}; it has {count} levels")
    return tuple(i + count if i < 0 else i for i in asked)


def feature_channels(name: str, out_indices: int | Sequence[int] = (0, 1, 2, 3), **model_args: Any) -> list[int]:
    """Channels of a backbone's outputs, in the order of out_indices, found without allocating its weights.

    Raises:
        UserError: timm knows no such model.
        ValueError: the model has no such outputs.
    """
    levels = _levels(name, out_indices, **model_args)
    with torch.device("meta"):
        return [int(c) for c in _create(name, sorted(set(levels)), **model_args).feature_info.channels(levels)]


def feature_levels(name: str, **model_args: Any) -> list[tuple[int, int]]:
    """(channels, stride) of every feature level of a model, found without allocating its weights.

    Raises:
        UserError: timm knows no such model.
    """
    with torch.device("meta"):
        wrapper = _create(name, (0,), **model_args)
    return [(int(i["num_chs"]), int(i["reduction"])) for i in wrapper.feature_info.info]


def _brings_norms(model: nn.Module) -> bool:
    """Whether a model in its dense form has norms of its own on its stages' outputs."""
    stages = getattr(model, "stages", ())
    return any(not isinstance(getattr(stage, "out_norm", None), nn.Identity | None) for stage in stages)


@MODELS.register_module()
class Backbone(BaseModule):
    """Multi-scale features [B, C_i, H / s_i, W / s_i] of a timm model, for any neck of mmdet.

    Args:
        name: any name that `timm.create_model` takes.
        out_indices: which of the model's feature levels to return, in the order of the outputs; negative ones count
            from the last, and an int n means the last n (for most of timm's convolutional networks level 0 is the stem,
            and mmdet's usual four levels are 1..4).
        pretrained: True for the model's published weights, a checkpoint in any dialect that is known of the model (of
            a detector the backbone, with its norms on outputs), an address, or the folder of a `zoo train` run.
        frozen_stages: as in mmdet: -1 trains everything, 0 freezes the stem, k the stem and the first k stages;
            a stage is a feature level of stride 4 or more.
        drop_path_rate: passed on when given.
        norm_eval: keep batch normalization in evaluation mode while training.
        out_norms: a LayerNorm on outputs, `norm0`, `norm1` ...: "auto" for what the original detection backbone has,
            True for all, False for none, or the levels that get one.
        out_norm_eps: their epsilon; None for the original's, or 1e-6.
        with_cp: recompute activations in the backward pass.
        init_cfg: None, or mmdet's dict(type="Pretrained", checkpoint=...), which is the same as `pretrained`.
        model_args: further arguments of the model: NAT's dilations, BiFormer's n_win, LITv2's local_ws ...

    Raises:
        UserError: the model or the file does not exist.
        ValueError: the model has no such outputs or stages.
    """

    def __init__(
        self,
        name: str,
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
        pretrained: bool | str | Path | None = False,
        frozen_stages: int = -1,
        drop_path_rate: float | None = None,
        norm_eval: bool = False,
        out_norms: str | bool | Sequence[int] = "auto",
        out_norm_eps: float | None = None,
        with_cp: bool = False,
        init_cfg: Mapping[str, Any] | None = None,
        **model_args: Any,
    ) -> None:
        super().__init__()
        if init_cfg is not None:
            if init_cfg.get("type") != "Pretrained" or pretrained:
                raise ValueError(f"zoo.Backbone: init_cfg is {dict(init_cfg)}; give the weights with `pretrained`")
            pretrained = init_cfg["checkpoint"]
        if drop_path_rate is not None:
            model_args["drop_path_rate"] = drop_path_rate
        self.name = name
        self.out_indices = _levels(name, out_indices, **model_args)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        built = sorted(set(self.out_indices))  # timm gives the maps in the order in which they are made
        self._order = [built.index(i) for i in self.out_indices]
        wrapper = _create(name, built, pretrained, **model_args)
        self.channels: list[int] = list(wrapper.feature_info.channels(self.out_indices))
        self.reductions: list[int] = list(wrapper.feature_info.reduction(self.out_indices))
        self._levels = [(str(i["module"]), int(i["reduction"])) for i in wrapper.feature_info.info]
        if isinstance(wrapper, FeatureGetterNet):
            self.body: Any = wrapper.model
            self._taps: Any = wrapper.out_indices
        else:
            self.body = wrapper
            self._taps = None
        if with_cp:
            self.body.set_grad_checkpointing(True)
        self._normed = self._add_out_norms(out_norms, out_norm_eps)
        self._load_out_norms(pretrained)
        self._frozen = self._freeze()

    def _add_out_norms(self, out_norms: str | bool | Sequence[int], eps: float | None) -> tuple[int, ...]:
        family = type(self.body)
        published: tuple[int, ...] = getattr(family, "out_norms", ())
        if eps is None:
            eps = family.out_norm_eps if published or "out_norm_eps" in vars(family) else _EPS
        if out_norms == "auto" and _brings_norms(self.body):
            wanted = []
        elif out_norms == "auto":
            wanted = [i for i in dict.fromkeys(self.out_indices) if i in published]
        elif isinstance(out_norms, str):
            raise ValueError(f"zoo.Backbone: out_norms is {out_norms!r}; it takes 'auto', a bool or a list of levels")
        elif isinstance(out_norms, bool):
            wanted = list(dict.fromkeys(self.out_indices)) if out_norms else []
        else:
            wanted = list(dict.fromkeys(out_norms))
            if not set(wanted) <= set(self.out_indices):
                raise ValueError(f"zoo.Backbone: out_norms {wanted} are not all among out_indices {self.out_indices}")
        for level in wanted:
            channels = self.channels[self.out_indices.index(level)]
            self.add_module(f"norm{level}", LayerNorm2d(channels, eps=eps))
        return tuple(wanted)

    def _load_out_norms(self, pretrained: Any) -> None:
        """Take the norms on the outputs too, where a detector's file has them."""
        if not self._normed or not pretrained or pretrained is True:
            return
        path = Path(str(pretrained)).expanduser()
        if path.exists() and path.suffix not in (".npz", ".npy"):
            for level, weights in output_norms(path, self.body).items():
                if level in self._normed:
                    getattr(self, f"norm{level}").load_state_dict(weights)

    def _freeze(self) -> list[nn.Module]:
        """Stop the gradients of the stem and the first stages; the modules that hold nothing else."""
        if self.frozen_stages < 0:
            return []
        stages = [(i, module) for i, (module, stride) in enumerate(self._levels) if stride >= 4]
        if self.frozen_stages > len(stages):
            raise ValueError(
                f"zoo.Backbone: frozen_stages is {self.frozen_stages}; {self.name} has {len(stages)} stages"
            )
        module = stages[max(self.frozen_stages, 1) - 1][1]
        for parameter in self._up_to(module, inclusive=self.frozen_stages > 0):
            parameter.requires_grad_(False)
        frozen = [
            m for m in self.body.modules() if (ps := list(m.parameters())) and not any(p.requires_grad for p in ps)
        ]
        for level, _ in stages[: self.frozen_stages]:
            if level in self._normed:
                norm = getattr(self, f"norm{level}")
                norm.requires_grad_(False)
                frozen.append(norm)
        return frozen

    def _up_to(self, path: str, inclusive: bool) -> list[nn.Parameter]:
        """Parameters of the modules that run before a module; modules are registered in the order of execution."""
        before: list[nn.Parameter] = []
        reached = False
        for name, module in self.body.named_modules():
            inside = f"{name}.".startswith((f"{path}.", f"{path.replace('.', '_')}."))  # as FeatureListNet spells it
            if inside and not inclusive or reached and not inside:
                return before
            reached = reached or inside
            before.extend(module.parameters(recurse=False))
        if not reached:
            raise ValueError(f"zoo.Backbone: {self.name} has no module {path}; frozen_stages cannot be used")
        return before

    def init_weights(self) -> None:
        """Nothing: the model was initialized, or its weights loaded, when it was built."""
        self._is_init = True

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Features of images [B, 3, H, W], NCHW, in the order of out_indices."""
        if self._taps is None:
            features = self.body(x)
        else:
            features = self.body.forward_intermediates(
                x, indices=self._taps, output_fmt="NCHW", intermediates_only=True
            )
        return tuple(
            getattr(self, f"norm{level}")(f) if level in self._normed else f
            for level, f in zip(self.out_indices, (features[i] for i in self._order), strict=True)
        )

    def train(self, mode: bool = True) -> "Backbone":
        """Set the mode; frozen stages, and batch normalization under norm_eval, stay in evaluation mode."""
        super().train(mode)
        if mode:
            for module in self._frozen:
                module.eval()
            if self.norm_eval:
                for module in self.modules():
                    if isinstance(module, _BatchNorm):
                        module.eval()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        adapt_backbone_keys(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

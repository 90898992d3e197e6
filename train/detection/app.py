"""`zoo detect`: mmdet's detectors on this package's backbones, from the arguments to an exit code.

Composes a config of mmdet's, writes it into the run folder as `detector.py` (which mmdet's own tools take), and runs
mmengine's Runner on it. Exit codes and the run folder are those of `zoo train` (see zoo/train/app.py).
"""

import json
import logging
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from zoo.errors import UserError
from zoo.runs import Run, load_run, lock_run, write_atomic
from zoo.train import app
from zoo.train.compose import SCHEMAS, compose_config, forbid_targets, prepare, typed
from zoo.train.engine import Interrupted, _determinism, _Signals
from zoo.train.state import World, join_world

from .checkpoints import read_detector_checkpoint
from .coco_data import CocoFiles, open_coco
from .config import DetectConfig, validate_detect
from .loops import unreadable_images
from .mmdet_config import PlainConfig, compose_mmdet
from .recipes import RECIPES, describe, register_recipes
from .run_hook import RunFolderHook, plain_model, versions

__all__ = ["build_runner", "detect_config", "main"]

SCHEMAS["detect"] = DetectConfig
_OWN_CONFIGS = "pkg://zoo.configs.detection"  # groups of zoo detect alone, apart from those of zoo train
_FREE = ("detector.overrides", "notes")
_OWN_GROUPS = ("data", "detector", "schedule")
_GROUPS = ("data", "detector", "experiment", "logger", "model", "schedule")
# What may change when a run is continued: nothing that the updates already made depend on.
_RESUME_KEYS = (
    "max_steps",
    "eval_every",
    "log_every",
    "val_batch_size",
    "pictures",
    "debug",
    "data.root",
    "data.num_workers",
)
_RESUME_SECTIONS = ("checkpoint.", "logger.")
# What an evaluation of a run may change.
_EVAL_KEYS = (
    "eval",
    "run",
    "dry_run",
    "checkpoint_name",
    "out",
    "val_batch_size",
    "pictures",
    "threads",
    "debug",
    "log_every",
)
_DRY_IMAGES = 4
_STOCK_HOOKS = ("timer", "logger", "checkpoint")  # for mmdet's own tools; the run folder's hook stands in for them


def detect_config(overrides: Sequence[str], search_path: Sequence[str] = ()) -> DictConfig:
    """Compose configs/detect.yaml with overrides.

    Raises:
        UserError: a key, a value or a choice is wrong; the message is one line.
    """
    register_recipes()
    free = tuple(f"{key}{end}" for key in _FREE for end in (".", "="))
    prepared = [f"++{o}" if o.startswith(free) else o for o in overrides if not o.startswith("hydra.searchpath=")]
    paths = [_OWN_CONFIGS]
    for override in overrides:
        if override.startswith("hydra.searchpath="):
            paths += [p.strip(" '\"") for p in override.split("=", 1)[1].strip("[] ").split(",")]
    for folder in search_path:
        if not Path(folder).is_dir():
            raise UserError(
                f"no configuration folder at {folder}; give the folder that holds detector/, experiment/ ..."
            )
        paths.append(f"file://{Path(folder).resolve()}")
    quoted = ",".join(f"'{path}'" for path in paths)
    return compose_config("detect", [*prepared, f"hydra.searchpath=[{quoted}]"])


def _settings(config: DictConfig) -> DetectConfig:
    try:
        cfg = OmegaConf.to_object(typed(config, DetectConfig))
    except MissingMandatoryValue as error:
        raise UserError(f"{str(error).splitlines()[0]}; give model=NAME, detector=NAME and data=NAME") from error
    assert isinstance(cfg, DetectConfig)
    validate_detect(cfg)
    return cfg


def _merged(
    base: DictConfig, overrides: Sequence[str], keys: Sequence[str], sections: Sequence[str], what: str
) -> DictConfig:
    """A run's configuration with those overrides that may change.

    Raises:
        UserError: another override differs from the run's value.
    """
    for key, value in app._parsed(overrides):
        key = key.replace("/", ".")
        if key == "resume":
            continue
        if key in keys or key.startswith(tuple(sections)):
            base = app._update(base, key, value, DetectConfig)
            continue
        current = None
        with suppress(OmegaConfBaseException):
            current = OmegaConf.select(base, key)
        if isinstance(current, DictConfig) and isinstance(value, str):
            current = current.get("name")
        if OmegaConf.is_config(current):
            current = OmegaConf.to_container(current)
        if current != value:
            may = ", ".join([*keys, *(f"{s}*" for s in sections)])
            raise UserError(
                f"{key}={value} conflicts with the run's {key}={current}; {what} keeps it (what may change: {may})"
            )
    return base


@contextmanager
def _quiet(debug: bool) -> Iterator[None]:
    """Keep the notices of mmengine and mmdet from the terminal."""
    if debug:
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        previous = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(previous)


def build_runner(config: Config, hook: RunFolderHook, world: World, *, train: bool) -> Runner:
    """mmengine's Runner for a composed config, with the run folder's hook."""
    config = PlainConfig(config.to_dict())
    if not train:
        for key in ("train_dataloader", "train_cfg", "optim_wrapper", "param_scheduler"):
            config[key] = None
        for key in ("val_dataloader", "val_cfg", "val_evaluator"):
            config[key] = None
    else:
        for key in ("test_dataloader", "test_cfg", "test_evaluator"):
            config[key] = None
    for name in _STOCK_HOOKS:
        config.default_hooks[name] = None
    config.log_level = "WARNING"
    config.launcher = "pytorch" if world.distributed else "none"
    try:
        runner = Runner.from_cfg(config)
    except (TypeError, KeyError, ValueError, RuntimeError, AssertionError, OSError) as error:
        problem = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"the detector cannot be built: {problem}; see model.* and detector.overrides") from error
    runner.register_hook(hook, priority="VERY_LOW")
    return runner


def _load_weights(runner: Runner, path: str) -> None:
    try:
        state_dict = read_detector_checkpoint(path)
    except FileNotFoundError as error:
        raise UserError(f"{error}; give weights=FILE") from error
    except RuntimeError as error:
        raise UserError(" ".join(str(error).split())) from error
    _load_strictly(runner, state_dict, path)


def _load_strictly(runner: Runner, state_dict: dict[str, Any], path: str | Path) -> None:
    try:
        plain_model(runner).load_state_dict(state_dict)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit the detector: {' '.join(str(error).split())[:600]}") from error


def _limit(config: Config) -> None:
    """Let a dry run evaluate a few images only."""
    for key in ("val_dataloader", "test_dataloader"):
        config[key].dataset.dataset.indices = _DRY_IMAGES


def _build_only(cfg: DetectConfig, config: Config) -> str:
    """Build detector and optimizer without memory for weights; what was built, in one line."""
    config.model.backbone.pretrained = False
    plain = {k: v for k, v in config.optim_wrapper.items() if k not in ("dtype", "loss_scale")}
    plain["type"] = "OptimWrapper"  # mmengine makes the one for mixed precision on GPUs alone
    with _quiet(cfg.debug), DefaultScope.overwrite_default_scope("mmdet"):
        with torch.device("meta"):
            model = MODELS.build(config.model)
        wrapper = build_optim_wrapper(model, plain)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    groups = len(wrapper.optimizer.param_groups)
    return f"{cfg.detector.name} with {cfg.model.name}: {parameters:.1f} M parameters in {groups} groups"


def _train(cfg: DetectConfig, run: Run | None) -> None:
    data = open_coco(cfg.data, may_lack=cfg.dry_run)
    if not data.present:
        config = compose_mmdet(cfg, data, Path(cfg.run_root))
        print(f"dry run passed: {_build_only(cfg, config)}; no step was made, for data.root is not set", flush=True)
        return
    if cfg.amp != "none" and not torch.cuda.is_available():
        raise UserError(f"amp={cfg.amp} needs a GPU, for mmengine has no mixed precision on the CPU; use amp=none")
    world = join_world("auto")
    folder: Path | None = None
    lock = None
    try:
        if world.is_primary:
            folder = run.path if run is not None else app._new_run_folder(cfg)  # type: ignore[arg-type]
            lock = lock_run(folder)
        folder = Path(world.from_primary(str(folder))).resolve()
        cfg.run_dir = str(folder)
        try:
            _run(cfg, data, folder, world, fresh=run is None)
        except Interrupted:
            if world.is_primary:
                print(f"interrupted; the state is saved; `zoo detect resume={folder}` continues", flush=True)
            raise
        except UserError:
            if world.is_primary and run is None and not (folder / "checkpoints").exists():
                shutil.rmtree(folder / "mmengine", ignore_errors=True)
                (folder / "detector.py").unlink(missing_ok=True)
                app._discard(folder)
            raise
    finally:
        if lock is not None:
            lock.close()
        world.leave()


def _run(cfg: DetectConfig, data: CocoFiles, folder: Path, world: World, *, fresh: bool) -> None:
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    config = compose_mmdet(cfg, data, folder)
    if cfg.dry_run:
        _limit(config)
    if world.is_primary:
        write_atomic(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(cfg), resolve=True))
        config.dump(folder / "detector.py")
    signals = _Signals()
    hook = RunFolderHook(cfg, folder, world, signals)
    with signals.installed(), _determinism(cfg.deterministic), _quiet(cfg.debug):
        runner = build_runner(config, hook, world, train=True)
        if cfg.weights is not None and fresh:
            _load_weights(runner, cfg.weights)
        runner.train()
    if world.is_primary:
        print(_last_line(json.loads((folder / "summary.json").read_text()), folder), flush=True)


def _last_line(summary: dict[str, Any], folder: Path) -> str:
    dry = "dry run passed: one step, saved, evaluated; " if summary.get("dry_run") else ""
    parts = [f"box AP {summary['bbox_mAP']:.3f}, AP50 {summary['bbox_mAP_50']:.3f}"]
    if summary.get("segm_mAP") is not None:
        parts.append(f"mask AP {summary['segm_mAP']:.3f}, AP50 {summary['segm_mAP_50']:.3f}")
    bad = summary["unreadable_images"]
    note = f"{len(bad)} images could not be read, the first is {bad[0]}; " if bad else ""
    return f"{dry}{note}{'; '.join(parts)} on {summary['images']} images; run folder: {folder}"


def _evaluate(cfg: DetectConfig, run: Run | None) -> None:
    state_dict, source = None, cfg.weights
    if run is not None:
        path, state = run.checkpoint(cfg.checkpoint_name)
        if state.get("kind") != "detector":
            raise UserError(f"{path} is no checkpoint of `zoo detect`; `zoo eval run={run.path}` evaluates classifiers")
        state_dict, source = state["state_dict"], str(path)
    elif cfg.weights is None:
        raise UserError("eval=true needs run=RUN_FOLDER, or weights=FILE with model, detector and data")
    data = open_coco(cfg.data, need_train=False)
    cfg.model.pretrained = False
    world = join_world("auto")
    folder: Path | None = None
    try:
        if world.is_primary:
            folder = run.path / f"evaluation-{cfg.checkpoint_name}" if run is not None else app._new_run_folder(cfg)  # type: ignore[arg-type]
            folder.mkdir(exist_ok=True)
        folder = Path(world.from_primary(str(folder))).resolve()
        if cfg.threads is not None:
            torch.set_num_threads(cfg.threads)
        config = compose_mmdet(cfg, data, folder)
        if cfg.dry_run:
            _limit(config)
        signals = _Signals()
        hook = RunFolderHook(cfg, folder, world, signals)
        (folder / "unreadable_images.jsonl").unlink(missing_ok=True)
        with _quiet(cfg.debug):
            runner = build_runner(config, hook, world, train=False)
            if state_dict is not None:
                _load_strictly(runner, state_dict, str(source))
            else:
                _load_weights(runner, str(source))
            runner.test()
        if world.is_primary:
            if run is None:
                write_atomic(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(cfg), resolve=True))
            config.dump(folder / "detector.py")
            dataset = runner.test_loop.dataloader.dataset
            result = {
                **{k: v for k, v in hook.metrics.items() if "mAP" in k},
                "images": len(dataset),
                "unreadable_images": unreadable_images(folder / "unreadable_images.jsonl"),
                "weights": source,
                "model": cfg.model.name,
                "detector": cfg.detector.name,
                "data": cfg.data.name,
                "versions": versions(),
            }
            write_atomic(folder / "summary.json", json.dumps(result, indent=2) + "\n")
            if cfg.out is not None:
                write_atomic(cfg.out, json.dumps(result, indent=2) + "\n")
            hook.gallery.write(folder / "predictions.png", dataset)
            print(_last_line(result, folder), flush=True)
    finally:
        world.leave()


def _value(overrides: Sequence[str], key: str) -> str | None:
    found = [o.split("=", 1)[1].strip("'\"") for o in overrides if o.lstrip("+").startswith(f"{key}=")]
    return found[-1] if found and found[-1] not in ("", "null") else None


def _detect(arguments: Any) -> None:
    overrides, search_path = arguments.overrides, arguments.search_path
    if arguments.multirun:
        raise UserError("zoo detect has no --multirun; call it once per run")
    evaluating = (_value(overrides, "eval") or "false").lower() == "true"
    folder = _value(overrides, "run") if evaluating else _value(overrides, "resume")
    run = load_run(folder) if folder is not None else None
    if run is not None:
        forbid_targets(run.config)
        prepare(search_path, overrides)
        if "detector" not in run.config:
            raise UserError(f"{run.path} is no run of `zoo detect`; `zoo train resume=` and `zoo eval run=` take it")
        base = typed(run.config, DetectConfig)
        if evaluating:
            config = _merged(base, overrides, _EVAL_KEYS, ("data.",), "an evaluation of the run")
        else:
            config = _merged(base, overrides, _RESUME_KEYS, _RESUME_SECTIONS, "a resumed run")
        config.resume = None
    else:
        config = detect_config(overrides, search_path)
    if arguments.show:
        recipe = RECIPES.get(_value(overrides, "experiment") or "") if run is None else None
        if recipe is not None:
            print(describe(recipe, detect_config([f"experiment={recipe.name}"]), config))
        print(OmegaConf.to_yaml(config), end="")
        return
    cfg = _settings(config)
    if cfg.eval:
        _evaluate(cfg, run)
    else:
        _train(cfg, run)


def _help() -> str:
    groups = []
    for name in _GROUPS:
        root = "zoo.configs.detection" if name in _OWN_GROUPS else "zoo.configs"
        found = [p.name.removesuffix(".yaml") for p in (files(root) / name).iterdir() if p.name.endswith(".yaml")]
        names = list(RECIPES) if name == "experiment" else found
        groups.append(f"  {name:<11} {', '.join(sorted(names))}")
    return (
        "usage: zoo detect [--config-dir DIR] [--cfg job] [key=value ...]\n\n"
        "  zoo detect data=coco data.root=DIR model=nat_tiny detector=mask_rcnn schedule=3x\n"
        "  zoo detect eval=true run=RUN_FOLDER           zoo detect resume=RUN_FOLDER\n\n"
        "choices, GROUP=NAME (model= also takes every name that `zoo list` and timm know):\n"
        + "\n".join(groups)
        + f"\n\nkeys, KEY=VALUE, with their defaults:\n{OmegaConf.to_yaml(detect_config([]))}"
    )


app.COMMANDS["detect"] = (_detect, "detect")


def main(argv: Sequence[str]) -> int:
    """Run `zoo detect` and return the exit code; errors become one line on stderr.

    Args:
        argv: Hydra overrides; `eval=true` evaluates, `resume=FOLDER` continues, `debug=true` shows tracebacks.
    """
    if any(a in ("-h", "--help") for a in argv):
        print(_help())
        return 0
    return app.main("detect", argv)

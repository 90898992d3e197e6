"""`zoo detect`: mmdet's detectors on this package's backbones.

Composes a config of mmdet's, writes it into the run folder as `detector.py` (which mmdet's own tools take), and runs
mmengine's Runner on it. Exit codes and the run folder are those of `zoo train`.
"""

import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from omegaconf import DictConfig, OmegaConf

from zoo.errors import UserError
from zoo.train.compose import compose_config, from_container, override_value
from zoo.train.images import PixelRanges
from zoo.train.resume import Changes, resumed_config
from zoo.train.runs import Run, check_writable, claim_folder, load_run, newest_intact, write_atomic, write_config
from zoo.train.shell import Arguments, Command, group_choices, run_command
from zoo.train.state import World, determinism
from zoo.train.stop import Signals

from .checkpoints import checkpoint_classes, read_detector_checkpoint
from .coco_data import CocoFiles, Known, open_coco
from .config import DETECT, DetectConfig
from .loops import unreadable_images
from .mmdet_config import MASKED, PlainConfig, compose_mmdet
from .recipes import RECIPES, describe, offered_recipes
from .run_hook import RunFolderHook, packages, plain_model

__all__ = ["COMMAND", "Job", "build_only", "build_runner", "detect_config", "main", "prepare"]

_RESUMED = Changes(
    "a resumed run",
    (
        "max_steps", "eval_every", "log_every", "val_batch_size", "pictures", "debug", "data.root", "data.num_workers",
    ),
    ("checkpoint.", "logger."),
    "start a new run instead",
)  # fmt: skip
_EVALUATED = Changes(
    "an evaluation of the run",
    (
        "eval", "run", "dry_run", "checkpoint_name", "out", "val_batch_size", "pictures", "threads", "debug",
        "log_every",
    ),
    ("data.",),
    "leave it out",
)  # fmt: skip
_LEFTOVERS = ("detector.py", "unreadable_images.jsonl", "mmengine", "annotations")  # of a start that came to nothing
_DRY_IMAGES = 4
_Checkpoint = tuple[Path, dict[str, Any]]
_STOCK_HOOKS = ("timer", "logger", "checkpoint")  # for mmdet's own tools; the run folder's hook stands in for them
_TRAINING = ("train_dataloader", "train_cfg", "optim_wrapper", "param_scheduler")
_VALIDATION = ("val_dataloader", "val_cfg", "val_evaluator")
_TEST = ("test_dataloader", "test_cfg", "test_evaluator")


def detect_config(overrides: Sequence[str], search_path: Sequence[str] = ()) -> DictConfig:
    """Compose configs/detect.yaml with overrides.

    Raises:
        UserError: a key, a value or a choice is wrong; the message is one line.
    """
    with offered_recipes():
        return compose_config(DETECT, overrides, search_path)


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
    for key in _TEST if train else (*_TRAINING, *_VALIDATION):
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


def _limit(config: Config) -> None:
    """Let a dry run evaluate a few images only."""
    for key in ("val_dataloader", "test_dataloader"):
        config[key].dataset.dataset.indices = _DRY_IMAGES


def build_only(cfg: DetectConfig, config: Config) -> str:
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


@dataclass(frozen=True)
class Job:
    """A detector that is ready to be trained or evaluated, in one of the processes of a run."""

    cfg: DetectConfig
    run: Run | None  # that is resumed or evaluated
    world: World
    folder: Path
    config: PlainConfig  # mmdet's
    runner: Runner
    hook: RunFolderHook
    weights: str | None  # where they came from, unless the run's checkpoint is resumed


@contextmanager
def prepare(cfg: DetectConfig, run: Run | None, data: CocoFiles, evaluated: _Checkpoint | None = None) -> Iterator[Job]:
    """Make everything ready for training or, with cfg.eval, for an evaluation; at the end let go of it.

    Args:
        cfg: the validated configuration.
        run: the run that is resumed or evaluated.
        data: the data set, which is there.
        evaluated: path and state of the run's checkpoint that is evaluated; read here if None.

    Raises:
        UserError: weights, model, device or folder do not fit the configuration.
    """
    source, state_dict = _weights(cfg, run, evaluated or _evaluated(cfg, run))
    own = None if run is None else run.path
    if cfg.eval:
        cfg.model.pretrained = False
        own = None if own is None else own / f"evaluation-{cfg.checkpoint_name}"
    elif cfg.amp != "none" and not torch.cuda.is_available():
        raise UserError(f"amp={cfg.amp} needs a GPU, for mmengine has no mixed precision on the CPU; use amp=none")
    with claim_folder(cfg, own, "auto", "detect", leftovers=_LEFTOVERS) as (world, folder):
        folder = folder.resolve()
        cfg.run_dir = str(folder)
        if cfg.threads is not None:
            torch.set_num_threads(cfg.threads)
        data = data.written(folder, world.is_primary)
        world.from_primary(None)  # the others read what the first one has written
        config = compose_mmdet(cfg, data, folder)
        if cfg.dry_run:
            _limit(config)
        if world.is_primary:
            if run is None:  # that of a resumed run is written when all checks have passed
                write_config(folder, cfg)
            config.dump(folder / "detector.py")
            if cfg.eval:
                (folder / "unreadable_images.jsonl").unlink(missing_ok=True)
        signals = Signals()
        hook = RunFolderHook(cfg, folder, world, signals, data.ranges)
        # an evaluation has nothing to save, so that a signal ends it at once
        with (
            nullcontext() if cfg.eval else signals.installed(),
            determinism(cfg.deterministic),
            _quiet(cfg.debug),
        ):
            runner = build_runner(config, hook, world, train=not cfg.eval)
            if state_dict is not None:
                _load_strictly(runner, state_dict, str(source))
            yield Job(cfg, run, world, folder, config, runner, hook, source)


def _evaluated(cfg: DetectConfig, run: Run | None) -> _Checkpoint | None:
    """Path and state of the checkpoint that is evaluated, where it is a run's."""
    if run is None or not cfg.eval:
        return None
    path, state = run.checkpoint(cfg.checkpoint_name)
    if state.get("kind") != "detector":
        raise UserError(f"{path} is no checkpoint of `zoo detect`; `zoo eval run={run.path}` evaluates classifiers")
    return path, state


def _known(cfg: DetectConfig, run: Run | None, evaluated: _Checkpoint | None) -> Known:
    """What the run or the detector that is taken up was trained on."""
    if run is None:
        classes = checkpoint_classes(cfg.weights) if cfg.eval and cfg.weights is not None else None
        return Known(classes, f"the detector {cfg.weights}")
    found = evaluated or newest_intact(run.path)
    if found is None:
        return Known()
    state = found[1]
    classes = ((state.get("meta") or {}).get("dataset_meta") or {}).get("classes")
    return Known(
        tuple(classes) if classes else None,
        f"the run {run.path}",
        whole=not cfg.eval,
        ranges=PixelRanges.from_state(state["ranges"]) if state.get("ranges") else None,
    )


def _weights(
    cfg: DetectConfig, run: Run | None, evaluated: _Checkpoint | None
) -> tuple[str | None, dict[str, Any] | None]:
    """What the detector begins with, and where it is from: a run's that is evaluated, a file's, or nothing."""
    if evaluated is not None:
        return str(evaluated[0]), evaluated[1]["state_dict"]
    if run is not None or cfg.weights is None:
        return None, None
    try:
        return cfg.weights, read_detector_checkpoint(cfg.weights)
    except FileNotFoundError as error:
        raise UserError(f"{error}; give weights=FILE") from error
    except RuntimeError as error:
        raise UserError(" ".join(str(error).split())) from error


def _load_strictly(runner: Runner, state_dict: dict[str, Any], path: str) -> None:
    try:
        plain_model(runner).load_state_dict(state_dict)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit the detector: {' '.join(str(error).split())[:600]}") from error


def _train(job: Job) -> dict[str, Any]:
    """Train to the end; the summary."""
    try:
        job.runner.train()
    finally:
        job.hook.recorder.close()
    return job.hook.summary


def _evaluate(job: Job) -> dict[str, Any]:
    """Evaluate, and write what was found; the summary."""
    job.runner.test()
    if not job.world.is_primary:
        return {}
    dataset = job.runner.test_loop.dataloader.dataset
    result = {
        **{k: v for k, v in job.hook.metrics.items() if "mAP" in k},
        "images": len(dataset),
        "unreadable_images": unreadable_images(job.folder / "unreadable_images.jsonl"),
        "weights": job.weights,
        "model": job.cfg.model.name,
        "detector": job.cfg.detector.name,
        "data": job.cfg.data.name,
        "versions": packages(),
    }
    text = json.dumps(result, indent=2, allow_nan=False) + "\n"
    write_atomic(job.folder / "summary.json", text)
    if job.cfg.out is not None:
        write_atomic(job.cfg.out, text)
    job.hook.gallery.write(job.folder / "predictions.png", dataset)
    return result


def _last_line(summary: dict[str, Any], folder: Path) -> str:
    dry = "dry run passed: one step, saved, evaluated; " if summary.get("dry_run") else ""
    parts = [f"box AP {summary['bbox_mAP']:.3f}, AP50 {summary['bbox_mAP_50']:.3f}"]
    if summary.get("segm_mAP") is not None:
        parts.append(f"mask AP {summary['segm_mAP']:.3f}, AP50 {summary['segm_mAP_50']:.3f}")
    bad = summary["unreadable_images"]
    note = f"{len(bad)} images could not be read, the first is {bad[0]}; " if bad else ""
    return f"{dry}{note}{'; '.join(parts)} on {summary['images']} images; run folder: {folder}"


def _composed(arguments: Arguments) -> tuple[DictConfig, Run | None]:
    """The configuration of a start, and the run that it resumes or evaluates."""
    overrides, search_path = arguments.overrides, arguments.search_path
    evaluating = (override_value(overrides, "eval") or "false").lower() == "true"
    folder = override_value(overrides, "run" if evaluating else "resume")
    if evaluating and override_value(overrides, "resume") is not None:
        raise UserError(
            "resume and eval=true exclude each other; evaluate a run with `zoo detect eval=true run=FOLDER`"
        )
    if not evaluating and override_value(overrides, "run") is not None:
        folder = override_value(overrides, "run")
        raise UserError(
            f"run={folder} is read in evaluations alone: `zoo detect eval=true run={folder}` evaluates it, "
            f"`zoo detect resume={folder}` continues it"
        )
    if folder is None:
        return detect_config(overrides, search_path), None
    run = load_run(folder)
    if "detector" not in run.config:
        raise UserError(f"{run.path} is no run of `zoo detect`; `zoo train resume=` and `zoo eval run=` take it")
    changes = _EVALUATED if evaluating else _RESUMED
    return resumed_config(run, DETECT, changes, overrides, search_path), run


def _detect(arguments: Arguments) -> None:
    config, run = _composed(arguments)
    if arguments.show:
        recipe = RECIPES.get(override_value(arguments.overrides, "experiment") or "") if run is None else None
        if recipe is not None:
            print(describe(recipe, detect_config([f"experiment={recipe.name}"]), config))
        print(OmegaConf.to_yaml(config), end="")
        return
    cfg = from_container(config, DETECT)
    if cfg.eval and run is None and cfg.weights is None:
        raise UserError("eval=true needs run=RUN_FOLDER, or weights=FILE with model, detector and data")
    if cfg.eval and cfg.out is not None:
        check_writable(Path(cfg.out))
    evaluated = _evaluated(cfg, run)
    data = open_coco(
        cfg.data,
        need_train=not cfg.eval,
        may_lack=cfg.dry_run and not cfg.eval,
        masks=cfg.detector.name in MASKED,
        known=_known(cfg, run, evaluated),
    )
    if not data.present:
        built = build_only(cfg, compose_mmdet(cfg, data, Path(cfg.run_root)))
        print(f"dry run passed: {built}; no step was made, for data.root is not set", flush=True)
        return
    with prepare(cfg, run, data, evaluated) as job:
        if job.world.is_primary:
            for note in data.notes:
                print(note, flush=True)
        summary = _evaluate(job) if cfg.eval else _train(job)
        if job.world.is_primary:
            print(_last_line(summary, job.folder), flush=True)


def _choices() -> dict[str, Sequence[str]]:
    shared = group_choices("zoo.configs", ("logger", "model"))
    return {"experiment": sorted(RECIPES), **shared, **group_choices("zoo.configs.detection")}


COMMAND = Command(
    "detect",
    DETECT,
    _detect,
    _choices,
    examples=(
        "zoo detect data=coco data.root=DIR model=nat_tiny detector=mask_rcnn schedule=3x",
        "zoo detect eval=true run=RUN_FOLDER           zoo detect resume=RUN_FOLDER",
    ),
)


def main(argv: Sequence[str]) -> int:
    """Run `zoo detect` and return the exit code; errors become one line on stderr.

    Args:
        argv: Hydra overrides; `eval=true` evaluates, `resume=FOLDER` continues, `debug=true` shows tracebacks.
    """
    return run_command(COMMAND, argv)

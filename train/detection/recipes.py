"""The published COCO recipes, a row each: `zoo detect experiment=NAME data.root=DIR` trains one.

A row says what the original configuration says and what was published for it; the name, the cost, the command and the
addresses of the original's files follow. `zoo detect experiment=NAME --cfg job` prints a recipe with its configuration.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

__all__ = ["RECIPES", "Recipe", "describe", "offered_recipes"]

_GPUS, _IMAGES_PER_GPU = 8, 2  # of every original
_TRAIN_IMAGES = 118_287  # of COCO train2017
_EPOCHS = {"1x": 12, "3x": 36}
# By the file under configs/detection/detector: the name in full, the one in our names, the one without underscores.
_DETECTORS = {
    "cascade_mask_rcnn_4conv": ("Cascade Mask R-CNN", "cascade_mask_rcnn", "cascademaskrcnn"),
    "mask_rcnn": ("Mask R-CNN", "mask_rcnn", "maskrcnn"),
    "retinanet": ("RetinaNet", "retinanet", "retinanet"),
}


@dataclass(frozen=True)
class Paper:
    """What the recipes of a paper share.

    In the templates of addresses {detector}, {joined} (the detector without underscores), {model}, {schedule} and
    {suffix} stand for the row's own.
    """

    title: str
    source: str
    checkpoint: str | None = None
    spellings: Mapping[str, str] = field(default_factory=dict)  # of {joined}, where the authors have another


@dataclass(frozen=True)
class Recipe:
    """One published detector."""

    title: str  # of the backbone
    paper: Paper
    model: str
    detector: str
    schedule: str
    drop_path: float
    box_ap: float
    mask_ap: float | None = None
    parameters_m: float | None = None
    gflops: int | None = None  # at 1280 x 800
    lr: float = 1e-4  # of 16 images per update
    weight_decay: float = 0.05
    amp: str = "fp16"
    augment: str = "detr"
    kwargs: Mapping[str, Any] = field(default_factory=dict)  # model.kwargs
    extras: Mapping[str, Any] = field(default_factory=dict)  # other keys of `model`
    suffix: str = ""  # of the name, where a paper has two recipes of a model with a detector
    their_suffix: str = ""  # of the original's files
    remark: str = ""

    @property
    def name(self) -> str:
        return f"coco_{_DETECTORS[self.detector][1]}_{self._size}_{self.schedule}{self.suffix}"

    @property
    def _size(self) -> str:
        """The model as detectors' names have it: without its weights' data set."""
        return self.model.removesuffix("_21k")

    def _filled(self, template: str) -> str:
        _, detector, joined = _DETECTORS[self.detector]
        return template.format(
            detector=detector,
            joined=self.paper.spellings.get(joined, joined),
            model=self._size,
            schedule=self.schedule,
            suffix=self.their_suffix,
        )

    @property
    def checkpoint(self) -> str | None:
        """The address of the published detector."""
        return self._filled(self.paper.checkpoint) if self.paper.checkpoint else None

    @property
    def command(self) -> str:
        return f"torchrun --nproc-per-node={_GPUS} -m zoo detect experiment={self.name} data.root=COCO_FOLDER"

    @property
    def head(self) -> str:
        """Title, expected result, cost, command and source, as the comment that opens a configuration."""
        expected = f"box AP {self.box_ap}" + (f", mask AP {self.mask_ap}" if self.mask_ap is not None else "")
        size = f"; {self.parameters_m} M parameters, {self.gflops} GFLOPs at 1280 x 800" if self.parameters_m else ""
        epochs, images = _EPOCHS[self.schedule], _GPUS * _IMAGES_PER_GPU
        updates = epochs * _TRAIN_IMAGES // images // 1000
        lines = [
            f"{self.title} with {_DETECTORS[self.detector][0]}, {self.schedule}, on COCO 2017 ({self.paper.title}).",
            f"Expected: {expected} on val2017{size} (published).",
            f"Cost: {epochs} epochs of {_TRAIN_IMAGES // 1000}k images, {images} images per update "
            f"({updates}k updates), {_GPUS} GPUs in the original.",
            f"  {self.command}",
            f"Source: {self._filled(self.paper.source)}",
            self.remark,
        ]
        return "\n".join(f"# {line}" for line in lines if line)

    @property
    def config(self) -> dict[str, Any]:
        """The configuration file that this row is, with its list of defaults."""
        model: dict[str, Any] = {"name": self.model, "pretrained": True, "drop_path_rate": self.drop_path}
        model |= self.extras
        if self.kwargs:
            model["kwargs"] = dict(self.kwargs)
        notes = {
            "box_ap": self.box_ap,
            "mask_ap": self.mask_ap,
            "parameters_m": self.parameters_m,
            "checkpoint": self.checkpoint,
        }
        return {
            "defaults": [
                {"override /model": "default"},
                {"override /detector": self.detector},
                {"override /schedule": self.schedule},
                {"override /data": "coco"},
                "_self_",
            ],
            "batch_size": _IMAGES_PER_GPU,
            "amp": self.amp,
            "model": model,
            "data": {"augment": self.augment},
            "schedule": {"lr": self.lr, "weight_decay": self.weight_decay},
            "notes": {key: value for key, value in notes.items() if value is not None},
        }


_SHI = "SHI-Labs/Neighborhood-Attention-Transformer, detection/configs"
_NAT = Paper(
    "Neighborhood Attention Transformer, arXiv:2204.07143",
    f"{_SHI}/nat/{{detector}}_{{model}}_{{schedule}}_coco.py",
    "https://shi-labs.com/projects/nat/checkpoints/DET/{model}_{joined}.pth",
)
_DINAT = Paper(
    "Dilated Neighborhood Attention Transformer, arXiv:2209.15001",
    f"{_SHI}/dinat/{{detector}}_{{model}}_{{schedule}}_coco.py",
    "https://shi-labs.com/projects/dinat/checkpoints/coco/{joined}_{model}.pth",
    {"cascademaskrcnn": "cascadedmaskrcnn"},
)
_DINAT_S = replace(_DINAT, source=_DINAT.source.replace("/dinat/", "/dinat_s/"))
_DAVIT = Paper(
    "DaViT: Dual Attention Vision Transformers, arXiv:2204.03645",
    "dingmyu/davit, mmdet/configs/davit_{joined}_{schedule}_coco.py",
)
_BIFORMER = Paper(
    "BiFormer: Vision Transformer with Bi-Level Routing Attention, arXiv:2303.08810",
    "rayleizhu/BiFormer, object_detection/configs/coco/{joined}.{schedule}.{model}.py",
)
_LITV2_FILE = "{detector}_{model}_fpn_{schedule}_coco{suffix}"
_LITV2 = Paper(
    "Fast Vision Transformers with HiLo Attention, arXiv:2205.13213",
    f"ziplab/LITv2, detection/configs/litv2/{_LITV2_FILE}.py",
    f"https://github.com/ziplab/LITv2/releases/download/v1.0/{_LITV2_FILE}.pth",
)


_CASCADE, _MASK, _RETINA = _DETECTORS
_STAGE = {6: [1, 3, 1, 5, 1, 7], 18: [1, 3, 1, 5, 1, 7] * 3}  # dilations of the third stage, by its depth
_WEIGHTS = {"large": "_21k"}  # DiNAT's sizes whose weights are of ImageNet-22k, in the model's name
_DAVIT_REMARK = "The repository has the tiny model's recipe alone; the drop path of this size is our assumption."


def _nat(size: str, detector: str, drop_path: float, **row: Any) -> Recipe:
    return Recipe(f"NAT-{size.title()}", _NAT, f"nat_{size}", detector, "3x", drop_path, **row)


def _dinat(size: str, detector: str, drop_path: float, **row: Any) -> Recipe:
    dilations = [[1, 28, 1], [1, 7, 1, 14], _STAGE[6 if size == "mini" else 18], [1, 3, 1, 3, 1]]
    model = f"dinat_{size}{_WEIGHTS.get(size, '')}"
    return Recipe(
        f"DiNAT-{size.title()}", _DINAT, model, detector, "3x", drop_path, kwargs={"dilations": dilations}, **row
    )


def _dinat_s(size: str, detector: str, drop_path: float, **row: Any) -> Recipe:
    dilations = [[1, 28], [1, 14], _STAGE[6 if size == "tiny" else 18], [1, 3]]
    model = f"dinat_s_{size}{_WEIGHTS.get(size, '')}"
    return Recipe(
        f"DiNAT_s-{size.title()}", _DINAT_S, model, detector, "3x", drop_path, kwargs={"dilations": dilations}, **row
    )


def _davit(size: str, detector: str, schedule: str, drop_path: float, **row: Any) -> Recipe:
    if detector == _RETINA:
        row["extras"] = {"out_norms": [1, 2, 3]}
    if size != "tiny":
        row["remark"] = _DAVIT_REMARK
    title = f"DaViT-{size[0].upper()}"
    return Recipe(title, _DAVIT, f"zoo_davit_{size}", detector, schedule, drop_path, amp="none", **row)


def _biformer(size: str, detector: str, drop_path: float, **row: Any) -> Recipe:
    row |= {"augment": "flip", "kwargs": {"n_win": 16, "auto_pad": True}, "extras": {"norm_eval": True}}
    return Recipe(f"BiFormer-{size[0].upper()}", _BIFORMER, f"biformer_{size}", detector, "1x", drop_path, **row)


def _litv2(size: str, window: int, detector: str, drop_path: float, **row: Any) -> Recipe:
    row |= {"augment": "flip", "weight_decay": 1e-4, "kwargs": {"local_ws": [0, 0, window, 1]}}
    if window == 4:
        row |= {"suffix": "_ws4", "their_suffix": "_ws_4"}
    title = f"LITv2-{size.upper()} (windows of {window})"
    return Recipe(title, _LITV2, f"litv2_{size}", detector, "1x", drop_path, **row)


_ROWS = (
    _nat("mini", _MASK, 0.2, box_ap=46.5, mask_ap=41.7, parameters_m=40, gflops=225),
    _nat("tiny", _MASK, 0.2, box_ap=47.7, mask_ap=42.6, parameters_m=48, gflops=258),
    _nat("small", _MASK, 0.35, box_ap=48.4, mask_ap=43.2, parameters_m=70, gflops=330),
    _nat("mini", _CASCADE, 0.2, box_ap=50.3, mask_ap=43.6, parameters_m=77, gflops=704),
    _nat("tiny", _CASCADE, 0.3, box_ap=51.4, mask_ap=44.5, parameters_m=85, gflops=737),
    _nat("small", _CASCADE, 0.3, box_ap=52.0, mask_ap=44.9, parameters_m=108, gflops=809),
    _nat("base", _CASCADE, 0.5, box_ap=52.3, mask_ap=45.1, parameters_m=147, gflops=931),
    _dinat("mini", _MASK, 0.2, box_ap=47.2, mask_ap=42.5, parameters_m=40, gflops=225),
    _dinat("tiny", _MASK, 0.2, box_ap=48.6, mask_ap=43.5, parameters_m=48, gflops=258),
    _dinat("small", _MASK, 0.35, box_ap=49.3, mask_ap=44.0, parameters_m=70, gflops=330),
    _dinat("mini", _CASCADE, 0.2, box_ap=51.2, mask_ap=44.4, parameters_m=77, gflops=704),
    _dinat("tiny", _CASCADE, 0.3, box_ap=52.2, mask_ap=45.1, parameters_m=85, gflops=737),
    _dinat("small", _CASCADE, 0.5, box_ap=52.9, mask_ap=45.8, parameters_m=108, gflops=809),
    _dinat("base", _CASCADE, 0.6, box_ap=53.4, mask_ap=46.2, parameters_m=147, gflops=931, lr=7.5e-5),
    _dinat("large", _CASCADE, 0.6, box_ap=55.3, mask_ap=47.8, parameters_m=258, gflops=1276, lr=7.5e-5, amp="none"),
    _dinat_s("tiny", _MASK, 0.2, box_ap=46.6, mask_ap=42.1, parameters_m=48, gflops=263),
    _dinat_s("small", _MASK, 0.35, box_ap=48.6, mask_ap=43.5, parameters_m=69, gflops=350),
    _dinat_s("tiny", _CASCADE, 0.3, box_ap=51.0, mask_ap=44.1, parameters_m=86, gflops=742),
    _dinat_s("small", _CASCADE, 0.5, box_ap=52.3, mask_ap=45.2, parameters_m=107, gflops=829),
    _dinat_s("base", _CASCADE, 0.6, box_ap=52.6, mask_ap=45.3, parameters_m=145, gflops=966, lr=7.5e-5),
    _dinat_s("large", _CASCADE, 0.6, box_ap=54.8, mask_ap=47.2, parameters_m=253, gflops=1357, lr=5e-5),
    _davit("tiny", _MASK, "1x", 0.1, box_ap=45.0, mask_ap=41.1, parameters_m=47.8, gflops=263),
    _davit("small", _MASK, "1x", 0.2, box_ap=47.7, mask_ap=42.9, parameters_m=69.2, gflops=351),
    _davit("base", _MASK, "1x", 0.3, box_ap=48.2, mask_ap=43.3, parameters_m=107.3, gflops=491),
    _davit("tiny", _MASK, "3x", 0.2, box_ap=47.4, mask_ap=42.9, parameters_m=47.8, gflops=263),
    _davit("small", _MASK, "3x", 0.2, box_ap=49.5, mask_ap=44.3, parameters_m=69.2, gflops=351),
    _davit("base", _MASK, "3x", 0.3, box_ap=49.9, mask_ap=44.6, parameters_m=107.3, gflops=491),
    _davit("tiny", _RETINA, "1x", 0.1, box_ap=44.0, parameters_m=38.5, gflops=244),
    _davit("small", _RETINA, "1x", 0.2, box_ap=46.0, parameters_m=59.9, gflops=332),
    _davit("base", _RETINA, "1x", 0.3, box_ap=46.7, parameters_m=98.5, gflops=471),
    _davit("tiny", _RETINA, "3x", 0.2, box_ap=46.5, parameters_m=38.5, gflops=244),
    _davit("small", _RETINA, "3x", 0.2, box_ap=48.2, parameters_m=59.9, gflops=332),
    _davit("base", _RETINA, "3x", 0.3, box_ap=48.7, parameters_m=98.5, gflops=471),
    _biformer("small", _MASK, 0.2, box_ap=47.8, mask_ap=43.2),
    _biformer("base", _MASK, 0.3, box_ap=48.6, mask_ap=43.7),
    _biformer("small", _RETINA, 0.2, box_ap=45.9, weight_decay=1e-4),
    _biformer("base", _RETINA, 0.3, box_ap=47.1, weight_decay=1e-4),
    _litv2("s", 2, _MASK, 0.2, box_ap=44.9, mask_ap=40.8, parameters_m=47, gflops=261, lr=2e-4),
    _litv2("s", 4, _MASK, 0.2, box_ap=44.7, mask_ap=40.7, parameters_m=47, gflops=249, lr=2e-4),
    _litv2("m", 2, _MASK, 0.2, box_ap=46.8, mask_ap=42.3, parameters_m=68, gflops=367, lr=2e-4),
    _litv2("m", 4, _MASK, 0.2, box_ap=46.5, mask_ap=42.0, parameters_m=68, gflops=315, lr=2e-4),
    _litv2("b", 2, _MASK, 0.3, box_ap=47.3, mask_ap=42.6, parameters_m=106, gflops=500, lr=2e-4),
    _litv2("b", 4, _MASK, 0.3, box_ap=46.8, mask_ap=42.3, parameters_m=106, gflops=449, lr=2e-4),
    _litv2("s", 2, _RETINA, 0.2, box_ap=44.0, parameters_m=38, gflops=242),
    _litv2("s", 4, _RETINA, 0.2, box_ap=43.7, parameters_m=38, gflops=230),
    _litv2("m", 2, _RETINA, 0.2, box_ap=46.0, parameters_m=59, gflops=348),
    _litv2("m", 4, _RETINA, 0.2, box_ap=45.8, parameters_m=59, gflops=312),
    _litv2("b", 2, _RETINA, 0.3, box_ap=46.7, parameters_m=97, gflops=481),
    _litv2("b", 4, _RETINA, 0.3, box_ap=46.3, parameters_m=97, gflops=430),
)
RECIPES: Mapping[str, Recipe] = {recipe.name: recipe for recipe in sorted(_ROWS, key=lambda recipe: recipe.name)}


@contextmanager
def offered_recipes() -> Iterator[None]:
    """Make every recipe a choice `experiment=NAME` of Hydra's, which `zoo train` in the same process shall not see."""
    store = ConfigStore.instance()
    for name, recipe in RECIPES.items():
        store.store(group="experiment", name=name, node=recipe.config, package="_global_")
    try:
        yield
    finally:
        for name in RECIPES:
            del store.repo["experiment"][f"{name}.yaml"]


def _leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def describe(recipe: Recipe, published: DictConfig, config: DictConfig) -> str:
    """A recipe's head, and what a configuration made from it has otherwise than the published one."""
    ours, theirs = (dict(_leaves(OmegaConf.to_container(c))) for c in (config, published))
    changed = [f"{key}={value}" for key, value in ours.items() if theirs.get(key, ours) != value and key != "data.root"]
    changed = [" ".join(text.split()) for text in changed]  # a comment is one line
    changed += [f"~{key}" for key in theirs if key not in ours]
    return recipe.head + (f"\n# Otherwise here: {', '.join(changed)}" if changed else "")

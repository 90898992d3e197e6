"""COCO average precision: mmdet's CocoMetric on faster-coco-eval, with pycocotools on request."""

import contextlib
import io
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from mmdet.evaluation import CocoMetric as MmdetCocoMetric
from mmengine.logging import MMLogger

from zoo.errors import UserError
from zoo.train.loggers import write_csv

from .annotations import number_anew
from .registry import METRICS

__all__ = ["CocoMetric", "coco_average_precision"]

_STATS = ("mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l", "AR@1", "AR@10", "AR@100", "AR_s", "AR_m", "AR_l")
_RECALL = _STATS.index("AR@1")


def coco_average_precision(
    ground_truth: str | Path | Mapping[str, Any],
    predictions: str | Path | Sequence[Mapping[str, Any]],
    iou_type: str = "bbox",
    *,
    engine: str = "faster_coco_eval",
    max_detections: Sequence[int] = (1, 10, 100),
    category_ids: Sequence[int] | None = None,
    per_class: dict[int, dict[str, float]] | None = None,
) -> dict[str, float]:
    """Average precision and recall as the COCO challenge defines them (cocodataset.org/#detection-eval).

    Args:
        ground_truth: annotations in COCO's format, or a file of them; crowd regions are neither hits nor misses.
        predictions: dicts of image_id, category_id, score and bbox (x, y, w, h) or segmentation (RLE), or a file.
        iou_type: "bbox" or "segm".
        engine: "faster_coco_eval", or "pycocotools", the original.
        max_detections: how many detections per image count.
        category_ids: evaluate these categories only.
        per_class: takes mAP, mAP_50 and mAP_75 of every category that is evaluated, by its id.

    Returns:
        mAP, mAP_50, mAP_75, mAP_s, mAP_m, mAP_l, AR@1, AR@10, AR@100, AR_s, AR_m, AR_l in 0..1; -1 where no category
        has ground truth.

    Raises:
        ValueError: an unknown engine or iou_type.
    """
    if iou_type not in ("bbox", "segm"):
        raise ValueError(f"coco_average_precision: iou_type is {iou_type!r}; it takes 'bbox' or 'segm'")
    truth = ground_truth if isinstance(ground_truth, Mapping) else json.loads(Path(ground_truth).read_text())
    found = predictions if not isinstance(predictions, (str, Path)) else json.loads(Path(predictions).read_text())
    # copies: both packages write areas and ids into what they are given
    truth = {**truth, "annotations": [_whole(a) for a in truth["annotations"]]}
    number_anew(truth["annotations"])
    if not found:  # which neither package evaluates
        for category in category_ids or [c["id"] for c in truth["categories"]] if per_class is not None else ():
            own = [a for a in truth["annotations"] if a["category_id"] == category]
            figures = _nothing_found({**truth, "annotations": own})
            per_class[category] = {name: figures[name] for name in _STATS[:3]}  # type: ignore[index]
        return _nothing_found(truth)
    if engine == "faster_coco_eval":
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as Evaluation
    elif engine == "pycocotools":
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval as Evaluation
    else:
        raise ValueError(f"coco_average_precision: engine is {engine!r}; it takes 'faster_coco_eval' or 'pycocotools'")
    truth.setdefault("info", {})
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        detections = [dict(p) for p in found]
        if iou_type == "segm":
            for detection in detections:
                detection.pop("bbox", None)  # else its area, not the mask's, decides small, medium or large
        evaluation = Evaluation(coco, coco.loadRes(detections), iou_type)
        evaluation.params.maxDets = list(max_detections)
        if category_ids is not None:
            evaluation.params.catIds = list(category_ids)
        evaluation.evaluate()
        evaluation.accumulate()
    if per_class is not None:
        table = np.asarray(evaluation.eval["precision"])
        for number, category in enumerate(evaluation.params.catIds):
            per_class[int(category)] = _averages(table[:, :, number : number + 1], evaluation.params.iouThrs)
    return _summarize(evaluation)


def _whole(annotation: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of an annotation with crowd flag and area, which the packages need, the latter from its box."""
    box = annotation["bbox"]
    return {"iscrowd": 0, "area": box[2] * box[3], **annotation}


def _nothing_found(truth: Mapping[str, Any]) -> dict[str, float]:
    """Zero for every figure that has ground truth, -1 for the others."""
    areas = [a["area"] for a in truth["annotations"] if not a.get("iscrowd")]
    present = {
        "s": any(v < 32**2 for v in areas),
        "m": any(32**2 <= v < 96**2 for v in areas),
        "l": any(v >= 96**2 for v in areas),
    }
    return {name: 0.0 if present.get(name[-1], bool(areas)) else -1.0 for name in _STATS}


def _mean(values: Any) -> float:
    """The mean of the values that are there; -1 where there is none."""
    values = np.asarray(values)
    values = values[values > -1]
    return float(values.mean()) if values.size else -1.0


def _averages(precision: np.ndarray, thresholds: Any) -> dict[str, float]:
    """mAP, mAP_50 and mAP_75 of a table of precisions [thresholds, recalls, categories, areas, detections]."""
    all_areas = precision[..., 0, precision.shape[-1] - 1]

    def at(threshold: float) -> int:
        return int(np.argmin(np.abs(np.asarray(thresholds) - threshold)))

    return {"mAP": _mean(all_areas), "mAP_50": _mean(all_areas[at(0.5)]), "mAP_75": _mean(all_areas[at(0.75)])}


def _summarize(evaluation: Any) -> dict[str, float]:
    """The twelve figures from the precision and recall tables, for any choice of maxDets."""
    precision, recall = np.asarray(evaluation.eval["precision"]), np.asarray(evaluation.eval["recall"])
    last = precision.shape[-1] - 1
    return {
        **_averages(precision, evaluation.params.iouThrs),
        **{f"mAP_{s}": _mean(precision[..., i, last]) for i, s in enumerate("sml", 1)},
        **{name: _mean(recall[..., 0, i]) for i, name in enumerate(_STATS[_RECALL : _RECALL + 3]) if i <= last},
        **{f"AR_{s}": _mean(recall[..., i, last]) for i, s in enumerate("sml", 1)},
    }


@METRICS.register_module()
class CocoMetric(MmdetCocoMetric):
    """mmdet's CocoMetric, evaluated by faster-coco-eval, with unrounded results.

    The metrics are those of mmdet (`coco/bbox_mAP`, `coco/bbox_mAP_50`, `coco/segm_mAP` ...). Predictions are kept as
    `outfile_prefix`.bbox.json and .segm.json where a prefix is given, and the precision of every class in per_class.csv
    beside them.

    Args:
        engine: "faster_coco_eval" or "pycocotools".
        kwargs: the arguments of mmdet's CocoMetric; `metric` takes "bbox" and "segm".

    Raises:
        ValueError: a metric other than "bbox" and "segm".
    """

    def __init__(self, *args: Any, engine: str = "faster_coco_eval", **kwargs: Any) -> None:
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools tells of its index
            super().__init__(*args, **kwargs)
        self.engine = engine
        other = set(self.metrics) - {"bbox", "segm"}
        if other:
            raise ValueError(
                f"zoo.CocoMetric: metric {sorted(other)} is not among 'bbox', 'segm'; use mmdet's CocoMetric"
            )
        if self._coco_api is None:
            raise ValueError("zoo.CocoMetric: ann_file is missing")

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        """Evaluate the collected results of all processes."""
        logger = MMLogger.get_current_instance()
        predictions = [prediction for _, prediction in results]
        classes = self.dataset_meta["classes"]
        self.cat_ids = self._coco_api.get_cat_ids(cat_names=classes)
        if len(self.cat_ids) != len(classes):
            raise UserError(f"the annotations have {len(self.cat_ids)} of the {len(classes)} classes of the dataset")
        scores: dict[str, float] = OrderedDict()
        rows: list[dict[str, Any]] = [
            {"class": self._coco_api.cats[i]["name"], "instances": len(self._coco_api.get_ann_ids(cat_ids=[i]))}
            for i in self.cat_ids
        ]
        with TemporaryDirectory() as folder:
            files = self.results2json(predictions, self.outfile_prefix or f"{folder}/results")
            if self.format_only:
                return scores
            for metric in self.metrics:
                if metric not in files:
                    raise KeyError(f"{metric} is not in the results: the detector predicts no masks")
                single: dict[int, dict[str, float]] = {}
                figures = coco_average_precision(
                    self._coco_api.dataset,
                    files[metric],
                    metric,
                    engine=self.engine,
                    max_detections=(1, 10, 100),
                    category_ids=self.cat_ids,
                    per_class=single,
                )
                for row, category in zip(rows, self.cat_ids, strict=True):
                    row |= {f"{metric}_{k}": f"{v:.4f}" for k, v in single[category].items() if v >= 0}
                scores.update({f"{metric}_{k}": v for k, v in figures.items() if k.startswith("mAP")})
                logger.info(f"{metric} " + " ".join(f"{k} {v:.3f}" for k, v in figures.items()))
        if self.outfile_prefix:
            columns = list(dict.fromkeys(key for row in rows for key in row))
            write_csv(Path(self.outfile_prefix).with_name("per_class.csv"), columns, rows)
        return scores

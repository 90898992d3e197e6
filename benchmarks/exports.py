"""Which family goes out in which form, how near the program is to the model, and how fast onnxruntime runs it.

    python -m benchmarks.exports                               # every family and form, compared; no time is taken
    python -m benchmarks.exports --speed --threads 2           # and onnxruntime against eager PyTorch: a quiet machine
    python -m benchmarks.exports --model van_b0 --form onnx    # these alone; the other rows are kept
    python -m benchmarks.exports --blocks 1                    # one block in every stage: minutes in place of an hour

Weights are random, and no branch is zero at first. Every program is run in a fresh process on images of three sizes and
batch sizes, as `zoo export` does before it gives one out. Writes a JSON file after every row and, from all its rows,
docs/export.md. The exit status is 1 where a program cannot be written or differs.
"""

import argparse
import importlib.metadata
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import zoo  # noqa: F401  registers the models
from benchmarks import ROOT
from benchmarks.environment import command_line, environment
from zoo.errors import UserError, first_line
from zoo.programs import Form, check_parity, write_program

RESULTS = ROOT / "benchmarks/results/exports.json"
PAGE = ROOT / "docs/export.md"


@dataclass(frozen=True)
class Model:
    """A model of every family, and the arguments that leave one block in each of its stages."""

    name: str
    shallow: dict[str, Any] = field(default_factory=lambda: {"depths": (1, 1, 1, 1)})


MODELS = (
    Model("nat_mini"),
    Model("dinat_mini"),
    Model("dinat_s_tiny"),
    Model("nat_isotropic_small", {"depth": 1}),
    Model("zoo_maxvit_pico_rw_256"),
    Model("zoo_davit_tiny"),
    Model("zoo_halonet26t", {}),
    Model("biformer_tiny"),
    Model("van_b0"),
    Model("litv2_s"),
    Model("stvit_small"),
    Model("spectformer_s"),
    Model("soft_tiny"),
    Model("sgformer_s"),
)
# what `zoo export` is told -> format, fields of Form
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "format=onnx": ("onnx", {}),
    "format=onnx dtype=float16": ("onnx", {"dtype": torch.float16}),
    "format=pt2": ("pt2", {}),
    "format=pt2 decompose=true": ("pt2", {"decompose": True}),
    "format=aoti dynamic=batch": ("aoti", {"dynamic": "batch"}),
}
_AXES = {"all": "batch, H, W", "batch": "batch", "none": "none"}


def build(model: Model, blocks: int | None) -> tuple[nn.Module, Form]:
    """The model, and what its programs have in common."""
    torch.manual_seed(0)
    made = timm.create_model(model.name, **(model.shallow if blocks == 1 else {})).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 1:  # scales of residual branches, which begin at zero or close to it
                parameter.add_(0.1 * torch.randn_like(parameter))
    published = timm.models.get_pretrained_cfg(model.name)
    assert published is not None
    channels, height, width = published.input_size
    return made, Form(channels, (height, width), dynamic="batch" if published.fixed_input_size else "all")


def measure(model: Model, name: str, blocks: int | None, threads: int, speed: bool) -> dict[str, Any]:
    """A row: one model in one form."""
    kind, options = FORMS[name]
    made, common = build(model, blocks)
    form = Form(**{**vars(common), **options})
    row: dict[str, Any] = {"model": model.name, "form": name, "blocks": blocks, "dynamic": form.dynamic}
    with tempfile.TemporaryDirectory() as folder:
        before = time.process_time()
        try:
            file, facts = write_program(kind, made, form, Path(folder))
            row["cpu_seconds"] = round(time.process_time() - before, 1)
            parity = check_parity(kind, file, made, form)
        except UserError as error:
            return {**row, "error": first_line(error)}
        row |= {"facts": facts, "program": parity.program, "own": parity.model, "shapes": parity.shapes}
        row["megabytes"] = round(sum(path.stat().st_size for path in Path(folder).iterdir()) / 1e6, 1)
        if speed and kind == "onnx" and form.dtype == torch.float32:
            row["speed"] = times(file, made, torch.randn(1, form.channels, *form.size), threads)
    return row


def times(file: Path, model: nn.Module, images: Tensor, threads: int, rounds: int = 15) -> dict[str, Any]:
    """Milliseconds of a call in onnxruntime and in eager PyTorch, medians of calls that take turns."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    given = {"images": images.numpy()}
    calls = {"onnxruntime": lambda: session.run(None, given), "eager": lambda: model(images)}
    taken: dict[str, list[float]] = {key: [] for key in calls}
    with torch.inference_mode():
        for _round in range(rounds + 2):
            for key, call in calls.items():
                before = time.perf_counter()
                call()
                taken[key].append(1e3 * (time.perf_counter() - before))
    return {"images": list(images.shape), **{key: round(statistics.median(ms[2:]), 2) for key, ms in taken.items()}}


def page(found: Mapping[str, Any]) -> str:
    """The Markdown of docs/export.md."""
    rows = {(row["model"], row["form"]): row for row in found["results"]}
    models = [m.name for m in MODELS if any(name == m.name for name, _ in rows)]
    lines = [
        "# Models as programs",
        "",
        "Written by `python -m benchmarks.exports` from `benchmarks/results/exports.json`. A cell is a program that",
        "`zoo export` writes: which sizes of the images it leaves open, and the largest difference of its logits from",
        "the model's in float64, in standard deviations, on images of three sizes (smaller and larger than what it was",
        "made from) and batch sizes, in a fresh process. Weights are random. A star: the model has one block in every",
        "stage. A dash was not run.",
        "",
        f"| model | {' | '.join(f'`{name}`' for name in FORMS)} |",
        "|---|" + "---|" * len(FORMS),
    ]
    for name in models:
        lines.append(f"| `{name}` | {' | '.join(_cell(rows.get((name, form))) for form in FORMS)} |")
    timed = [row for row in found["results"] if "speed" in row]
    lines += ["", "## Speed", ""]
    if timed:
        lines += [
            f"One image, {found['environment']['threads']} threads of {found['environment']['cpu']}; medians of calls",
            "that take turns.",
            "",
            "| model | images | eager PyTorch, ms | onnxruntime, ms | eager / onnxruntime |",
            "|---|---|---|---|---|",
        ]
        for row in timed:
            taken = row["speed"]
            lines.append(
                f"| `{row['model']}` | {'x'.join(map(str, taken['images']))} | {taken['eager']:.1f} "
                f"| {taken['onnxruntime']:.1f} | {taken['eager'] / taken['onnxruntime']:.2f} |"
            )
    else:
        lines += ["Not measured yet: `python -m benchmarks.exports --speed`, on a quiet machine."]
    errors = [row for row in found["results"] if "error" in row]
    if errors:
        lines += ["", "## What fails", ""]
        lines += [f"- `{row['model']}`, `{row['form']}`: {row['error']}" for row in errors]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return "\n".join([*lines, "", f"Versions: {versions}.", ""])


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "-"
    found = "fails" if "error" in row else f"{_AXES[row['dynamic']]}: {row['program']:.0e}"
    return found + " *" * (row["blocks"] == 1)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.exports", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="append", choices=[m.name for m in MODELS], help="repeatable; all by default")
    parser.add_argument("--form", action="append", choices=[*FORMS, *(f.split("=", 1)[1] for f in FORMS)])
    parser.add_argument("--blocks", type=int, choices=[1], help="in every stage; as many as the model has by default")
    parser.add_argument("--speed", action="store_true", help="take onnxruntime's time and eager PyTorch's")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, help="docs/export.md, or beside OUT where that is given")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    forms = [f if f in FORMS else f"format={f}" for f in args.form or FORMS]
    chosen = [m for m in MODELS if args.model is None or m.name in args.model]
    text = args.page or (PAGE if args.out == RESULTS else args.out.with_suffix(".md"))

    old = json.loads(args.out.read_text())["results"] if args.out.exists() else []
    rows = {(row["model"], row["form"]): row for row in old}
    given = [f"--blocks={args.blocks}"] * (args.blocks is not None) + ["--speed"] * args.speed
    command = command_line("exports", given)
    failed = False
    for model in chosen:
        for name in forms:
            row = rows[model.name, name] = measure(model, name, args.blocks, args.threads, args.speed)
            failed |= "error" in row
            print(f"{model.name:<24} {name:<26} {row.get('error') or _cell(row)}", flush=True)
            ordered = [rows[m.name, form] for m in MODELS for form in FORMS if (m.name, form) in rows]
            found = {
                "command": command,
                "environment": environment(torch.device("cpu"), args.threads, command),
                "versions": {p: importlib.metadata.version(p) for p in ("torch", "timm", "onnxscript", "onnxruntime")},
                "results": ordered,
            }
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(found, indent=1) + "\n")
            text.write_text(page(found))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

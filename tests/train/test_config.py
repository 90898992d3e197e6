"""The command line of training: one line per mistake, naming the thing and the remedy, and exit code 2."""

import operator
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import training
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from PIL import Image

from zoo.cli import main as cli
from zoo.train.app import main
from zoo.train.compose import compose_config, from_container, normalize
from zoo.train.config import TRAIN

ROOT = Path(__file__).parents[2]


def fails(capsys: pytest.CaptureFixture[str], command: str, *argv: str) -> str:
    """Run a command that must fail as the user's mistake, and return its one line."""
    assert main(command, list(argv)) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith(f"zoo {command}: ")
    assert "Traceback" not in captured.err + captured.out
    assert captured.out == ""
    return lines[0]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("epohs=3", ("'epohs'", "epochs")),
        ("optim.lrr=3", ("'optim.lrr'", "optim.lr")),
        ("+made_up=3", ("'made_up'", "nearest")),
        ("modle=nat_tiny", ("'modle'", "model")),
        ("epochs=abc", ("epochs=abc", "Integer")),
        ("epochs=2.5", ("epochs=2.5", "Integer")),
        ("epochs=null", ("epochs=null", "give a value")),
        ("ema.enabled=maybe", ("ema.enabled=maybe", "bool")),
        ("data.mean=[a,b]", ("data.mean[0]=a", "Float")),
        ("epochs=0", ("epochs=0", "at least 1")),
        ("optim.lr=-1", ("optim.lr=-1", "positive")),
        ("schedule.warmup_epochs=21", ("schedule.warmup_epochs", "epochs=20")),
        ("amp=fp8", ("amp='fp8'", "fp16")),
        ("optim.name=adamww", ("'adamww'", "adamw")),
        ("schedule.name=cosin", ("'cosin'", "cosine")),
        ("loss.name=cee", ("'cee'", "ce")),
        ("epochs=1,2", ("epochs=1,2", "--multirun")),
        ("epochs=[1", ("epochs=[1", "key=value")),
        ("epochs", ("'epochs'", "key=value")),
        ("--nonsense", ("--nonsense", "--help")),
        ("model=nat_tinny", ("'nat_tinny'", "nat_tiny")),
        ("model.name=nat_tinny", ("'nat_tinny'", "nat_tiny")),
        ("model=null", ("configuration", "--help")),
        ("model.kwargs.foo=3", ("nat_mini", "'foo'", "model.kwargs")),
        ("model.kwargs.num_classes=3", ("model.num_classes",)),
        ("model.pretrained=/no/such.pth", ("/no/such.pth", "give the path")),
        ("model.pretrained=3", ("model.pretrained=3", "checkpoint")),
        ("model.num_classes=4", ("model.num_classes=4", "10 classes")),
        ("model.in_chans=2", ("model.in_chans=2", "1 (grey)")),
        ("model.name=${nope}", ("model.name", "nope")),
        ("data=imagfolder", ("imagfolder", "imagefolder")),
        ("data=imagefolder", ("data.root", "PATH")),
        ("data=imagefolder data.root=/no/such", ("/no/such", "data.root=PATH")),
        ("data.name=nope", ("'nope'", "imagefolder")),
        ("data.name=torch/cifar10 data.root=.", ("torch/cifar10", "data.download")),
        ("data=timm", ("data.name", "data.name=VALUE")),
        ("data.num_classes=3", ("data.num_classes=3", "10 classes")),
        ("batch_size=5000", ("1438", "lower batch_size")),
        ("batch_size=33 augment.mixup=0.5", ("batch_size=33", "even")),
        ("augment.auto_augment=rnd-m9", ("rnd-m9", "rand-m9")),
        ("augment.auto_augment=rand-m9-foo3", ("rand-m9-foo3", "'foo3'", "no option")),
        ("augment.color_jitter=-1", ("augment.color_jitter=-1", "0 or more")),
        ("augment.color_jitter=nan", ("augment.color_jitter=nan", "0 or more")),
        ("augment.scale=[0.1,inf]", ("augment.scale", "low")),
        ("data.mean=[0.5]", ("data.mean=[0.5]", "3 channels")),
        ("data.std=[0.1,0.2]", ("data.std=[0.1, 0.2]", "3 channels")),
        ("data.std=[0.1,-0.2,0.3]", ("data.std=[0.1, -0.2, 0.3]", "above 0")),
        ("data.std=[0,0,0]", ("data.std", "above 0")),
        ("data.mean=[123.7,116.3,103.5]", ("data.mean", "0 to 1")),
        ("data.mean=[nan,0.5,0.5]", ("data.mean", "0 to 1")),
        ("data.mean=[]", ("data.mean=[]", "per channel")),
        ("data.max_bad=-1", ("data.max_bad=-1", "share")),
        ("data.value_range=[1,1]", ("data.value_range=[1.0, 1.0]", "[0,4095]")),
        ("data.value_range=[0]", ("data.value_range=[0.0]", "[0,4095]")),
        ("data.num_workers=100000", ("data.num_workers=100000", "1024")),
        ("data.num_classes=1", ("data.num_classes=1", "at least 2")),
        ("model.in_chans=5", ("model.in_chans=5", "other bands are not read")),
        ("augment=digit", ("augment=digit", "digits")),
        ("experiment=nat_huge", ("nat_huge", "nat_base")),
        ("experiment=coco_mask_rcnn_nat_mini_3x", ("coco_mask_rcnn_nat_mini_3x", "zoo detect")),
        ("optim.kwargs.betaz=[1,2]", ("adamw", "betaz", "optim.kwargs")),
        ("device=tpu", ("'tpu'", "cuda")),
        ("resume=/no/such", ("/no/such", "zoo train")),
        ("resume=/", ("/ is not a run folder", "config.yaml")),
        ("hydra.searchpath=[file:///no/such]", ("/no/such", "file:///")),
        ("--config-dir=/no/such", ("/no/such", "give the folder")),
        ("hydra.job_logging.version=1", ("hydra.job_logging", "not open")),
        ("logger=wandb logger.wandb.mode=sometimes", ("'sometimes'", "offline")),
        ("lr=1e-3", ("unknown key 'lr'", "optim.lr")),
        ("optimizer.lr=1e-3", ("optim.lr",)),
        ("treads=3", ("threads",)),
        ("mixup=0.1", ("augment.mixup",)),
        ("threads=100000", ("threads=100000", "1 to")),
        ("threads=0", ("threads=0", "1 to")),
        ("batch_size=1000000000", ("batch_size=1000000000", "1 to")),
        ("batch_size=5000", ("1438 training images", "lower batch_size")),
        ("val_batch_size=99999999", ("val_batch_size=99999999", "1 to")),
        ("grad_accum=99999999", ("grad_accum=99999999", "1 to")),
        ("schedule.min_lr=1", ("schedule.min_lr=1.0", "optim.lr=0.002")),
        ("schedule.min_lr=-1", ("schedule.min_lr=-1.0", "0 up to")),
        ("schedule.min_lr=nan", ("schedule.min_lr=nan", "0 up to")),
        ("schedule.warmup_epochs=1 schedule.warmup_lr=1", ("schedule.warmup_lr=1.0", "optim.lr=0.002")),
        ("optim.lr=inf", ("optim.lr=inf", "positive")),
        ("optim.lr=nan", ("optim.lr=nan", "positive")),
        ("optim.momentum=2", ("optim.momentum=2.0", "below 1")),
    ],
)
def test_train_mistake(capsys: pytest.CaptureFixture[str], tmp_path: Path, argv: str, words: tuple[str, ...]) -> None:
    line = fails(capsys, "train", f"run_root={tmp_path}", *argv.split())
    for word in words:
        assert word in line
    assert not list(tmp_path.rglob("*")), "a start that failed left a run folder"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("", ("model.name", "give")),
        ("runn=3", ("'runn'", "run")),
        ("run=/no/such", ("/no/such",)),
        ("model=nat_tiny", ("no weights", "pretrained")),
        ("model=nat_tiny pretrained=/no/such.pth", ("/no/such.pth",)),
        ("model=nat_tinny pretrained=true", ("'nat_tinny'", "nat_tiny")),
        ("model=nat_mini checkpoint=first", ("'first'", "last")),
        ("--multirun run=x", ("--multirun",)),
    ],
)
def test_eval_mistake(capsys: pytest.CaptureFixture[str], argv: str, words: tuple[str, ...]) -> None:
    line = fails(capsys, "eval", *argv.split())
    for word in words:
        assert word in line


def test_code_from_configuration(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    targets = (
        "model.kwargs._target_=os.system",
        "++model.kwargs._target_=os.system",
        "++model.kwargs={_target_: os.system}",
        "+optim.kwargs.a={b: [{_target_: os.system}]}",
        "++_target_=os.system",
        "hydra.sweeper._target_=os.system",
        "hydra.callbacks.x._target_=os.system",
    )
    for override in targets:
        line = fails(capsys, "train", override)
        assert "code to run" in line or "not open" in line
    for group, content in (
        ("model", "name: nat_mini\nkwargs:\n  depths:\n    _target_: os.system\n"),
        (
            "experiment",
            f"# @package _global_\nmodel:\n  kwargs:\n    x:\n      - _target_: os.system\n        c: touch {marker}\n",
        ),
    ):
        folder = tmp_path / group / group
        folder.mkdir(parents=True)
        (folder / "evil.yaml").write_text(content)
        assert "code to run" in fails(capsys, "train", f"--config-dir={tmp_path / group}", f"{group}=evil")
    sweeping = tmp_path / "sweep" / "experiment"
    sweeping.mkdir(parents=True)
    (sweeping / "evil.yaml").write_text(
        f"# @package _global_\nhydra:\n  callbacks:\n    x:\n      _target_: os.system\n      command: touch {marker}\n"
    )
    argv = ["--multirun", f"--config-dir={sweeping.parent}", "experiment=evil", "seed=1,2"]
    assert "not open" in fails(capsys, "train", *argv)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("model: {name: nat_mini, kwargs: {x: {_target_: os.system}}}")
    assert "code to run" in fails(capsys, "train", f"resume={run}")
    assert not marker.exists()


def _own(folder: Path, name: str, text: str) -> Path:
    """A folder of configurations with one experiment."""
    (folder / "experiment").mkdir(parents=True, exist_ok=True)
    (folder / "experiment" / f"{name}.yaml").write_text(f"# @package _global_\n{text}")
    return folder


HYDRA = {
    "job_logging": "job_logging:\n    version: 1\n    handlers: {x: {class: logging.FileHandler, filename: MARK}}\n",
    "job_logging.filters": "job_logging:\n    filters: {x: {'()': os.system, command: 'touch MARK'}}\n",
    "hydra_logging": "hydra_logging:\n    handlers: {x: {'()': os.system, command: 'touch MARK'}}\n",
    "job.env_set": "job:\n    env_set: {LD_PRELOAD: MARK}\n",
    "job.env_copy": "job:\n    env_copy: [SECRET]\n",
    "job.chdir": "job:\n    chdir: true\n",
    "callbacks": "callbacks: {x: {_target_: os.system, command: 'touch MARK'}}\n",
    "run.dir": "run:\n    dir: MARK\n",
    "sweep.dir": "sweep:\n    dir: MARK/${oc.env:SECRET}\n",
    "sweep.subdir": "sweep:\n    subdir: ${oc.env:SECRET}\n",
    "output_subdir": "output_subdir: MARK\n",
    "verbose": "verbose: true\n",
    "help": "help: {template: x}\n",
    "launcher": "launcher: {_target_: os.system, command: 'touch MARK'}\n",
    "sweeper": "sweeper: {_target_: subprocess.run, args: [touch, MARK]}\n",
    "sweeper.params": "sweeper: {params: {seed: '${oc.env:SECRET}'}}\n",
}


@pytest.mark.parametrize(
    ("part", "jobs"),
    [
        *((part, "-m experiment=nat_mini,evil") for part in HYDRA),
        ("callbacks", "-m experiment=evil seed=1,2"),
        ("job_logging", "experiment=evil seed=1"),
    ],
)
def test_only_the_package_speaks_to_hydra(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, part: str, jobs: str
) -> None:
    """What a user's file says in the section `hydra` is refused before Hydra acts on it, in every job."""
    mark = tmp_path / "mark"
    monkeypatch.setenv("SECRET", "hunter2")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("zoo.train.app._train_one", lambda *args: pytest.fail("it trains"))
    text = HYDRA[part].replace("MARK", str(mark))
    folder = _own(tmp_path / "own", "evil", f"hydra:\n  {text}")
    line = fails(capsys, "train", f"-cd={folder}", *jobs.split(), f"run_root={tmp_path / 'runs'}")
    assert f"hydra.{part.split('.')[0]}" in line
    assert "hunter2" not in line
    assert [p.name for p in tmp_path.iterdir()] == ["own"]
    assert "LD_PRELOAD" not in os.environ


def test_a_file_cannot_add_a_search_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _own(tmp_path / "own", "evil", "hydra:\n  searchpath: [file:///tmp]\n")
    for jobs in (["seed=1"], ["-m", "seed=1,2"]):
        line = fails(capsys, "train", f"-cd={folder}", "experiment=evil", *jobs, f"run_root={tmp_path / 'runs'}")
        assert "searchpath" in line


RESOLVERS = [
    "${oc.env:SECRET}",
    "x${oc.env:SECRET,y}",
    "${oc.decode:${oc.env:SECRET}}",
    "${oc.select:${oc.env:SECRET}}",
    "${oc.create:{name:a}}",
    "${oc.dict.keys:optim}",
    "${oc.deprecated:seed}",
    "${now:%Y}",
    "${hydra:runtime.cwd}",
    "${${loss.name}:SECRET}",
    "\\${oc.env:SECRET}",
    "${mine:SECRET}",
]


@pytest.mark.parametrize("text", RESOLVERS)
def test_no_resolver_is_called(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """Not from a user's files, the command line, or the configuration of a run of someone else's."""
    monkeypatch.setenv("SECRET", "hunter2")
    monkeypatch.setattr("zoo.train.app._train_one", lambda *args: pytest.fail("it trains"))
    OmegaConf.register_new_resolver("mine", lambda name: os.environ[name], replace=True)
    run = tmp_path / "run"
    run.mkdir()
    cases = []
    for section, key in (("logger.wandb", "name"), ("data", "root"), ("model.kwargs", "x"), ("optim", "name")):
        head = "".join(f"{'  ' * depth}{part}:\n" for depth, part in enumerate(section.split(".")))
        body = f"{head}{'  ' * len(section.split('.'))}{key}: '{text}'\n"
        name = section.replace(".", "_")
        folder = _own(tmp_path / "own", name, body)
        cases.append([f"-cd={folder}", f"experiment={name}"])
        cases.append([f"-cd={folder}", f"experiment={name}", "-m", "seed=1,2"])
        cases.append([f"-cd={folder}", f"experiment=nat_mini,{name}", "-m"])
        cases.append([f"{section}.{key}='{text}'"])
    (run / "config.yaml").write_text(
        f"model: {{name: nat_mini}}\nrun_root: '{text}'\nlogger: {{wandb: {{name: '{text}'}}}}"
    )
    cases.append([f"resume={run}"])
    for argv in cases:
        line = fails(capsys, "train", *argv, f"run_root={tmp_path / 'runs'}")
        assert "hunter2" not in line, argv
    (run / "config.yaml").write_text(f"model: {{name: nat_mini}}\ndata: {{name: digits, root: '{text}'}}")
    assert "hunter2" not in fails(capsys, "eval", f"run={run}")
    assert cli(["export", f"run={run}", f"out={tmp_path / 'out'}"]) == 2
    assert "hunter2" not in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["own", "run"]


def test_no_resolver_in_a_defaults_list(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    folder = _own(tmp_path / "own", "evil", "defaults:\n  - override /model: ${oc.env:SECRET}\n")
    for more in ([], ["-m", "seed=1,2"]):
        line = fails(capsys, "train", f"-cd={folder}", "experiment=evil", *more, f"run_root={tmp_path / 'runs'}")
        assert "hunter2" not in line
        assert "oc.env" in line


def test_what_a_sweep_may_say_to_hydra(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command line chooses the folder of a sweep; a value may refer to another."""
    folder = _own(tmp_path / "own", "mine", "val_batch_size: ${batch_size}\n")
    argv = ["-m", "seed=1,2", "max_steps=1", "experiment=mine", f"-cd={folder}", *training.TINY]
    assert main("train", [*argv, f"hydra.sweep.dir={tmp_path / 'sweep'}"]) == 0
    runs = sorted((tmp_path / "sweep").glob("*/config.yaml"))
    assert [OmegaConf.load(path).val_batch_size for path in runs] == [128, 128]


@pytest.mark.parametrize("key", ["checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"])
def test_a_model_reads_no_file_by_the_way(capsys: pytest.CaptureFixture[str], key: str) -> None:
    assert "use model.pretrained=FILE" in fails(capsys, "train", f"model.kwargs.{key}=x")


def _class_folders(root: Path, splits: dict[str, tuple[str, ...]], images: int = 3) -> Path:
    for split, classes in splits.items():
        for index, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(images):
                Image.new("RGB", (40, 36), (60 * index, 20 * i, 90)).save(folder / f"{i}.png")
    return root


def test_folder_mistakes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    root = _class_folders(tmp_path / "a", {"train": ("cat", "dog")})
    common = ("data=imagefolder", "batch_size=2", f"run_root={tmp_path / 'runs'}")
    assert "validation" in fails(capsys, "train", f"data.root={root}", *common)
    (root / "val").mkdir()
    assert "no images" in fails(capsys, "train", f"data.root={root}", *common)
    other = _class_folders(tmp_path / "b", {"train": ("cat", "dog"), "val": ("cat", "emu")})
    assert "emu" in fails(capsys, "train", f"data.root={other}", *common)
    three = _class_folders(tmp_path / "c", {"train": ("a", "b", "c"), "val": ("a",)})
    assert "3 classes" in fails(capsys, "train", f"data.root={three}", "data.num_classes=2", *common)
    one = _class_folders(tmp_path / "d", {"train": ("a",), "val": ("a",)})
    assert "single class, a" in fails(capsys, "train", f"data.root={one}", *common)
    (root / "train" / "empty").mkdir()
    assert "without images: empty" in fails(capsys, "train", f"data.root={root}", *common)
    Image.new("RGB", (8, 8)).save(three / "train" / "x.png")
    assert "beside the class folders" in fails(capsys, "train", f"data.root={three}", *common)
    flat = tmp_path / "flat"
    for split in ("train", "val"):
        (flat / split).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(flat / split / "x.png")
    assert "no class folders" in fails(capsys, "train", f"data.root={flat}", *common)


PATH_NAMES = (
    "/a b,c=[d]/x~y", "a", "3", "007", "1e3", "1_0", "true.d", "[a]", "{a: b}", "(x)", "'tis", "a'b", 'q"uote', "a\\",
    "a\\'b", "a\\\\b", "x#y", "a:b", "a,b", "x=y", "*?", "ü/日本", "a\tb", "a\nb", "$HOME", "%d", "!&|;<>`", "@f",
    " lead", "trail ", "../x", "-x", "choice(a,b)", "glob(*)", "key=1,b=2", "a\udc80b",
)  # fmt: skip


@pytest.mark.parametrize("key", ["data.root", "+data.root", "++run_dir", "run_root", "out", "model.pretrained"])
def test_paths_have_any_character_unquoted(key: str) -> None:
    parser = OverridesParser.create()
    for name in PATH_NAMES:
        if key == "model.pretrained" and name.isdecimal():
            continue
        (override,) = parser.parse_overrides(normalize(TRAIN, [f"{key}={name}"]))
        assert override.value() == name


def test_paths_reach_the_run_as_they_are() -> None:
    for name in ("/it's [a], {b: c} (d)", '"q\\\\\\"\\', "\n\t#é日\udc80 = ~"):
        values = [f"{key}={name}" for key in ("data.root", "run_dir", "run_root", "model.pretrained")]
        config = from_container(compose_config(TRAIN, [*values, "data=imagefolder"]), TRAIN)
        written = OmegaConf.create(OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True))
        for found in (config, written):
            assert {found.data.root, found.run_dir, found.run_root, found.model.pretrained} == {name}


def test_paths_that_are_quoted_or_none(tmp_path: Path) -> None:
    for text, value in (("'/q u'", "/q u"), ('"/q u"', "/q u"), ("null", None), ("", "")):
        assert compose_config(TRAIN, [f"data.root={text}", "data=imagefolder"]).data.root == value
    assert compose_config(TRAIN, ["model.pretrained=true"]).model.pretrained is True
    swept = normalize(TRAIN, ["data.root=/a b,'/c d'", "run_root=x y,z", "data.root=glob(*)"], sweep=True)
    assert swept == ["data.root=/a b,'/c d'", "run_root='x y','z'", "data.root=glob(*)"]
    folder = tmp_path / "it's, here" / "data"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("name: imagefolder\nroot: ~/somewhere\n")
    mine = from_container(compose_config(TRAIN, ["data=mine"], [str(folder.parent)]), TRAIN)
    assert mine.data.root == str(Path.home() / "somewhere")


def test_home_is_expanded() -> None:
    keys = ("data.root", "run_root", "run_dir", "model.pretrained")
    config = from_container(compose_config(TRAIN, [*(f"{k}=~/a b" for k in keys), "data=imagefolder"]), TRAIN)
    assert {operator.attrgetter(key)(config) for key in keys} == {str(Path.home() / "a b")}


def test_a_run_in_a_folder_of_any_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trained, resumed, moved and evaluated without a quote."""
    root = _class_folders(tmp_path / "a b,c=[d]" / "x~y", {"train": ("cat", "dog"), "val": ("cat", "dog")})
    run, out = tmp_path / "it's (a) run, {1}", tmp_path / "o=[1], x.json"
    argv = ["data=imagefolder", f"data.root={root}", "data.img_size=32", "data.num_workers=0", *training.TINY]
    assert main("train", [*argv, "batch_size=2", f"run_dir={run}", "epochs=1", "max_steps=1"]) == 0
    moved = root.rename(tmp_path / "it's, moved")
    assert main("train", [f"resume={run}", f"data.root={moved}", "max_steps=2"]) == 0
    assert main("eval", [f"run={run}", f"data.root={moved}", f"out={out}"]) == 0
    assert out.is_file()


def test_too_many_classes_in_a_checkpoint(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "thousand.pth"
    torch.save({"model": timm.create_model("test_resnet", num_classes=1000).state_dict()}, file)
    line = fails(capsys, "eval", "model=test_resnet", f"pretrained={file}")
    assert "1000" in line
    assert "10" in line


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("train", ["epohs=3", "debug=true"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_internal_error_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoo.train.app.compose_config", lambda *a, **k: 1 // 0)
    assert main("train", []) == 1
    error = capsys.readouterr().err
    assert error.splitlines() == [error.strip()]
    assert "ZeroDivisionError" in error
    assert "debug=true" in error


def test_any_model_name_is_a_choice() -> None:
    for name in ("test_vit", "resnet18.a1_in1k", "nat_tiny"):
        assert compose_config(TRAIN, [f"model={name}"]).model.name == name
    assert compose_config(TRAIN, ["model=nat_digits"]).model.kwargs.depths == [1, 2, 2]


def test_free_sections_take_new_keys() -> None:
    config = compose_config(TRAIN, ["model.kwargs.dilations=[1,2]", "optim.kwargs={betas: [0.9, 0.95]}"])
    assert config.model.kwargs.dilations == [1, 2]
    assert config.optim.kwargs.betas == [0.9, 0.95]


def test_data_choose_their_augmentation(tmp_path: Path) -> None:
    assert compose_config(TRAIN, []).augment.hflip == 0
    assert compose_config(TRAIN, ["data=imagenet", "data.root=x"]).augment.mixup == 0.8
    assert compose_config(TRAIN, ["data=imagenet", "augment=none"]).augment.enabled is False
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "mine.yaml").write_text("name: imagefolder\nroot: somewhere\n")
    mine = compose_config(TRAIN, ["data=mine"], [str(tmp_path)])
    assert mine.data.root == "somewhere"
    assert mine.augment.hflip == 0.5


def test_hydra_searchpath(tmp_path: Path) -> None:
    folder = tmp_path / "experiment"
    folder.mkdir()
    (folder / "mine.yaml").write_text("# @package _global_\ndefaults:\n  - override /model: test_vit\nepochs: 7\n")
    config = compose_config(TRAIN, [f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine"])
    assert config.epochs == 7
    assert config.model.name == "test_vit"


CHOICES = {
    "model": ("nat_digits", "default"),
    "data": ("digits", "imagefolder", "imagenet", "timm"),
    "optim": ("adamw", "sgd", "lamb"),
    "schedule": ("cosine", "constant"),
    "augment": ("none", "digits", "imagefolder", "imagenet", "timm"),
    "logger": ("none", "tensorboard", "wandb"),
    "experiment": ("nat_imagenet", "nat_mini", "nat_tiny", "nat_small", "nat_base"),
}


@pytest.mark.parametrize(("group", "name"), [(g, n) for g, names in CHOICES.items() for n in names])
def test_every_configuration_composes(group: str, name: str) -> None:
    assert (ROOT / "configs" / group / f"{name}.yaml").is_file()
    extra = {"timm": ["data.name=hfds/x"], "default": ["model.name=nat_mini"]}.get(name, [])
    from_container(compose_config(TRAIN, [f"{group}={name}", *extra]), TRAIN)


@pytest.mark.parametrize("model", ["nat_mini", "nat_tiny", "nat_small", "nat_base"])
def test_model_of_a_shared_recipe_is_a_choice(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    for extra in ([], ["optim.lr=3e-4", "model.kwargs.kernel_size=5"], ["data=digits"], ["model=van_b0"]):
        whole = compose_config(TRAIN, ["experiment=nat_imagenet", f"model={model}", *extra])
        assert compose_config(TRAIN, [f"experiment={model}", *extra]) == whole
    assert compose_config(TRAIN, [f"experiment={model}"]).model.name == model
    assert main("train", ["--help"]) == 0
    listed = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  experiment "))
    assert model in listed.split(maxsplit=1)[1].split(", ")


def test_recipes_of_one_paper_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--multirun", "experiment=nat_mini,nat_tiny", "data=digits", "augment=none", "amp=none", "max_steps=1"]
    small = ["model.kwargs.depths=[1,1,1]", "model.kwargs.embed_dim=16", "model.kwargs.num_heads=[2,4,8]"]
    small += ["model.kwargs.kernel_size=3", "augment.interpolation=bilinear", f"run_root={tmp_path}"]
    assert main("train", [*argv, *small]) == 0
    capsys.readouterr()
    runs = sorted(tmp_path.glob("sweep-*/*/summary.json"))
    assert [training.summary(r.parent)["model"] for r in runs] == ["nat_mini", "nat_tiny"]
    assert "nat_tiny" in fails(capsys, "train", "--multirun", "experiment=nat_mini,nat_tinny", f"run_root={tmp_path}")


def test_images_of_timm_are_augmented_as_folders_are() -> None:
    folder = compose_config(TRAIN, ["augment=imagefolder"]).augment
    assert (folder.scale, folder.hflip, folder.color_jitter) == ([0.2, 1.0], 0.5, 0.4)
    assert compose_config(TRAIN, ["augment=timm"]).augment == folder
    assert compose_config(TRAIN, ["data=timm", "data.name=hfds/x"]).augment == folder


def test_nat_recipe_is_the_published_one() -> None:
    config = compose_config(TRAIN, ["experiment=nat_small", "data.root=x"])
    assert config.model.name == "nat_small"
    assert (config.epochs, config.schedule.cooldown_epochs, config.schedule.warmup_epochs) == (300, 10, 20)
    assert (config.optim.lr, config.optim.weight_decay, config.optim.clip_grad) == (1e-3, 0.05, 5.0)
    assert (config.augment.mixup, config.augment.cutmix, config.augment.random_erasing) == (0.8, 1.0, 0.25)
    assert config.loss.smoothing == 0.1


def test_show_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("train", ["--cfg", "job", "epochs=3"]) == 0
    shown = OmegaConf.create(capsys.readouterr().out)
    assert shown.epochs == 3
    assert main("train", ["--help"]) == 0
    text = capsys.readouterr().out
    for key in ("usage: zoo train", "nat_digits", "imagefolder", "every_steps", "--multirun"):
        assert key in text
    assert main("eval", ["--help"]) == 0
    assert "checkpoint: last" in capsys.readouterr().out


def test_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--multirun", "seed=1,2", "max_steps=1", f"run_root={tmp_path}", *training.TINY]
    assert main("train", argv) == 0
    runs = sorted(tmp_path.glob("sweep-*/*/summary.json"))
    assert [r.parent.name for r in runs] == ["0", "1"]
    assert [training.summary(r.parent)["seed"] for r in runs] == [1, 2]
    capsys.readouterr()
    assert "'epohs'" in fails(capsys, "train", "--multirun", "epohs=1,2", f"run_root={tmp_path}")
    assert "nat_mini" in fails(capsys, "train", "--multirun", "model=nat_mini,nat_minni", f"run_root={tmp_path}")


def test_a_sweep_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("train", ["-m", "--cfg", "job", "seed=1,2", "model=nat_mini,van_b0", "epochs=3"]) == 0
    shown = list(yaml.safe_load_all(capsys.readouterr().out))
    assert [(c["seed"], c["model"]["name"]) for c in shown] == [
        (1, "nat_mini"), (1, "van_b0"), (2, "nat_mini"), (2, "van_b0"),
    ]  # fmt: skip
    assert {c["epochs"] for c in shown} == {3}
    assert main("train", ["-m", "--cfg", "job", "epochs=3"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["epochs"] == 3


def test_help_lists_what_train_can_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("train", ["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = dict(line.split(maxsplit=1) for line in lines if re.match(r"  (model|data|experiment|optim) ", line))
    for group, names in listed.items():
        for name in names.split(", "):
            if (group, name) not in (("model", "default"), ("data", "timm")):
                from_container(compose_config(TRAIN, [f"{group}={name}"]), TRAIN)


def test_nothing_is_left_beside_the_run(tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from zoo.train.app import main; "
    code += "sys.exit(main('train', sys.argv[1:]))"
    argv = [sys.executable, "-c", code, "max_steps=1", *training.TINY]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]
    last = result.stdout.splitlines()[-1]
    assert last.startswith("top-1 ")
    assert last.endswith(f"run folder: {next((tmp_path / 'runs').iterdir()).relative_to(tmp_path)}")

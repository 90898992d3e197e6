"""The command line's own commands: what they print, and the error for a wrong name."""

import json

import pytest

from zoo import __version__
from zoo.cli import COMMANDS, main


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in COMMANDS)


def test_no_command_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: zoo" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"zoo {__version__}\n"


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    err = capsys.readouterr().err
    assert err == "zoo: no command 'trian'; did you mean `zoo train`?\n"


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "nat_*", "dinat_s_tiny"]) == 0
    names = capsys.readouterr().out.split()
    assert {"nat_mini", "nat_tiny", "nat_small", "nat_base", "dinat_s_tiny"} <= set(names)
    assert not any(n.startswith("resnet") for n in names)


def test_list_holds_only_this_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    names = capsys.readouterr().out.split()
    assert "nat_tiny" in names
    assert "resnet50" not in names


def test_list_tags(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "dinat_large", "--tags"]) == 0
    assert set(capsys.readouterr().out.split()) == {"dinat_large.in22k_ft_in1k", "dinat_large.in22k"}


def test_markdown_of_some(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--markdown", "van_b[01]", "nat_mini"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == ["nat_mini", "van_b0", "van_b1"]
    assert main(["list", "--markdown", "vann*"]) == 2
    assert "'vann*'" in capsys.readouterr().err


def test_list_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "natt_tiny*"]) == 2
    assert "nat_tiny" in capsys.readouterr().err


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "nat_tiny"]) == 0
    out = capsys.readouterr().out
    assert "27.90 M" in out
    assert "83.2 %" in out
    assert "neighborhood_attention: cpu" in out
    assert "nat_tiny.pth" in out
    assert "2204.07143" in out


def test_info_measures_close_to_the_published_flops(capsys: pytest.CaptureFixture[str]) -> None:
    for name, published in (("nat_mini", 2.7), ("nat_tiny", 4.3), ("dinat_s_tiny", 4.5)):
        assert main(["info", name, "--json"]) == 0
        info = json.loads(capsys.readouterr().out)
        assert info["macs"] / 1e9 == pytest.approx(published, rel=0.05), name


def test_info_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "nat_tinny"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "nat_tiny" in err


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "neighborhood_attention" in out
    assert "torch" in out


@pytest.mark.parametrize("name", ["nat_tiny.foo", "nat_tiny.", "nat_tiny.in1k.x"])
def test_info_of_an_unknown_tag(capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert main(["info", name]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "unknown tag" in line
    assert "nat_tiny.in1k" in line
    assert main(["info", "nat_tiny.in1k"]) == 0


@pytest.mark.parametrize("argv", [["info"], ["info", "a", "b"], ["list", "--nope"], ["doctor", "x"]])
def test_wrong_arguments_are_one_line(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    assert main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"`zoo {argv[0]} --help` says more" in line

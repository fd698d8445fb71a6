"""The command line itself: what it prints about itself, and how it fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import vattn
from vattn.tools.cli import main


def vattn_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vattn", *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"vattn {vattn.__version__}\n"


def test_help_names_every_command() -> None:
    done = vattn_command("--help")
    assert done.returncode == 0
    for command in ("info", "plan", "replay", "demo", "bench", "--cmake-dir", "--pkgconfig-dir", "--version"):
        assert command in done.stdout


@pytest.mark.parametrize("command", ["info", "plan", "replay", "demo", "bench"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"vattn {command}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["plan", "--nonsense"], ["replay"], ["info", "extra"]])
def test_bad_usage_is_one_line_and_status_2(arguments: list[str]) -> None:
    done = vattn_command(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "error: " in done.stderr


FOLDERS = [("--cmake-dir", "lib/cmake/vattn", "vattnConfig.cmake"), ("--pkgconfig-dir", "lib/pkgconfig", "vattn.pc")]


@pytest.mark.parametrize(("option", "place", "file"), FOLDERS)
def test_a_folder_for_builds_is_printed_where_the_package_has_one(
    option: str,
    place: str,
    file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / place
    folder.mkdir(parents=True)
    (folder / file).touch()
    monkeypatch.setattr(vattn, "__path__", [str(tmp_path / "elsewhere"), str(tmp_path)])
    assert main([option]) == 0
    assert capsys.readouterr().out == f"{folder.resolve()}\n"


@pytest.mark.parametrize(("option", "place", "file"), FOLDERS)
def test_a_folder_for_builds_of_a_copy_without_one_is_an_error(
    option: str,
    place: str,
    file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(vattn, "__path__", [str(tmp_path)])
    assert main([option]) == 2
    assert f"no {file} in {tmp_path / place}" in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_error_message() -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as gone:
        done = subprocess.run(
            [sys.executable, "-m", "vattn", "plan", "--json"],
            stdout=gone,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.stderr == ""
    assert done.returncode == 1


def test_an_interrupt_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(_args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("vattn.tools.plan.run", interrupted)
    assert main(["plan"]) == 130
    assert capsys.readouterr().err == "vattn: interrupted\n"

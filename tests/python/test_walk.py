"""docs/walk.md says what the code does: its example prints what it shows, its functions are in the files it names."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WALK = (ROOT / "docs" / "walk.md").read_text()
STATIONS = re.findall(r"^\| (\d+) \| `([^`]+)` \| `([^`]+)` \|$", WALK, re.MULTILINE)


def block(language: str) -> str:
    match = re.search(rf"```{language}\n(.*?)```", WALK, re.DOTALL)
    assert match is not None
    return match[1]


def test_the_example_prints_what_the_walk_shows() -> None:
    done = subprocess.run([sys.executable, "-c", block("python")], capture_output=True, text=True, check=False)
    assert done.stdout == block("text"), done.stderr


@pytest.mark.parametrize(("number", "file", "function"), STATIONS)
def test_each_function_is_where_the_walk_says(number: str, file: str, function: str) -> None:
    definition = rf"\b{re.escape(function)}\("
    assert re.search(definition, (ROOT / file).read_text()), f"{number}: {function} is not in {file}"


def test_the_numbers_of_the_walk_are_its_stations() -> None:
    numbers = [int(number) for number, _, _ in STATIONS]
    assert numbers == list(range(1, len(numbers) + 1))
    assert [int(number) for number in re.findall(r"^(\d+)\. ", WALK, re.MULTILINE)] == numbers


def test_every_file_the_walk_names_exists() -> None:
    named = set(re.findall(r"`((?:src|python|docs|tests)/[\w./]+)`", WALK))
    assert named
    assert not [file for file in named if not (ROOT / file).is_file()]

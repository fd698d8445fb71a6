"""Tables and progress: pretty on a terminal that can, plain anywhere else."""

from __future__ import annotations

import io
import sys

import pytest

from vattn.tools.progress import progress
from vattn.tools.table import plain_table, print_table

COLUMNS = ("", "vattn", "static")
ROWS = (["waste", "1.25%", "92.51%"], ["requests [all]", "19,366", "5"])
PLAIN = """\
a title
                 vattn  static
--------------  ------  ------
waste            1.25%  92.51%
requests [all]  19,366       5
"""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("rich.console", "rich.table", "rich.text", "rich.progress"):
        monkeypatch.setitem(sys.modules, module, None)  # makes the import raise ImportError


def printed(out: io.StringIO) -> str:
    print_table("a title", COLUMNS, ROWS, file=out)
    return out.getvalue()


def test_redirected_output_is_aligned_plain_text() -> None:
    assert printed(io.StringIO()) == PLAIN


@pytest.mark.usefixtures("without_rich")
def test_a_terminal_without_rich_gets_the_same_plain_text() -> None:
    assert printed(Terminal()) == PLAIN


def test_a_terminal_with_rich_gets_a_frame_and_the_same_cells() -> None:
    pytest.importorskip("rich")
    text = printed(Terminal())
    assert text != PLAIN
    for row in ROWS:
        assert all(cell in text for cell in row)


def test_a_table_without_rows_has_its_columns() -> None:
    assert plain_table("", ("a", "b"), []) == "a  b\n-  -"


def test_progress_is_silent_unless_there_is_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(sys, "stderr", out)
    with progress("working", 10) as advance:
        advance(5)
    assert out.getvalue() == ""


@pytest.mark.usefixtures("without_rich")
def test_progress_on_a_terminal_without_rich_is_silent_too(monkeypatch: pytest.MonkeyPatch) -> None:
    out = Terminal()
    monkeypatch.setattr(sys, "stderr", out)
    with progress("working", 10) as advance:
        advance(5)
    assert out.getvalue() == ""


def test_progress_on_a_terminal_with_rich_names_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    out = Terminal()
    monkeypatch.setattr(sys, "stderr", out)
    with progress("working", 10) as advance:
        advance(10)
    assert "working" in out.getvalue()

"""Request traces: ``TIMESTAMP,ContextTokens,GeneratedTokens``, one request a line.

The format is that of the Azure LLM inference traces. A trace is read whole and checked line by line: anything malformed
is a :class:`TraceError` that names the file, the line and what is wrong with it, whatever bytes the file holds, and in
bounded memory. Tolerated, since real files have them: a byte-order mark, CRLF, no newline at the end, blank lines at
the end, columns in another order, and further columns (ignored). Two requests may share a timestamp; time never runs
backwards. Thread: any; a Trace is not changed once made.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from os import PathLike, fspath
from typing import BinaryIO

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")

#: No line of a trace is nearly this long; the bound keeps a file without newlines from being read whole.
MAX_LINE_BYTES = 4096
MAX_TOKENS = 2**63 - 1

_TIMESTAMP = re.compile(
    r"(\d{4}-\d\d-\d\d)[ T](\d\d):(\d\d):(\d\d)(?:\.(\d{1,9}))?(?:Z|([+-])(\d\d):(\d\d))?", re.ASCII
)
_BOM = b"\xef\xbb\xbf"


class TraceError(ValueError):
    """A trace that cannot be used: ``path``, ``line`` (from 1) and ``problem`` say where and why."""

    def __init__(self, path: str, line: int, problem: str) -> None:
        super().__init__(f"{path}, line {line}: {problem}")
        self.path = path
        self.line = line
        self.problem = problem


@dataclass(frozen=True)
class Trace:
    """Requests in the order they arrive; the three arrays have one entry a request."""

    path: str
    arrivals_ns: array[int]  # nanoseconds after the first request
    prompts: array[int]  # tokens in
    answers: array[int]  # tokens out

    def __len__(self) -> int:
        return len(self.arrivals_ns)


def read_trace(path: str | PathLike[str], limit: int | None = None) -> Trace:
    """Read the first ``limit`` requests of a trace (all of them by default); what follows those is not looked at."""
    name = fspath(path)
    arrivals, prompts, answers = array("q"), array("q"), array("q")
    last = first = 0
    with open(name, "rb") as file:
        lines = _lines(file, name)
        header = next(lines, None)
        if header is None:
            raise TraceError(name, 1, "the file is empty")
        width, places = _columns(header[1], name)
        for number, text in lines:
            if limit is not None and len(arrivals) >= limit:
                break
            fields = text.split(",")
            if len(fields) != width:
                raise TraceError(
                    name, number, f"{_count(len(fields), 'field')} where the header has {width}: {_shown(text)}"
                )
            when = _timestamp(fields[places[0]], name, number)
            if not arrivals:
                first = when
            elif when < last:
                raise TraceError(
                    name, number, f"TIMESTAMP {fields[places[0]]!r} is before that of the request above it"
                )
            last = when
            if last - first > MAX_TOKENS:
                raise TraceError(
                    name, number, f"TIMESTAMP {fields[places[0]]!r} is more than 292 years after the first"
                )
            arrivals.append(when - first)
            prompts.append(_tokens(fields[places[1]], COLUMNS[1], name, number))
            answers.append(_tokens(fields[places[2]], COLUMNS[2], name, number))
            if prompts[-1] + answers[-1] > MAX_TOKENS:
                raise TraceError(name, number, "ContextTokens and GeneratedTokens add up to more than 2**63 - 1")
    if not arrivals:
        raise TraceError(name, 2, "the file has a header and no requests")
    return Trace(name, arrivals, prompts, answers)


def _lines(file: BinaryIO, name: str) -> Iterator[tuple[int, str]]:
    """Yield (number, text) of each line, without its end; refuse what is not text."""
    blank = number = 0  # blank: the first blank line not yet known to be at the end
    while raw := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if number == 1:
            raw = raw.removeprefix(_BOM)
        if len(raw) > MAX_LINE_BYTES:
            raise TraceError(name, number, f"longer than {MAX_LINE_BYTES} bytes: not a trace")
        if b"\0" in raw:
            raise TraceError(name, number, "a NUL byte: not a text file, or not one in UTF-8")
        try:
            text = raw.decode("utf-8").removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise TraceError(name, number, f"not UTF-8 text (byte {raw[error.start]:#04x})") from None
        if not text.strip():
            # Blank lines may end a file; anywhere else something is missing.
            blank = blank or number
            continue
        if blank:
            raise TraceError(name, blank, "a blank line between requests" if blank > 1 else "a blank line for a header")
        yield number, text


def _columns(header: str, name: str) -> tuple[int, tuple[int, ...]]:
    """Return how many columns there are, and where the three that matter stand."""
    titles = [title.strip() for title in header.split(",")]
    expected = ",".join(COLUMNS)
    if not any(column in titles for column in COLUMNS):
        raise TraceError(name, 1, f"the header is {_shown(header)}; expected {expected}")
    for column in COLUMNS:
        if titles.count(column) != 1:
            problem = "missing" if column not in titles else "there twice"
            raise TraceError(name, 1, f"column {column} is {problem}; expected {expected}")
    return len(titles), tuple(titles.index(column) for column in COLUMNS)


def _timestamp(text: str, name: str, number: int) -> int:
    """Nanoseconds since year 1; written out, since Python before 3.11 reads no 7-digit fractions."""
    match = _TIMESTAMP.fullmatch(text.strip())
    if match is None:
        raise TraceError(name, number, f"TIMESTAMP is not a time such as 2023-11-16 18:15:46.68: {_shown(text)}")
    date, hour, minute, second, fraction, sign, zone_hours, zone_minutes = match.groups()
    try:
        day = datetime.strptime(date, "%Y-%m-%d").toordinal() if date not in _DAYS else _DAYS[date]
    except ValueError:
        raise TraceError(name, number, f"TIMESTAMP has no such date: {_shown(text)}") from None
    if len(_DAYS) < 1000:
        _DAYS[date] = day
    if int(hour) > 23 or int(minute) > 59 or int(second) > 59:
        raise TraceError(name, number, f"TIMESTAMP has no such time of day: {_shown(text)}")
    seconds = ((day * 24 + int(hour)) * 60 + int(minute)) * 60 + int(second)
    if sign:
        offset = (int(zone_hours) * 60 + int(zone_minutes)) * 60
        seconds -= offset if sign == "+" else -offset
    return seconds * 1_000_000_000 + int((fraction or "0").ljust(9, "0"))


def _tokens(text: str, column: str, name: str, number: int) -> int:
    """A token count."""
    digits = text.strip()
    # Not just int(): that takes 1_000, +5 and other scripts' digits.
    if digits.isascii() and digits.isdigit():
        if (len(digits) > 19 and len(digits.lstrip("0")) > 19) or int(digits.lstrip("0") or "0") > MAX_TOKENS:
            raise TraceError(name, number, f"{column} is larger than 2**63 - 1: {_shown(digits)}")
        return int(digits)
    if digits.startswith("-") and digits[1:].isdigit():
        raise TraceError(name, number, f"{column} is negative: {_shown(digits)}")
    raise TraceError(name, number, f"{column} is {'empty' if not digits else 'not an integer: ' + _shown(digits)}")


def _shown(text: str) -> str:
    """A quoted, printable, short form of what was found."""
    return ascii(text) if len(text) <= 60 else f"{text[:57]!a}..."


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


# Dates already checked: a trace spans few days and strptime is slow. Entries are only ever added, and are always right.
_DAYS: dict[str, int] = {}

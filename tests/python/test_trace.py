"""Request traces: what a real file may look like, and that every malformed one is an error naming file and line."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vattn.tools.synthetic import write_trace
from vattn.tools.trace import TraceError, read_trace

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
FIRST = "2023-11-16 18:15:46.6805900,374,44\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "trace.csv"


def test_requests_are_read_in_order_with_times_after_the_first(file: Path) -> None:
    file.write_text(HEADER + FIRST + "2023-11-16 18:15:50.9951690,396,109\n")
    trace = read_trace(file)
    assert len(trace) == 2
    assert list(trace.arrivals_ns) == [0, 4_314_579_000]
    assert list(trace.prompts) == [374, 396]
    assert list(trace.answers) == [44, 109]


@pytest.mark.parametrize(
    "content",
    [
        "\ufeff" + HEADER + FIRST,
        (HEADER + FIRST).replace("\n", "\r\n"),
        (HEADER + FIRST).rstrip("\n"),
        HEADER + FIRST + "\n  \n\n",
        "ContextTokens,TIMESTAMP,GeneratedTokens\n374,2023-11-16 18:15:46.68059,44\n",
        "TIMESTAMP,ContextTokens,GeneratedTokens,model\n2023-11-16T18:15:46.68059,374,44,llama\n",
        HEADER + "2023-11-16 18:15:46.680590+00:00, 374 ,044\n",
        HEADER + "2023-11-16 18:15:46Z,374,44\n",
    ],
    ids=["BOM", "CRLF", "no last newline", "blank end", "column order", "more columns", "zone", "no fraction"],
)
def test_harmless_differences_are_tolerated(file: Path, content: str) -> None:
    file.write_bytes(content.encode())
    trace = read_trace(file)
    assert (list(trace.prompts), list(trace.answers)) == ([374], [44])


def test_equal_timestamps_and_requests_of_no_tokens_are_fine(file: Path) -> None:
    file.write_text(HEADER + FIRST + FIRST + FIRST.replace("374,44", "0,0"))
    assert list(read_trace(file).arrivals_ns) == [0, 0, 0]


def test_zones_are_taken_into_account(file: Path) -> None:
    file.write_text(HEADER + "2024-05-10 00:00:00+02:00,1,1\n2024-05-09 22:00:01-00:00,1,1\n")
    assert list(read_trace(file).arrivals_ns) == [0, 10**9]


def test_a_limit_reads_no_further(file: Path) -> None:
    file.write_text(HEADER + FIRST * 3 + "not looked at\n")
    assert len(read_trace(file, limit=3)) == 3


MALFORMED = {
    "empty": ("", 1, "empty"),
    "blank": ("\n\n", 1, "empty"),
    "header only": (HEADER, 2, "no requests"),
    "no header": (FIRST + FIRST, 1, "the header is"),
    "another header": ("time,in,out\n" + FIRST, 1, "expected TIMESTAMP,ContextTokens,GeneratedTokens"),
    "missing column": ("TIMESTAMP,ContextTokens\n" + FIRST, 1, "GeneratedTokens is missing"),
    "column twice": ("TIMESTAMP,ContextTokens,ContextTokens,GeneratedTokens\n", 1, "ContextTokens is there twice"),
    "blank first line": ("\n" + HEADER + FIRST, 1, "blank line"),
    "blank line inside": (HEADER + FIRST + "\n" + FIRST, 3, "blank line"),
    "truncated line": (HEADER + FIRST + "2023-11-16 18:15:50.99", 3, "1 field where the header has 3"),
    "truncated tokens": (HEADER + FIRST + "2023-11-16 18:15:50.99,396,", 3, "GeneratedTokens is empty"),
    "too many fields": (HEADER + FIRST.replace("44", "44,5"), 2, "4 fields where the header has 3"),
    "not an integer": (HEADER + FIRST.replace("374", "many"), 2, "ContextTokens is not an integer: 'many'"),
    "a float": (HEADER + FIRST.replace("374", "374.0"), 2, "not an integer"),
    "underscore": (HEADER + FIRST.replace("374", "3_74"), 2, "not an integer"),
    "other digits": (HEADER + FIRST.replace("374", "٣٧٤"), 2, "not an integer"),
    "plus": (HEADER + FIRST.replace("374", "+374"), 2, "not an integer"),
    "negative": (HEADER + FIRST.replace("44", "-44"), 2, "GeneratedTokens is negative: '-44'"),
    "nan tokens": (HEADER + FIRST.replace("374", "NaN"), 2, "not an integer: 'NaN'"),
    "nan time": (HEADER + "NaN,1,1\n", 2, "TIMESTAMP is not a time"),
    "empty time": (HEADER + ",1,1\n", 2, "TIMESTAMP is not a time"),
    "no such date": (HEADER + FIRST.replace("11-16", "02-30"), 2, "no such date"),
    "year 0": (HEADER + FIRST.replace("2023", "0000"), 2, "no such date"),
    "no such time": (HEADER + FIRST.replace("18:", "25:"), 2, "no such time"),
    "backwards": (HEADER + FIRST + FIRST.replace("18:", "17:"), 3, "is before that of the request above it"),
    "centuries": (HEADER + FIRST + FIRST.replace("2023", "2523"), 3, "292 years"),
    "2**63": (HEADER + FIRST.replace("374", str(2**63)), 2, "larger than 2**63 - 1"),
    "5000 digits": (HEADER + FIRST.replace("374", "9" * 4000), 2, "larger than 2**63 - 1"),
    "huge sum": (HEADER + FIRST.replace("374", str(2**63 - 1)), 2, "add up to more"),
    "long line": (HEADER + "x" * 100_000, 2, "longer than"),
    "NUL": (HEADER + FIRST.replace("374", "3\x0074"), 2, "NUL"),
}


@pytest.mark.parametrize(("content", "line", "problem"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_trace_names_file_line_and_problem(file: Path, content: str, line: int, problem: str) -> None:
    file.write_bytes(content.encode())
    with pytest.raises(TraceError) as caught:
        read_trace(file)
    assert problem in str(caught.value)
    assert str(caught.value).startswith(f"{file}, line {line}: ")
    assert (caught.value.path, caught.value.line) == (str(file), line)
    assert len(caught.value.problem) < 250


@pytest.mark.parametrize(
    "junk", [bytes(range(256)), b"\xff\xfe" + HEADER.encode("utf-16-le"), b"PK\x03\x04\x14\0" * 50]
)
def test_binary_files_are_refused(file: Path, junk: bytes) -> None:
    file.write_bytes(junk)
    with pytest.raises(TraceError, match="line 1: "):
        read_trace(file)


def test_an_endless_file_is_refused_without_being_read() -> None:
    with pytest.raises(TraceError, match="longer than"):
        read_trace("/dev/zero")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_at_all_are_a_trace_or_a_trace_error(file: Path, data: bytes) -> None:
    for content in (data, HEADER.encode() + FIRST.encode() + data):
        file.write_bytes(content)
        with suppress(TraceError):
            read_trace(file)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, len(HEADER + FIRST) - 1), st.binary(min_size=1, max_size=3))
def test_a_damaged_byte_is_a_trace_or_a_trace_error(file: Path, place: int, damage: bytes) -> None:
    content = bytearray((HEADER + FIRST).encode())
    content[place : place + len(damage)] = damage
    file.write_bytes(content)
    with suppress(TraceError):
        read_trace(file)


def test_the_made_up_trace_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_trace(tmp_path / name, requests=300, per_second=10, seed=4)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    trace = read_trace(tmp_path / "a")
    assert len(trace) == 300
    assert 800 < sorted(trace.prompts)[150] < 1250
    assert 20 < trace.arrivals_ns[-1] / 1e9 < 45

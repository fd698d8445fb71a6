"""Fuzz of the request-trace parser: whatever bytes a file holds, it is a sane trace or a TraceError.

A few hundred examples a change; FUZZ_SECONDS=60 goes on for that long, with a new seed each time, which is printed.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from soak import FIRST_SEED
from vattn.tools.trace import MAX_TOKENS, TraceError, read_trace

SECONDS = float(os.environ.get("FUZZ_SECONDS", "0"))
HEADER = b"TIMESTAMP,ContextTokens,GeneratedTokens"
QUICK = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

# What a damaged file is made of: pieces of real ones, the edges of what they may hold, and anything.
FIELDS = [
    *(
        b"2023-11-16 18:15:46.6805900",
        b"2023-11-16T18:15:46Z",
        b"2024-02-29 23:59:59+14:59",
        b"0001-01-01 00:00:00-99:99",
    ),
    *(
        b"9999-12-31 23:59:59.999999999",
        b"0",
        b"374",
        b"-1",
        b"+1",
        b" 7 ",
        b"007",
        b"9" * 19,
        b"9" * 40,
        b"1e3",
        b"NaN",
    ),
    *(
        str(2**63 - 1).encode(),
        str(2**63).encode(),
        "٣".encode(),
        "²".encode(),
        b"",
        b"\0",
        b"\xff",
        b"'",
        b'"',
        b"\x85",
    ),
]
SEPARATORS = [
    b",",
    b",",
    b",",
    b"\n",
    b"\n",
    b"\r\n",
    b"\r",
    b";",
    b"\n\n",
    b"\x0b",
    "\u2028".encode(),
    b"\xef\xbb\xbf",
]
PIECES = (
    st.sampled_from(FIELDS) | st.sampled_from(SEPARATORS) | st.sampled_from(HEADER.split(b",")) | st.binary(max_size=6)
)
ROWS = st.tuples(st.sampled_from(FIELDS), st.sampled_from(FIELDS), st.sampled_from(FIELDS)).map(b",".join)
FILES = (
    st.binary(max_size=300)
    | st.lists(PIECES, max_size=40).map(b"".join)
    | st.lists(ROWS, max_size=8).map(lambda rows: b"\n".join([HEADER, *rows]))
    | st.lists(PIECES, max_size=30).map(lambda pieces: HEADER + b"\n" + b"".join(pieces))
)


def read_anything(path: Path, data: bytes, limit: int | None) -> None:
    path.write_bytes(data)
    refused: TraceError | None = None
    try:
        trace = read_trace(path, limit)
    except TraceError as error:
        refused = error
    if refused is not None:
        assert refused.path == str(path)
        assert 1 <= refused.line <= data.count(b"\n") + 2
        assert 0 < len(refused.problem) < 300
        assert refused.problem.isprintable()
        return
    assert len(trace) > 0
    assert limit is None or len(trace) <= limit
    assert len(trace) == len(trace.prompts) == len(trace.answers)
    assert trace.arrivals_ns[0] == 0
    assert all(a <= b for a, b in zip(trace.arrivals_ns, trace.arrivals_ns[1:], strict=False))
    assert all(p >= 0 and a >= 0 and p + a <= MAX_TOKENS for p, a in zip(trace.prompts, trace.answers, strict=True))


@QUICK
@given(FILES, st.none() | st.integers(1, 4))
def test_any_file_is_a_sane_trace_or_a_trace_error(tmp_path: Path, data: bytes, limit: int | None) -> None:
    read_anything(tmp_path / "trace.csv", data, limit)


@QUICK
@given(st.lists(ROWS, min_size=1, max_size=4), st.data())
def test_a_file_cut_anywhere_is_a_sane_trace_or_a_trace_error(
    tmp_path: Path, rows: list[bytes], data: st.DataObject
) -> None:
    whole = b"\n".join([HEADER, *rows]) + b"\n"
    read_anything(tmp_path / "trace.csv", whole[: data.draw(st.integers(0, len(whole)))], None)


def test_the_fuzz_goes_on_for_as_long_as_asked(tmp_path: Path) -> None:
    chance = random.Random(FIRST_SEED) if "VATTN_SOAK_SEED" in os.environ else random.SystemRandom()
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        start = chance.randrange(2**32)
        print(f"seed {start}")

        @seed(start)
        @settings(QUICK, database=None)
        @given(FILES, st.none() | st.integers(1, 4))
        def more(data: bytes, limit: int | None) -> None:
            read_anything(tmp_path / "trace.csv", data, limit)

        more()

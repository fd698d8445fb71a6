"""Sizes as people write them: what is accepted, what is refused, and what the refusal says."""

from __future__ import annotations

import pytest

from vattn.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("65536", 65536),
        ("512B", 512),
        ("64KiB", 64 * 1024),
        ("2MiB", 2 * 1024**2),
        ("2 mib", 2 * 1024**2),
        (" 40GiB ", 40 * 1024**3),
        ("1.5GiB", 3 * 1024**3 // 2),
        ("0.5 KiB", 512),
        ("1.0", 1),
        ("1TiB", 1024**4),
        ("1KB", 1000),
        ("2MB", 2_000_000),
        ("40GB", 40 * 1000**3),
        ("0.1TB", 100_000_000_000),
        ("9223372036854775807", 2**63 - 1),
        ("007KiB", 7 * 1024),
    ],
)
def test_text_is_a_number_and_a_unit_in_any_case(text: str, size: int) -> None:
    assert parse_size(text, "memory") == size


@pytest.mark.parametrize("size", [1, 4096, 2**31, 2**32, 2**63 - 1])
def test_integers_are_bytes(size: int) -> None:
    assert parse_size(size, "memory") == size


def test_numpy_integers_are_integers() -> None:
    numpy = pytest.importorskip("numpy")
    result = parse_size(numpy.int64(4096), "memory")
    assert (result, type(result)) == (4096, int)


class RaisingIndex:
    def __index__(self) -> int:
        raise RuntimeError("no number today")


class HostileRepr:
    def __repr__(self) -> str:
        raise RuntimeError("no text either")


@pytest.mark.parametrize(
    "value", [True, False, 1.0, float("nan"), None, b"2MiB", [4096], RaisingIndex(), HostileRepr()]
)
def test_other_types_are_a_type_error(value: object) -> None:
    with pytest.raises(TypeError, match="memory_limit="):
        parse_size(value, "memory_limit")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0, -1, -(2**70), "0", "0GiB", "-1", "-1GiB", "", " ", "GiB", "nan", "inf", "1e9"])
@pytest.mark.parametrize("name", ["page_size", "memory_limit"])
def test_nothing_negative_and_other_text_are_a_value_error(value: int | str, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=.*65536.*2MiB"):
        parse_size(value, name)


@pytest.mark.parametrize(
    "text", ["1_000", "+5", "٣GiB", "1.5", "0.3KiB", "1,5GiB", "4K", "40G", "1PiB", "1 2MiB", "2MiB\0"]
)
def test_ambiguous_text_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match="page_size="):
        parse_size(text, "page_size")


@pytest.mark.parametrize(
    "value", [2**63, 2**64, pytest.param(10**5000, id="5000 digits"), "9223372036854775808", "8388608TiB", "9" * 5000]
)
def test_more_than_63_bits_is_an_overflow_error(value: int | str) -> None:
    with pytest.raises(OverflowError, match="memory_limit="):
        parse_size(value, "memory_limit")


def test_a_message_stays_short_whatever_the_value() -> None:
    with pytest.raises(ValueError, match=r"\.\.\.") as caught:
        parse_size("x" * 100_000, "memory")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (2 * 1024**2, "2 MiB"), (40 * 1024**3, "40 GiB")],
)
def test_format_is_for_people(size: int, text: str) -> None:
    assert format_size(size) == text

"""Sizes in bytes, as people write them: ``40GiB``, ``"2 MiB"``, ``65536``.

Promise: :func:`parse_size` returns a positive ``int`` below 2**63 or raises an error that names the parameter, the
value and the accepted forms; it changes nothing and needs nothing installed. :func:`format_size` is its readable
inverse. Thread: any; both are pure functions.
"""

from __future__ import annotations

import operator
import re

#: The largest size the library can count: byte counts are signed 64-bit integers everywhere below.
MAX_SIZE = 2**63 - 1

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 1000,
    "mb": 1000**2,
    "gb": 1000**3,
    "tb": 1000**4,
    "kib": 1024,
    "mib": 1024**2,
    "gib": 1024**3,
    "tib": 1024**4,
}
_FORM = re.compile(r"\s*(\d+)(?:\.(\d+))?\s*([A-Za-z]*)\s*", re.ASCII)
_ACCEPTED = "a positive whole number of bytes, or text such as '65536', '64KiB', '2MiB', '1.5GiB', '40GB'"

# Longer digit strings are past 2**63 - 1 whatever they say, and Python refuses to convert very long ones at all.
_MAX_DIGITS = 40


def shown(value: object) -> str:
    """``repr`` of a value, short enough for a message (and safe: ``repr`` of a huge int raises)."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    try:
        text = repr(value)
    except Exception:  # an object may do anything in its repr; the message must still be made
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def parse_size(value: int | str, name: str) -> int:
    """Return ``value`` in bytes; ``name`` is the parameter, for the error message.

    Integers (anything with ``__index__``, numpy's included) are bytes. Text is a number and an optional unit, in any
    case: B, KB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB (powers of 1024). A decimal is fine if it comes to
    whole bytes. Raises TypeError for any other type (bool and float included), ValueError for zero, a negative number
    or text of another form, and OverflowError beyond 2**63 - 1.
    """
    size = _parse_text(value, name) if isinstance(value, str) else _parse_integer(value, name)
    if size <= 0:
        raise ValueError(f"{name}={shown(value)}: a size must be at least 1 byte; give {_ACCEPTED}")
    if size > MAX_SIZE:
        raise OverflowError(f"{name}={shown(value)}: larger than 2**63 - 1 bytes; give {_ACCEPTED}")
    return size


def _parse_integer(value: object, name: str) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}={shown(value)} is a {type(value).__name__}; give {_ACCEPTED}")
    try:
        return operator.index(value)
    except Exception as error:
        raise TypeError(f"{name}={shown(value)} cannot be used as an integer ({error}); give {_ACCEPTED}") from error


def _parse_text(value: str, name: str) -> int:
    match = _FORM.fullmatch(value)
    unit = _UNITS.get(match[3].lower()) if match else None
    if match is None or unit is None:
        raise ValueError(f"{name}={shown(value)} is not a size; give {_ACCEPTED}")
    whole, fraction = match[1].lstrip("0"), (match[2] or "").rstrip("0")
    if len(whole) > _MAX_DIGITS:
        raise OverflowError(f"{name}={shown(value)}: larger than 2**63 - 1 bytes; give {_ACCEPTED}")
    # Integer arithmetic, not float: 0.1TB is exactly 100,000,000,000 bytes.
    power: int = 10 ** min(len(fraction), _MAX_DIGITS)
    scaled, rest = divmod(int(fraction[:_MAX_DIGITS] or "0") * unit, power)
    if rest or len(fraction) > _MAX_DIGITS:
        raise ValueError(f"{name}={shown(value)} is not a whole number of bytes; give {_ACCEPTED}")
    return int(whole or "0") * unit + scaled


def format_size(size: float) -> str:
    """Return a byte count for people: ``1536`` gives ``1.50 KiB``, whole multiples drop the decimals (``2 MiB``)."""
    for unit, scale in (("TiB", 1024**4), ("GiB", 1024**3), ("MiB", 1024**2), ("KiB", 1024)):
        if abs(size) >= scale:
            amount = size / scale
            return f"{amount:.0f} {unit}" if amount == int(amount) else f"{amount:.2f} {unit}"
    return f"{size:.0f} B"

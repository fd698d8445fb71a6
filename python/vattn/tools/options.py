"""Command-line options the commands share, and the conversions of their values.

Promise: a value that cannot be used gives one line on standard error that names the option, the value and the way out,
and exit status 2; nothing has been started by then. Thread: the main one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NoReturn, TypeVar

from vattn.sizes import parse_size
from vattn.tools.geometry import DTYPE_BYTES, Geometry, find_model, notes_of
from vattn.tools.model_config import ModelConfig, read_config

DEFAULT_MODEL = "llama-3-8b"

_T = TypeVar("_T")


class UsageError(Exception):
    """Bad input, explained in one line; the command ends with status 2."""


def os_error(error: OSError) -> str:
    """An operating system's error in words, without its number."""
    reason = error.strerror or str(error)
    return f"{error.filename}: {reason}" if error.filename else reason


class CheckError(Exception):
    """Something the command checks did not hold; it ends with status 1."""


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)  # an abbreviation would change meaning when an option is added
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


def _checked(convert: Callable[[str], _T]) -> Callable[[str], _T]:
    """Let argparse show a conversion's own message, not "invalid value"."""

    def converted(text: str) -> _T:
        try:
            return convert(text)
        except (ValueError, OverflowError) as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return converted


def _integer(text: str, least: int) -> int:
    digits = text.strip().removeprefix("-")
    if not (digits.isascii() and digits.isdigit()):
        raise ValueError(f"not an integer: {text[:60]!r}")
    if len(digits) > 19 or int(digits) > 2**63 - 1:
        raise OverflowError(f"larger than 2**63 - 1: {text[:60]!r}")
    if int(text) < least:
        raise ValueError(f"must be at least {least}, not {text.strip()}")
    return int(text)


def _number(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):  # NaN is neither
        raise ValueError(f"must be a positive number, not {text!r}")
    return value


def _percent(text: str) -> float:
    value = _number(text)
    if value >= 100:
        raise ValueError(f"must be below 100 percent, not {text!r}")
    return value


positive = _checked(lambda text: _integer(text, 1))
non_negative = _checked(lambda text: _integer(text, 0))
positive_number = _checked(_number)
percent = _checked(_percent)
size = _checked(lambda text: parse_size(text, "size"))
token_counts = _checked(lambda text: [_integer(part, 1) for part in text.split(",")])


def add_geometry(parser: argparse.ArgumentParser) -> None:
    """Options that say what a token is made of."""
    group = parser.add_argument_group(
        "model", "a known model by name, its configuration, or its numbers; numbers given beside replace its own"
    )
    help_model = f"such as llama-3-8b or Qwen/Qwen3-8B (default: {DEFAULT_MODEL})"
    group.add_argument("--model", metavar="NAME", help=help_model)
    help_config = "a config.json as Hugging Face writes it, or a folder with one: any model, known by name or not"
    group.add_argument("--config", metavar="PATH", help=help_config)
    group.add_argument("--num-layers", type=positive, metavar="N", help="attention layers")
    group.add_argument("--num-kv-heads", type=positive, metavar="N", help="key and value heads")
    group.add_argument("--head-dim", type=positive, metavar="N", help="elements a head")
    group.add_argument("--v-head-dim", type=non_negative, metavar="N", help="of V where it differs; 0: keys only (MLA)")
    group.add_argument(
        "--dtype", choices=sorted(DTYPE_BYTES), help="of the cache (default: the model's, else bfloat16)"
    )


def geometry_of(args: argparse.Namespace) -> Geometry:
    """The geometry those options describe."""
    return model_of(args).geometry


def model_of(args: argparse.Namespace) -> ModelConfig:
    """The geometry those options describe, and what it leaves out of the model."""
    given = {
        name: getattr(args, name)
        for name in ("num_layers", "num_kv_heads", "head_dim", "v_head_dim", "dtype")
        if getattr(args, name) is not None
    }
    missing = [name for name in ("num_layers", "num_kv_heads", "head_dim") if name not in given]
    if args.config is not None:
        return _from_config(args, given)
    if args.model is None and not missing:
        return ModelConfig(Geometry(**given), ())
    if args.model is None and len(missing) < 3:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
        raise UsageError(f"without --model, give {options} too")
    try:
        model = find_model(args.model or DEFAULT_MODEL)
    except ValueError as error:
        raise UsageError(f"argument --model: {error}") from None
    return ModelConfig(_changed(model, given), notes_of(model))


def _from_config(args: argparse.Namespace, given: dict[str, Any]) -> ModelConfig:
    if args.model is not None:
        raise UsageError("argument --config: give either --model or --config")
    try:
        found = read_config(args.config)
    except OSError as error:
        raise UsageError(f"argument --config: {os_error(error)}") from None
    except ValueError as error:
        raise UsageError(f"argument --config: {error}") from None
    return replace(found, geometry=_changed(found.geometry, given))


def _changed(model: Geometry, given: dict[str, Any]) -> Geometry:
    if "head_dim" in given and "v_head_dim" not in given and model.v_head_dim is not None:
        raise UsageError(f"argument --head-dim: {model.name} has a V of its own size; give --v-head-dim too")
    return replace(model, **given, name=model.name if not given else f"{model.name}, changed")


def add_pages(parser: argparse.ArgumentParser, page_size: str) -> None:
    """Options that say how tokens are laid out in pages."""
    group = parser.add_argument_group("memory")
    group.add_argument(
        "--page-size", type=size, metavar="SIZE", help=f"bytes a page, such as 2MiB (default: {page_size})"
    )
    group.add_argument(
        "--layers-per-tensor",
        type=positive,
        metavar="N",
        help="layers that share a page (default: the library's: 1 on cpu, else so many that a page holds at most 64 "
        "tokens)",
    )
    group.add_argument("--layout", choices=("NHD", "HND"), help="token-major or head-major (default: the library's)")
    group.add_argument(
        "--max-seq-len", type=positive, default=16_384, metavar="N", help="longest request (default: 16384)"
    )

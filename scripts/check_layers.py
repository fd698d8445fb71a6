#!/usr/bin/env python3
"""Checks the include rule of the C++ sources: a layer includes only itself and the layers beneath it.

    python scripts/check_layers.py [ROOT]

The rule, in words, is in src/cpp/README.md; here it is as a table, bottom up. Also checked: every quoted include names
a file that exists; src/cpp and src/cuda know neither Python nor torch; the CUDA toolkit's headers appear in one test
only, the one that compares our declarations with them. Prints each violation as ``file:line: what``; exit status 1 if
there is any.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

# Bottom up: a name, and the paths (files, or folders with a slash at the end) that belong to it. The longest match
# wins.
LAYERS: list[tuple[str, tuple[str, ...]]] = [
    (
        "base",
        tuple(
            f"src/cpp/vattn/{name}"
            for name in (
                *("checked.hpp", "dtype.hpp", "error.hpp", "export.hpp", "fork.hpp", "fork.cpp"),
                *("version.hpp", "version.cpp"),
            )
        ),
    ),
    ("driver", ("src/cpp/vattn/driver/",)),
    ("host", ("src/cpp/vattn/driver/host/",)),
    ("null", ("src/cpp/vattn/driver/null/",)),
    ("cuda", ("src/cuda/",)),
    ("decorators", ("src/cpp/vattn/driver/decorators/",)),
    ("factory", ("src/cpp/vattn/driver/open.hpp", "src/cpp/vattn/driver/open.cpp")),
    ("memory", ("src/cpp/vattn/memory/",)),
    ("tensor", ("src/cpp/vattn/tensor/",)),
    ("kv", ("src/cpp/vattn/kv/",)),
    ("umbrella", ("src/cpp/vattn/vattn.hpp",)),
    ("c", ("src/cpp/vattn/c/",)),
    ("bindings", ("src/bindings/",)),
]
# The drivers know nothing of each other, and nobody knows which there are but the factory, and `info` in the bindings.
ONLY_FOR = {name: {"factory", "bindings"} for name in ("host", "null", "cuda")}

SOURCES = ("*.hpp", "*.cpp", "*.h", "*.c", "*.def")
INCLUDE = re.compile(r'^\s*#\s*include\s*(?P<open>["<])(?P<name>[^">]+)[">]')
PYTHON_OR_TORCH = re.compile(r"^(Python\.h|nanobind/|pybind11/|torch/|ATen/|c10/|bindings/)")
CUDA_TOOLKIT = re.compile(r"^(cuda|cuda_runtime|cuda_runtime_api|cudaTypedefs|cuda_bf16|cuda_fp16|nvml)\.h$")
THIRD_PARTY = re.compile(r"^(gtest|gmock|benchmark)/")
MAY_INCLUDE_CUDA_TOOLKIT = "tests/cpp/cuda_types_match.cpp"


def layer_of(path: str) -> str | None:
    """The layer of a path relative to the root; None outside the library and its bindings."""
    matches = [
        (len(place), name)
        for name, places in LAYERS
        for place in places
        if (path.startswith(place) if place.endswith("/") else path == place)
    ]
    return max(matches)[1] if matches else None


def may_include(layer: str) -> set[str]:
    """The layers that `layer` may include besides itself."""
    names = [name for name, _ in LAYERS]
    return {below for below in names[: names.index(layer)] if below not in ONLY_FOR or layer in ONLY_FOR[below]}


def includes(file: Path) -> Iterator[tuple[int, str, bool]]:
    """Line, name and whether it is quoted, of each include."""
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        match = INCLUDE.match(line)
        if match:
            yield number, match["name"], match["open"] == '"'


def resolve(root: Path, file: Path, name: str) -> Path | None:
    """The file that a quoted include names: beside the file, or under one of the two roots of includes."""
    places = [file.parent, root / "src/cpp", root / "src"]
    if root / "tests" in file.parents:
        places += [root / "tests/cpp", root / "tests/fake_cuda"]
    for place in places:
        if (place / name).is_file():
            return (place / name).resolve()
    return None


def check_file(root: Path, file: Path) -> Iterator[str]:
    path = file.relative_to(root).as_posix()
    layer = layer_of(path)
    in_library = path.startswith(("src/cpp/", "src/cuda/"))
    if path.startswith("src/") and layer is None:
        yield f"{path}:1: belongs to no layer: name it in scripts/check_layers.py and in src/cpp/README.md"
    for line, name, quoted in includes(file):
        where = f"{path}:{line}"
        if CUDA_TOOLKIT.match(name) and path != MAY_INCLUDE_CUDA_TOOLKIT:
            yield f"{where}: {name} is of the CUDA toolkit, which nothing but {MAY_INCLUDE_CUDA_TOOLKIT} may need"
            continue
        if in_library and PYTHON_OR_TORCH.match(name):
            yield f"{where}: {name}: the library knows neither Python nor torch; that belongs to src/bindings"
            continue
        if not quoted:
            if in_library and name.startswith("vattn/"):
                yield f"{where}: <{name}>: our own files are included with quotes, so that this script sees them"
            continue
        target = resolve(root, file, name)
        if target is None and not path.startswith("src/") and THIRD_PARTY.match(name):
            continue
        if target is None:
            yield f'{where}: "{name}" names no file'
            continue
        if layer is None:
            continue
        below = layer_of(target.relative_to(root).as_posix())
        if below is not None and below != layer and below not in may_include(layer):
            allowed = ", ".join(sorted(may_include(layer))) or "no other layer"
            yield f'{where}: {layer} includes "{name}" of {below}; it may include {allowed}'


def check(root: Path) -> list[str]:
    root = root.resolve()
    files = [
        file for top in ("src", "tests", "bench", "examples") for kind in SOURCES for file in (root / top).rglob(kind)
    ]
    return [problem for file in sorted(files) for problem in check_file(root, file)]


def main(arguments: list[str]) -> int:
    root = Path(arguments[0]) if arguments else Path(__file__).parents[1]
    problems = check(root)
    for problem in problems:
        print(problem)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

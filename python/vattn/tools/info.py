"""``vattn info``: what is there, what is missing, and how to get it.

Promise: runs on any Python 3.10 or newer with nothing else importable (no torch, no GPU, not even the native part of
this package), reports a broken installation as well as an absent one, and changes nothing. Thread: the main one.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from vattn.sizes import format_size
from vattn.tools.host import cuda_facts, host_facts

#: The native part of the package.
NATIVE_MODULE = "vattn._core"

# module: (what it is for, how to get it)
PACKAGES = {
    NATIVE_MODULE: (
        "the native part of vattn: every cache and tensor",
        "pip install vattn (from source: pip install .)",
    ),
    "nanobind_backend": ("the native part is loaded through it", "pip install nanobind-backend"),
    "torch": ("tensors: view, batch, layer and write; not needed on device 'meta'", "pip install torch"),
    "numpy": ("lengths as numpy arrays", "pip install numpy"),
    "transformers": ("vattn.transformers: Hugging Face generate", "pip install 'transformers>=5.17,<6'"),
    "rich": ("progress bars and prettier tables", "pip install 'vattn[cli]'"),
}

#: Every environment variable the package reads.
ENVIRONMENT = {
    "VATTN_CUDA_LIBRARY": "the library to open in place of libcuda.so.1",
    "VATTN_TRACE": "the request trace the tests and benchmarks replay; the library does not read it",
}


def run(args: argparse.Namespace) -> int:
    """The command: look and print."""
    facts = collect()
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        _print(facts)
    return 0


def version() -> str:
    """The version of the package as installed, else as its source says."""
    try:
        return metadata.version("vattn")
    except metadata.PackageNotFoundError:
        import vattn

        return str(getattr(vattn, "__version__", "unknown"))


def collect() -> dict[str, Any]:
    """Everything ``info --json`` prints."""
    packages = {module: _package(module) for module in PACKAGES}
    cuda = _cuda()
    missing = [
        {"what": module, "needed_for": purpose, "problem": packages[module]["problem"], "get": get}
        for module, (purpose, get) in PACKAGES.items()
        if packages[module]["problem"]
    ]
    if cuda["problem"]:
        missing.append(
            {
                "what": "a CUDA device",
                "needed_for": "device 'cuda' ('cpu' and 'meta' need none)",
                "problem": cuda["problem"],
                "get": "install NVIDIA's driver, which brings libcuda.so.1, on a machine with a GPU",
            }
        )
    return {
        "vattn": {"version": version(), "path": str(Path(__file__).resolve().parent.parent)},
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "packages": packages,
        "cuda": cuda,
        "host": host_facts(),
        "environment": _environment(),
        "missing": missing,
    }


def _cuda() -> dict[str, Any]:
    """What the library itself sees of CUDA; where it cannot be imported, what can be seen without it."""
    try:
        seen = importlib.import_module(NATIVE_MODULE).probe_cuda()
    except Exception:  # why it cannot be imported is reported with the packages
        return cuda_facts()
    number = seen["driver_version"]
    return {
        "library": seen["library"],
        "driver_version": f"{number // 1000}.{number % 1000 // 10}" if number else None,
        "devices": list(seen["devices"]),
        "problem": seen["reason"] or None,
    }


def _package(module: str) -> dict[str, Any]:
    """Version of a package and, if it cannot be imported, why."""
    # Really imported: a package can be installed and still not load, which is what people need to be told.
    try:
        found = importlib.import_module(module)
    except Exception as error:  # an import runs foreign code, which may raise anything
        return {"version": None, "problem": " ".join(f"{type(error).__name__}: {error}".split())}
    known = getattr(found, "__version__", None)
    return {"version": str(known) if known is not None else _installed_version(module), "problem": None}


def _installed_version(module: str) -> str | None:
    name = module.split(".", maxsplit=1)[0].replace("_", "-")
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _environment() -> list[dict[str, Any]]:
    names = sorted(set(ENVIRONMENT) | {name for name in os.environ if name.startswith("VATTN_")})
    unknown = "not a variable this version reads"
    return [{"name": name, "value": os.environ.get(name), "meaning": ENVIRONMENT.get(name, unknown)} for name in names]


def _print(facts: dict[str, Any]) -> None:
    host, cuda = facts["host"], facts["cuda"]
    print(f"vattn {facts['vattn']['version']} in {facts['vattn']['path']}")
    print(f"Python {facts['python']['version']} at {facts['python']['executable']}\n")
    print("packages")
    for module, package in facts["packages"].items():
        state = f"cannot be imported ({package['problem']})" if package["problem"] else package["version"] or "there"
        print(f"  {module:<18}{state}")
    print("\nCUDA")
    print(f"  {'library':<18}{cuda['library']}{'' if cuda['problem'] is None else ': ' + cuda['problem']}")
    if cuda["driver_version"]:
        print(f"  {'driver supports':<18}CUDA {cuda['driver_version']}")
    for number, device in enumerate(cuda["devices"]):
        details = [device["name"], format_size(device["total_bytes"])]
        if device["granularity"]:
            details.append(f"pages of {format_size(device['granularity'])} or multiples")
        if device["reason"]:
            details.append(f"cannot be used: {device['reason']}")
        print(f"  {f'cuda:{number}':<18}{', '.join(details)}")
    print("\nhost")
    for name, value in host.items():
        is_bytes = name.endswith("_bytes") and isinstance(value, int)
        shown = (
            format_size(value)
            if is_bytes
            else "none"
            if value is None
            else f"{value:,}"
            if isinstance(value, int)
            else value
        )
        print(f"  {name.removesuffix('_bytes').replace('_', ' '):<18}{shown}")
    print("\nenvironment")
    for entry in facts["environment"]:
        value = "not set" if entry["value"] is None else repr(entry["value"])
        print(f"  {entry['name']:<20}{value}: {entry['meaning']}")
    if facts["missing"]:
        print("\nmissing")
        for entry in facts["missing"]:
            print(f"  {entry['what']}: {entry['needed_for']}\n    {entry['get']}")
    else:
        print("\nnothing is missing")

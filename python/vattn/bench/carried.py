"""Kernels carried to a machine without a package index: ``vattn bench --carried DIR`` finds what `bench/carry.py` made.

What it is: the folder holds `manifest.json`, FlashAttention-3's library (xz), wheels, and FlashInfer's compiled modules
(xz). `use` unpacks them into a temporary folder of this user, once, and makes them importable, after everything that is
installed.

What it promises: a file whose checksum is not the manifest's is refused. What cannot be used is told by its reason and
left out; nothing is downloaded or compiled. Thread: one, before the first use of a kernel.
"""

from __future__ import annotations

import hashlib
import json
import logging
import lzma
import os
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vattn.bench.benchmark import Settings

MANIFEST = "manifest.json"
#: In the folder, and where FlashInfer looks for modules in its own package.
MODULES = "flashinfer_modules"
FLASHINFER_AOT = Path("flashinfer/data/aot")
FA3 = "_vllm_fa3_C.abi3.so"

log = logging.getLogger("vattn.bench")
_used: dict[Path, dict[str, str]] = {}


class CarriedError(Exception):
    """The folder is not what `bench/carry.py` makes, or a file of it is damaged."""


def no_gpu(settings: Settings) -> str:
    """Why the kernels cannot be measured with these settings; empty where they can."""
    if settings.fake_cuda is not None or settings.device == "cpu":
        import importlib.util

        return "" if importlib.util.find_spec("triton") else "triton is not installed: pip install triton"
    import torch

    if torch.cuda.is_available():
        return ""
    return f"no GPU that torch can use as {settings.device} (torch {torch.__version__})"


def use(folder: Path | None, interpret: bool = False) -> dict[str, str]:
    """Make what is in the folder importable. By name, why it is left out; empty where it is used.

    `interpret`: as `interpret_triton`.
    """
    if interpret:
        interpret_triton()
    if folder is None:
        return {}
    folder = folder.resolve()
    if folder not in _used:
        _used[folder] = _unpack_and_use(folder)
        for name, reason in _used[folder].items():
            if reason:
                log.warning("%s, carried in %s, is left out: %s", name, folder, reason)
    return _used[folder]


def interpret_triton() -> None:
    """Triton is to run without a GPU: to be said before it is imported, which some releases of torch do themselves."""
    if "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"


def unpack(folder: Path, site: Path) -> None:
    """Everything of the folder into `site`. CarriedError for a folder or a file that is not as the manifest says."""
    try:
        files: dict[str, dict[str, object]] = json.loads((folder / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        raise CarriedError(f"{folder} has no usable {MANIFEST} ({error}): make it with bench/carry.py") from error
    site.mkdir(parents=True, exist_ok=True)
    for name, known in files.items():
        path = folder / name
        if not path.is_file() or sha256(path) != known["sha256"]:
            raise CarriedError(
                f"{path} is missing or not what {MANIFEST} says: make the folder anew with bench/carry.py"
            )
        if path.suffix == ".whl":
            with zipfile.ZipFile(path) as wheel:
                wheel.extractall(site)
    # After the wheels: modules lie within FlashInfer's package.
    for path in (folder / name for name in files if name.endswith(".xz")):
        name = path.name.removesuffix(".xz")
        target = site / name
        if path.parent.name == MODULES:
            target = site / FLASHINFER_AOT / name.removesuffix(".so") / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with lzma.open(path) as packed, target.open("wb") as plain:
            shutil.copyfileobj(packed, plain, 1 << 20)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _unpack_and_use(folder: Path) -> dict[str, str]:
    manifest = folder / MANIFEST
    mark = sha256(manifest)[:16] if manifest.is_file() else "none"
    site = Path(tempfile.gettempdir()) / f"vattn-carried-{os.getuid()}-{mark}"
    if not (site / MANIFEST).is_file():
        shutil.rmtree(site, ignore_errors=True)
        unpack(folder, site)
        shutil.copy2(manifest, site / MANIFEST)  # the last one: the sign that all is there
    # What is installed comes first; what FlashInfer has no module for is refused, not compiled.
    if str(site) not in sys.path:
        sys.path.append(str(site))
    os.environ.setdefault("FLASHINFER_DISABLE_JIT", "1")
    os.environ.setdefault("FLASHINFER_CUDA_ARCH_LIST", "9.0a")
    return {"fa3": _load_fa3(site / FA3), "flashinfer": _try_flashinfer(site)}


def _load_fa3(path: Path) -> str:
    if not path.is_file():
        return "not in the folder"
    from vattn.attention import flash_attn3

    try:
        flash_attn3.load(path)
    except OSError as error:
        return f"{error}".splitlines()[0]
    return ""


def _try_flashinfer(site: Path) -> str:
    if not (site / "flashinfer").is_dir():
        return "not in the folder"
    try:
        import flashinfer  # noqa: F401
    except Exception as error:  # whatever a foreign package does when it is imported
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""

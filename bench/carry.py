#!/usr/bin/env python3
"""Gathers kernels for a machine with a GPU and without a package index: run it where pip and nvcc are.

    python bench/carry.py DIR [--only fa3,flashinfer] [--python 3.12] [--no-compile] [--limit-mib 64]

What it gathers, with pip, from the index that pip is set up with:

* `fa3`: FlashAttention-3, one member of vllm's wheel (hundreds of MiB come down, a few stay), packed with xz. It is
  built for torch 2.11 and CUDA 13.
* `flashinfer`: the wheels of flashinfer-python and of what it imports, and its modules for bfloat16 and head dim 128,
  compiled by nvcc for compute capability 9.0 (about a minute a source file on two cores) and packed with xz; with
  `--no-compile` the modules are left out.
* `build`: wheels of nanobind and scikit-build-core, to build vattn itself there.
* `xformers`, `cudnn`: optional; no benchmark asks for them.

What it promises: DIR holds only what the manifest names, with sizes and checksums. What one run gathers replaces what
an earlier one did; each kind is written as soon as it is there, so a run cut short leaves those before it, whole. What
fails, or would go past the limit, is told and left out; the status is then 1. Nothing of it belongs into a repository:
DIR gets a .gitignore of its own. Not safe to run twice at once in one DIR.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from vattn.bench.carried import FA3, FLASHINFER_AOT, MANIFEST, MODULES, sha256

VLLM = "vllm==0.26.0"
FA3_MEMBER = f"vllm/vllm_flash_attn/{FA3}"
FLASHINFER = "flashinfer-python==0.6.6"
#: What FlashInfer imports and a plain machine with torch may lack; `carried` puts what is installed there first.
FLASHINFER_NEEDS = (
    "apache-tvm-ffi==0.1.12",
    *("einops", "tabulate", "nvidia-ml-py", "tqdm", "click", "packaging", "filelock", "ninja", "typing-extensions"),
    *("requests", "urllib3", "idna", "certifi", "charset-normalizer"),
)
#: Of the driver, by CUTLASS and FlashInfer.
DRIVER_CALLS = ("cuTensorMapEncodeTiled", "cuTensorMapEncodeIm2col", "cuGetErrorName", "cuGetErrorString")
WHEELS = {
    "build": ("nanobind>=3.1,<4", "nanobind-backend>=1.0", "scikit-build-core>=1.0"),
    "xformers": ("xformers==0.0.35",),
    "cudnn": ("nvidia-cudnn-frontend==1.18.0",),
}
DEFAULT = ("fa3", "flashinfer", "build")
#: Manylinux tags, newest first: pip takes each as it is written.
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (39, 35, 34, 31, 28, 27, 24, 17)] + ["manylinux2014_x86_64"]
LZMA_PRESET = 9

#: Compiles in a process of its own: FlashInfer reads its settings when it is imported.
COMPILE = """
import sys, torch
from pathlib import Path
from flashinfer.jit import env
from flashinfer.jit.attention import gen_batch_prefill_module, gen_single_prefill_module
b, none = torch.bfloat16, 0
for backend in ("fa2", "fa3"):
    for make, index in ((gen_single_prefill_module, ()), (gen_batch_prefill_module, (torch.int32,))):
        spec = make(backend, b, b, b, *index, 128, 128, none, False, False, False)
        spec.build(verbose=False)
        print(spec.name, spec.jit_library_path, flush=True)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default=",".join(DEFAULT), help=f"of fa3, flashinfer, {', '.join(WHEELS)}")
    parser.add_argument("--python", default="3.12", help="of the machine it is carried to")
    parser.add_argument("--no-compile", action="store_true", help="FlashInfer without its modules")
    parser.add_argument("--limit-mib", type=float, default=64, help="nothing is written past it")
    args = parser.parse_args()
    known: dict[str, Callable[[Path, Path, argparse.Namespace], None]] = {"fa3": fa3, "flashinfer": flashinfer}
    known |= {name: wheels(names) for name, names in WHEELS.items()}
    chosen = args.only.split(",")
    if unknown := [name for name in chosen if name not in known]:
        parser.error(f"--only: {unknown[0]} is not one of {', '.join(known)}")
    failed = []
    carried = Folder(args.folder, args.limit_mib)
    for name in chosen:
        with tempfile.TemporaryDirectory() as scratch:  # vllm's wheel is large: gone before the next one comes
            made, work = Path(scratch) / "made", Path(scratch) / "work"
            made.mkdir()
            work.mkdir()
            try:
                known[name](made, work, args)
                carried.add(made)
            except (OSError, KeyError, subprocess.CalledProcessError, zipfile.BadZipFile, TooMuchError) as error:
                failed.append(name)
                print(f"{name}: left out: {error}", file=sys.stderr, flush=True)
    print(f"{carried.bytes / 2**20:8.1f} MiB  together")
    return 1 if failed else 0


class TooMuchError(Exception):
    """The folder would hold more than it may."""


class Folder:
    """DIR, as far as it is made: after every `add` its manifest names all that is there, however this process ends."""

    def __init__(self, folder: Path, limit_mib: float) -> None:
        self.folder, self.limit_mib = folder, limit_mib
        self.files: dict[str, dict[str, object]] = {}

    @property
    def bytes(self) -> int:
        return sum(int(str(known["bytes"])) for known in self.files.values())

    def add(self, made: Path) -> None:
        """Everything in `made`, with a line for each file. TooMuchError, and nothing of it, past the limit."""
        paths = {str(path.relative_to(made)): path for path in sorted(made.rglob("*")) if path.is_file()}
        more = {name: {"sha256": sha256(path), "bytes": path.stat().st_size} for name, path in paths.items()}
        total = sum(int(str(known["bytes"])) for known in {**self.files, **more}.values())
        if total > self.limit_mib * 2**20:
            raise TooMuchError(f"{total / 2**20:.1f} MiB with it, over the limit of {self.limit_mib:g} MiB")
        if not self.files:
            self.empty()
        self.files |= more
        shutil.copytree(made, self.folder, dirs_exist_ok=True)
        manifest = self.folder / MANIFEST
        beside = manifest.with_suffix(".new")
        beside.write_text(json.dumps({"files": self.files}, indent=1) + "\n")
        beside.replace(manifest)  # whole or not at all, and after the files
        for name, path in paths.items():
            print(f"{path.stat().st_size / 2**20:8.1f} MiB  {name}", flush=True)

    def empty(self) -> None:
        """Takes away what an earlier run's manifest names, and what one left that was cut while it wrote."""
        self.folder.mkdir(parents=True, exist_ok=True)
        manifest = self.folder / MANIFEST
        if manifest.is_file():
            for old in json.loads(manifest.read_text())["files"]:
                (self.folder / old).unlink(missing_ok=True)
            manifest.unlink()
        (self.folder / ".gitignore").write_text("*\n")


def download(names: tuple[str, ...], into: Path, python: str) -> list[Path]:
    """Wheels for the machine that they are carried to, without what they depend on."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(into),
    ]
    command += ["--python-version", python, "--implementation", "cp"]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    subprocess.run([*command, *names], check=True)
    return sorted(into.glob("*.whl"))


def pack(path: Path, target: Path) -> None:
    """With xz, in parts: such a file has hundreds of MiB."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with path.open("rb") as plain, lzma.open(target, "wb", preset=LZMA_PRESET) as packed:
        shutil.copyfileobj(plain, packed, 1 << 20)


def fa3(made: Path, work: Path, args: argparse.Namespace) -> None:
    (wheel,) = download((VLLM,), work, args.python)
    with zipfile.ZipFile(wheel) as members:
        members.extract(FA3_MEMBER, work)  # KeyError: another release has it elsewhere
    pack(work / FA3_MEMBER, made / f"{FA3}.xz")


def wheels(names: tuple[str, ...]) -> Callable[[Path, Path, argparse.Namespace], None]:
    def gather(made: Path, work: Path, args: argparse.Namespace) -> None:
        for wheel in download(names, work, args.python):
            keep(wheel, made)

    return gather


def keep(wheel: Path, made: Path) -> None:
    (made / "wheels").mkdir(exist_ok=True)
    shutil.copy2(wheel, made / "wheels")


def link_folders(work: Path) -> list[Path]:
    """Where the linker finds CUDA's runtime, beside nvcc wherever that is, and a stand-in for the driver's library,
    which a machine without a GPU lacks: its name, and the names of what kernels call in it."""
    source = work / "empty.cu"
    source.touch()
    shown = subprocess.run(["nvcc", "--dryrun", "-c", str(source)], capture_output=True, text=True, check=True)
    top = next(line.partition("TOP=")[2].strip() for line in shown.stderr.splitlines() if "TOP=" in line)
    stubs = work / "stubs"
    stubs.mkdir()
    calls = stubs / "calls.c"
    calls.write_text("".join(f"void {name}(void) {{}}\n" for name in DRIVER_CALLS))
    command = ["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(stubs / "libcuda.so"), str(calls)]
    subprocess.run(command, check=True)
    return [Path(top).resolve() / "lib64", stubs]


def flashinfer(made: Path, work: Path, args: argparse.Namespace) -> None:
    for wheel in download((FLASHINFER, *FLASHINFER_NEEDS), work, args.python):
        keep(wheel, made)
    if args.no_compile:
        return
    # The same release for this Python, where nvcc is. It is not left installed.
    site = work / "site"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--target",
        str(site),
    ]
    subprocess.run([*install, FLASHINFER, *FLASHINFER_NEEDS], check=True)
    env = {
        **os.environ,
        "PYTHONPATH": f"{site}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "FLASHINFER_WORKSPACE_BASE": str(work),
        "FLASHINFER_CUDA_ARCH_LIST": "9.0a",
        "LIBRARY_PATH": os.pathsep.join(map(str, link_folders(work))),
    }
    # Verbose or debugging builds would be compiled with -G, for nobody to measure.
    for setting in ("FLASHINFER_DISABLE_JIT", "FLASHINFER_JIT_VERBOSE", "FLASHINFER_JIT_DEBUG"):
        env.pop(setting, None)
    built = subprocess.run([sys.executable, "-c", COMPILE], env=env, check=True, stdout=subprocess.PIPE, text=True)
    for line in built.stdout.splitlines():
        name, path = line.split(maxsplit=1)
        print(f"compiled {name}, to lie in {FLASHINFER_AOT / name}")
        pack(Path(path), made / MODULES / f"{name}.so.xz")


if __name__ == "__main__":
    sys.exit(main())

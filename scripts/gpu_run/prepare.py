"""Makes ready for a GPU that is lent for minutes: the folder .gpu, which travels there, and a dry run of it here.

    scripts/gpu-run prepare [--python PYTHON]     # needs no GPU; minutes
    scripts/gpu-run dry-run [--call 1|2|least|short]    # what prepare made, on the fake libcuda, called libcuda.so.1
    scripts/gpu-run check                         # the short dry run of a checkout, with nothing prepared: CI's

`prepare` gathers vattn's wheel and the one that it needs, the C++ tests, Triton's compiled kernels, FlashAttention-3,
and run.sh with its stages, which lie beside this file. What cannot be had is left out and named, in the manifest and at
the end; with no wheel there is no folder. It holds at most 60 MiB: past that the least valuable parts are left out.
Then everything runs once on the fake, and the commands for the machine are printed. `--python` is one like the
machine's, with torch; vattn comes from the wheel, whatever is installed there. Without it that of .venv is taken.

Not safe to run twice at once in one checkout.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".gpu"
BUILD = ROOT / "build/gpu-run"
VENV = ROOT / ".venv/bin/python"
MOST_MIB = 60
#: The Python of the machine that it is carried to.
THERE = "3.12"
#: Tests of the CUDA driver, and what they need of the others' files.
TESTS = "cuda_*;driver_contract*;kv_cache;page_pool;mapper;retirement;growable_tensor"
#: Left out first where it is too much.
LEAST_FIRST = ("kernels", "triton-cache.tar.xz", "cpp")
SECONDS = {"1": 480, "2": 240}


# N818 wants a name that ends in Error: it is none.
class LeftOut(Exception):  # noqa: N818
    """A part cannot be had; the reason, and what would help."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    prepare_ = commands.add_parser("prepare", help="make .gpu")
    prepare_.add_argument("--wheel", type=Path, help="take this one of vattn's, not a new one")
    prepare_.add_argument(
        "--kernels", type=Path, help="a folder of bench/carry.py; else ../shared/kernels where there is one"
    )
    prepare_.add_argument("--triton-python", type=Path, help="one with torch and triton of the machine's releases")
    prepare_.add_argument("--no-dry-run", action="store_true")
    dry_run_ = commands.add_parser("dry-run", help="run what prepare made on the fake")
    dry_run_.add_argument("--call", default="1", choices=["1", "2", "least", "short"])
    for each in (prepare_, dry_run_):
        each.add_argument(
            "--python", type=Path, default=VENV, help="for the dry run: an environment like the machine's"
        )
    check_ = commands.add_parser("check", help="the short dry run of a checkout")
    check_.add_argument("--build", type=Path, default=ROOT / "build/test", help="a build of the tests")
    args = parser.parse_args()
    if args.command == "prepare":
        return prepare(args)
    if args.command == "dry-run":
        return dry_run(FOLDER, args.python, args.call)
    return check(args.build.resolve())


def prepare(args: argparse.Namespace) -> int:
    if not VENV.exists():  # a fresh clone
        print("gpu-run: make .venv/.ready ...", flush=True)
        run("make", "-C", ROOT, ".venv/.ready")
    parts: dict[str, Callable[[Path], None]] = {
        "wheels": lambda made: wheels(made, args.wheel, args.python),
        "cpp": cpp,
        "triton-cache.tar.xz": lambda made: triton_cache(made, args.triton_python),
        "kernels": lambda made: kernels(made, args.kernels),
    }
    left_out: dict[str, str] = {}
    with tempfile.TemporaryDirectory(dir=ROOT, prefix=".gpu-") as scratch:
        made = Path(scratch)
        for name, part in parts.items():
            print(f"gpu-run: {name} ...", flush=True)
            try:
                part(made)
            except LeftOut as reason:
                left_out[name] = str(reason)
            except subprocess.CalledProcessError as error:
                left_out[name] = f"{' '.join(map(str, error.cmd))[:200]} ended with status {error.returncode}"
        scripts(made)
        if "wheels" in left_out:
            print(f"gpu-run: no wheel, so nothing was made: {left_out['wheels']}", file=sys.stderr)
            return 1
        fit(made, left_out)
        describe(made, left_out)
        shutil.rmtree(FOLDER, ignore_errors=True)
        shutil.copytree(made, FOLDER)
        FOLDER.chmod(0o755)  # a temporary folder is its maker's alone
    status = 0 if args.no_dry_run else dry_run(FOLDER, args.python, "1") or dry_run(FOLDER, args.python, "2")
    for path in sorted(each for each in FOLDER.rglob("*") if each.is_file()):
        print(f"{mib(path):8.2f} MiB  {path.relative_to(FOLDER)}")
    print(f"{mib(FOLDER):8.2f} MiB  together, of {MOST_MIB}")
    for name, reason in left_out.items():
        print(f"left out: {name}: {reason}")
    print("Carry .gpu, and run there, with OUT set:")
    for call, seconds in SECONDS.items():
        print(f"  bash .gpu/run.sh {call}    # at most {seconds} s")
    return status


def mib(path: Path) -> float:
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return sum(each.stat().st_size for each in files) / 2**20


def run(*command: str | Path, **more: object) -> None:
    """Raises CalledProcessError, after the output that explains it."""
    done = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more)  # type: ignore[call-overload]
    if done.returncode:
        print(done.stdout[-4000:], file=sys.stderr)
        raise subprocess.CalledProcessError(done.returncode, [*map(str, command)])


def wheels(made: Path, ready: Path | None, python: Path) -> None:
    """vattn's, for every Python; and nanobind-backend's, which is made for one: for the machine's, and for this one."""
    into = made / "wheels"
    into.mkdir()
    if ready is not None:
        if not ready.is_file():
            raise LeftOut(f"--wheel {ready}: no such file")
        shutil.copy2(ready, into)
    else:
        run(VENV, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", into, ROOT)
    here = subprocess.run(
        [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], capture_output=True, text=True, check=True
    ).stdout.strip()
    platforms = [word for minor in (28, 27, 17) for word in ("--platform", f"manylinux_2_{minor}_x86_64")]
    for version in dict.fromkeys((THERE, here)):
        only = ["--no-deps", "--only-binary=:all:", "--implementation", "cp", "--python-version", version]
        run(VENV, "-m", "pip", "download", "--quiet", *only, *platforms, "-d", into, "nanobind-backend>=1.0")


def cpp(made: Path) -> None:
    """The tests of the CUDA driver, which find their libraries beside them wherever they lie."""
    tools = VENV.parent
    options = ["-DCMAKE_BUILD_TYPE=Release", f"-DVATTN_TESTS={TESTS}", "-DVATTN_BUILD_TESTS=ON"]
    options += ["-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON", "-DCMAKE_INSTALL_RPATH=$ORIGIN"]
    run(ROOT / "scripts/need", "gtest")
    run(tools / "cmake", "-S", ROOT, "-B", BUILD, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}", *options)
    run(tools / "cmake", "--build", BUILD, "-j", str(os.cpu_count()), "--target", "vattn_tests", "fake_cuda")
    into = made / "cpp"
    into.mkdir()
    wanted = ("vattn_tests", "libvattn.so.0", "libfake_cuda.so")
    for name in wanted:
        (found,) = [path for path in BUILD.rglob(name) if "CMakeFiles" not in path.parts]
        shutil.copyfile(found, into / name)
        run("strip", into / name)
    (into / "vattn_tests").chmod(0o755)


def triton_cache(made: Path, python: Path | None) -> None:
    """vattn's Triton kernels, compiled for the GPU without one: only the same release of Triton takes them."""
    if python is None:
        raise LeftOut(
            "give --triton-python, one with the machine's torch and triton: else they are compiled there, a minute"
        )
    with tempfile.TemporaryDirectory() as scratch:
        cache = Path(scratch) / "cache"
        env = {**os.environ, "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(made / "site")}
        here = made / "wheels"
        run(
            python,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-index",
            "--no-deps",
            "--find-links",
            here,
            "--target",
            made / "site",
            "vattn",
            "nanobind-backend",
        )
        try:
            run(python, ROOT / "scripts/gpu_run/precompile.py", env=env)
        finally:
            shutil.rmtree(made / "site")
        with tarfile.open(made / "triton-cache.tar.xz", "w:xz") as packed:
            packed.add(cache, ".")


def kernels(made: Path, folder: Path | None) -> None:
    """FlashAttention-3, as bench/carry.py gathered it."""
    folder = folder or ROOT.parent / "shared/kernels"
    if not (folder / "manifest.json").is_file():
        raise LeftOut("make it once (hundreds of MiB come down): bench/carry.py DIR --only fa3, then --kernels DIR")
    shutil.copytree(folder, made / "kernels")


def scripts(made: Path) -> None:
    for name in ("run.sh", "stages.sh"):
        shutil.copyfile(ROOT / "scripts/gpu_run" / name, made / name)


def fit(made: Path, left_out: dict[str, str], most: float = MOST_MIB) -> None:
    """Leaves out what is too much."""
    for name in LEAST_FIRST:
        if mib(made) <= most:
            return
        part = made / name
        if part.exists():
            left_out[name] = f"its {mib(part):.1f} MiB are too much: the folder holds {most} MiB"
            shutil.rmtree(part) if part.is_dir() else part.unlink()
    if mib(made) > most:
        raise SystemExit(f"gpu-run: {mib(made):.1f} MiB without anything optional, and {most} are allowed")


def describe(made: Path, left_out: dict[str, str]) -> None:
    """What is there, and of which commit."""
    commit = subprocess.run(
        ["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True
    ).stdout
    files = {str(path.relative_to(made)): path.stat().st_size for path in sorted(made.rglob("*")) if path.is_file()}
    known = {"commit": commit.strip(), "files": files, "left_out": left_out}
    (made / "manifest.json").write_text(json.dumps(known, indent=1) + "\n")


def dry_run(folder: Path, python: Path, call: str) -> int:
    """run.sh on the fake, in an environment that has what `python` has, but for vattn. Prints its table."""
    known = [folder / "cpp/libfake_cuda.so", *sorted(ROOT.glob("build/*/tests/libfake_cuda.so"))]
    fake = next((path for path in known if path.is_file()), None)
    if fake is None:
        print("gpu-run: no dry run: there is no fake libcuda, neither in the folder nor in build", file=sys.stderr)
        return 1
    work = Path(tempfile.gettempdir()) / f"vattn-gpu-run-{os.getuid()}"
    if call != "2":  # the second call goes on where the first ended
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(exist_ok=True)
    return run_sh(folder, call, work, clean_python(python, work), fake)


def clean_python(python: Path, work: Path) -> Path:
    """An environment with the packages of another, but for what is installed in place: vattn comes from the wheel."""
    venv = work / "venv"
    if not venv.exists():
        subprocess.run([python, "-m", "venv", "--without-pip", venv], check=True)
        asked = "import sysconfig; print(sysconfig.get_path('purelib'))"
        theirs, ours = (
            subprocess.run([each, "-c", asked], capture_output=True, text=True, check=True).stdout.strip()
            for each in (python, venv / "bin/python")
        )
        Path(ours, "packages.pth").write_text(theirs + "\n")
    return venv / "bin/python"


def run_sh(folder: Path, call: str, work: Path, python: Path, fake: Path) -> int:
    out = work / f"out.{call}"
    env = {**os.environ, "OUT": str(out), "PYTHON": str(python), "VATTN_GPU_RUN_FAKE": str(fake.resolve())}
    env |= {"VATTN_GPU_RUN_WORK": str(work), "VATTN_GPU_RUN_SLOW": "6", "OMP_NUM_THREADS": "1"}
    for name in ("VATTN_CUDA_LIBRARY", "VATTN_TEST_GPU", "VATTN_FAKE_CUDA", "PYTHONPATH"):
        env.pop(name, None)
    done = subprocess.run(["bash", folder / "run.sh", call], env=env, check=False)
    with tarfile.open(out / "results.tar.gz") as results:
        if f"./stages.{call}.txt" not in results.getnames():
            print("gpu-run: the results lack the table of stages", file=sys.stderr)
            return 1
    return done.returncode


def check(build: Path) -> int:
    """The scripts as they are, with the checkout's own Python and build in place of what `prepare` makes."""
    with tempfile.TemporaryDirectory(dir=ROOT, prefix=".gpu-") as scratch:
        folder, work = Path(scratch) / "folder", Path(scratch) / "work"
        (folder / "cpp").mkdir(parents=True)
        work.mkdir()
        scripts(folder)
        fake = build / "tests/libfake_cuda.so"
        if (build / "tests/vattn_tests").is_file():
            (folder / "cpp/vattn_tests").symlink_to(build / "tests/vattn_tests")
        return run_sh(folder, "short", work, VENV, fake)


if __name__ == "__main__":
    sys.exit(main())

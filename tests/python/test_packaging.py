"""What is shipped: the libraries' dependencies, the wheel's contents, the stub, and an import without torch.

The wheel is built once, into a temporary folder; everything about it is asked of that file.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import vattn

ROOT = Path(__file__).resolve().parents[2]
STUB = ROOT / "python" / "vattn" / "_core.pyi"
EXAMPLES = [("cc", "-std=c99", "c/two_requests.c"), ("c++", "-std=c++20", "cpp/growing_attention.cpp")]
FORBIDDEN = re.compile(r"lib(cuda|cudart|nvidia|nv|torch|c10|python)[^/]*\.so")
META_CACHE = """
import sys, vattn
cache = vattn.KVCache(32, 8, 128, max_batch_size=4, max_seq_len=4096, dtype="bfloat16", device="meta")
slot = cache.alloc()
cache.step({slot: 100})
assert cache.stats().used_bytes == 100 * 32 * 8 * 128 * 2 * 2
cache.close()
assert not any(name == "torch" or name.startswith("torch.") for name in sys.modules if sys.modules[name] is not None)
print(vattn.__file__)
"""


def run(*command: str | Path, cwd: Path | None = None, **more: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env={**os.environ, **more},
        cwd=cwd,
        check=False,
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def dynamic_section(library: Path) -> dict[str, list[str]]:
    """``readelf -d``: tag -> values."""
    if shutil.which("readelf") is None:
        pytest.skip("readelf (binutils) is not installed")
    entries: dict[str, list[str]] = {}
    for tag, value in re.findall(r"\((\w+)\).*\[(.*)\]", run("readelf", "-d", library, LC_ALL="C")):
        entries.setdefault(tag, []).append(value)
    return entries


def check_library(library: Path) -> dict[str, list[str]]:
    entries = dynamic_section(library)
    assert entries["NEEDED"], library
    assert not [name for name in entries["NEEDED"] if FORBIDDEN.match(name)], entries["NEEDED"]
    for path in ":".join(entries.get("RUNPATH", []) + entries.get("RPATH", [])).split(":"):
        assert path == "" or path.startswith("$ORIGIN"), f"{library.name} looks for libraries in {path}"
    return entries


# The installed package.


def installed_libraries() -> tuple[Path, Path]:
    from vattn import _core

    core = Path(_core.__file__)
    return core, core.parent / "lib" / "libvattn.so.0"


def test_installed_libraries_depend_on_nothing_they_should_not() -> None:
    core, library = installed_libraries()
    assert "libvattn.so.0" in check_library(core)["NEEDED"]
    assert "libvattn.so.0" in check_library(library)["SONAME"]


def test_the_check_of_dependencies_would_find_one(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler is installed")
    (tmp_path / "empty.c").write_text("int nothing;\n")
    run(compiler, "-shared", "empty.c", "-o", "libcuda.so.1", "-Wl,-soname,libcuda.so.1", cwd=tmp_path)
    user = ["-shared", "-Wl,--no-as-needed", "empty.c", "libcuda.so.1", "-o", "user.so"]
    run(compiler, *user, cwd=tmp_path)
    with pytest.raises(AssertionError, match=r"libcuda\.so\.1"):
        check_library(tmp_path / "user.so")
    user = ["-shared", "-Wl,--no-as-needed", "empty.c", "-lm", "-o", "user.so", "-Wl,-rpath,/somewhere"]
    run(compiler, *user, cwd=tmp_path)
    with pytest.raises(AssertionError, match="/somewhere"):
        check_library(tmp_path / "user.so")


def test_installed_version_is_the_one_stated_once() -> None:
    from vattn import _core

    assert importlib.metadata.version("vattn") == vattn.__version__ == _core.version()


def test_import_and_a_meta_cache_need_no_torch() -> None:
    run(sys.executable, "-c", "import sys; sys.modules['torch'] = None\n" + META_CACHE)


def test_stub_is_up_to_date(tmp_path: Path) -> None:
    pytest.importorskip("nanobind", reason="nanobind, which writes the stub, is not installed")
    run(sys.executable, "-m", "nanobind.stubgen", "-q", "-m", "vattn._core", "-o", tmp_path / "_core.pyi")
    # Compared as programs: a formatter may lay the committed one out.
    now, committed = (ast.unparse(ast.parse(path.read_text())) for path in (tmp_path / "_core.pyi", STUB))
    renew = "python -m nanobind.stubgen -m vattn._core -o python/vattn/_core.pyi && ruff format python/vattn/_core.pyi"
    assert now == committed, f"the bindings changed; renew the stub: {renew}"


# The wheel.


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("scikit_build_core") is None or importlib.util.find_spec("nanobind") is None:
        pytest.skip("scikit-build-core and nanobind, which build the wheel, are not installed")
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--quiet"]
    run(*pip, "--wheel-dir", folder, f"-Cbuild-dir={folder / 'build'}", ROOT)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel alone with what it needs to load: a place where torch cannot be found."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    backend = importlib.util.find_spec("nanobind_backend")
    assert backend is not None
    assert backend.origin is not None
    origin = Path(backend.origin)
    if origin.name == "__init__.py":
        shutil.copytree(origin.parent, folder / "nanobind_backend")
    else:
        shutil.copy(origin, folder)
    return folder


def names(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def test_wheel_serves_every_python_from_3_10(wheel: Path) -> None:
    assert re.fullmatch(rf"vattn-{re.escape(vattn.__version__)}-cp310-abi3-\w+\.whl", wheel.name)


def test_wheel_holds_what_users_need(wheel: Path) -> None:
    inside = names(wheel)
    headers = {
        f"vattn/include/vattn/{path.relative_to(ROOT / 'src/cpp/vattn').as_posix()}"
        for path in (ROOT / "src/cpp/vattn").rglob("*.hpp")
        if path.parent.name != "c"  # the C interface's own
    }
    modules = {
        path.relative_to(ROOT / "python").as_posix() for path in (ROOT / "python/vattn").rglob("*.py") if path.is_file()
    }
    wanted = {
        "vattn/_core.abi3.so",
        "vattn/_core.pyi",
        "vattn/py.typed",
        "vattn/lib/libvattn.so.0",
        "vattn/bench/programs/commit",
        "vattn/bench/programs/decode_step",
        "vattn/lib/cmake/vattn/vattnConfig.cmake",
        "vattn/lib/cmake/vattn/vattnConfigVersion.cmake",
        "vattn/lib/cmake/vattn/vattnTargets.cmake",
        "vattn/lib/pkgconfig/vattn.pc",
        "vattn/include/vattn.h",
        "vattn/include/vattn/vattn.hpp",
    }
    assert wanted | headers | modules <= inside, (wanted | headers | modules) - inside


def test_wheel_holds_nothing_else(wheel: Path) -> None:
    info = f"vattn-{vattn.__version__}.dist-info/"
    strays = [name for name in names(wheel) if not name.startswith(("vattn/", info))]
    strays += [name for name in names(wheel) if name.endswith((".cpp", ".pyc", ".a", ".in"))]
    libraries = [name for name in names(wheel) if re.search(r"\.so(\.|$)", name)]
    assert strays == []
    # One library, once; append_loop.so is what a benchmark compares it with.
    wanted = ["vattn/_core.abi3.so", "vattn/bench/programs/append_loop.so", "vattn/lib/libvattn.so.0"]
    assert sorted(libraries) == wanted
    assert any(name.startswith(info) and name.endswith("LICENSE") for name in names(wheel))


def test_wheel_holds_no_symlinks(wheel: Path) -> None:
    kinds = {entry.filename: entry.external_attr >> 28 for entry in zipfile.ZipFile(wheel).infolist()}
    assert not [name for name, kind in kinds.items() if kind == 0o12]


def test_wheel_metadata(wheel: Path, unpacked: Path) -> None:
    (info,) = unpacked.glob("*.dist-info")
    scripts = importlib.metadata.Distribution.at(info).entry_points
    assert {(entry.group, entry.name, entry.value) for entry in scripts} == {
        ("console_scripts", "vattn", "vattn.tools.cli:main"),
        ("cmake.root", "vattn", "vattn.lib.cmake.vattn"),
    }
    metadata = Parser().parsestr((info / "METADATA").read_text())
    assert metadata["Version"] == vattn.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"
    needs = [need for need in metadata.get_all("Requires-Dist", []) if "extra ==" not in need]
    assert sorted(re.split(r"[<>=]", need)[0] for need in needs) == ["nanobind-backend", "torch"]
    # A later backend serves older modules, so an upper bound would only get in the way.
    assert not any("<" in need for need in needs)


def test_wheel_libraries_depend_on_nothing_they_should_not(unpacked: Path) -> None:
    core = check_library(unpacked / "vattn" / "_core.abi3.so")
    assert core["RUNPATH"] == ["$ORIGIN/lib"]
    check_library(unpacked / "vattn" / "lib" / "libvattn.so.0")
    check_library(unpacked / "vattn" / "bench" / "programs" / "append_loop.so")
    for program in ("commit", "decode_step"):
        needs = check_library(unpacked / "vattn" / "bench" / "programs" / program)
        assert "libvattn.so.0" in needs["NEEDED"]
        assert needs["RUNPATH"] == ["$ORIGIN/../../lib"]


def test_wheel_works_alone_and_without_torch(unpacked: Path) -> None:
    # -S: no site-packages, hence no torch and no other vattn.
    place = run(sys.executable, "-S", "-c", META_CACHE, PYTHONPATH=str(unpacked)).strip()
    assert Path(place).is_relative_to(unpacked)
    folder = run(sys.executable, "-S", "-m", "vattn", "--cmake-dir", PYTHONPATH=str(unpacked)).strip()
    assert Path(folder) == unpacked / "vattn" / "lib" / "cmake" / "vattn"


@pytest.mark.parametrize(("compiler", "standard", "source"), EXAMPLES, ids=["C", "C++"])
def test_wheel_serves_pkg_config_wherever_it_lies(
    compiler: str, standard: str, source: str, unpacked: Path, tmp_path: Path
) -> None:
    if shutil.which("pkg-config") is None or shutil.which(compiler) is None:
        pytest.skip(f"pkg-config or {compiler} is not installed")
    folder = run(sys.executable, "-S", "-m", "vattn", "--pkgconfig-dir", PYTHONPATH=str(unpacked)).strip()
    assert Path(folder) == unpacked / "vattn" / "lib" / "pkgconfig"
    ask = ("pkg-config", "--print-errors", "vattn")
    assert run(*ask, "--modversion", PKG_CONFIG_PATH=folder).strip() == vattn.__version__
    flags = run(*ask, "--cflags", "--libs", PKG_CONFIG_PATH=folder).split()
    program = tmp_path / "program"
    run(compiler, standard, ROOT / "examples" / source, *flags, "-o", program)
    # Nothing says where the library is: the program itself has to know.
    environment = {name: value for name, value in os.environ.items() if name != "LD_LIBRARY_PATH"}
    done = subprocess.run([program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_wheel_names_no_folder_of_the_machine_that_built_it(wheel: Path, unpacked: Path) -> None:
    for file in [path for path in unpacked.rglob("*") if path.is_file() and "nanobind_backend" not in path.parts]:
        content = file.read_bytes()
        for folder in (ROOT, wheel.parent):
            assert str(folder).encode() not in content, f"{file.relative_to(unpacked)} names {folder}"

"""libvattn inside other C and C++ projects: as a part of a CMake project, as a static library, from older C++.

One library is built here, without optimisation, as a static part of a parent project, which also installs it. Skipped,
with the reason, where there is no compiler or no CMake. Builds go to temporary folders.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

import vattn

ROOT = Path(__file__).resolve().parents[2]
HEADERS = sorted(path for path in (ROOT / "src/cpp/vattn").rglob("*.hpp") if path.parent.name != "c")
PATH = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
CMAKE = shutil.which("cmake", path=PATH)
CC, CXX = (shutil.which(os.environ.get(name) or fallback) for name, fallback in (("CC", "cc"), ("CXX", "c++")))
NINJA = ("-G", "Ninja") if shutil.which("ninja", path=PATH) else ()

pytestmark = [
    pytest.mark.skipif(CMAKE is None, reason="cmake is not installed"),
    pytest.mark.skipif(CC is None or CXX is None, reason="no C and C++ compiler is installed"),
]

PARENT = """
cmake_minimum_required(VERSION 3.22)
project(parent VERSION 7.8 LANGUAGES C CXX)
enable_testing()
set(CMAKE_CXX_STANDARD 17)

function(write_down name)
  get_directory_property(variables DIRECTORY ${CMAKE_SOURCE_DIR} VARIABLES)
  set(text "")
  foreach(variable ${variables})
    get_directory_property(value DIRECTORY ${CMAKE_SOURCE_DIR} DEFINITION ${variable})
    string(APPEND text "variable ${variable}=${value}\\n")
  endforeach()
  get_cmake_property(cached CACHE_VARIABLES)
  foreach(variable ${cached})
    string(APPEND text "cached ${variable}=$CACHE{${variable}}\\n")
  endforeach()
  foreach(property COMPILE_OPTIONS COMPILE_DEFINITIONS COMPILE_FEATURES INCLUDE_DIRECTORIES LINK_OPTIONS)
    get_property(value DIRECTORY ${CMAKE_SOURCE_DIR} PROPERTY ${property})
    string(APPEND text "property ${property}=${value}\\n")
  endforeach()
  foreach(property ENABLED_LANGUAGES PACKAGES_FOUND PACKAGES_NOT_FOUND ALLOW_DUPLICATE_CUSTOM_TARGETS)
    get_property(value GLOBAL PROPERTY ${property})
    string(APPEND text "global ${property}=${value}\\n")
  endforeach()
  file(WRITE ${CMAKE_BINARY_DIR}/${name}.txt "${text}")
endfunction()

write_down(before)
add_subdirectory(${VATTN_SOURCE} vattn)
write_down(after)

function(list_targets folder)
  get_property(targets DIRECTORY ${folder} PROPERTY BUILDSYSTEM_TARGETS)
  get_property(tests DIRECTORY ${folder} PROPERTY TESTS)
  foreach(target ${targets})
    file(APPEND ${CMAKE_BINARY_DIR}/targets.txt "target ${target}\\n")
  endforeach()
  foreach(test ${tests})
    file(APPEND ${CMAKE_BINARY_DIR}/targets.txt "test ${test}\\n")
  endforeach()
  get_property(folders DIRECTORY ${folder} PROPERTY SUBDIRECTORIES)
  foreach(each ${folders})
    list_targets(${each})
  endforeach()
endfunction()
file(WRITE ${CMAKE_BINARY_DIR}/targets.txt "")
list_targets(${CMAKE_SOURCE_DIR})
"""

PROGRAMS = """
add_executable(from_c program.c)
target_link_libraries(from_c PRIVATE vattn::vattn)
add_executable(from_cpp program.cpp)
target_link_libraries(from_cpp PRIVATE vattn::vattn)
"""

ALONE = """
add_executable(of_the_parent alone.cpp)
"""

C_PROGRAM = """
#include <stdio.h>
#include <vattn.h>

int main(void) {
  vattn_cache_config config;
  vattn_cache* cache = NULL;
  VATTN_INIT(&config);
  config.num_layers = config.num_kv_heads = config.max_batch_size = 1;
  config.head_dim = 16;
  config.max_seq_len = 64;
  config.dtype = "float16";
  if (vattn_cache_create(&config, &cache) != VATTN_OK) return puts(vattn_last_error()), 1;
  vattn_cache_destroy(cache);
  printf("vattn %s\\n", vattn_version());
  return 0;
}
"""

CPP_PROGRAM = """
#include <cstdio>
#include <vattn/vattn.hpp>

int main() {
  vattn::CacheConfig config;
  config.num_layers = config.num_kv_heads = config.max_batch_size = 1;
  config.head_dim = 16;
  config.max_seq_len = 64;
  vattn::KVCache cache(config);
  const auto slot = cache.alloc();
  cache.step({{slot, 10}});
  try {
    vattn::KVCache on_gpu(config, vattn::parse_device("cuda:0"));
  } catch (const vattn::Error& error) {  // libcuda is looked for, and exceptions come out of a static library
    std::puts(error.what());
  }
  std::printf("vattn %s, %lld tokens\\n", vattn::version(), static_cast<long long>(cache.seq_len(slot)));
}
"""

# What CMake's own modules leave behind when threads are looked for.
OF_CMAKE = re.compile(
    r"(CMAKE_HAVE_LIBC_PTHREAD|CMAKE_HAVE_PTHREAD|FIND_PACKAGE_MESSAGE_DETAILS_Threads|_CMAKE|THREADS_)"
)


def run(*command: str | Path | None, **more: str) -> str:
    environment = {**os.environ, "PATH": PATH, **more}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def make_parent(folder: Path, *more: str) -> Path:
    """A project that has vattn as a part of it."""
    folder.mkdir()
    (folder / "CMakeLists.txt").write_text(PARENT + "".join(more))
    (folder / "program.c").write_text(C_PROGRAM)
    (folder / "program.cpp").write_text(CPP_PROGRAM)
    (folder / "alone.cpp").write_text("static_assert(__cplusplus < 202002L);\nint main() {}\n")
    return folder


def configure(source: Path, build: Path, *options: str) -> None:
    run(CMAKE, "-S", source, "-B", build, *NINJA, f"-DVATTN_SOURCE={ROOT}", *options)


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The build folder of a parent that asked for nothing; configured only."""
    folder = tmp_path_factory.mktemp("parent")
    configure(make_parent(folder / "source", PROGRAMS, ALONE), folder / "build")
    return folder / "build"


def entries(file: Path) -> dict[str, str]:
    """What write_down() wrote; a value may have several lines."""
    found: dict[str, str] = {}
    name = ""
    for line in file.read_text().splitlines():
        match = re.match(r"((?:variable|cached|property|global) [^=]+)=(.*)", line)
        if match:
            name = match[1]
            found[name] = match[2]
        else:
            found[name] += "\n" + line
    return found


def test_a_parents_settings_stay_as_they_were(parent: Path) -> None:
    before, after = entries(parent / "before.txt"), entries(parent / "after.txt")
    assert before["variable CMAKE_CXX_STANDARD"] == after["variable CMAKE_CXX_STANDARD"] == "17"
    assert after["cached CMAKE_BUILD_TYPE"] == ""
    own = re.compile(r"\w+ (VATTN_|vattn_)")  # with the variables that project() makes of its name
    changed = [
        f"{name}: {before.get(name)!r} is now {after.get(name)!r}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
        and not own.match(name)
        and not OF_CMAKE.match(name.partition(" ")[2])
        and not (name == "global PACKAGES_FOUND" and after[name].replace("Threads", "").strip(";") == before[name])
        and not re.match(r"variable (ARG[CNV]|name$|CMAKE_CURRENT_)", name)  # of write_down() itself
    ]
    assert changed == []


def test_a_parent_gets_targets_of_vattns_name_and_no_tests(parent: Path) -> None:
    lines = (parent / "targets.txt").read_text().split("\n")
    targets = [line.removeprefix("target ") for line in lines if line.startswith("target ")]
    assert "vattn" in targets
    assert [name for name in targets if not name.startswith("vattn")] == []
    assert [line for line in lines if line.startswith("test ")] == []


def test_a_parent_installs_nothing_of_vattn_unless_asked(parent: Path) -> None:
    rules = [path.read_text() for path in parent.rglob("cmake_install.cmake")]
    assert len(rules) > 1
    assert not any("file(INSTALL" in rule for rule in rules)


def test_a_parent_gets_no_compile_commands_unless_asked(parent: Path) -> None:
    assert not (parent / "compile_commands.json").exists()


def test_a_parents_own_programs_are_compiled_its_way_and_those_of_vattn_as_cpp20(tmp_path: Path) -> None:
    source = make_parent(tmp_path / "source", PROGRAMS, ALONE)
    configure(source, tmp_path / "build", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON")
    commands = {
        Path(entry["file"]).name: entry["command"]
        for entry in json.loads((tmp_path / "build" / "compile_commands.json").read_text())
    }
    assert not re.search(r"-std=(gnu|c)\+\+20", commands["alone.cpp"])
    assert "vattn" not in commands["alone.cpp"].replace(str(tmp_path), "")
    assert re.search(r"-std=(gnu|c)\+\+20", commands["program.cpp"])
    for flag in ("-Wconversion", "-fvisibility", "-fPIC"):
        assert flag not in commands["program.cpp"], "only vattn's own sources are compiled so"


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A parent with vattn as a static part of it, built; a prefix in which it has installed that part."""
    folder = tmp_path_factory.mktemp("static")
    source = make_parent(folder / "source", PROGRAMS, ALONE)
    options = ["-DBUILD_SHARED_LIBS=OFF", "-DVATTN_INSTALL=ON", "-DCMAKE_BUILD_TYPE=Debug"]
    configure(source, folder / "build", *options)
    run(CMAKE, "--build", folder / "build", "--parallel", "2")
    run(CMAKE, "--install", folder / "build", "--prefix", folder / "prefix")
    return folder


def check_program(program: Path) -> None:
    printed = run(program, VATTN_CUDA_LIBRARY="/nowhere/libcuda.so.1")
    assert f"vattn {vattn.__version__}" in printed
    if shutil.which("readelf") is not None:
        assert "libvattn" not in run("readelf", "-d", program)


@pytest.mark.parametrize("program", ["from_c", "from_cpp"])
def test_programs_of_a_parent_hold_the_static_library(static: Path, program: str) -> None:
    check_program(static / "build" / program)


def test_a_static_prefix_has_an_archive_and_no_shared_library(static: Path) -> None:
    prefix = static / "prefix"
    assert [path.name for path in prefix.glob("lib*/libvattn*")] == ["libvattn.a"]
    assert (prefix / "include" / "vattn.h").is_file()
    assert (prefix / "include" / "vattn" / "vattn.hpp").is_file()


def test_a_static_library_is_found_with_what_it_links_to(static: Path, tmp_path: Path) -> None:
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.22)\nproject(user LANGUAGES C CXX)\nfind_package(vattn 0.1 REQUIRED)\n"
        + PROGRAMS
    )
    (tmp_path / "program.c").write_text(C_PROGRAM)
    (tmp_path / "program.cpp").write_text(CPP_PROGRAM)
    run(CMAKE, "-S", tmp_path, "-B", tmp_path / "build", *NINJA, f"-DCMAKE_PREFIX_PATH={static / 'prefix'}")
    run(CMAKE, "--build", tmp_path / "build", "--parallel", "2")
    for program in ("from_c", "from_cpp"):
        check_program(tmp_path / "build" / program)


def test_a_static_library_tells_a_project_of_c_alone_what_it_needs(static: Path, tmp_path: Path) -> None:
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.22)\nproject(user LANGUAGES C)\nfind_package(vattn 0.1 REQUIRED)\n"
    )
    command = [CMAKE, "-S", tmp_path, "-B", tmp_path / "build", *NINJA, f"-DCMAKE_PREFIX_PATH={static / 'prefix'}"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "add CXX to the languages of project()" in " ".join(done.stderr.split())


@pytest.mark.parametrize("more", [(), ("--static",)], ids=["plain", "static"])
@pytest.mark.parametrize("language", ["C", "C++"])
def test_pkg_config_says_what_a_static_library_links_to(
    static: Path, language: str, more: tuple[str, ...], tmp_path: Path
) -> None:
    if shutil.which("pkg-config") is None:
        pytest.skip("pkg-config is not installed")
    (file,) = (static / "prefix").glob("lib*/pkgconfig/vattn.pc")
    flags = run("pkg-config", *more, "--cflags", "--libs", "vattn", PKG_CONFIG_PATH=str(file.parent)).split()
    compiler, standard, name = (CC, "-std=c99", "program.c") if language == "C" else (CXX, "-std=c++20", "program.cpp")
    (tmp_path / name).write_text(C_PROGRAM if language == "C" else CPP_PROGRAM)
    run(compiler, standard, tmp_path / name, *flags, "-o", tmp_path / "program")
    check_program(tmp_path / "program")


def test_a_static_library_and_the_python_package_exclude_each_other(tmp_path: Path) -> None:
    command = [CMAKE, "-S", ROOT, "-B", tmp_path, *NINJA, "-DVATTN_STATIC=ON", "-DVATTN_BUILD_PYTHON=ON"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "VATTN_STATIC=ON and VATTN_BUILD_PYTHON=ON" in done.stderr


# Compilers.


def compiled(compiler: str | None, standard: str, source: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [str(compiler), f"-std={standard}", "-fsyntax-only", *flags, str(source)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"})


@pytest.mark.parametrize("header", HEADERS, ids=[path.relative_to(ROOT / "src/cpp").as_posix() for path in HEADERS])
def test_every_header_says_that_it_needs_cpp20(header: Path, tmp_path: Path) -> None:
    (tmp_path / "user.cpp").write_text(
        f"#include <{header.relative_to(ROOT / 'src/cpp').as_posix()}>\nint main() {{}}\n"
    )
    for standard in ("c++17", "c++14"):
        done = compiled(CXX, standard, tmp_path / "user.cpp", f"-I{ROOT / 'src/cpp'}")
        assert done.returncode != 0
        errors = [line for line in done.stderr.splitlines() if "error:" in line]
        assert "vattn's C++ headers need C++20: compile with -std=c++20" in errors[0], errors[:3]


def test_the_c_header_is_plain_c_and_old_cpp(tmp_path: Path) -> None:
    strict = ("-Wall", "-Wextra", "-pedantic", "-pedantic-errors", "-Werror", f"-I{ROOT / 'src/cpp/vattn/c'}")
    (tmp_path / "user.c").write_text(C_PROGRAM)
    (tmp_path / "user.cpp").write_text(C_PROGRAM)
    (tmp_path / "first.c").write_text("#include <vattn.h>\nint main(void) { return 0; }\n")
    for name, compiler, standards in (
        ("user.c", CC, ("c99", "c11", "gnu17")),
        ("first.c", CC, ("c99",)),
        ("user.cpp", CXX, ("c++98", "c++11", "c++17", "c++20")),
    ):
        more = ("-Wno-long-long",) if name == "user.cpp" else ("-Wmissing-field-initializers", "-Wstrict-prototypes")
        for standard in standards:
            done = compiled(compiler, standard, tmp_path / name, *strict, *more)
            assert done.returncode == 0, f"{name} as {standard}:\n{done.stderr}"

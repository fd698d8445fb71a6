"""The examples build and run as their READMEs say.

On the installed package, and on a prefix that ``cmake --install`` filled. Skipped, with the reason, only where there is
no compiler or no CMake. Builds go to temporary folders.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import vattn

torch = pytest.importorskip("torch")

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
PATH = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
CMAKE = shutil.which("cmake", path=PATH)
CC, CXX = (shutil.which(os.environ.get(name) or fallback) for name, fallback in (("CC", "cc"), ("CXX", "c++")))
NINJA = ("-G", "Ninja") if shutil.which("ninja", path=PATH) else ()

pytestmark = [
    pytest.mark.skipif(CMAKE is None, reason="cmake is not installed"),
    pytest.mark.skipif(CC is None or CXX is None, reason="no C and C++ compiler is installed"),
]


def run(*command: str | Path, **more: str) -> str:
    """What a command prints; its whole output in the failure where it fails."""
    environment = {**os.environ, "PATH": PATH, **more}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def cmake(source: Path, build: Path, *options: str) -> None:
    run(CMAKE, "-S", source, "-B", build, *NINJA, *options)
    run(CMAKE, "--build", build, "--parallel", "2")


@pytest.fixture(scope="module")
def package_dir() -> str:
    """The folder of the installed package's CMake files, as ``python -m vattn --cmake-dir`` prints it."""
    folder = run(sys.executable, "-m", "vattn", "--cmake-dir").strip()
    assert (Path(folder) / "vattnConfig.cmake").is_file()
    return folder


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """libvattn without Python, installed into a prefix."""
    folder = tmp_path_factory.mktemp("library")
    # Not optimised, which halves the time: what is asked here is where files go and what they export.
    cmake(ROOT, folder / "build", "-DVATTN_BUILD_TESTS=OFF", "-DCMAKE_BUILD_TYPE=Debug")
    run(CMAKE, "--install", folder / "build", "--prefix", folder / "prefix")
    return folder / "prefix"


@pytest.fixture(params=["package", "prefix"])
def where(request: pytest.FixtureRequest) -> str:
    """The option that tells CMake where vattn is."""
    if request.param == "package":
        return f"-Dvattn_DIR={request.getfixturevalue('package_dir')}"
    return f"-DCMAKE_PREFIX_PATH={request.getfixturevalue('prefix')}"


def test_cpp_program_matches_its_reference(where: str, tmp_path: Path) -> None:
    cmake(EXAMPLES / "cpp", tmp_path, where)
    printed = run(tmp_path / "growing_attention")
    assert "every attention output equals the reference" in printed
    assert f"vattn {vattn.__version__}" in printed


def test_c_program_runs(where: str, tmp_path: Path) -> None:
    cmake(EXAMPLES / "c", tmp_path, where)
    assert run(tmp_path / "two_requests").endswith("all as it should be\n")


def test_c_program_needs_no_cmake(prefix: Path, tmp_path: Path) -> None:
    (library,) = prefix.glob("lib*/libvattn.so")
    folder = library.parent
    flags = ["-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror", f"-I{prefix / 'include'}"]
    link = [f"-L{folder}", f"-Wl,-rpath,{folder}", "-lvattn"]
    run(CC, *flags, EXAMPLES / "c" / "two_requests.c", *link, "-o", tmp_path / "two_requests")
    assert run(tmp_path / "two_requests").endswith("all as it should be\n")


@pytest.fixture(params=["package", "prefix"])
def pkg_config(request: pytest.FixtureRequest) -> dict[str, str]:
    """The environment in which pkg-config finds vattn."""
    if shutil.which("pkg-config", path=PATH) is None:
        pytest.skip("pkg-config is not installed")
    if request.param == "package":
        return {"PKG_CONFIG_PATH": run(sys.executable, "-m", "vattn", "--pkgconfig-dir").strip()}
    (file,) = request.getfixturevalue("prefix").glob("lib*/**/pkgconfig/vattn.pc")
    return {"PKG_CONFIG_PATH": str(file.parent)}


@pytest.mark.parametrize("language", ["C", "C++"])
def test_programs_build_with_pkg_config(language: str, pkg_config: dict[str, str], tmp_path: Path) -> None:
    flags = run("pkg-config", "--cflags", "--libs", "vattn", **pkg_config).split()
    program = tmp_path / "program"
    if language == "C":
        run(CC, "-std=c99", "-Wall", "-Werror", EXAMPLES / "c" / "two_requests.c", *flags, "-o", program)
    else:
        run(CXX, "-std=c++20", EXAMPLES / "cpp" / "growing_attention.cpp", *flags, "-o", program)
    libraries = run("pkg-config", "--variable=libdir", "vattn", **pkg_config).strip()
    printed = run(program, LD_LIBRARY_PATH=libraries)
    assert "all as it should be" in printed or "every attention output equals the reference" in printed


def test_a_prefix_may_be_moved_and_pkg_config_follows(prefix: Path, tmp_path: Path) -> None:
    if shutil.which("pkg-config", path=PATH) is None:
        pytest.skip("pkg-config is not installed")
    moved = tmp_path / "elsewhere"
    shutil.copytree(prefix, moved, symlinks=True)
    (file,) = moved.glob("lib*/**/pkgconfig/vattn.pc")
    assert str(prefix) not in file.read_text()
    for variable in ("libdir", "includedir"):
        folder = Path(run("pkg-config", f"--variable={variable}", "vattn", PKG_CONFIG_PATH=str(file.parent)).strip())
        assert folder.is_dir()
        assert folder.resolve().is_relative_to(moved)
    assert run("pkg-config", "--modversion", "vattn", PKG_CONFIG_PATH=str(file.parent)).strip() == vattn.__version__


@pytest.fixture(scope="module")
def engine_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The engine as pip installs it; scikit-build-core finds vattn by its entry point, no path is passed."""
    pytest.importorskip("scikit_build_core")
    pytest.importorskip("pybind11")
    folder = tmp_path_factory.mktemp("engine")
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--quiet"]
    shutil.copytree(EXAMPLES / "engine", folder / "source")  # so that nothing is written into the repository
    run(*pip, "--target", folder / "site", folder / "source", f"-Cbuild-dir={folder / 'build'}")
    return folder / "site"


@pytest.fixture(scope="module")
def toy_engine(engine_site: Path) -> ModuleType:
    sys.path.insert(0, str(engine_site))
    try:
        import toy_engine
    finally:
        sys.path.remove(str(engine_site))
    return toy_engine


VOCABULARY, WIDTH, HEADS, KV_HEADS, DIM = 97, 64, 4, 2, 16


def weights(matrix: int, rows: int) -> torch.Tensor:
    """The engine's weights: the formula of examples/engine/src/model.cpp."""
    row, column = np.mgrid[0:rows, 0:WIDTH].astype(np.uint64)
    low = np.uint64(0xFFFFFFFF)
    x = (np.uint64(matrix * 0x9E3779B1) + row * np.uint64(0x85EBCA77) + column * np.uint64(0xC2B2AE3D)) & low
    x = ((x ^ x >> np.uint64(15)) * np.uint64(0x2C1B3C6D)) & low
    x = ((x ^ x >> np.uint64(12)) * np.uint64(0x297A2D39)) & low
    return torch.from_numpy(((x ^ x >> np.uint64(15)) >> np.uint64(8)).astype(np.float64) / (1 << 23) - 1.0)


def reference(prompt: list[int], steps: int, layers: int) -> tuple[list[int], list[tuple[torch.Tensor, torch.Tensor]]]:
    """The tokens, and each layer's keys and values, computed in torch from the whole sequence at once."""

    def normalised(x: torch.Tensor) -> torch.Tensor:
        return x / torch.sqrt(1e-6 + x.square().mean(-1, keepdim=True))

    def project(index: int, rows: int, x: torch.Tensor, heads: int) -> torch.Tensor:
        return (normalised(x) @ (weights(index, rows) / 8).T).view(-1, heads, DIM)

    tokens, generated = list(prompt), []
    while True:
        x = weights(0, VOCABULARY)[tokens]
        cache = []
        for layer in range(layers):
            q = project(1 + 4 * layer, WIDTH, x, HEADS)
            k = project(2 + 4 * layer, KV_HEADS * DIM, x, KV_HEADS)
            v = project(3 + 4 * layer, KV_HEADS * DIM, x, KV_HEADS)
            cache.append((k, v))
            attended = torch.nn.functional.scaled_dot_product_attention(
                *(t.transpose(0, 1)[None] for t in (q, k, v)), is_causal=True, enable_gqa=True
            )
            x = x + attended[0].transpose(0, 1).reshape(-1, WIDTH) @ (weights(4 + 4 * layer, WIDTH) / 8).T
        if len(generated) == steps:
            return generated, cache
        generated.append(int((normalised(x[-1]) @ weights(0, VOCABULARY).T).argmax()))
        tokens.append(generated[-1])


def test_engine_generates_what_torch_computes(toy_engine: ModuleType) -> None:
    layers, steps = 2, 12
    prompts = [[3, 14, 15, 92, 65, 35], [8, 9, 79]]
    engine = toy_engine.Engine(layers, 4, 4096)
    requests = [engine.add_request(prompt) for prompt in prompts]
    generated = [engine.decode_step() for _ in range(steps)]
    for request, prompt in zip(requests, prompts, strict=True):
        tokens, cache = reference(prompt, steps, layers)
        assert [step[request] for step in generated] == tokens
        assert engine.seq_len(request) == len(prompt) + steps
        for layer, expected in enumerate(cache):
            for view, wanted in zip(engine.view(layer, request), expected, strict=True):
                torch.testing.assert_close(torch.from_dlpack(view).double(), wanted, rtol=1e-4, atol=1e-4)


def test_engine_and_python_share_memory(toy_engine: ModuleType) -> None:
    engine = toy_engine.Engine(1, 2, 4096)
    request = engine.add_request([1, 2, 3])
    view, _ = engine.view(0, request)
    k = torch.from_dlpack(view)
    assert tuple(k.shape) == view.shape == (3, KV_HEADS, DIM)
    assert k.data_ptr() == view.address
    before = engine.sum(0, request)
    k += 1.0
    assert engine.sum(0, request) == pytest.approx(before + k.numel(), rel=1e-5)
    engine.decode_step()
    longer = torch.from_dlpack(engine.view(0, request)[0])
    assert longer.data_ptr() == k.data_ptr()
    assert len(longer) == 4
    assert torch.equal(longer[:3], k)
    assert np.shares_memory(np.from_dlpack(view), k.numpy())


def test_views_keep_their_memory_when_the_engine_is_gone(toy_engine: ModuleType) -> None:
    engine = toy_engine.Engine(1, 2, 4096)
    request = engine.add_request([5, 6, 7, 8])
    k, v = (torch.from_dlpack(view) for view in engine.view(0, request))
    engine.view(0, request)[0].__dlpack__()  # a capsule that nobody takes gives its reference back
    expected = k.clone(), v.clone()
    engine.close()
    with pytest.raises(vattn.ClosedError):
        engine.decode_step()
    del engine
    assert torch.equal(k, expected[0])
    assert torch.equal(v, expected[1])
    address = k.data_ptr()
    assert is_memory_of_vattn(address)
    del k
    assert not is_memory_of_vattn(address)


def is_memory_of_vattn(address: int) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(end, 16) for end in line.split()[0].split("-"))
        if first <= address < last:
            return "memfd:vattn" in line
    return False


def test_errors_of_the_engine_are_vattns(toy_engine: ModuleType) -> None:
    engine = toy_engine.Engine(1, 2, 1 << 20, memory_limit=8 * 65536)
    request = engine.add_request([1])
    with pytest.raises(vattn.OutOfMemoryError) as caught:
        engine.add_request([2] * 5000)
    assert isinstance(caught.value, MemoryError)
    assert caught.value.needed_bytes > caught.value.available_bytes
    assert caught.value.limit_bytes == 8 * 65536
    assert engine.stats()["active_slots"] == 1, "a request that was refused must not keep its slot"
    engine.finish(request)
    for _ in range(2):
        engine.add_request([1])
    with pytest.raises(vattn.NoFreeSlotError):
        engine.add_request([1])
    with pytest.raises(IndexError, match="slot=99"):
        engine.seq_len(99)
    with pytest.raises(ValueError, match="token 97"):
        engine.add_request([97])


def test_freed_memory_serves_the_next_request(toy_engine: ModuleType) -> None:
    engine = toy_engine.Engine(1, 2, 4096)
    engine.finish(engine.add_request([1, 2, 3]))
    before = engine.stats()
    engine.add_request([4, 5, 6])
    now = engine.stats()
    assert now["prompts"] == before["prompts"] + 1
    assert now["reused_prompts"] == before["reused_prompts"] + 1


ONE_LIBRARY = """
import torch, toy_engine, vattn

cache = vattn.KVCache(1, 2, 16, max_batch_size=2, max_seq_len=64, dtype="float32", device="cpu")
cache.step({cache.alloc(): 3})
engine = toy_engine.Engine(1, 2, 64)
torch.from_dlpack(engine.view(0, engine.add_request([1, 2, 3]))[0]).copy_(cache.view(0, 0)[0])
libraries = {line.split()[-1] for line in open("/proc/self/maps") if "libvattn" in line}
assert len(libraries) == 1, libraries
print(*libraries)
"""


def test_a_process_has_one_libvattn(engine_site: Path) -> None:
    library = run(sys.executable, "-c", ONE_LIBRARY, PYTHONPATH=str(engine_site)).strip()
    assert Path(library).name == "libvattn.so.0"


def test_engine_builds_with_cmake_alone(package_dir: str, tmp_path: Path) -> None:
    pybind11 = pytest.importorskip("pybind11")
    options = [f"-Dvattn_DIR={package_dir}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    cmake(EXAMPLES / "engine", tmp_path, *options, f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_BUILD_TYPE=Debug")
    run(CMAKE, "--install", tmp_path, "--prefix", tmp_path / "site")
    shutil.copy(EXAMPLES / "engine" / "toy_engine" / "__init__.py", tmp_path / "site" / "toy_engine")
    run(sys.executable, "-c", ONE_LIBRARY, PYTHONPATH=str(tmp_path / "site"))

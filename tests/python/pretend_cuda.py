"""A stand-in for CUDA's torch: tensors over the fake libcuda say ``cuda:0``, and behave towards torch as such do.

    python tests/python/pretend_cuda.py     # the smoke, as a GPU would run it, as far as its Python goes

Inside `pretending`, a tensor made for ``cuda``, or by vattn's CUDA driver, or from one of these, has that device; an
operation that mixes one with a tensor of the CPU raises as torch does, and numpy refuses it. Results are computed by
the CPU. Streams and captures are the fake library's. So mistakes that only a GPU would show in Python show here.

It does not know streams' orders, other threads, or what a kernel does. Thread: the main one.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CUDA = torch.device("cuda:0")
#: Take tensors of both: they copy between devices, index by a tensor of the CPU, or look at no contents.
MIXING = {"copy_", "__getitem__", "__setitem__", "to", "type_as", "__repr__", "__format__", "__deepcopy__", "set_data"}
#: Hand out what is no tensor of the device.
LEAVING = {"item", "tolist", "cpu", "__bool__", "__float__", "__int__", "__len__"}


def is_there(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and getattr(value, "_pretends", False)


def move(value: Any) -> Any:
    """The value, its tensors being on cuda from now on."""
    if isinstance(value, torch.Tensor):
        value._pretends = True
    elif isinstance(value, (tuple, list)):
        for each in value:
            move(each)
    return value


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from tensors_in(each)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def is_cuda(device: Any) -> bool:
    return isinstance(device, (str, torch.device)) and str(device).startswith("cuda")


class Pretending(TorchFunctionMode):
    """Every operation of torch passes here."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", str(func))
        if name == "__get__":
            return self.attribute(func, args)
        if name in ("to", "cpu", "cuda"):
            return self.transfer(func, name, args, kwargs)
        if name in ("numpy", "__array__") and is_there(args[0]):
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it to the host."
            )
        wanted = is_cuda(kwargs["device"]) if kwargs.get("device") is not None else None
        if wanted:
            kwargs["device"] = "cpu"
        tensors = [*tensors_in(args), *tensors_in(kwargs)]
        has_some = any(is_there(each) for each in tensors)
        # A bias that says "causal" is a tensor by class only.
        plain = [each for each in tensors if not is_there(each) and each.dim() and type(each).__name__ != "CausalBias"]
        if has_some and plain and name not in MIXING:
            raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu! ({name})")
        result = func(*args, **kwargs)
        stays = wanted if wanted is not None else has_some
        return move(result) if stays and name not in LEAVING else result

    def attribute(self, func: Any, args: Any) -> Any:
        name, of = getattr(getattr(func, "__self__", None), "__name__", ""), args[0] if args else None
        if is_there(of) and name in ("device", "is_cuda"):
            return CUDA if name == "device" else True
        result = func(*args)
        return move(result) if is_there(of) and isinstance(result, torch.Tensor) else result

    def transfer(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        source, goes = args[0], is_there(args[0])
        if name != "to":
            goes = name == "cuda"
        arguments = []
        for each in args[1:]:
            if isinstance(each, (str, torch.device)):
                goes, each = is_cuda(each), "cpu"
            elif isinstance(each, torch.Tensor):
                goes = is_there(each)
            arguments.append(each)
        if kwargs.get("device") is not None:
            goes, kwargs["device"] = is_cuda(kwargs["device"]), "cpu"
        result = source if name != "to" else func(source, *arguments, **kwargs)
        if goes == is_there(source):
            return move(result) if goes else result
        result = result.clone() if result is source else result  # a transfer copies
        result._pretends = goes
        return result


class Stream:
    """A stream of the fake library."""

    fake: Any = None
    device = CUDA

    def __init__(self, device: Any = None) -> None:
        self.cuda_stream = int(self.fake.fake_cuda_stream_create(0))


class Graph:
    """Does anew what the last launch of a `ReplayedKernel` did."""

    again: Any = None

    def replay(self) -> None:
        if Graph.again is not None:
            Graph.again()


class ReplayedKernel:
    """SDPA, as a kernel that can be captured: what a launch gave out is written anew when the graph is replayed."""

    def prepare(self, rows: Any, k: Any, v: Any, queries: int, q_heads: int) -> Any:
        from vattn.attention import KERNELS

        def launch(q: Any, k: Any, v: Any) -> Any:
            def compute() -> Any:
                return KERNELS["sdpa"].prepare(rows, k, v, queries, q_heads)(q, k, v)

            out = compute()
            Graph.again = lambda: out.copy_(compute())
            return out

        return launch


@contextlib.contextmanager
def capturing(graph: Graph, stream: Stream | None = None) -> Iterator[None]:
    stream = stream or Stream()
    stream.fake.fake_cuda_set_capturing(stream.cuda_stream, 1)
    try:
        yield
    finally:
        stream.fake.fake_cuda_set_capturing(stream.cuda_stream, 0)


@contextlib.contextmanager
def pretending(fake: Any) -> Iterator[None]:
    """For the rest of the process, but for the mode itself. `fake`: the fake library, by ctypes."""
    import ctypes

    import vattn.growable_tensor
    import vattn.kv_cache
    from vattn._tensors import finisher

    fake.fake_cuda_stream_create.restype = ctypes.c_uint64
    fake.fake_cuda_set_capturing.argtypes = (ctypes.c_uint64, ctypes.c_int)

    def finish(dtype: str, device: str) -> Any:
        plain = finisher(dtype, device)
        return (lambda view: move(plain(view) if plain else view)) if device.startswith("cuda") else plain

    vattn.kv_cache.finisher = finish  # type: ignore[attr-defined]
    vattn.growable_tensor.finisher = finish  # type: ignore[attr-defined]
    Stream.fake = fake
    cuda: Any = torch.cuda
    cuda.is_available, cuda.is_initialized = lambda: True, lambda: False
    cuda.get_device_capability = lambda device=None: (7, 0)  # too old for any kernel but SDPA
    cuda.synchronize = lambda device=None: None
    cuda.Stream, cuda.CUDAGraph, cuda.graph = Stream, Graph, capturing
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda._sleep = lambda cycles: None
    to = torch.nn.Module.to

    def module_to(module: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        if any(is_cuda(each) for each in [*args, *kwargs.values()]):
            for each in [*module.parameters(), *module.buffers()]:
                move(each)
            return module
        return to(module, *args, **kwargs)

    torch.nn.Module.to = module_to  # type: ignore[assignment,method-assign]
    with Pretending():
        yield


def main() -> int:
    """The smoke as `Place`, which is written for a GPU, runs it."""
    from vattn import attention
    from vattn.bench.gpu.smoke import checks, run
    from vattn.bench.gpu.smoke.place import Place

    class PretendedPlace(Place):
        def generator(self, seed: int) -> torch.Generator:
            return torch.Generator().manual_seed(seed)

        def synchronize(self) -> None:
            self.cuda.synchronize()

    place = PretendedPlace()
    assert place.cuda.is_fake, "pretending needs the fake libcuda: VATTN_CUDA_LIBRARY"
    place.tokens, place.prompt, place.hidden = 5000, 300, 64
    smoke = run.Smoke(place)
    with pretending(place.cuda.library):
        attention.get_kernel, plain = lambda name: ReplayedKernel(), attention.get_kernel  # type: ignore[assignment]
        with smoke.part("replay") as seen:
            seen["worst"] = checks.replay(place, "")
            assert seen["worst"] < checks.CLOSE
        attention.get_kernel = plain
        return run.run(smoke)


if __name__ == "__main__":
    sys.exit(main())

"""Tensors of vattn's memory are pickled, saved and sent as what they show; every other tensor as torch has it.

On the host and on the fake CUDA driver; both layouts, since a head-major view spans the gaps between its heads.
"""

from __future__ import annotations

import copy
import copyreg
import io
import multiprocessing
import pickle
import warnings
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import vattn
from conftest import check_child, make_cache, without_meta
from vattn import _core

LONG = 131_072
SHOWN = 16 * 8 * 128 * 2  # bytes: 16 tokens of 8 heads of 128 bfloat16
ROOM = 8 << 10  # for what a file holds beside them


@pytest.fixture(params=["NHD", "HND"])
def cache(request: pytest.FixtureRequest) -> Iterator[vattn.KVCache]:
    """One slot of 16 tokens, whose rows could hold 131,072."""
    with vattn.KVCache(
        1, 8, 128, max_batch_size=2, max_seq_len=LONG, dtype=torch.bfloat16, device="cpu", layout=request.param
    ) as made:
        made.step({made.alloc(): 16})
        for tensor in made.view(0, 0):
            assert tensor is not None
            tensor.copy_(torch.randn(tensor.shape))
        yield made


def saved(value: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def loaded(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=True)


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "legacy"])
def test_saving_a_view_writes_its_tokens(cache: vattn.KVCache, options: dict[str, Any]) -> None:
    k, v = cache.view(0, 0)
    data = saved({"k": k, "v": v, "again": k}, **options)
    assert len(data) < 2 * SHOWN + ROOM
    back = loaded(data)
    assert torch.equal(back["k"], k)
    assert torch.equal(back["v"], v)
    assert back["again"] is back["k"]


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("pickler", [pickle.Pickler, pickle._Pickler], ids=["C", "Python"])
def test_pickling_a_view_writes_its_tokens(cache: vattn.KVCache, pickler: Any, protocol: int) -> None:
    k = cache.view(0, 0)[0]
    file = io.BytesIO()
    pickler(file, protocol).dump([k, k])
    assert len(file.getvalue()) < 2 * SHOWN, "protocol 2 has no bytes, and writes them as text"
    one, two = pickle.loads(file.getvalue())
    assert torch.equal(one, k)
    assert one is two


def test_every_way_to_look_at_it_is_written_as_it_looks(cache: vattn.KVCache) -> None:
    k = cache.view(0, 0)[0]
    whole_k = cache.layer(0)[0]
    batch = cache.batch(0, [0], 16)[0]
    ways = {
        "slice": k[3:5],
        "head": k[:, 2],
        "transposed": k.transpose(0, 1),
        "permuted": k.permute(2, 0, 1),
        "strided": k[::3, ::2, ::5],
        "part of a layer": whole_k[0, :16],
        "batch": batch,
        "one element": k[7, 3, 9],
        "no tokens": k[:0],
        "bytes": k.view(torch.uint8),
    }
    for name, tensor in ways.items():
        data = saved(tensor)
        assert len(data) < tensor.nbytes + ROOM, name
        assert torch.equal(loaded(data), tensor), name
        assert torch.equal(pickle.loads(pickle.dumps(tensor)), tensor), name
    wide = k[:1].expand(1000, 8, 128)
    assert len(saved(wide)) < 8 * 128 * 2 + ROOM, "repetitions are not written"
    assert torch.equal(loaded(saved(wide)), wide)


def test_deepcopy_takes_what_is_shown(cache: vattn.KVCache) -> None:
    k = cache.view(0, 0)[0]
    for tensor in (k, k[2:4], k.transpose(0, 1)):
        memo: dict[int, Any] = {}
        both = copy.deepcopy([tensor, tensor], memo)
        assert both[0] is both[1]
        assert torch.equal(both[0], tensor)
        assert not _core.owns(both[0].data_ptr())
        assert both[0].untyped_storage().nbytes() <= k.nbytes


def test_a_shallow_copy_still_shares_memory(cache: vattn.KVCache) -> None:
    k = cache.view(0, 0)[0]
    shallow = copy.copy(k)
    assert shallow.data_ptr() == k.data_ptr()
    shallow.fill_(3)
    assert bool((k == 3).all())


def test_what_was_written_needs_no_cache(cache: vattn.KVCache) -> None:
    k = cache.view(0, 0)[0]
    wanted = k.clone()
    cache.close()
    data = saved(k)
    assert len(data) < SHOWN + ROOM, "after close the tensor still shows its tokens"
    assert torch.equal(loaded(data), wanted)


def test_gradients_attributes_and_refusals_are_torchs(cache: vattn.KVCache) -> None:
    k = cache.view(0, 0)[0]
    leaf = k.detach().requires_grad_()
    leaf.note = "kept"  # type: ignore[attr-defined]
    for back in (pickle.loads(pickle.dumps(leaf)), copy.deepcopy(leaf)):
        assert back.requires_grad
        assert back.is_leaf
        assert back.note == "kept"
    assert loaded(saved(torch.nn.Parameter(k))).requires_grad
    result = k.detach().requires_grad_()[1:]
    with pytest.raises(RuntimeError, match="graph leaves"):
        copy.deepcopy(result)
    with pytest.raises(RuntimeError, match="non-leaf"):
        ForkingPickler.dumps(result)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_a_growable_tensor_and_small_caches_on_every_device(device: str, layout: str) -> None:
    without_meta(device)
    with make_cache(device, layout=layout, head_dim=16) as small:
        small.step({small.alloc(): 5})
        k = small.view(0, 0)[0]
        k.copy_(torch.rand(k.shape))
        assert _core.owns(k.data_ptr())
        assert len(saved(k)) < k.nbytes + ROOM
        assert torch.equal(loaded(saved(k)), k)
    with vattn.GrowableTensor(16, 1 << 20, torch.float32, device=device) as rows:
        rows.append(torch.rand(10, 16, device=rows.tensor.device))
        assert torch.equal(loaded(saved(rows.tensor[2:4])), rows.tensor[2:4])
        assert len(saved(rows.tensor[2:4])) < 2 * 64 + ROOM


def test_under_fault_the_gaps_are_not_touched() -> None:
    check_child("""
        import copy, pickle, torch, vattn
        cache = vattn.KVCache(1, 8, 128, max_batch_size=1, max_seq_len=131072, dtype="bfloat16", device="cpu",
                              layout="HND", unmapped_reads="fault")
        cache.step({cache.alloc(): 16})
        k = cache.view(0, 0)[0]
        assert torch.equal(pickle.loads(pickle.dumps(k)), k)
        assert torch.equal(copy.deepcopy(k), k)
    """)


# Other tensors.


def plain_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    base = torch.randn(64, 64)
    return {
        "dense": base,
        "slice": base[3:5],
        "transposed": base.t(),
        "expanded": base[:1].expand(9, 64),
        "leaf": torch.randn(3, requires_grad=True),
        "no leaf": torch.randn(3, requires_grad=True) * 2,
        "meta": torch.empty(3, device="meta"),
        "empty": torch.empty(0),
        "sparse": torch.eye(3).to_sparse(),
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "quantized": torch.quantize_per_tensor(torch.randn(4), 0.1, 0, torch.qint8),
        "complex": torch.randn(3, dtype=torch.complex64).conj(),
        "parameter": torch.nn.Parameter(torch.randn(3)),
    }


@pytest.mark.filterwarnings("ignore")  # torch says of nested and quantized tensors that they will change
def test_other_tensors_are_pickled_and_saved_byte_for_byte_as_torch_does(cache: vattn.KVCache) -> None:
    cache.view(0, 0)  # so the reducers are there
    ours = copyreg.dispatch_table[torch.Tensor]
    for name, tensor in plain_tensors().items():
        with_ours = []
        for installed in (True, False):
            if not installed:
                del copyreg.dispatch_table[torch.Tensor]
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    protocols = range(2, pickle.HIGHEST_PROTOCOL + 1)
                    with_ours.append([saved([tensor, tensor]), *(pickle.dumps(tensor, p) for p in protocols)])
            finally:
                copyreg.dispatch_table[torch.Tensor] = ours
        assert with_ours[0] == with_ours[1], name


def test_other_tensors_are_copied_as_torch_does(cache: vattn.KVCache) -> None:
    cache.view(0, 0)
    base = torch.randn(8, 8)
    first, second = copy.deepcopy([base, base[2:]])
    assert second.data_ptr() == first[2:].data_ptr(), "they still share memory"
    assert copy.copy(base).data_ptr() == base.data_ptr()


def test_an_earlier_reducer_is_asked_for_what_is_not_ours() -> None:
    check_child("""
        import copyreg, pickle, torch, vattn
        asked = []
        def earlier(tensor):
            asked.append(tensor)
            return tensor.__reduce_ex__(2)
        copyreg.pickle(torch.Tensor, earlier)
        rows = vattn.GrowableTensor(4, 100, "float32")
        rows.resize(3)
        plain = torch.ones(2)
        assert torch.equal(pickle.loads(pickle.dumps([plain, rows.tensor]))[1], rows.tensor)
        assert asked[0] is plain and len(asked) == 2
    """)


def test_accounting_installs_nothing_and_imports_no_torch() -> None:
    check_child("""
        import sys, vattn
        for device in ("meta", "cpu"):
            cache = vattn.KVCache(1, 1, 16, max_batch_size=1, max_seq_len=64, dtype="float16", device=device)
            cache.step({cache.alloc(): 3})
        assert "torch" not in sys.modules and "vattn._pickling" not in sys.modules
    """)


# Other processes.


def answer(received: Any, answers: Any) -> None:
    """What came, back as numbers; then it is overwritten, which must not be seen by the sender."""
    for _ in range(2):
        tensor = received.get(timeout=60)
        answers.put((tensor.float().sum().item(), tuple(tensor.shape), tensor.untyped_storage().nbytes()))
        tensor.zero_()
        answers.put(None)


def test_a_queue_takes_a_copy_and_leaves_the_sender_alone(cache: vattn.KVCache) -> None:
    processes = torch.multiprocessing.get_context("spawn")
    k, v = cache.view(0, 0)
    received, answers = processes.Queue(), processes.Queue()
    child = processes.Process(target=answer, args=(received, answers))
    child.start()
    try:
        assert v is not None
        for tensor in (k, v[4:8].transpose(0, 1)):
            address, wanted = tensor.data_ptr(), tensor.float().sum().item()
            received.put(tensor)
            total, shape, span = answers.get(timeout=60)
            assert total == pytest.approx(wanted, rel=1e-3)
            assert shape == tuple(tensor.shape)
            assert span == tensor.nbytes
            assert answers.get(timeout=60) is None
            assert tensor.data_ptr() == address
            assert tensor.float().sum().item() == wanted, "the child wrote into its own copy"
    finally:
        child.join(60)
    k.fill_(5)
    assert bool((cache.view(0, 0)[0] == 5).all()), "it is still the cache's memory"


def check_argument(tensor: torch.Tensor, parameter: torch.nn.Parameter, wanted: float) -> None:
    assert tensor.float().sum().item() == pytest.approx(wanted, rel=1e-3)
    assert parameter.float().sum().item() == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("sharing", ["file_descriptor", "file_system"])
def test_a_spawned_process_gets_its_arguments(cache: vattn.KVCache, sharing: str) -> None:
    strategy = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy(sharing)
    try:
        k = cache.view(0, 0)[0]
        address = k.data_ptr()
        parameter = torch.nn.Parameter(k.detach())
        arguments = (k, parameter, k.float().sum().item())
        child = multiprocessing.get_context("spawn").Process(target=check_argument, args=arguments)
        child.start()
        child.join(60)
        assert child.exitcode == 0
        assert k.data_ptr() == parameter.data_ptr() == address
    finally:
        torch.multiprocessing.set_sharing_strategy(strategy)


class RowsOf(Dataset[torch.Tensor]):
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __len__(self) -> int:
        return len(self.tensor)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.tensor[index]


@pytest.mark.parametrize("start", ["spawn", "forkserver"])
def test_a_data_loader_reads_a_growable_tensor_and_leaves_it(start: str) -> None:
    with vattn.GrowableTensor(8, 1 << 20, torch.float32) as rows:
        rows.append(torch.arange(48.0).view(6, 8))
        data = RowsOf(rows.tensor)
        loader = DataLoader(data, batch_size=3, num_workers=1, multiprocessing_context=start)
        assert torch.equal(torch.cat(list(loader)), rows.tensor)
        assert data.tensor.data_ptr() == rows.tensor.data_ptr()
        data.tensor.zero_()
        assert not rows.tensor.any(), "the dataset's tensor is still the growable one"


def test_a_forked_child_pickles_what_it_made_itself() -> None:
    check_child("""
        import os, pickle, threading, torch, vattn

        def made():
            rows = vattn.GrowableTensor(4, 1 << 20, "float32")
            rows.append(torch.ones(3, 4))
            return rows

        kept = made()
        kept.tensor
        stop = threading.Event()

        def busy():  # takes and leaves the list of buffers all the while
            while not stop.is_set():
                made().close()

        thread = threading.Thread(target=busy)
        thread.start()
        for _ in range(20):
            child = os.fork()
            if child == 0:
                rows = made()
                part = rows.tensor[1:]
                os._exit(0 if torch.equal(pickle.loads(pickle.dumps(part)), torch.ones(2, 4)) else 1)
            assert os.waitpid(child, 0)[1] == 0
        stop.set()
        thread.join()
    """)


def test_share_memory_moves_a_tensor_out_and_a_clone_of_it_does_not(cache: vattn.KVCache) -> None:
    k = cache.view(0, 0)[0]
    shared = k.clone().share_memory_()
    assert shared.is_shared()
    assert shared.untyped_storage().nbytes() == SHOWN
    assert _core.owns(k.data_ptr())
    k.share_memory_()
    assert not _core.owns(k.data_ptr()), "as its docstring says"


def test_memory_that_is_no_longer_anybodys_is_not_vattns() -> None:
    with make_cache("cpu") as small:
        small.step({small.alloc(): 1})
        k = small.view(0, 0)[0]
        address = k.data_ptr()
        assert _core.owns(address)
        assert not _core.owns(0)
    assert _core.owns(address), "a tensor keeps it"
    del k
    assert not _core.owns(address)


def test_a_tensor_of_more_dimensions_than_eight_is_whole() -> None:
    native = _core.GrowableTensor([1] * 39 + [3], 4, "float32", "cpu", page_size=None, memory_limit=None, pool=None)
    native.resize(2)
    tensor = native.tensor()
    assert tuple(tensor.shape) == (2, *[1] * 39, 3)
    tensor.copy_(torch.arange(6.0).view(tensor.shape))
    assert native.tensor().flatten().tolist() == [0, 1, 2, 3, 4, 5]

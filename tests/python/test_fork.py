"""Tensors that a forked child inherited: touching one ends the child, whatever it has allocated since.

Each test runs a program in a process of its own.
"""

from __future__ import annotations

import pytest

from conftest import check_child

START = """
import os, resource, signal, subprocess, sys, torch, vattn
torch.set_num_threads(1)
live = vattn.KVCache(1, 1, 64, max_batch_size=2, max_seq_len=65536, dtype="float32", device="cpu")
live.step({live.alloc(): 1000})
mapped, whole = live.view(0, 0)[0], live.layer(0)[0]
mapped.fill_(2)
rows = vattn.GrowableTensor((64,), 1 << 20, "float32", device="cpu")
rows.append(torch.arange(32.0)[:, None].expand(32, 64))

def end_of(touch):
    "The signal that ends a child which allocates a lot and then does this; 0 where none does."
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        own = [torch.full((1 << 20,), 42.0) for _ in range(64)]
        touch()
        os._exit(0 if all(bool((one == 42).all()) for one in own) else 1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
"""


def test_a_child_that_allocates_first_can_neither_read_nor_write_what_it_inherited() -> None:
    check_child(
        START
        + """
assert end_of(lambda: None) == 0
for touch in (
    lambda: float(mapped[0, 0, 0]), lambda: mapped.fill_(-1), lambda: float(whole[1, 60000, 0, 0]),
    lambda: float(rows.tensor[31, 63]) if not rows.is_closed else float(kept[0, 0]), lambda: kept.fill_(1),
):
    kept = rows.tensor
    assert end_of(touch) == signal.SIGSEGV
    assert end_of(lambda: os._exit(0 if end_of(touch) == signal.SIGSEGV else 1)) == 0  # and a child of that child
assert bool((mapped == 2).all())
"""
    )


def test_a_tensor_that_outlives_its_cache_is_not_inherited_either() -> None:
    check_child(
        START
        + """
live.close()
del whole
assert bool((mapped == 2).all())
assert end_of(lambda: float(mapped[0, 0, 0])) == signal.SIGSEGV
del mapped
assert end_of(lambda: None) == 0
"""
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_data_loader_that_forks_fails_instead_of_summing_other_memory() -> None:
    check_child(
        START
        + """
class Rows(torch.utils.data.Dataset):
    def __init__(self):
        self.rows = rows.tensor
    def __len__(self):
        return len(self.rows)
    def __getitem__(self, index):
        return self.rows[index]

def total(**options):
    return sum(float(batch[:, 0].sum()) for batch in torch.utils.data.DataLoader(Rows(), batch_size=4, **options))

assert total() == 496
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
try:
    found = total(num_workers=2, multiprocessing_context="fork")
except RuntimeError as error:
    assert "Segmentation fault" in str(error) or "exited unexpectedly" in str(error), error
else:
    raise AssertionError(found)
assert total() == 496
""",
        timeout=120,
    )


def test_programs_that_are_started_run_as_ever() -> None:
    check_child(
        START
        + """
for options in ({}, {"close_fds": False}, {"preexec_fn": lambda: None}, {"start_new_session": True}):
    assert subprocess.run([sys.executable, "-c", "print(3)"], stdout=subprocess.PIPE, **options).stdout == b"3\\n"
assert os.waitstatus_to_exitcode(os.waitpid(os.posix_spawnp("true", ["true"], os.environ), 0)[1]) == 0
assert os.system("true") == 0
live.step({0: 2000})
assert bool((mapped == 2).all())
"""
    )


def test_reservations_side_by_side_are_one_mapping_in_the_child() -> None:
    check_child(
        """
        import os, vattn
        pool = vattn.PagePool("cpu", memory_limit="64MiB")
        live = [vattn.KVCache(1, 1, 64, max_batch_size=2, max_seq_len=4096, dtype="float32", device="cpu", pool=pool,
                              lookahead_tokens=0) for _ in range(1000)]
        child = os.fork()
        if child == 0:
            with open("/proc/self/maps") as maps:
                os._exit(min(250, sum("---p 00000000 00:00 0" in line for line in maps)))
        stretches = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert 0 < stretches < 200, stretches  # of 2,000 reservations
        """
    )

"""``make soak``: another first seed each time, printed, and the same programs for the same seed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import FAKE_CUDA

ROOT = Path(__file__).resolve().parents[2]
PRINT = "import soak; print(soak.FIRST_SEED)"
# What one round of a soak's model does, by its first draws.
DRAWS = """
import soak
from hypothesis import seed, settings
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test
import hypothesis.strategies as st

class Machine(RuleBasedStateMachine):
    @rule(number=st.integers(0, 2**40))
    def draw(self, number):
        print(number)

for number in range(2):
    seed(soak.FIRST_SEED + number)(Machine)
    run_state_machine_as_test(Machine, settings=settings(max_examples=3, stateful_step_count=3, database=None))
"""


def child(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("VATTN_SOAK")}
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT / "tests/python",
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=True,
    )


def test_without_a_soak_the_seed_is_always_the_same() -> None:
    done = child(PRINT)
    assert (done.stdout, done.stderr) == ("20261122\n", "")


def test_a_soak_draws_its_first_seed_and_prints_it() -> None:
    seeds = set()
    for _ in range(2):
        done = child(PRINT, VATTN_SOAK_MINUTES="1")
        assert done.stderr == f"soak: VATTN_SOAK_SEED={done.stdout}"
        seeds.add(done.stdout)
    assert len(seeds) == 2


def test_a_given_seed_goes_through_the_same_programs() -> None:
    first, again, other = (
        child(DRAWS, VATTN_SOAK_MINUTES="1", VATTN_SOAK_SEED=seed).stdout for seed in ("7", "7", "9")
    )
    assert first == again != other
    numbers = first.split()
    assert len(set(numbers)) > len(numbers) // 2, "no round repeats the one before"


def make(*words: str) -> list[str]:
    done = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    if not done.stdout:
        pytest.skip(f"make -n says nothing: {done.stderr.strip()}")
    return done.stdout.splitlines()


def test_make_soak_prints_a_seed_of_its_own_that_repeats_it() -> None:
    said = [line for _ in range(2) for line in make("soak", "MINUTES=1") if line.startswith('echo "soak:')]
    pattern = r'echo "soak: the first seed is (\d+); make soak MINUTES=1 SEED=\1 repeats it"'
    matches = [re.fullmatch(pattern, line) for line in said]
    assert all(matches)
    assert len({match[1] for match in matches if match}) == 2
    assert 'echo "soak: the first seed is 5; make soak MINUTES=60 SEED=5 repeats it"' in make("soak", "SEED=5")


@pytest.mark.skipif(not FAKE_CUDA, reason="no built C++ tests beside the fake libcuda")
def test_the_cpp_model_begins_with_the_seed_it_is_given(tmp_path: Path) -> None:
    program = Path(str(FAKE_CUDA)).parent / "vattn_tests"
    if not program.exists():
        pytest.skip(f"no {program}")
    out = tmp_path / "out.json"
    environment = {**os.environ, "VATTN_SOAK_SEED": "31", "VATTN_SOAK_MINUTES": "0"}
    command = [str(program), "--gtest_filter=*PoolModel.Keeps*/null", f"--gtest_output=json:{out}"]
    subprocess.run(command, env=environment, capture_output=True, check=True, timeout=240)
    assert '"first_seed_null": "31"' in out.read_text()

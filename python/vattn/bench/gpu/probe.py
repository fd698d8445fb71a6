"""What the driver's memory calls answer, one raw call a line: the first thing to run on a GPU.

    python -m vattn.bench.gpu.probe [--fake-cuda LIB] [--out FILE] [--all] [--bold]

It makes the calls that vattn makes, and the ones that it must never need to, and notes code, microseconds and what
came back; then it prints every line that differs from what the fake libcuda of the tests answers, which is in
`probe_fake.json` beside this file. The fake decides what the tests can find, so a difference is a rule that the fake
has wrong, or is stricter about: tests/fake_cuda/README.md lists those that are known.

Promise: no kernel runs and no line faults a context, so that each answers for itself; what may lose the context runs
only on the fake, or with ``--bold``, last. About a second on a GPU. Exit status 0, whatever differs; 1 where there is
no driver. ``--record`` writes `probe_fake.json` anew, on the fake only. Thread: one, and one that has no context.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vattn.bench.gpu.libcuda import CudaError, Libcuda
from vattn.bench.gpu.probe_call import Answer, Probe
from vattn.bench.gpu.probe_lines import BOLD, LINES

EXPECTED = Path(__file__).with_name("probe_fake.json")


def ask(cuda: Libcuda, bold: bool = False) -> dict[str, Answer]:
    """Every line, in order."""
    probe = Probe(cuda, bold)
    for lines in LINES:
        try:
            lines(probe)
        except CudaError as error:  # what its lines stand on was refused; the others stand on their own
            probe.note(f"{lines.__name__} ended early", Answer(error.name, {"call": error.call}))
    return probe.answers


def differences(answers: dict[str, Answer], expected: dict[str, dict[str, Any]]) -> list[str]:
    """A sentence for each line that is not what the fake answers: the code, or a fact."""
    found = []
    for line, answer in answers.items():
        if line not in expected:
            found.append(f"{line}: {answer.code}; the fake was never asked")
            continue
        known = expected[line]
        if answer.code != known["code"]:
            found.append(f"{line}: {answer.code}; the fake: {known['code']}")
        for name in {**known["facts"], **answer.facts} if answer.code == known["code"] else ():
            here, there = answer.facts.get(name, "nothing"), known["facts"].get(name, "nothing")
            if here != there:
                found.append(f"{line}: {name} is {here}; the fake: {there}")
    missing = [line for line in expected if line not in answers]
    if not any(line.startswith(BOLD) for line in answers):
        missing = [line for line in missing if not line.startswith(BOLD)]
    found += [f"{line}: not asked; the fake: {expected[line]['code']}" for line in missing]
    return found


def comparable(answers: dict[str, Answer]) -> dict[str, dict[str, Any]]:
    """Without what is of this machine."""
    return {line: {"code": answer.code, "facts": answer.facts} for line, answer in answers.items()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vattn.bench.gpu.probe", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--device", type=int, default=0, help="its ordinal")
    parser.add_argument("--fake-cuda", type=Path, metavar="LIB", help="ask this fake libcuda")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write every answer there, as JSON")
    parser.add_argument("--all", action="store_true", help="print every line, not only what differs")
    parser.add_argument(
        "--bold", action="store_true", help="also what may lose the context; not on the fake: there always"
    )
    parser.add_argument("--record", action="store_true", help="take these answers for the fake's from now on")
    args = parser.parse_args(arguments)
    if args.fake_cuda:
        os.environ["VATTN_CUDA_LIBRARY"] = str(args.fake_cuda.resolve())
    try:
        cuda = Libcuda(args.device)
    except (OSError, CudaError) as error:
        print(f"probe: no CUDA driver here: {error}", file=sys.stderr)
        return 1
    start = time.perf_counter()
    answers = ask(cuda, args.bold)
    took = time.perf_counter() - start
    name, version = cuda.device_name(), cuda.driver_version()
    if args.record:
        if not cuda.is_fake:
            parser.error("--record: this is no fake libcuda")
        EXPECTED.write_text(json.dumps(comparable(answers), indent=1) + "\n")
    if args.out:
        lines = {line: asdict(answer) for line, answer in answers.items()}
        args.out.write_text(json.dumps({"device": name, "driver": version, "answers": lines}, indent=1) + "\n")
    if args.all:
        for line, answer in answers.items():
            print(f"{line}: {answer.code} {json.dumps({**answer.facts, **answer.measured})}")
    found = differences(answers, json.loads(EXPECTED.read_text()))
    for sentence in found:
        print(f"differs: {sentence}")
    print(f"probe: {len(answers)} lines in {took:.1f} s on {name}, driver {version}: {len(found)} differ from the fake")
    return 0


if __name__ == "__main__":
    sys.exit(main())

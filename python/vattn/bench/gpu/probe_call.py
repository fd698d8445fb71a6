"""`Probe`: raw driver calls, each with a line's name, its code, its time and what came back (`Answer`).

Thread: one at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vattn.bench.gpu.libcuda import CudaError, Libcuda


@dataclass
class Answer:
    """One line."""

    #: The code's name; "absent" where the library has no such entry; "-" where a line is no call.
    code: str
    #: What can be compared between machines.
    facts: dict[str, Any] = field(default_factory=dict)
    #: What cannot: times and sizes of this machine.
    measured: dict[str, Any] = field(default_factory=dict)


class Probe:
    """The driver, and what it has answered so far, by line."""

    def __init__(self, cuda: Libcuda, bold: bool = False) -> None:
        self.cuda = cuda
        self.page = cuda.granularity
        #: Whether lines that may lose the context are to run.
        self.is_bold = bold or cuda.is_fake
        self.answers: dict[str, Answer] = {}

    def call(self, line: str, entry: str, *arguments: Any) -> Answer:
        """Makes the call and notes its code and time. The facts may be added to."""
        start = time.perf_counter()
        try:
            code = self.cuda.name_of(self.cuda.call(entry, *arguments))
        except CudaError:
            code = "absent"
        took = time.perf_counter() - start
        return self.note(line, Answer(code, measured={"us": round(took * 1e6, 1)}))

    def note(self, line: str, answer: Answer) -> Answer:
        assert line not in self.answers, line
        self.answers[line] = answer
        return answer

    def is_done(self, line: str) -> bool:
        """Whether that call succeeded."""
        return line in self.answers and self.answers[line].code == "CUDA_SUCCESS"


#: A part of the probe: asks some lines.
Lines = Callable[[Probe], None]

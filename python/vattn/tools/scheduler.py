"""Continuous batching, simulated: one scheduler, run over whatever memory it is given.

The rules are the same for every memory, so that only the memory differs in a comparison:

* A request arrives at its timestamp and waits in a queue. The clock advances by one iteration at a time; while nothing
  runs it jumps to the next arrival.
* An iteration first grows every running request by one token, all in one transaction. If that cannot be had, the
  youngest is preempted (its memory freed, back to the *front* of the queue, to start again from its prompt with nothing
  generated) until it can.
* Then the queue's head is admitted for as long as there is a slot, and memory for its prompt and the token it is about
  to generate. Nothing overtakes the head, and nothing is admitted in an iteration that preempted: what was just taken
  away would only be taken away again.
* A request that has all its tokens leaves at the end of the iteration and its memory is freed. The running requests are
  thus always in order of arrival, the oldest is never preempted while another runs, and so every request finishes.
* A request that can never fit (longer than the longest row, or than all the memory when alone) is refused on arrival.

Means are over time, from the first arrival to the end of the last request, idle gaps included.
Thread: one; a memory belongs to the run it is given to.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from vattn.tools.asked import Asked, AskedCounter
from vattn.tools.series import Recorder, Series


class Memory(Protocol):
    """What the scheduler asks of a memory. Slots are small integers, below the batch limit."""

    longest: int  # tokens of the longest request it could hold with nothing else in it
    asked_bytes: int  # that ``admit`` and ``grow`` made slots hold which did not hold them, since the beginning

    def admit(self, request: int, tokens: int) -> int:
        """Return a slot with memory for ``tokens``, or -1 with nothing changed."""

    def grow(self, lengths: array[int], active: Sequence[int]) -> bool:
        """Give every active slot memory for ``lengths[slot]`` tokens, or return False with nothing changed."""

    def release(self, slot: int) -> None:
        """Free a slot and its memory."""

    def usage(self) -> tuple[int, int, int]:
        """Return the bytes that hold tokens, those mapped for active slots, and those reclaimable.

        Asked once an iteration, when all who run in it have their memory and nobody has finished.
        """


@dataclass(frozen=True)
class Workload:
    """What is simulated: requests in the order they arrive, and the pace."""

    arrivals_ns: Sequence[int]
    prompts: Sequence[int]
    answers: Sequence[int]
    iteration_ns: int
    max_batch: int


@dataclass(frozen=True)
class Figures:
    """What a run came to; means are weighted by time."""

    finished: int
    refused: int
    simulated_seconds: float
    mean_concurrency: float
    peak_concurrency: int
    used_bytes: int
    mapped_bytes: int
    reclaimable_bytes: int
    waste: float
    preemptions: int
    asked: Asked  # memory newly needed, a second
    series: Series  # the same over time


def simulate(work: Workload, memory: Memory, on_done: Callable[[int], None] | None = None) -> Figures:
    """Run every request to its end; ``on_done`` is told now and then how many are finished or refused."""
    return _Run(work, memory, on_done).run()


class _Run:
    """The state of one simulation."""

    def __init__(self, work: Workload, memory: Memory, on_done: Callable[[int], None] | None) -> None:
        self.work = work
        self.memory = memory
        self.on_done = on_done
        self.queue: deque[int] = deque()  # requests that wait, the next to be admitted first
        self.active: list[int] = []  # slots in use, the oldest request first
        self.lengths = array("q", bytes(8 * work.max_batch))  # tokens, by slot; 0: not in use
        self.targets = array("q", bytes(8 * work.max_batch))  # tokens at which the request is done
        self.owners = array("q", bytes(8 * work.max_batch))  # which request has the slot
        self.blocked = False  # the head did not fit, and nothing has been freed since
        self.finished = self.refused = self.preemptions = 0
        self.peak = 0
        self.end_ns = 0
        # Sums over iterations; times the length of one, these are integrals over time.
        self.sum_active = self.sum_used = self.sum_mapped = self.sum_reclaimable = 0
        self.prompt_bytes = self.decode_bytes = 0  # asked for in this iteration
        self.recorder = Recorder(work.iteration_ns)
        self.asked = AskedCounter(work.iteration_ns)

    def run(self) -> Figures:
        work, queue = self.work, self.queue
        arrivals, total, step_ns = work.arrivals_ns, len(work.arrivals_ns), work.iteration_ns
        clock = arrived = 0
        while True:
            while arrived < total and arrivals[arrived] <= clock:
                self._arrive(arrived)
                arrived += 1
            asked = self.memory.asked_bytes
            preempted = self._grow()
            grown = self.memory.asked_bytes
            if not preempted and queue and not self.blocked:
                self._admit()
            self.decode_bytes, self.prompt_bytes = grown - asked, self.memory.asked_bytes - grown
            if not self.active:
                if queue:
                    continue  # alone and preempted: refused in _grow, or the next in the queue gets its turn
                if arrived == total:
                    break
                clock = arrivals[arrived]
                continue
            self._account(clock)
            clock += step_ns
            self._retire(clock)
        return self._figures()

    def _arrive(self, request: int) -> None:
        if self.work.prompts[request] + self.work.answers[request] > self.memory.longest:
            self._refuse()
        else:
            self.queue.append(request)

    def _grow(self) -> bool:
        """One token more for every running request; True if someone had to be preempted for it."""
        lengths, active = self.lengths, self.active
        for slot in active:
            lengths[slot] += 1
        preempted = False
        while active and not self.memory.grow(lengths, active):
            slot = active.pop()
            lengths[slot] = 0
            self.memory.release(slot)
            self.blocked = False
            if active:
                self.queue.appendleft(self.owners[slot])
                self.preemptions += 1
            else:
                self._refuse()  # it had all the memory there is, and that was not enough
            preempted = True
        return preempted

    def _admit(self) -> None:
        queue, active, work = self.queue, self.active, self.work
        while queue and len(active) < work.max_batch:
            request = queue[0]
            prompt, answer = work.prompts[request], work.answers[request]
            tokens = prompt + min(answer, 1)
            slot = self.memory.admit(request, tokens)
            if slot < 0:
                if active:
                    self.blocked = True
                    return
                self._refuse()  # nothing is in its way, so nothing will ever make room
            else:
                self.lengths[slot], self.targets[slot], self.owners[slot] = tokens, prompt + answer, request
                active.append(slot)
            queue.popleft()

    def _account(self, clock: int) -> None:
        count = len(self.active)
        self.peak = max(self.peak, count)
        used, mapped, reclaimable = self.memory.usage()
        self.sum_active += count
        self.sum_used += used
        self.sum_mapped += mapped
        self.sum_reclaimable += reclaimable
        self.recorder.add(clock, count, used, mapped, self.prompt_bytes, self.decode_bytes)
        self.asked.add(clock, self.prompt_bytes, self.decode_bytes)

    def _retire(self, clock: int) -> None:
        """Free the slots whose requests have all their tokens."""
        lengths, targets = self.lengths, self.targets
        done = [slot for slot in self.active if lengths[slot] >= targets[slot]]
        if not done:
            return
        for slot in done:
            lengths[slot] = 0
            self.memory.release(slot)
        self.active = [slot for slot in self.active if lengths[slot]]
        self.blocked = False
        self.end_ns = clock
        self.finished += len(done)
        self._tell()

    def _refuse(self) -> None:
        self.refused += 1
        self._tell()

    def _tell(self) -> None:
        if self.on_done is not None:
            self.on_done(self.finished + self.refused)

    def _figures(self) -> Figures:
        def mean(total: int) -> float:
            return total * self.work.iteration_ns / self.end_ns if self.end_ns else 0.0

        return Figures(
            finished=self.finished,
            refused=self.refused,
            simulated_seconds=self.end_ns / 1e9,
            mean_concurrency=mean(self.sum_active),
            peak_concurrency=self.peak,
            used_bytes=round(mean(self.sum_used)),
            mapped_bytes=round(mean(self.sum_mapped)),
            reclaimable_bytes=round(mean(self.sum_reclaimable)),
            waste=1 - self.sum_used / self.sum_mapped if self.sum_mapped else 0.0,
            preemptions=self.preemptions,
            asked=self.asked.asked(self.end_ns),
            series=self.recorder.series(),
        )

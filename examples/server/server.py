"""A continuous-batching server of Llamas in one process: several models, one budget of memory.

Each iteration decodes one token of every running request, model by model, and admits who waits. Memory is vattn's: a
request is admitted when `KVCache.fits` says that it would have memory; when a step is refused, the request that came
last is preempted, whichever model it is of, and computed again later. Tokens are the model's likeliest (greedy).

    server = Server({"large": llama, "small": other}, memory_limit="1GiB")
    request = server.submit("large", prompt_ids, max_new_tokens=100)
    server.run()
    request.new_tokens

Thread: one calls `step` or `run`; `submit` and `cancel` may be called from any.
"""

from __future__ import annotations

import collections
import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from llama import Llama

import vattn


@dataclass(eq=False)
class Request:
    model: str
    tokens: list[int]  #: the prompt, then what came out
    prompt_len: int
    max_new_tokens: int
    arrival: int
    state: str = "waiting"  #: then running, and finished, cancelled or failed
    slot: int = -1
    preemptions: int = 0
    error: vattn.OutOfMemoryError | None = None

    @property
    def new_tokens(self) -> list[int]:
        return self.tokens[self.prompt_len :]

    @property
    def is_over(self) -> bool:
        return self.state in ("finished", "cancelled", "failed")


@dataclass
class Queue:
    """A model, its cache, and its requests."""

    llama: Llama
    cache: vattn.KVCache
    waiting: collections.deque[Request] = field(default_factory=collections.deque)
    running: list[Request] = field(default_factory=list)
    rows: vattn.Rows | None = None  #: of `running`, as long as that is the same

    def leave(self, request: Request, state: str) -> None:
        """Out of the batch: its memory is there for whoever needs it."""
        self.running.remove(request)
        self.cache.free(request.slot)
        request.slot, request.state, self.rows = -1, state, None


class Server:
    def __init__(
        self,
        models: dict[str, Any],
        memory_limit: int | str,
        max_batch_size: int = 32,
        max_seq_len: int = 4096,
        page_size: int | str | None = None,
    ) -> None:
        llamas = {name: Llama(model) for name, model in models.items()}
        device = next(iter(llamas.values())).device
        self.pool = vattn.PagePool(device, memory_limit=memory_limit, page_size=page_size)
        shape = {"max_batch_size": max_batch_size, "max_seq_len": max_seq_len, "pool": self.pool}
        self.queues = {name: Queue(llama, llama.make_cache(**shape)) for name, llama in llamas.items()}
        self.arrivals = itertools.count()

    def submit(self, model: str, prompt: list[int], max_new_tokens: int) -> Request:
        queue = self.queues[model]
        if not prompt or len(prompt) + max_new_tokens > queue.cache.max_seq_len:
            raise ValueError(f"a prompt and what follows are 1 to {queue.cache.max_seq_len} tokens")
        request = Request(model, list(prompt), len(prompt), max_new_tokens, next(self.arrivals))
        queue.waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Takes effect in the next iteration; what came out until then stays."""
        if not request.is_over:
            request.max_new_tokens = 0

    def run(self) -> None:
        while self.step():
            pass

    @torch.inference_mode()
    def step(self) -> bool:
        """One iteration. False: there was nothing to do."""
        busy = False
        for queue in self.queues.values():
            self._drop_cancelled(queue)
            busy = self._decode(queue) or busy
        for queue in self.queues.values():
            busy = self._admit(queue) or busy
        return busy

    def close(self) -> None:
        for queue in self.queues.values():
            queue.cache.close()
        self.pool.close()

    def _decode(self, queue: Queue) -> bool:
        if not self._grow(queue):
            return False
        if queue.rows is None:
            queue.rows = queue.cache.rows([request.slot for request in queue.running])
        last = [request.tokens[-1] for request in queue.running]
        self._append(queue, queue.running, queue.llama.forward(last, queue.rows))
        return True

    def _grow(self, queue: Queue) -> bool:
        """Memory for the next token of every running request, of fewer requests if need be. False: none is left."""
        while queue.running:
            try:
                queue.cache.step({request.slot: len(request.tokens) for request in queue.running})
                return True
            except vattn.OutOfMemoryError as error:
                if len(queue.running) == 1 and not error.waiting_can_help:
                    queue.running[0].error = error  # alone it is more than the budget
                    queue.leave(queue.running[0], "failed")
                else:
                    self._preempt()
        return False

    def _preempt(self) -> None:
        """The request that came last gives its memory up, and waits before all others of its model."""
        running = [(request, queue) for queue in self.queues.values() for request in queue.running]
        request, queue = max(running, key=lambda one: one[0].arrival)
        request.preemptions += 1
        queue.leave(request, "waiting")
        queue.waiting.appendleft(request)

    def _admit(self, queue: Queue) -> bool:
        """Prompts (and what was preempted) that have memory: computed, and in the batch from the next iteration on."""
        admitted = False
        while queue.waiting:
            request = queue.waiting[0]
            next_lengths = {other.slot: len(other.tokens) for other in queue.running}
            somebody_runs = any(other.running for other in self.queues.values())
            if somebody_runs and not queue.cache.fits(next_lengths, new=[len(request.tokens)]):
                break  # until somebody ends
            queue.waiting.popleft()
            request.slot, request.state, queue.rows = queue.cache.alloc(len(request.tokens)), "running", None
            queue.running.append(request)
            try:
                queue.cache.step({request.slot: len(request.tokens)})
            except vattn.OutOfMemoryError as error:
                request.error = error  # with nobody running there is nobody to wait for
                queue.leave(request, "failed")
                continue
            rows = queue.cache.rows([request.slot])
            self._append(queue, [request], queue.llama.forward(request.tokens, rows))
            admitted = True
        return admitted

    def _append(self, queue: Queue, requests: list[Request], logits: torch.Tensor) -> None:
        for request, token in zip(list(requests), logits.argmax(-1).tolist(), strict=True):
            request.tokens.append(token)
            if len(request.new_tokens) >= request.max_new_tokens or token in queue.llama.end_tokens:
                queue.leave(request, "finished")

    def _drop_cancelled(self, queue: Queue) -> None:
        for request in [request for request in queue.running if request.max_new_tokens == 0]:
            queue.leave(request, "cancelled")
        for request in [request for request in queue.waiting if request.max_new_tokens == 0]:
            queue.waiting.remove(request)
            request.state = "cancelled"

"""One side of the demo's comparison: ``python -m vattn.tools.demo_arm dynamic|vattn [DEVICE [PROMPT_TOKENS]]`` in a
process of its own.

Prints one line of JSON: the tokens, the times, the memory and its curve. Both sides run the very same code but for the
cache they pass to ``generate``. Memory is the most that was held while decoding: resident memory on the host, what the
device has less of on a GPU. The curve has, for every token, the most that was held since the one before; to read it is
part of a token's time, some tens of microseconds on either side. Thread: the main one of its process.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch

from vattn.transformers import cache_argument

# Untyped on purpose: transformers resolves its names at run time, which type checkers cannot follow.
transformers: Any = importlib.import_module("transformers")

#: No length is chosen up front with vattn: this is only where the addresses end.
MAX_SEQ_LEN = 131_072


class Clock:
    """A streamer for ``generate``: notes when each token arrives and what was held for it; what the prompt took is left
    out.
    """

    def __init__(self, memory: HostMemory | DeviceMemory) -> None:
        self.memory = memory
        self.times: list[float] = []
        self.held: list[int] = []  # bytes, from the second token on
        self.prompt_seen = False

    def put(self, _tokens: torch.Tensor) -> None:
        if not self.prompt_seen:
            self.prompt_seen = True  # generate hands over the prompt first
            return
        if not self.times:
            self.memory.reset_peak()  # the prompt's activations are the model's, not the cache's
            self.times.append(time.perf_counter())
            return
        self.times.append(time.perf_counter())
        self.held.append(self.memory.peak_since())

    def end(self) -> None:
        pass


class HostMemory:
    """Resident memory of this process and its peak, from /proc."""

    name = "resident memory"

    def current(self) -> int:
        return self._status("VmRSS")

    def reset_peak(self) -> None:
        trim()
        self._forget_peak()

    def peak_since(self) -> int:
        """The peak since the last call."""
        peak = self._status("VmHWM")
        self._forget_peak()
        return peak

    @staticmethod
    def _forget_peak() -> None:
        # A sandbox without this file counts the prompt's activations in, on both sides.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    @staticmethod
    def _status(field: str) -> int:
        match = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
        return int(match[1]) * 1024 if match else 0


class DeviceMemory:
    """What the device has less of than before the model was loaded: torch's memory and vattn's alike."""

    name = "device memory"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        torch.zeros(1, device=device)  # the context's own memory is nobody's
        self.before = self._taken()

    def current(self) -> int:
        torch.cuda.empty_cache()
        return self._taken() - self.before

    def peak_since(self) -> int:
        """What is held now: the peak too."""
        # Neither allocator gives anything back to the device while decoding, so the end is the peak.
        return self._taken() - self.before

    def reset_peak(self) -> None:
        torch.cuda.empty_cache()

    def _taken(self) -> int:
        free, total = torch.cuda.mem_get_info(self.device)
        return int(total - free)


def trim() -> None:
    """Give the C library's free memory back, so that what is left is what is used."""
    with contextlib.suppress(OSError, AttributeError):  # not every C library is glibc
        ctypes.CDLL(None).malloc_trim(0)


def build(device: torch.device) -> tuple[Any, int]:
    """The model and the length of its prompt: small for a processor, larger for a GPU."""
    large = device.type == "cuda"
    config = transformers.LlamaConfig(
        vocab_size=2000,
        hidden_size=2048 if large else 512,
        intermediate_size=5632 if large else 1408,
        num_hidden_layers=16 if large else 8,
        num_attention_heads=16 if large else 8,
        num_key_value_heads=16 if large else 8,
        max_position_embeddings=MAX_SEQ_LEN,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    # float32: both caches then differ by less than any two logits do.
    return transformers.LlamaForCausalLM(config).to(device).eval(), 16_384 if large else 4096


def main(which: str, device_name: str | None = None, prompt_tokens: str | None = None) -> None:
    """Generate and print."""
    transformers.logging.set_verbosity_error()
    device = torch.device(device_name or ("cuda" if torch.cuda.is_available() else "cpu"))
    memory = DeviceMemory(device) if device.type == "cuda" else HostMemory()
    model, length = build(device)
    length = int(prompt_tokens or length)
    prompt = torch.randint(1, 2000, (1, length), generator=torch.Generator().manual_seed(1)).to(device)
    # Once over a few tokens first: what libraries set up at first use belongs to neither side.
    generate(model, prompt[:, :8], make_cache(which, model), 4)
    trim()
    model_bytes = memory.current()
    clock = Clock(memory)
    start = time.perf_counter()
    tokens = generate(model, prompt, make_cache(which, model), 96, streamer=clock)
    report = {
        "tokens": tokens[0, length:].tolist(),
        "prompt_tokens": length,
        "first_token_s": clock.times[0] - start,
        "token_ms": (clock.times[-1] - clock.times[0]) / (len(clock.times) - 1) * 1000,
        "peak_bytes": max(clock.held),
        # The last token is not in the cache yet when it arrives.
        "curve": [[length + 1 + i, held] for i, held in enumerate(clock.held)],
        "model_bytes": model_bytes,
        "memory": memory.name,
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads",
        "model": f"{sum(weight.numel() for weight in model.parameters()) / 1e6:.0f}M parameters, float32",
    }
    print(json.dumps(report))


def make_cache(which: str, model: Any) -> Any:
    if which == "dynamic":
        return transformers.DynamicCache(config=model.config)
    from vattn.transformers import VattnCache

    return VattnCache(model.config, max_seq_len=MAX_SEQ_LEN)


def generate(model: Any, prompt: torch.Tensor, cache: Any, new_tokens: int, **options: Any) -> torch.Tensor:
    torch.manual_seed(2)
    tokens: torch.Tensor = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        **cache_argument(cache),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        # Sampled, not greedy: random weights would soon repeat two tokens, and a comparison of those shows little.
        do_sample=True,
        **options,
    )
    return tokens


if __name__ == "__main__":
    main(*sys.argv[1:])

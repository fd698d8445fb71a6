"""examples/server: every request gets the tokens that it would have alone, whoever runs beside it."""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "server"
PAGE = 4096  # 16 tokens of both models' K in a layer: small, so that short requests cross pages
VOCABULARY = 97


@pytest.fixture(scope="module")
def server_module() -> Iterator[Any]:
    sys.path.insert(0, str(EXAMPLE))
    try:
        import server

        yield server
    finally:
        sys.path.remove(str(EXAMPLE))
        for name in ("server", "llama"):
            sys.modules.pop(name, None)


def make_llama(layers: int, seed: int) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=512,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def llamas() -> dict[str, Any]:
    return {"large": make_llama(3, 1), "small": make_llama(1, 2)}


def alone(llama: Any, prompt: list[int], new: int) -> list[int]:
    """What `generate` makes of it by itself, greedily."""
    with torch.inference_mode():
        out = llama.generate(torch.tensor([prompt]), max_new_tokens=new, do_sample=False, pad_token_id=0)
    return out[0, len(prompt) :].tolist()


def prompts(count: int, seed: int) -> list[list[int]]:
    chance = random.Random(seed)
    return [[chance.randrange(1, VOCABULARY) for _ in range(chance.randint(1, 40))] for _ in range(count)]


def test_many_requests_of_two_models_get_the_tokens_they_would_have_alone(server_module: Any, llamas: Any) -> None:
    server = server_module.Server(llamas, "16MiB", max_batch_size=4, max_seq_len=128, page_size=PAGE)
    requests = [
        server.submit("large" if number % 2 else "small", prompt, 5 + number)
        for number, prompt in enumerate(prompts(10, 3))
    ]
    server.run()
    for request in requests:
        assert request.state == "finished"
        wanted = alone(llamas[request.model], request.tokens[: request.prompt_len], request.max_new_tokens)
        assert request.new_tokens == wanted
    assert all(len(queue.cache) == 0 for queue in server.queues.values())
    server.close()


def test_a_request_that_is_preempted_goes_on_where_it_was(server_module: Any, llamas: Any) -> None:
    # A group is 2 pages a layer: 6 for the large model, 2 for the small one. 40 pages hold few of the requests at once.
    server = server_module.Server(llamas, 40 * PAGE, max_batch_size=6, max_seq_len=128, page_size=PAGE)
    requests = [
        server.submit("small" if number % 3 == 0 else "large", prompt[:6], 40)
        for number, prompt in enumerate(prompts(6, 4))
    ]
    server.run()
    assert [request.state for request in requests] == ["finished"] * 6
    assert sum(request.preemptions for request in requests) > 0, "the budget was to be too small for all"
    assert requests[0].preemptions == 0, "who came first stays"
    for request in requests:
        assert request.new_tokens == alone(llamas[request.model], request.tokens[: request.prompt_len], 40)
    assert server.pool.stats().available_bytes == server.pool.memory_limit
    server.close()


def test_a_request_larger_than_the_budget_fails_and_the_others_go_on(server_module: Any, llamas: Any) -> None:
    server = server_module.Server(llamas, 20 * PAGE, max_batch_size=4, max_seq_len=256, page_size=PAGE)
    prompt_too_long = server.submit("large", [1] * 200, 5)
    grows_too_long = server.submit("large", [1, 2, 3], 200)
    fine = server.submit("small", [5, 6], 30)
    server.run()
    for request in (prompt_too_long, grows_too_long):
        assert request.state == "failed"
        assert not request.error.waiting_can_help
    assert grows_too_long.new_tokens == alone(llamas["large"], [1, 2, 3], len(grows_too_long.new_tokens))
    assert fine.new_tokens == alone(llamas["small"], [5, 6], 30)
    server.close()


def test_a_cancelled_request_leaves_and_the_others_do_not_notice(server_module: Any, llamas: Any) -> None:
    server = server_module.Server(llamas, "16MiB", max_batch_size=2, max_seq_len=128, page_size=PAGE)
    running, staying, waiting, later = (server.submit("large", [number, 7], 12) for number in range(1, 5))
    for _ in range(4):
        server.step()
    server.cancel(running)
    server.cancel(waiting)
    server.run()
    assert (running.state, waiting.state) == ("cancelled", "cancelled")
    assert running.new_tokens == alone(llamas["large"], [1, 7], 12)[: len(running.new_tokens)]
    assert (0 < len(running.new_tokens) < 12, waiting.new_tokens) == (True, [])
    for request in (staying, later):
        assert request.new_tokens == alone(llamas["large"], request.tokens[:2], 12)
    server.cancel(later)
    assert later.state == "finished"
    server.close()


def test_requests_come_while_others_run(server_module: Any, llamas: Any) -> None:
    server = server_module.Server(llamas, "16MiB", max_batch_size=3, max_seq_len=128, page_size=PAGE)
    requests, more = [], prompts(6, 9)
    while server.step() or more:
        if more:
            requests.append(server.submit(("large", "small")[len(more) % 2], more.pop(), 9))
    assert all(
        request.new_tokens == alone(llamas[request.model], request.tokens[: request.prompt_len], 9)
        for request in requests
    )
    with pytest.raises(ValueError, match="128"):
        server.submit("large", [1] * 100, 29)
    server.close()


def test_the_readme_runs(server_module: Any, capsys: pytest.CaptureFixture[str]) -> None:
    text = (EXAMPLE / "README.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(program, str(EXAMPLE / "README.md"), "exec"), {"__name__": "readme"})
    assert [len(tokens) for tokens in eval(capsys.readouterr().out)] == [20, 20, 20]

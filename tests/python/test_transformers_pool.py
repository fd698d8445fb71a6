"""VattnCache.pool: many conversations of one model on one KVCache."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from transformers.cache_utils import DynamicLayer

import vattn
from hf_models import MODELS, VattnCache, generate, model_of, prompt

HEADS, DIM = 2, 8  # of the Llama in hf_models
TOKEN_BYTES = 3 * 2 * HEADS * DIM * 4  # layers, keys and values, heads, dim, float32


def states(rows=1, tokens=1, heads=HEADS, dim=DIM):
    return torch.randn(rows, tokens, heads, dim).transpose(1, 2)


def fill(cache, rows, tokens, heads=(HEADS,) * 3):
    """Random tokens for each layer of `cache`: what each layer was given."""
    given = [(states(rows, tokens, count), states(rows, tokens, count)) for count in heads]
    for layer, (keys, values) in enumerate(given):
        cache.update(keys, values, layer)
    return given


def holds(cache, given):
    return all(
        torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
        for layer, (keys, values) in zip(cache.layers, given, strict=True)
    )


@pytest.fixture
def pool():
    with VattnCache.pool(model_of("llama").config, max_seq_len=256) as made:
        yield made


def pool_of(rows, **options):
    return VattnCache.pool(model_of("llama").config, max_seq_len=256, max_batch_size=rows, **options)


# ---------------------------------------------------------------- contents


@pytest.mark.parametrize("name", MODELS)
def test_conversations_that_take_turns_say_what_they_say_alone(name):
    model = model_of(name)
    prompts = [prompt(length=length, seed=length) for length in (3, 17, 9)]
    with VattnCache.pool(model.config, max_seq_len=256) as pool:
        conversations = [pool.new() for _ in prompts]
        for _ in range(2):
            for ids, conversation in zip(prompts, conversations, strict=True):
                assert torch.equal(generate(model, ids, conversation), generate(model, ids))
            for conversation in conversations:
                conversation.reset()


def test_one_kv_cache_is_behind_all_conversations(pool):
    held = [(conversation, fill(conversation, 1, 5)) for conversation in [pool.new() for _ in range(50)]]
    assert len(pool.kv_caches) == 1
    assert {conversation.kv_caches for conversation, _ in held} == {pool.kv_caches}
    assert pool.stats().active_slots == len(pool) == 50
    assert pool.stats().used_bytes == 50 * 5 * TOKEN_BYTES
    assert all(holds(conversation, given) for conversation, given in held)


@pytest.mark.parametrize("seed", range(10))
def test_random_programs_over_many_conversations_leave_what_dynamic_layers_leave(seed):
    chance = random.Random(seed)
    torch.manual_seed(seed)
    with pool_of(24) as pool:
        live = []
        for _ in range(150):
            action = chance.choice(["new", "drop", "close", "fork", "reset", "crop", "select", *["update"] * 8])
            if action == "new" and len(live) < 6:
                live.append((pool.new(), [DynamicLayer() for _ in range(3)]))
            if not live:
                continue
            place = chance.randrange(len(live))
            cache, plain = live[place]
            length = plain[0].get_seq_length()
            if action in ("drop", "close"):
                if action == "close":
                    cache.close()
                del live[place], cache
            elif action == "fork" and len(live) < 6:
                live.append((copy.deepcopy(cache), copy.deepcopy(plain)))
            elif action == "reset":
                cache.reset()
                plain[:] = [DynamicLayer() for _ in range(3)]
            elif action == "crop" and length > 1:
                count = chance.randint(1, length - 1)
                for each in (cache, *plain):
                    each.crop(-count)
            elif action == "select" and length:
                rows = plain[0].keys.shape[0]
                kept = torch.tensor([chance.randrange(rows) for _ in range(chance.randint(1, 3))])
                for each in (cache, *plain):
                    each.batch_select_indices(kept)
            elif action == "update" and length < 200:
                rows = plain[0].keys.shape[0] if length else chance.randint(1, 3)
                tokens = chance.choice([1, 1, 2, 30])
                for layer in range(3):
                    keys, values = states(rows, tokens), states(rows, tokens)
                    got = cache.update(keys, values, layer)
                    expected = plain[layer].update(keys, values)
                    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
            for other, layers in live:
                for layer, expected in zip(other.layers, layers, strict=True):
                    assert layer.get_seq_length() == expected.get_seq_length()
                    if expected.get_seq_length():
                        assert torch.equal(layer.keys, expected.keys)
                        assert torch.equal(layer.values, expected.values)


def test_a_copy_takes_slots_of_the_same_pool_and_memory_of_its_own(pool):
    conversation = pool.new()
    given = fill(conversation, 2, 5)
    twin = copy.deepcopy(conversation)
    assert twin.kv_caches == conversation.kv_caches
    assert pool.stats().active_slots == 4
    twin.layers[1].keys.zero_()
    fill(twin, 2, 3)
    assert holds(conversation, given)
    del conversation
    assert pool.stats().active_slots == 2
    assert torch.equal(twin.layers[2].keys[:, :, :5], given[2][0])


def test_layers_of_different_shapes_share_a_kv_cache_a_shape(pool):
    held = []
    for _ in range(4):
        conversation = pool.new()
        held.append((conversation, fill(conversation, 2, 5, heads=(2, 3, 2))))
    assert all(holds(conversation, given) for conversation, given in held)
    # The first did not know yet that its first layer and its last are alike.
    assert sorted(cache.num_layers for cache in pool.kv_caches) == [1, 1, 2]
    del held[0], conversation
    assert [(cache.num_layers, cache.stats().active_slots) for cache in pool.kv_caches] == [(1, 6), (2, 6)]
    twin = copy.deepcopy(held[0][0])
    assert holds(twin, held[0][1])


def test_another_dtype_has_a_kv_cache_of_its_own(pool):
    first, second = pool.new(), pool.new()
    given = fill(first, 1, 5)
    for layer, (keys, values) in enumerate(given):
        second.update(keys.bfloat16(), values.bfloat16(), layer)
    assert len(pool.kv_caches) == 2
    assert holds(first, given)
    assert second.layers[2].keys.dtype == torch.bfloat16


# ---------------------------------------------------------------- memory that comes and goes


def test_dropped_closed_and_reset_conversations_give_their_slots_back(pool):
    dropped, closed, reset, kept = (pool.new() for _ in range(4))
    for conversation in (dropped, closed, reset, kept):
        fill(conversation, 1, 5)
    assert pool.stats().active_slots == 4
    del dropped, conversation
    closed.close()
    reset.reset()
    assert pool.stats().active_slots == 1
    assert len(pool) == 2
    with pytest.raises(vattn.ClosedError):
        fill(closed, 1, 1)
    given = fill(reset, 1, 7)
    assert holds(reset, given)


def test_a_conversation_in_a_reference_cycle_is_given_back_by_the_collector(pool):
    conversation = pool.new()
    fill(conversation, 1, 5)
    conversation.itself = conversation
    del conversation
    gc.collect()
    assert pool.stats().active_slots == len(pool) == 0


def test_the_next_conversation_reuses_the_memory_of_a_dropped_one(pool):
    conversation = pool.new()
    fill(conversation, 1, 100)
    made = pool.stats().pages_created
    del conversation
    for _ in range(20):
        conversation = pool.new()
        given = fill(conversation, 1, 100)
        assert holds(conversation, given)
        del conversation
    assert pool.stats().pages_created == made


def test_rows_that_a_conversation_no_longer_holds_go_back(pool):
    conversation = pool.new()
    given = fill(conversation, 1, 5)
    conversation.batch_repeat_interleave(4)
    assert pool.stats().active_slots == 4
    conversation.batch_select_indices(torch.tensor([3]))
    assert pool.stats().active_slots == 1
    assert holds(conversation, given)


def test_with_scrub_no_token_of_another_conversation_lies_behind_a_tensor():
    with pool_of(4, scrub=True) as pool:
        first = pool.new()
        fill(first, 1, 200)
        del first
        second = pool.new()
        with torch.no_grad():
            given = fill(second, 1, 3)
        for layer, (keys, _) in zip(second.layers, given, strict=True):
            everything = torch.tensor([], dtype=keys.dtype).set_(layer.keys.untyped_storage())
            assert everything.count_nonzero() == keys.count_nonzero()


def test_the_memory_limit_is_the_pools():
    page = 65536
    with pool_of(8, memory_limit=3 * 2 * 2 * page, page_size=page) as pool:  # two pages in every tensor
        first, second, third = (pool.new() for _ in range(3))
        given = fill(first, 1, 5)
        fill(second, 1, 5)
        with pytest.raises(vattn.OutOfMemoryError):
            fill(third, 1, 5)
        assert (holds(first, given), third.get_seq_length()) == (True, 0)
        del second
        fill(third, 1, 5)


# ---------------------------------------------------------------- a full pool


def test_a_full_pool_is_an_error_that_names_the_parameter_and_changes_nothing():
    with pool_of(2) as pool:
        first, second = pool.new(), pool.new()
        given = fill(first, 1, 5)
        for attempt in (pool.new, lambda: copy.deepcopy(first)):
            with pytest.raises(vattn.NoFreeSlotError, match=r"max_batch_size=2: .*larger max_batch_size"):
                attempt()
        with pytest.raises(vattn.NoFreeSlotError, match=r"max_batch_size=2: .*kept for conversations without one"):
            first.batch_repeat_interleave(2)
        with pytest.raises(ValueError, match=r"max_batch_size=2, but the batch has 3 rows"):
            fill(second, 3, 1)
        assert (len(pool), pool.stats().active_slots) == (2, 1)
        assert holds(first, given)
        fill(second, 1, 5)
        del second
        assert holds(copy.deepcopy(first), given)


def test_a_conversation_can_always_have_one_row():
    with pool_of(8) as pool:
        waiting = [pool.new() for _ in range(5)]
        greedy = pool.new()
        fill(greedy, 3, 1)
        with pytest.raises(vattn.NoFreeSlotError):
            pool.new()
        for conversation in waiting:
            fill(conversation, 1, 1)


def test_rows_of_a_batch_must_be_neighbours_and_the_error_says_so():
    with pool_of(5) as pool:
        held = [pool.new() for _ in range(5)]
        for conversation in held:
            fill(conversation, 1, 1)
        del conversation, held[3], held[1]
        with pytest.raises(vattn.NoFreeSlotError, match=r"2 rows must be neighbours, and none of the 2 free"):
            fill(pool.new(), 2, 1)


def test_the_default_has_room_for_hundreds():
    with VattnCache.pool(model_of("llama").config) as pool:
        held = [pool.new() for _ in range(400)]
        for conversation in held:
            fill(conversation, 1, 2)
        assert pool.stats().active_slots == 400
        assert pool.max_batch_size >= 800, "spare slots, for copies"
        assert pool.max_seq_len == 512
        assert pool.kv_caches[0].layout == "NHD"
        assert pool.kv_caches[0].lookahead_tokens == pool.kv_caches[0].warm_tokens == 0


def test_the_default_has_fewer_rows_where_they_are_very_long():
    with VattnCache.pool(model_of("llama").config, max_seq_len=10**9) as pool:  # 357 GiB a row
        given = fill(conversation := pool.new(), 1, 2)
        assert 64 <= pool.max_batch_size < 128
        assert holds(conversation, given)
    with (
        VattnCache.pool(model_of("llama").config, max_seq_len=10**9, max_batch_size=1024) as pool,
        pytest.raises(OverflowError, match=r"max_batch_size .* max_seq_len"),
    ):
        fill(pool.new(), 1, 2)


def test_options_are_those_of_a_kv_cache():
    with pool_of(4, layout="HND", page_size="128KiB") as pool:
        fill(pool.new(), 1, 1)
        assert (pool.kv_caches[0].layout, pool.kv_caches[0].page_size) == ("HND", 128 << 10)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"max_batch_size": 0}, ValueError, "max_batch_size=0"),
        ({"max_seq_len": "8"}, TypeError, "max_seq_len.*'8'"),
        ({"page_sise": 1}, TypeError, "page_sise=1.*page_size"),
        ({"max_cache_len": 8}, TypeError, "max_cache_len=8.*max_seq_len"),
        ({"offloading": True}, TypeError, "offloading"),
    ],
)
def test_bad_arguments_are_named_when_the_pool_is_made(options, error, words):
    with pytest.raises(error, match=words):
        VattnCache.pool(model_of("llama").config, **options)


# ---------------------------------------------------------------- close, repr, copies of the pool


def test_a_closed_pool_ends_its_conversations():
    pool = pool_of(4)
    conversation, empty = pool.new(), pool.new()
    fill(conversation, 1, 5)
    kept = conversation.layers[0].keys
    before = kept.clone()
    pool.close()
    pool.close()
    assert pool.is_closed
    assert conversation.is_closed
    assert torch.equal(kept, before)
    assert pool.stats().mapped_bytes == 0
    for attempt in (pool.new, lambda: fill(conversation, 1, 1), lambda: fill(empty, 1, 1)):
        with pytest.raises(vattn.ClosedError):
            attempt()
    conversation.reset()
    conversation.close()


def test_repr_says_how_full_it_is(pool):
    conversation = pool.new()
    pool.empty = pool.new()
    fill(conversation, 2, 5)
    assert repr(pool) == "<VattnCachePool 2 conversations, 2 of 1024 rows, 3.75 KiB of tokens, 768 KiB mapped>"
    assert repr(conversation) == "<VattnCache 5 tokens, 2 rows, 3.75 KiB, 3 of 3 layers in vattn memory>"
    pool.close()
    assert repr(pool) == "<VattnCachePool closed>"
    assert "closed" in repr(conversation)


def test_a_pool_is_not_copied_or_pickled(pool):
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"VattnCachePool"):
            attempt(pool)


def test_a_subclass_has_pools_of_its_own():
    class Mine(VattnCache):
        pass

    with Mine.pool(model_of("llama").config) as pool:
        assert type(pool.new()) is Mine


# ---------------------------------------------------------------- threads and processes


def test_conversations_of_one_pool_run_in_several_threads():
    model = model_of("llama")
    prompts = [prompt(length=5 + number, seed=number) for number in range(4)]
    expected = [generate(model, ids) for ids in prompts]
    with VattnCache.pool(model.config, max_seq_len=256, max_batch_size=8) as pool:

        def talk(number):
            said = []
            for turn in range(6):
                conversation = pool.new()
                said.append(greedy(model, prompts[number], conversation))
                if turn % 2:
                    conversation.close()
                else:
                    conversation.reset()
                    said.append(greedy(model, prompts[number], conversation))
                del conversation
            return said

        with ThreadPoolExecutor(4) as threads:
            for said, right in zip(threads.map(talk, range(4)), expected, strict=True):
                assert all(torch.equal(one, right) for one in said)
        assert pool.stats().active_slots == len(pool) == 0


def greedy(model, ids, cache):
    # Not `generate` of hf_models: that seeds the process's random numbers.
    from hf_models import NEW, cache_argument

    return model.generate(ids, max_new_tokens=NEW, do_sample=False, **cache_argument(cache))


def test_dropping_a_conversation_while_the_lock_is_held_does_not_wait(pool):
    conversation = pool.new()
    fill(conversation, 1, 5)
    with pool._shared.held():  # as where the collector runs in the middle of a call of the pool
        conversation = None
        assert pool._shared.members == 1
    assert pool.stats().active_slots == 0
    # And in another thread.
    conversation = [pool.new()]
    fill(conversation[0], 1, 5)
    with pool._shared.held():
        thread = threading.Thread(target=conversation.clear)
        thread.start()
        thread.join(timeout=10)
        assert not thread.is_alive()
    assert pool.stats().active_slots == len(pool) == 0


def test_a_forked_child_is_refused_and_harms_nobody(pool):
    conversation = pool.new()
    given = fill(conversation, 1, 5)
    child = os.fork()
    if child == 0:
        try:
            for attempt in (pool.new, pool.stats, lambda: copy.deepcopy(conversation)):
                try:
                    attempt()
                    os._exit(1)
                except vattn.ClosedError:
                    pass
            del conversation
            gc.collect()
            os._exit(0)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert holds(conversation, given)
    assert pool.stats().active_slots == 1

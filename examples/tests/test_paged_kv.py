from __future__ import annotations

import pytest
import torch
from llama_tp import LlamaTP, generate_greedy
from paged_kv import PagedKVCache, kv_heads_of, plan_head_moves

from sagellm.core.protocols import ConfigError, ResourceError, Shard

NEW_TOKENS = 16
LAYERS = 8


@pytest.fixture(scope="module")
def whole():
    return LlamaTP()


def small_cache(**changes):
    options = {"num_layers": 2, "num_blocks": 3, "num_kv_heads": 4, "head_dim": 4}
    return PagedKVCache(**(options | {"tp_size": 2, "rank": 1, "page_tokens": 4} | changes))


def disaggregate(run_ranks, prompt, prefill_tp, decode_tp, sabotage_layer=None):
    """Prefills on one group, moves the KV by heads as layers finish, decodes on another."""
    wire = {}

    def prefill(group):
        model = LlamaTP(comm_backend=group)
        sequence = model.new_cache(8, page_tokens=4).new_sequence()
        moves = plan_head_moves(2, prefill_tp, decode_tp)

        def send(layer):
            for move in moves:
                if move.source_rank == group.rank:
                    parts = [
                        sequence.cache.head_view(layer, block, move.heads).clone()
                        for block in sequence.block_ids
                    ]
                    wire[group.rank, move.target_rank, layer] = move.heads, parts

        return int(model.forward(prompt, sequence, send).argmax())

    first = run_ranks(prefill_tp, prefill)[0]

    def decode(group):
        model = LlamaTP(comm_backend=group)
        cache = model.new_cache(32, page_tokens=4)
        cache.new_sequence(8)  # so that block ids differ from those of the sender
        sequence = cache.new_sequence(len(prompt))
        for (_, target, layer), (heads, parts) in wire.items():
            if target == group.rank and layer != sabotage_layer:
                for block, part in zip(sequence.block_ids, parts, strict=True):
                    cache.head_view(layer, block, heads).copy_(part)
        sequence.mark_filled(len(prompt))
        return [first, *generate_greedy(model, [first], NEW_TOKENS - 1, sequence, stop_ids=())]

    ranks = run_ranks(decode_tp, decode)
    assert all(tokens == ranks[0] for tokens in ranks)
    return ranks[0]


def alone(whole, prompt):
    sequence = whole.new_cache(8).new_sequence()
    return generate_greedy(whole, prompt, NEW_TOKENS, sequence, stop_ids=())


@pytest.mark.parametrize("prefill_tp", [1, 2, 4])
@pytest.mark.parametrize("decode_tp", [1, 2, 4])
def test_decode_from_moved_kv_equals_a_single_process(
    run_ranks, whole, prompts, prefill_tp, decode_tp
):
    for prompt in prompts[:2]:
        found = disaggregate(run_ranks, prompt, prefill_tp, decode_tp)

        assert found == alone(whole, prompt)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_layer_that_did_not_arrive_changes_the_tokens(run_ranks, whole, prompts, layer):
    found = [disaggregate(run_ranks, prompt, 1, 1, layer) for prompt in prompts]

    assert found != [alone(whole, prompt) for prompt in prompts]


@pytest.mark.parametrize("source_tp", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("target_tp", [1, 2, 4, 8, 16])
def test_every_target_gets_each_of_its_heads_once_from_a_rank_that_holds_it(source_tp, target_tp):
    moves = plan_head_moves(4, source_tp, target_tp)

    for target in range(target_tp):
        got = [head for m in moves if m.target_rank == target for head in m.heads]
        assert sorted(got) == list(kv_heads_of(4, target_tp, target))
    for move in moves:
        assert set(move.heads) <= set(kv_heads_of(4, source_tp, move.source_rank))


def test_heads_that_cannot_be_dealt_out_are_refused():
    with pytest.raises(ConfigError, match="tp_size=3 is neither a divisor nor a multiple of the 4"):
        kv_heads_of(4, 3, 0)
    with pytest.raises(ConfigError, match="rank 2 of tp_size=2"):
        kv_heads_of(4, 2, 2)


def test_blocks_and_head_runs_are_contiguous_views():
    cache = small_cache()
    sequence = cache.new_sequence(5)

    block = sequence.blocks(1)[1]
    view = cache.head_view(1, sequence.block_ids[1], range(3, 4))
    view.fill_(7.0)

    assert block.is_contiguous()
    assert all(side.is_contiguous() for side in view)
    assert block[:, 1].eq(7.0).all()
    assert block[:, 0].eq(0.0).all()
    assert block.nbytes == cache.block_bytes


@pytest.mark.parametrize("heads", [range(1, 3), range(3, 5), range(2, 2)])
def test_heads_held_elsewhere_are_refused(heads):
    with pytest.raises(ConfigError, match="are not within"):
        small_cache().head_view(0, 0, heads)


def test_written_tokens_are_read_back_across_pages():
    sequence = small_cache().new_sequence(11)
    k, v = torch.randn(2, 2, 11, 4)

    sequence.write(1, 0, k[:, :3], v[:, :3])
    sequence.write(1, 3, k[:, 3:], v[:, 3:])
    found_k, found_v = sequence.read(1, 10)

    assert torch.equal(found_k, k[:, :10])
    assert torch.equal(found_v, v[:, :10])


def test_a_full_cache_refuses_and_takes_nothing():
    cache = small_cache()
    sequence = cache.new_sequence(5)

    with pytest.raises(ResourceError, match="2 KV blocks of 4 tokens wanted, 1 of 3 free"):
        sequence.reserve(13)

    assert cache.free_blocks == 1
    assert len(sequence.block_ids) == 2


def test_freed_blocks_come_back_empty():
    cache = small_cache()
    first = cache.new_sequence(12)
    for block in first.blocks(0):
        block.fill_(3.0)
    first.free()

    second = cache.new_sequence(12)

    assert cache.free_blocks == 0
    assert not any(block.any() for block in second.blocks(0))


def test_more_tokens_than_reserved_cannot_be_declared():
    with pytest.raises(ConfigError, match="9 tokens do not fit 8 reserved"):
        small_cache().new_sequence(8).mark_filled(9)


@pytest.mark.parametrize(
    "name", ["num_layers", "num_blocks", "num_kv_heads", "head_dim", "page_tokens"]
)
def test_a_cache_of_nothing_is_refused(name):
    with pytest.raises(ConfigError, match=f"{name} is 0"):
        small_cache(**{name: 0})


def test_the_layout_describes_the_tensors_and_the_share_of_the_heads():
    for tp, rank, shard in [
        (1, 0, None),
        (2, 1, Shard("head", 1, 2)),
        (4, 3, Shard("head", 1, 2, 2)),
    ]:
        cache = small_cache(num_kv_heads=2, tp_size=tp, rank=rank)

        group = cache.layout("m").groups[0]

        assert group.shard == shard
        assert group.tensor_names == tuple(cache.tensors())
        assert all((3, *group.block_shape) == tuple(t.shape) for t in cache.tensors().values())
        assert (group.dtype, group.page_tokens) == ("float32", 4)
        assert len(group.axes) == 5

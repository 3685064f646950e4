from __future__ import annotations

import pytest
import torch
from llama_tp import TINY_LLAMA, LlamaTP, generate_greedy
from row_reduce import reduce_in_chunks
from safetensors.torch import load_file, save_file

from sagellm.core.protocols import ConfigError

NEW_TOKENS = 32


@pytest.fixture(scope="module")
def whole():
    return LlamaTP(TINY_LLAMA)


@pytest.fixture(scope="module")
def hf():
    transformers = pytest.importorskip("transformers", reason="the oracle of these tests")

    def load(folder):
        return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    return load


def logits(model, tokens, page_tokens=16):
    sequence = model.new_cache(64, page_tokens).new_sequence()
    return model.forward(tokens, sequence, all_positions=True)


def greedy(model, tokens, **options):
    return generate_greedy(model, tokens, NEW_TOKENS, model.new_cache(8).new_sequence(), **options)


def hf_logits(oracle, tokens):
    with torch.no_grad():
        return oracle(torch.tensor([tokens])).logits[0]


def test_logits_and_greedy_tokens_equal_transformers(whole, hf, prompts):
    oracle = hf(TINY_LLAMA)

    for tokens in prompts:
        torch.testing.assert_close(
            logits(whole, tokens), hf_logits(oracle, tokens), atol=1e-4, rtol=0
        )
        made = oracle.generate(torch.tensor([tokens]), max_new_tokens=NEW_TOKENS, do_sample=False)
        assert greedy(whole, tokens) == made[0, len(tokens) :].tolist()


def test_untied_grouped_sharded_checkpoint_equals_transformers(make_checkpoint, hf):
    folder = make_checkpoint(files=3)
    tokens = torch.randint(0, 61, (40,), generator=torch.Generator().manual_seed(1)).tolist()

    ours = logits(LlamaTP(folder), tokens)

    torch.testing.assert_close(ours, hf_logits(hf(folder), tokens), atol=1e-4, rtol=0)


@pytest.mark.parametrize("tp", [2, 4])
def test_split_model_equals_whole(whole, run_ranks, prompts, tp):
    def rank_main(group):
        model = LlamaTP(TINY_LLAMA, tp, group.rank, group)
        return logits(model, prompts[2]), greedy(model, prompts[2])

    ranks = run_ranks(tp, rank_main)

    torch.testing.assert_close(ranks[0][0], logits(whole, prompts[2]), atol=1e-4, rtol=0)
    assert all(torch.equal(ranks[0][0], other) for other, _ in ranks)
    assert [tokens for _, tokens in ranks] == [greedy(whole, prompts[2])] * tp


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_split_of_an_untied_model_with_an_odd_vocabulary_equals_whole(
    make_checkpoint, run_ranks, tp
):
    folder = make_checkpoint(files=2)
    tokens = list(range(0, 60, 3))

    ranks = run_ranks(tp, lambda group: logits(LlamaTP(folder, comm_backend=group), tokens))

    for found in ranks:
        torch.testing.assert_close(found, logits(LlamaTP(folder), tokens), atol=1e-4, rtol=0)


def test_a_forward_costs_two_all_reduces_a_layer_and_one_for_the_embedding(run_ranks):
    def rank_main(group):
        logits(LlamaTP(comm_backend=group), [1, 2, 3])
        return group.calls

    for calls in run_ranks(2, rank_main):
        assert calls == [("all_reduce", (3, 192))] * 17 + [("all_gather", (3, 768))]


@pytest.mark.parametrize("chunks", [2, 3])
def test_chunked_reduction_equals_plain(run_ranks, prompts, whole, chunks):
    tokens = [token for prompt in prompts for token in prompt]

    def rank_main(group):
        reduce = reduce_in_chunks(group, chunks, min_rows=4)
        found = logits(LlamaTP(comm_backend=group, reduce=reduce), tokens)
        return found, len(group.calls)

    for found, calls in run_ranks(2, rank_main):
        torch.testing.assert_close(found, logits(whole, tokens), atol=1e-4, rtol=0)
        assert calls == 17 * chunks + 1


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_rank_holds_and_reads_no_more_than_its_share(run_ranks, tp):
    def rank_main(group):
        model = LlamaTP(comm_backend=group)
        return model.parameter_bytes(), model.bytes_read

    for held, bytes_read in run_ranks(tp, rank_main):
        assert held.total == 3_837_120 * 4
        assert held.bound == held.total // tp + (17 * 192 + 1536 * 192) * 4
        assert held.local <= held.bound
        assert bytes_read == held.local // 2  # the file stores bfloat16


@pytest.mark.parametrize("tp", [2, 4])
def test_ranks_together_hold_every_parameter_once_beside_norms_and_shared_heads(run_ranks, tp):
    ranks = run_ranks(tp, lambda group: LlamaTP(comm_backend=group).parameter_bytes())

    norms = 17 * 192 * 4
    kv_once = 8 * 2 * 128 * 192 * 4
    copies = 1 if tp == 2 else 2
    expected = ranks[0].total + (tp - 1) * norms + (copies - 1) * kv_once
    assert sum(held.local for held in ranks) == expected


def test_the_fingerprint_is_the_same_on_every_rank_and_differs_between_models(
    run_ranks, make_checkpoint, whole
):
    ranks = run_ranks(2, lambda group: LlamaTP(comm_backend=group).fingerprint)

    assert set(ranks) == {whole.fingerprint}
    assert LlamaTP(make_checkpoint()).fingerprint != whole.fingerprint


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_the_fingerprint_changes_with_any_tensor(make_checkpoint, name):
    folder = make_checkpoint()
    before = LlamaTP(folder).fingerprint
    tensors = load_file(folder / "model.safetensors")
    tensors[name] += 1

    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    assert LlamaTP(folder).fingerprint != before


def test_the_fingerprint_is_the_same_in_any_dtype_and_number_of_files(make_checkpoint, tmp_path):
    one = LlamaTP(make_checkpoint()).fingerprint
    double = LlamaTP(tmp_path, dtype=torch.float64).fingerprint
    (tmp_path / "model.safetensors").unlink()

    several = LlamaTP(make_checkpoint(files=3)).fingerprint

    assert one == double == several


def test_prompt_in_parts_equals_prompt_at_once(whole, prompts):
    tokens = prompts[2]
    sequence = whole.new_cache(8).new_sequence()

    whole.forward(tokens[:3], sequence)
    whole.forward(tokens[3:4], sequence)
    rest = whole.forward(tokens[4:], sequence, all_positions=True)

    torch.testing.assert_close(rest, logits(whole, tokens)[4:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("page_tokens", [1, 5])
def test_small_pages_equal_one_page(whole, prompts, page_tokens):
    found = logits(whole, prompts[2], page_tokens)

    assert torch.equal(found, logits(whole, prompts[2], page_tokens=64))


def test_layers_are_announced_in_order_with_their_kv_in_place(whole, prompts):
    tokens = prompts[0]
    done = whole.new_cache(4).new_sequence()
    whole.forward(tokens, done)
    sequence = whole.new_cache(4).new_sequence()
    seen = []

    def on_layer_done(layer):
        seen.append(layer)
        for found, expected in zip(sequence.blocks(layer), done.blocks(layer), strict=True):
            assert torch.equal(found, expected)
        assert all(
            not block.any() for later in range(layer + 1, 8) for block in sequence.blocks(later)
        )

    whole.forward(tokens, sequence, on_layer_done)

    assert seen == list(range(8))


def test_generation_stops_after_a_stop_token(whole, prompts):
    free = greedy(whole, prompts[0], stop_ids=())

    assert len(free) == NEW_TOKENS
    assert greedy(whole, prompts[0], stop_ids=[free[5]]) == free[: free.index(free[5]) + 1]


def test_float64_agrees_with_float32(whole, prompts):
    double = logits(LlamaTP(dtype=torch.float64), prompts[0])

    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), logits(whole, prompts[0]), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "one token or more"),
        ([1536], r"1536\.\.1536 are not all in 0\.\.1535"),
        ([-1, 3], r"-1\.\.3"),
        ([5] * 4097, "4097 new tokens exceed the model's 4096 positions"),
    ],
)
def test_bad_tokens_are_refused_before_anything_is_computed(whole, tokens, message):
    sequence = whole.new_cache(1).new_sequence()

    with pytest.raises(ConfigError, match=message):
        whole.forward(tokens, sequence)

    assert sequence.num_tokens == 0
    assert not sequence.block_ids


def test_a_cache_of_another_model_is_refused(whole, make_checkpoint):
    other = LlamaTP(make_checkpoint()).new_cache(1)

    with pytest.raises(ConfigError, match=r"use new_cache\(\)"):
        whole.forward([1], other.new_sequence())

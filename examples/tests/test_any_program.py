"""An unmodified program of transformers on a group of ours gives what one process gives."""

import os
from datetime import timedelta

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from sagellm.core.protocols.testing.rank_pool import RankPool

LAYERS, PROMPT, NEW_TOKENS = 2, [[3, 141, 59, 26, 5, 35, 89, 79]], 6


def write_model(folder):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def logits_and_tokens(model):
    import torch

    ids = torch.tensor(PROMPT)
    with torch.inference_mode():
        logits = model(ids).logits
        tokens = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
    return logits.tolist(), tokens.tolist()


def one_process(rank, size, folder):
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModelForCausalLM

    write_model(folder)
    return logits_and_tokens(AutoModelForCausalLM.from_pretrained(folder))


def tensor_parallel(rank, size, store, folder):
    os.environ |= {"HF_HUB_OFFLINE": "1", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    import torch
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM

    from sagellm.comm.collective_ops import register_c10d_backend

    records = []
    register_c10d_backend(record=records)
    dist.init_process_group(
        "sagellm",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),
    )
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
    records.clear()
    with torch.inference_mode():
        model(torch.tensor(PROMPT))
    counts = {"all_reduce": 0, "gather": 0}
    for record in records:
        counts["gather" if "gather" in record.op else record.op] += 1
    found = *logits_and_tokens(model), counts
    dist.barrier()
    dist.destroy_process_group()
    return found


@pytest.mark.timeout(300)
@pytest.mark.parametrize("size", [2, 4])
def test_tp_plan_auto_runs_unchanged(tmp_path, size, monkeypatch):
    import torch

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with RankPool(size) as pool:
        folder = str(tmp_path / "model")
        job = pool.submit(one_process, folder, ranks=1)
        ((logits, tokens),) = job.wait(120)
        found = pool.run(tensor_parallel, pool.store_path(), folder, timeout_s=120)

    for got, got_tokens, counts in found:
        difference = (torch.tensor(got) - torch.tensor(logits)).abs().max().item()
        assert difference <= 1e-5
        assert got_tokens == tokens
        assert counts == {"all_reduce": 2 * LAYERS + 1, "gather": 1}

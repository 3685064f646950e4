from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
from llama_tp import TINY_LLAMA
from safetensors.torch import save_file
from tokenizers import Tokenizer

DEADLINE_S = 30.0
PROMPTS = (
    "The compiler checks that",
    "import os\n",
    "class Node:\n    def __init__(self",
    "    def read(self, size=-1):\n        ",
    "A function that returns a value of type",
)


class ThreadGroup:
    """One rank of a group whose ranks are threads; sums in rank order, so all get equal bits."""

    def __init__(self, shared, rank):
        self.shared, self.rank, self.size = shared, rank, shared.size
        self.calls = []

    def _exchange(self, x):
        self.shared.slots[self.rank] = x.clone()
        self.shared.barrier.wait(DEADLINE_S)
        parts = list(self.shared.slots)
        self.shared.barrier.wait(DEADLINE_S)
        return parts

    def all_reduce(self, x, op="sum", *, async_op=False):
        assert op == "sum"
        self.calls.append(("all_reduce", tuple(x.shape)))
        work = DeferredSum(self._exchange(x), x)
        return work if async_op else work.wait()

    def all_gather(self, x, *, async_op=False):
        assert not async_op
        self.calls.append(("all_gather", tuple(x.shape)))
        return self._exchange(x)


class DeferredSum:
    """Writes the sum only when waited for: reading too early shows."""

    def __init__(self, parts, x):
        self.parts, self.x = parts, x

    def wait(self, timeout_s=None):
        self.x.copy_(sum(self.parts[1:], start=self.parts[0]))
        return self.x


class SharedState:
    def __init__(self, size):
        self.size = size
        self.slots = [None] * size
        self.barrier = threading.Barrier(size)


@pytest.fixture
def run_ranks():
    """`run_ranks(size, fn)` gives `[fn(group) for each rank]`, each in a thread of its own."""

    def run(size, fn):
        shared = SharedState(size)
        results, errors = [None] * size, []

        def rank_main(rank):
            try:
                results[rank] = fn(ThreadGroup(shared, rank))
            except Exception as e:
                errors.append(e)
                shared.barrier.abort()

        threads = [threading.Thread(target=rank_main, args=(r,), daemon=True) for r in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE_S)
            assert not thread.is_alive(), "a rank did not come back"
        for error in errors:
            if not isinstance(error, threading.BrokenBarrierError):
                raise error
        assert not errors, errors
        return results

    return run


@pytest.fixture(scope="session")
def prompts():
    """Token ids of a few prompts, each with the token that begins a document."""
    tokenizer = Tokenizer.from_file(str(TINY_LLAMA / "tokenizer.json"))
    return [[0, *tokenizer.encode(text).ids] for text in PROMPTS]


@pytest.fixture
def make_checkpoint(tmp_path: Path):
    """`make_checkpoint(files=1, **config)` writes random weights and returns the folder."""

    def make(files=1, **changes):
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "attention_bias": False,
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 10,
            "vocab_size": 61,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-6,
            "rope_theta": 5000.0,
            "rope_scaling": None,
            "tie_word_embeddings": False,
            "eos_token_id": [1, 2],
            "bos_token_id": 1,
        } | changes
        (tmp_path / "config.json").write_text(json.dumps(config))
        tensors = random_tensors(config)
        if files == 1:
            save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
            return tmp_path
        weight_map = {}
        for i in range(files):
            name = f"model-{i + 1:05d}-of-{files:05d}.safetensors"
            part = {k: tensors[k] for k in sorted(tensors)[i::files]}
            save_file(part, tmp_path / name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, name)
        total = sum(t.nbytes for t in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        return tmp_path

    return make


def random_tensors(c):
    g = torch.Generator().manual_seed(7)
    hidden, ffn, e = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    q, kv = c["num_attention_heads"] * e, c["num_key_value_heads"] * e
    shapes = {"model.embed_tokens": (c["vocab_size"], hidden), "model.norm": (hidden,)}
    if not c["tie_word_embeddings"]:
        shapes["lm_head"] = (c["vocab_size"], hidden)
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.input_layernorm": (hidden,),
            f"{layer}.post_attention_layernorm": (hidden,),
            f"{layer}.self_attn.q_proj": (q, hidden),
            f"{layer}.self_attn.k_proj": (kv, hidden),
            f"{layer}.self_attn.v_proj": (kv, hidden),
            f"{layer}.self_attn.o_proj": (hidden, q),
            f"{layer}.mlp.gate_proj": (ffn, hidden),
            f"{layer}.mlp.up_proj": (ffn, hidden),
            f"{layer}.mlp.down_proj": (hidden, ffn),
        }
    return {
        f"{name}.weight": torch.randn(shape, generator=g) * 0.3 + (1.0 if len(shape) == 1 else 0.0)
        for name, shape in shapes.items()
    }

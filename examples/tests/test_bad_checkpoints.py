from __future__ import annotations

import json

import pytest
import torch
from llama_tp import LlamaTP
from safetensors.torch import load_file, save_file

from sagellm.core.protocols import ConfigError, IntegrityError


class FixedGroup:
    """A group that only says where it stands; nothing may be sent through it."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size


@pytest.mark.parametrize(
    ("tp", "message"),
    [
        (3, "tp_size=3 does not divide the 4 query heads; use one of 1, 2, 4"),
        (8, "tp_size=8 does not divide the 4 query heads; use one of 1, 2, 4"),
    ],
)
def test_a_tp_that_does_not_divide_the_query_heads_is_refused(tp, message):
    with pytest.raises(ConfigError, match=message):
        LlamaTP(tp_size=tp, rank=0, comm_backend=FixedGroup(0, tp))


def test_a_tp_that_does_not_fit_the_kv_heads_is_refused(make_checkpoint):
    folder = make_checkpoint(num_attention_heads=12, num_key_value_heads=6, intermediate_size=96)

    with pytest.raises(ConfigError, match="tp_size=4 is neither a divisor nor a multiple of the 6"):
        LlamaTP(folder, comm_backend=FixedGroup(0, 4))


def test_a_tp_that_does_not_divide_the_feed_forward_is_refused(make_checkpoint):
    with pytest.raises(ConfigError, match="does not divide intermediate_size 81"):
        LlamaTP(make_checkpoint(intermediate_size=81), comm_backend=FixedGroup(0, 2))


def test_several_ranks_need_a_group():
    with pytest.raises(ConfigError, match=r"tp_size=4 needs a group of 4 ranks.*create_comm_back"):
        LlamaTP(tp_size=4)


def test_a_group_of_another_size_is_refused():
    with pytest.raises(ConfigError, match="tp_size=4, rank=0 but comm_backend is rank 0 of 2"):
        LlamaTP(tp_size=4, comm_backend=FixedGroup(0, 2))


@pytest.mark.parametrize("rank", [-1, 1])
def test_a_rank_outside_the_group_is_refused(rank):
    with pytest.raises(ConfigError, match=f"rank {rank} of tp_size=1"):
        LlamaTP(rank=rank)


def test_an_integer_dtype_is_refused():
    with pytest.raises(ConfigError, match=r"torch\.int32 is none of"):
        LlamaTP(dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["Qwen2ForCausalLM"]}, "architectures is .*Qwen2"),
        ({"architectures": None}, "architectures is None"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type is 'llama3'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn'"),
        ({"rope_parameters": [1]}, r"rope_parameters is \[1\]"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_size": None}, "has no hidden_size"),
        ({"hidden_size": "48"}, "hidden_size is '48'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps is -1e-06"),
        ({"num_key_value_heads": 3}, "8 query heads are no multiple of 3 KV heads"),
        ({"head_dim": 9}, "head_dim 9 is odd"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
    ],
)
def test_a_configuration_we_do_not_compute_is_refused(make_checkpoint, changes, message):
    folder = make_checkpoint()
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))

    with pytest.raises(ConfigError, match=message):
        LlamaTP(folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"architectures": "\xff'])
def test_a_damaged_configuration_is_refused(make_checkpoint, text):
    folder = make_checkpoint()
    (folder / "config.json").write_bytes(text.encode("latin-1"))

    with pytest.raises(ConfigError, match=r"config\.json"):
        LlamaTP(folder)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path, make_checkpoint):
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        LlamaTP(tmp_path / "nowhere")
    folder = make_checkpoint()
    (folder / "model.safetensors").unlink()

    with pytest.raises(
        ConfigError, match=r"neither model\.safetensors nor model\.safetensors\.ind"
    ):
        LlamaTP(folder)


def change_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_a_missing_tensor_is_named_with_its_file(make_checkpoint):
    folder = make_checkpoint()
    change_tensors(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))

    with pytest.raises(
        IntegrityError,
        match=r"'model\.layers\.1\.mlp\.up_proj\.weight' is missing from .*/model\.safetensors",
    ):
        LlamaTP(folder)


def test_an_untied_model_needs_its_lm_head(make_checkpoint):
    folder = make_checkpoint()
    change_tensors(folder, lambda t: t.pop("lm_head.weight"))

    with pytest.raises(IntegrityError, match=r"'lm_head\.weight' is missing"):
        LlamaTP(folder)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(make_checkpoint):
    folder = make_checkpoint()
    change_tensors(folder, lambda t: t.update({"model.norm.weight": torch.ones(47)}))

    with pytest.raises(IntegrityError, match=r"'model\.norm\.weight'.*\(47,\).*\(48,\)"):
        LlamaTP(folder)


def test_a_quantised_tensor_is_refused(make_checkpoint):
    folder = make_checkpoint()
    name = "model.layers.0.self_attn.o_proj.weight"
    change_tensors(folder, lambda t: t.update({name: t[name].to(torch.int8)}))

    with pytest.raises(ConfigError, match=r"o_proj.*stored as I8"):
        LlamaTP(folder)


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.999])
def test_a_truncated_file_is_refused(make_checkpoint, kept):
    folder = make_checkpoint()
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: kept if isinstance(kept, int) else int(len(whole) * kept)])

    with pytest.raises(
        IntegrityError, match=r"model\.safetensors is missing, truncated or damaged"
    ):
        LlamaTP(folder)


def test_an_index_that_names_an_absent_file_is_refused(make_checkpoint):
    folder = make_checkpoint(files=2)
    (folder / "model-00002-of-00002.safetensors").unlink()

    with pytest.raises(IntegrityError, match=r"model-00002-of-00002\.safetensors is missing"):
        LlamaTP(folder)


def test_an_index_without_a_tensor_is_refused(make_checkpoint):
    folder = make_checkpoint(files=2)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["model.norm.weight"]
    path.write_text(json.dumps(index))

    with pytest.raises(
        IntegrityError, match=r"'model\.norm\.weight' is missing from .*index\.json"
    ):
        LlamaTP(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not readable JSON"),
        ("{}", "no weight_map"),
        ('{"weight_map": {"model.norm.weight": "../x.safetensors"}}', "no plain file name"),
        ('{"weight_map": {"model.norm.weight": 3}}', "no plain file name"),
    ],
)
def test_a_damaged_index_is_refused(make_checkpoint, text, message):
    folder = make_checkpoint(files=2)
    (folder / "model.safetensors.index.json").write_text(text)

    with pytest.raises(IntegrityError, match=message):
        LlamaTP(folder)

"""The gate: what codecs do to a model that goes on from the decoded cache, in CI."""

from pathlib import Path

import pytest
import torch

from sagellm.comm.kv_transfer.benchmarks import bench_compression
from sagellm.comm.kv_transfer.benchmarks._peers import PEERS
from sagellm.comm.kv_transfer.compression import Compressor
from sagellm.comm.kv_transfer.compression.quality import Harness, evaluate, outlier_scale
from sagellm.core.protocols import ConfigError
from sagellm.core.protocols.bench import Row

MODEL = Path(__file__).parents[3] / "examples" / "data" / "tiny_llama"
PREFIX = 512


@pytest.fixture(scope="module")
def model():
    pytest.importorskip("safetensors")
    transformers = pytest.importorskip("transformers", minversion="4.56")
    if not MODEL.is_dir():
        pytest.skip("the small Llama is in a checkout's examples/data")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a small model: more threads only wait for one another
    yield transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def windows():
    load_file = pytest.importorskip("safetensors.torch").load_file
    return load_file(MODEL / "windows.safetensors")["heldout_ids"][:2, : PREFIX + 64]


@pytest.fixture(scope="module")
def harness(model, windows):
    return Harness(model, windows, PREFIX)


@pytest.mark.parametrize(
    ("codec", "options", "ratio", "kl", "error"),
    [
        ("lossless", {}, 1.47, 1e-12, 1e-6),
        ("fp8", {}, 1.9, 1.5e-3, 0.11),
        ("int8", {}, 1.9, 4e-5, 0.02),
        ("int4", {}, 3.6, 8e-3, 0.26),
        ("quant", {"step": 1 / 16}, 2.5, 4e-5, 0.03),
        ("quant", {"step": 1 / 4}, 3.75, 6e-4, 0.11),
        ("quant", {"step": 1.0}, 6.8, 1e-2, 0.45),
    ],
)
def test_quality_and_ratio_hold(harness, codec, options, ratio, kl, error):
    with Compressor(codec, **options) as compressor:
        found = harness.evaluate(compressor)

    assert found.ratio >= ratio
    assert found.kl <= kl
    assert found.attention_error <= error
    assert (codec == "lossless") == (found.kl == 0.0)


def test_outlier_channels_change_quant_by_less_than_a_tenth_and_others_by_much(harness):
    layers, heads, _, dim = harness.shape
    scale = outlier_scale(layers, heads, harness.rope, dim)

    with Compressor("quant") as compressor:
        quant = [harness.evaluate(compressor, k_scale=s).kl for s in (None, scale)]
    int4 = [harness.evaluate(PEERS["int4 g64"], k_scale=s).kl for s in (None, scale)]

    assert quant[1] == pytest.approx(quant[0], rel=0.1)
    assert int4[1] > 4 * int4[0]


def test_a_rotated_cache_is_coded_better_by_those_who_know(harness):
    with Compressor("quant", step=0.5) as compressor:
        informed = harness.evaluate(compressor)
        blind = harness.evaluate(bench_compression.coder_of(compressor, None))

    assert informed.kl < 0.8 * blind.kl
    assert informed.attention_error < 0.8 * blind.attention_error


@pytest.mark.parametrize(
    ("peer", "ratio"),
    [("int8 per token and head", 1.94), ("KIVI-4 g32", 3.2), ("TurboQuant-4", 3.76)],
)
def test_peers_have_the_rates_that_are_known(harness, peer, ratio):
    found = harness.evaluate(PEERS[peer])

    assert found.ratio == pytest.approx(ratio, rel=0.01)
    assert found.kl > 0


def test_one_call_does_for_one_codec(model, windows, harness):
    with Compressor("quant") as compressor:
        assert evaluate(compressor, model, windows, PREFIX) == harness.evaluate(compressor)


def test_windows_that_are_too_short_are_refused(model, windows):
    with pytest.raises(ConfigError, match="a prefix of 2000"):
        Harness(model, windows, 2000)


def rows(quality):
    """Rows as a launch of the benchmark gives them, without running it."""
    case = {"subject": "made up", "windows": 1}
    made = []
    for name in bench_compression.codecs():
        ratio, kl = quality(name)
        made.append(Row({"figure": "ratio", **case}, name, (ratio,)))
        made.append(Row({"figure": "kl", **case}, name, (kl,)))
    for name in bench_compression.OUTLIERS:
        made.append(Row({"figure": "kl with outlier channels", **case}, name, (0.5,)))
    return made


def test_every_promised_figure_has_a_ratio_with_its_goal():
    def quality(name):
        if not name.startswith("quant"):
            return 3.0, 1e-3
        step = float(name.split()[1].rstrip(","))
        return 4 / step**0.5, 1e-2 * step**2

    found = bench_compression.ratios(rows(quality))

    named = {r.name: r for r in found}
    want = named["ratio of quant at the KL of fp8 e4m3"]
    assert want.goal == 4.6
    assert want.value == pytest.approx(4 / 0.1**0.25)
    assert sum(r.goal is not None for r in found) == 8 + 3 + 2 + 1 + 4
    assert named["encode speed of quant 0.25 / zstd-1"].value is None


def test_interpolation_is_logarithmic_and_never_flatters():
    points = [(1e-4, 3.0), (1e-2, 12.0)]

    assert bench_compression.at_kl(points, 1e-3) == pytest.approx(6.0)
    assert bench_compression.at_kl(points, 1e-5) is None
    assert bench_compression.at_kl(points, 1.0) == 12.0


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of a peer's import
def test_speeds_are_measured(model):
    case = {"figure": "decode, GB/s of one core", "subject": "small", "windows": 1}

    named = bench_compression.contenders(case)

    assert named["quant 0.25"]() > 0
    assert named["zstd-1"]() > 0


def tiny(name, **fields):
    transformers = pytest.importorskip("transformers", minversion="4.56")
    torch.manual_seed(0)
    config = getattr(transformers, name)(vocab_size=100, bos_token_id=0, eos_token_id=0, **fields)
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("model", "interleaved", "dim"),
    [
        (lambda: tiny("GPT2Config", n_embd=64, n_layer=2, n_head=2, n_positions=256), False, None),
        (lambda: tiny("OPTConfig", hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
                      ffn_dim=64, max_position_embeddings=256, word_embed_proj_dim=64,
                      pad_token_id=0), False, None),
        (lambda: tiny("CohereConfig", hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
                      num_key_value_heads=1, intermediate_size=64, pad_token_id=0), True, 32),
    ],
    ids=["gpt2", "opt", "cohere"],
)  # fmt: skip
def test_models_that_rotate_otherwise_or_not_at_all(model, interleaved, dim):
    harness = Harness(model(), torch.randint(0, 100, (1, 200)), 128, interleaved=interleaved)

    assert (harness.rope.dim if harness.rope else None) == dim
    layers, heads, _, head = harness.shape
    scale = outlier_scale(layers, heads, harness.rope, head)
    assert {1.0, 4.0, 8.0} == set(scale.unique().tolist())
    with Compressor("quant", step=1 / 16) as codec:
        found = harness.evaluate(codec)
    assert found.kl < 1e-3
    assert found.ratio > 2

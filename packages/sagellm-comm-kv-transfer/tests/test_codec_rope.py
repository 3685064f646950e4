"""Frequencies of RoPE's variants: those that models use."""

import math

import pytest
from codec_data import cache, half, layout

from sagellm.comm.kv_transfer.compression import Compressor, RopeSpec
from sagellm.core.protocols import ConfigError

BASE = {"hidden_size": 512, "num_attention_heads": 8, "rope_theta": 10000.0,
        "max_position_embeddings": 8192}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 2048}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 32, "long_factor": [2.0] * 32,
        "original_max_position_embeddings": 4096, "factor": 2.0}  # fmt: skip
VARIANTS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "longrope": LONG,
}


def frequencies(scaling, **fields):
    return RopeSpec.from_config({**BASE, **fields, "rope_scaling": scaling}).inv_freq


def test_plain_and_linear():
    plain = frequencies(None)

    assert plain == pytest.approx([10000 ** (-2 * i / 64) for i in range(32)])
    assert frequencies(VARIANTS["linear"]) == pytest.approx([f / 4 for f in plain])
    assert len(frequencies(None, partial_rotary_factor=0.5)) == 16
    assert len(frequencies(None, head_dim=128)) == 64


def test_llama3_keeps_short_waves_and_stretches_long_ones():
    plain, scaled = frequencies(None), frequencies(LLAMA3)

    for a, b in zip(plain, scaled, strict=True):
        wave = 2 * math.pi / a
        if wave < 2048 / 4:
            assert b == a
        elif wave > 2048:
            assert b == pytest.approx(a / 8)
        else:
            assert a / 8 < b < a


def test_yarn_keeps_the_first_and_stretches_the_last():
    plain, scaled = frequencies(None), frequencies(YARN)

    assert scaled[0] == plain[0]
    assert scaled[-1] == pytest.approx(plain[-1] / 4)
    assert all(p / 4 <= s * 1.0000001 <= p * 1.0000002 for p, s in zip(plain, scaled, strict=True))


def test_variants_that_depend_on_the_length():
    config = {**BASE, "rope_scaling": VARIANTS["dynamic"]}
    short, long = (RopeSpec.from_config(config, tokens=n).inv_freq for n in (100, 20000))
    assert short == pytest.approx(frequencies(None))
    assert long[-1] < short[-1]

    config = {**BASE, "rope_scaling": LONG}
    short, long = (RopeSpec.from_config(config, tokens=n).inv_freq for n in (100, 5000))
    assert long == pytest.approx([f / 2 for f in short])


@pytest.mark.parametrize("name", VARIANTS)
def test_as_transformers_has_them(name):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if name == "default":
        pytest.skip("newer releases compute it elsewhere; the formula is tested above")
    named = {**BASE, "rope_theta": 10000.0, "rope_scaling": VARIANTS[name]}
    if int(transformers.__version__.partition(".")[0]) >= 5:
        named["rope_parameters"] = {"rope_theta": named.pop("rope_theta"), **VARIANTS[name]}
        del named["rope_scaling"]
    elif name == "longrope":  # which looks for this one on the configuration
        key = "original_max_position_embeddings"
        named[key] = VARIANTS[name][key]
    config = transformers.LlamaConfig(**named)
    want, _ = ROPE_INIT_FUNCTIONS[name](config, "cpu", seq_len=5000)

    got = RopeSpec.from_config({**BASE, "rope_scaling": VARIANTS[name]}, tokens=5000)

    assert got.inv_freq == pytest.approx(want.tolist(), rel=1e-5)


@pytest.mark.parametrize(
    ("scaling", "said"), [({"rope_type": "spiral"}, "'spiral' is unknown"),
                          ({"rope_type": "linear"}, "lacks 'factor'")],
)  # fmt: skip
def test_unknown_variants_are_refused(scaling, said):
    with pytest.raises(ConfigError, match=said):
        frequencies(scaling)


@pytest.mark.parametrize("bad", [(), (float("nan"),), (100.0,), (1.0,) * 2000])
def test_frequencies_without_sense_are_refused(bad):
    with pytest.raises(ConfigError):
        RopeSpec(bad)


@pytest.mark.parametrize("spoil", [lambda x: x[:, :, :16], lambda x: x * float("nan")])
def test_keys_that_tell_nothing_do_not_end_the_check(spoil):
    x = cache(1, 300, 4, 64, rope=half(64))
    wrong = layout(rope=RopeSpec.of(64, interleaved=True))
    with Compressor("quant", workers=1) as coder:
        coder.encode(spoil(x), wrong)

        with pytest.raises(ConfigError, match="contradict"):
            coder.encode(x, wrong)

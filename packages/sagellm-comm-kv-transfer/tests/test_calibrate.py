"""`calibrate`: from a model or a recorded cache to a basis that codes that model's cache."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from codec_data import half, layout, rotated

from sagellm.comm.kv_transfer._cli.main import main
from sagellm.comm.kv_transfer.compression import BASES, Basis, Compressor
from sagellm.comm.kv_transfer.compression.basis_source import model_fingerprint
from sagellm.comm.kv_transfer.compression.quality import Harness
from sagellm.core.protocols import LayoutMismatchError

MODEL = Path(__file__).parents[3] / "examples" / "data" / "tiny_llama"
PROMPTS = MODEL.parent / "prompts"


@pytest.fixture
def run(capsys):
    def call(*arguments):
        code = main(["calibrate", *map(str, arguments)])
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def llama():
    pytest.importorskip("safetensors")
    pytest.importorskip("transformers", minversion="4.56")
    if not MODEL.is_dir():
        pytest.skip("the small Llama is in a checkout's examples/data")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield MODEL
    torch.set_num_threads(threads)


def test_a_model_and_windows_give_a_basis_for_that_model(llama, run, tmp_path):
    transformers = pytest.importorskip("transformers")
    load_file = pytest.importorskip("safetensors.torch").load_file
    windows = MODEL / "windows.safetensors"
    output = tmp_path / "basis.safetensors"

    code, out, _ = run(
        "--json", "--model", llama, "--windows", f"{windows}:calibration_ids",
        "--max-windows", 3, "--window-tokens", 256, "--output", output,
    )  # fmt: skip

    found = json.loads(out)
    assert code == 0
    assert (found["layers"], found["heads"], found["head_dim"]) == (8, 2, 64)
    assert found["tokens"] == 768
    assert found["bytes"] == output.stat().st_size
    basis = Basis.load(output)
    assert basis.fingerprint == found["fingerprint"]
    assert basis.info.rope == half(64)
    model = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    assert model_fingerprint(model) == basis.info.model
    held_out = load_file(windows)["heldout_ids"][:1, :320]
    harness = Harness(model, held_out, 256)
    fingerprint = BASES.load(output)
    with Compressor("transform", basis=fingerprint) as ours, Compressor("quant") as quant:
        quality, plain = harness.evaluate(ours), harness.evaluate(quant)
    BASES.drop(fingerprint)
    assert quality.ratio > plain.ratio  # how much more says nothing: this cache is of low rank
    assert quality.attention_error < 0.2
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight.add_(0.1)
    assert model_fingerprint(model) != basis.info.model


def test_text_is_cut_into_windows(llama, run, tmp_path):
    texts = [t for n in ("3-module", "4-manual") for t in ("--text", PROMPTS / f"{n}.txt")]
    output = tmp_path / "b.safetensors"

    code, out, said = run(
        "--model", llama, *texts, "--max-windows", 2, "--window-tokens", 128, "--output", output
    )

    assert code == 0
    assert "window 2, 256 tokens" in said
    assert Basis.load(output).fingerprint in out
    code, _, said = run("--model", llama, *texts, "--window-tokens", 100_000, "--output", output)
    assert code == 2
    assert "no window of 100000 tokens" in said


@pytest.fixture
def recorded(tmp_path):
    rope, random = half(16), torch.Generator().manual_seed(0)
    mix = torch.randn(6, 2 * 2 * 2 * 16, generator=random)
    x = torch.randn(600, 6, generator=random) @ mix + torch.randn(1, 128, generator=random)
    k, v = x.view(600, 2, 2, 2, 16).permute(1, 2, 0, 3, 4)
    k = torch.stack([rotated(layer.contiguous(), rope) for layer in k])
    path = tmp_path / "cache.npz"
    np.savez(path, k=k.numpy(), v=v.contiguous().numpy())
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"rope_theta": 10000.0, "head_dim": 16}))
    return path, config, torch.stack([k, v], 1)


@pytest.mark.parametrize("join", ["1", "all"])
def test_a_recorded_cache_gives_one_too(recorded, run, tmp_path, join):
    path, config, x = recorded
    output = tmp_path / "b.safetensors"

    code, out, _ = run(
        "--json", "--cache", path, "--fingerprint", "mine", "--config", config,
        "--window-tokens", 200, "--output", output, "--join", join,
    )  # fmt: skip

    assert code == 0
    assert json.loads(out)["model"] == "mine"
    fingerprint = BASES.load(output)
    with Compressor("transform", basis=fingerprint) as compressor:
        got = compressor.decode(compressor.encode(x, layout(rope=half(16), model="mine")))
        with pytest.raises(LayoutMismatchError, match="yours"):
            compressor.encode(x, layout(rope=half(16), model="yours"))
    BASES.drop(fingerprint)
    assert float((got - x).norm() / x.norm()) < 0.15


def test_what_cannot_work_is_said(recorded, run, tmp_path):
    path, config, _ = recorded
    pickled = tmp_path / "pickled.npz"
    np.savez(pickled, k=np.array([{}], dtype=object), v=np.zeros(1))
    other = tmp_path / "cache.pt"
    other.write_bytes(b"x")
    basic = ("--fingerprint", "m", "--output", tmp_path / "out")
    for arguments, words in (
        ((), "give --model"),
        (("--model", tmp_path), "no causal language model"),
        (("--cache", path), "give --model"),
        (("--cache", path, *basic, "--join", "0"), "not positive"),
        (("--cache", path, *basic, "--join", "5"), "must divide"),
        (("--cache", path, *basic, "--window-tokens", 600), "at least two"),
        (("--cache", path, *basic, "--text", path), "give one of"),
        (("--cache", pickled, *basic), "no file of plain arrays"),
        (("--cache", other, *basic), "neither .safetensors nor .npz"),
        (("--cache", path, "--fingerprint", "m", "--output", tmp_path / "no" / "x"), "no folder"),
    ):
        code, _, said = run(*arguments)
        assert code == 2, arguments
        assert words in said
    code, _, said = run(
        "--cache", path, *basic, "--config", config, "--window-tokens", 200, "--interleaved"
    )
    assert code == 2
    assert "contradict the layout's RoPE" in said
    assert not (tmp_path / "out").exists()

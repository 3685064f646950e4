"""Blocks through codecs on real channels: what arrives, over which path, at what cost."""

import threading

import pytest
import torch
from codec_data import rotated
from test_comm import make_backends

from sagellm.comm.kv_transfer import CodecRequest, KVTransferChannel, KVTransferSettings
from sagellm.comm.kv_transfer.compression import RopeSpec
from sagellm.comm.kv_transfer.compression.auto import label, quant_within
from sagellm.core.protocols import (
    CacheGroup,
    ConfigError,
    KVLayout,
    KVTransferError,
    Shard,
    TransferKey,
)

PAGE, HEADS, DIM = 16, 4, 64
AXES = ("block", "kv", "token", "head", "dim")


def group(name="kv", kind="kv", axes=AXES, shape=(2, PAGE, HEADS, DIM), **kw):
    kw.setdefault("dtype", "bfloat16")
    kw.setdefault("page_tokens", PAGE)
    kw.setdefault("layers", (f"{name}0", f"{name}1"))
    return CacheGroup(name=name, kind=kind, axes=axes, block_shape=shape, **kw)


def memory(layout, blocks=80, seed=0):
    random = torch.Generator().manual_seed(seed)
    found = {}
    for g in layout.groups:
        size = dict(
            zip([a for a in g.axes if a not in ("block", "layer")], g.block_shape, strict=True)
        )
        size |= {"block": blocks, "layer": len(g.layers)}
        for name in g.tensor_names:
            x = torch.randn([size[a] for a in g.axes], generator=random)
            dtype = getattr(torch, g.dtype)
            found[name] = x.to(dtype) if dtype.is_floating_point else x.mul(8).to(dtype)
    return found


@pytest.fixture
def coded(channel):
    """A sender and a receiver with equal layouts: (sender, its tensors, receiver, its tensors)."""

    def make(*groups, transport="tcp", comms=(None, None), **settings):
        layout = KVLayout(groups or (group(),), model="m")
        s = KVTransferSettings(transport=transport, **settings)
        out, into = (channel(settings=s, comm=c) for c in comms)
        out.register(layout, a := memory(layout))
        into.register(layout, b := memory(layout, seed=1))
        return out, a, into, b

    return make


def blocks_of(tensors, layout, name, ids):
    g = next(g for g in layout.groups if name in g.tensor_names)
    return tensors[name].movedim(g.axes.index("block"), 0)[ids]


SOURCE = [*range(3, 40), 77, 41, 50]
TARGET = [5, 70, *range(20, 58)]


@pytest.mark.parametrize("transport", ["tcp", "shm", "comm"])
@pytest.mark.parametrize("codec", ["lossless", "lossless-fast", "zstd"])
def test_lossless_codecs_bring_the_same_bits(coded, transport, codec):
    comms = (None, None)
    if transport == "comm":
        comms = make_backends()
    out, a, into, b = coded(transport=transport, comms=comms)
    kept = {n: t.clone() for n, t in b.items()}

    key = TransferKey("k")
    got = into.receive(key, TARGET)
    sent = out.transfer(SOURCE, into.node_id, key=key, codec=codec)
    sent.wait(20)
    got.wait(20)

    for n in b:
        assert torch.equal(b[n][TARGET], a[n][SOURCE])
        others = [i for i in range(80) if i not in TARGET]
        assert torch.equal(b[n][others], kept[n][others])
    assert sent.metrics.path.startswith(transport)
    assert sent.metrics.codec == got.metrics.codec == codec
    assert sent.metrics.codec_s > 0 < got.metrics.codec_s
    assert sent.metrics.bytes == got.metrics.bytes == sum(t[SOURCE].nbytes for t in a.values())
    assert got.metrics.wire_bytes == sent.metrics.wire_bytes < 0.95 * sent.metrics.bytes
    assert "as asked" in sent.explain()


@pytest.mark.parametrize("ids", [list(range(40)), SOURCE], ids=["in a row", "scattered"])
def test_every_kind_of_group_arrives(coded, ids):
    groups = (
        group(),
        group("apart", axes=("block", "token", "head", "dim"), shape=(PAGE, HEADS, DIM),
              parts=("k", "v")),
        group("odd", axes=("block", "token", "head", "dim"), shape=(PAGE, HEADS, DIM),
              parts=("left", "right")),
        group("stacked", axes=("layer", *AXES)),
        group("dims", axes=("block", "kv", "head", "dim", "token"), shape=(2, HEADS, DIM, PAGE)),
        group("latent", "mla", ("block", "token", "dim"), (PAGE, 96)),
        group("mamba", "state", ("block", "head", "dim"), (3, 17), dtype="float32",
              page_tokens=None),
        group("scales", "scale", ("block", "head"), (5,), dtype="float16"),
        group("bytes", "opaque", ("block", "dim"), (33,), dtype="uint8"),
    )  # fmt: skip
    out, a, into, b = coded(*groups)
    layout = KVLayout(groups)

    key = TransferKey("k")
    got = into.receive(key, {g.name: TARGET for g in groups})
    out.transfer({g.name: ids for g in groups}, into.node_id, key=key, codec="lossless").wait(20)
    got.wait(20)

    for n in b:
        assert torch.equal(blocks_of(b, layout, n, TARGET), blocks_of(a, layout, n, ids)), n


def test_what_is_no_kv_is_never_rounded(coded):
    groups = (group(), group("mamba", "state", ("block", "dim"), (256,), page_tokens=None))
    out, a, into, b = coded(*groups)

    key = TransferKey("k")
    got = into.receive(key, {"kv": TARGET, "mamba": TARGET})
    out.transfer({"kv": SOURCE, "mamba": SOURCE}, into.node_id, key=key, codec="quant").wait(20)
    got.wait(20)

    assert not torch.equal(b["kv0"][TARGET], a["kv0"][SOURCE])
    assert torch.equal(b["mamba0"][TARGET], a["mamba0"][SOURCE])


@pytest.mark.parametrize("error", [1 / 32, 0.25, "near"])
def test_the_error_stays_within_its_bound(coded, error):
    out, a, into, b = coded()

    key = TransferKey("k")
    got = into.receive(key, TARGET)
    sent = out.transfer(SOURCE, into.node_id, key=key, codec="quant", max_error=error)
    sent.wait(20)
    got.wait(20)

    bound = 1 / 32 if error == "near" else error
    for n in b:
        x, y = a[n][SOURCE].float(), b[n][TARGET].float()
        spread = x.transpose(0, 1).flatten(1, 2).std(1)  # of a channel of K, [2, heads, dim]
        spread[1] = x[:, 1].permute(2, 0, 1, 3).flatten(1).std(1)[:, None]  # of a head of V
        rounding = x.abs() / 256
        off = (x - y).abs() - rounding
        assert (off <= 1.1 * bound * spread[:, None]).all()  # eighths of octaves, 9 %
    assert sent.metrics.wire_bytes < sent.metrics.bytes / 2


def test_rope_is_undone_at_the_right_position(coded):
    rope = RopeSpec.of(DIM)
    out, a, into, b = coded()
    first = 1000
    random = torch.Generator().manual_seed(3)
    tokens = len(SOURCE) * PAGE
    mean = 4 * torch.randn(HEADS, DIM, generator=random)
    keys = rotated(mean + torch.randn(tokens, HEADS, DIM, generator=random), rope, first)
    a["kv0"][SOURCE, 0] = keys.view(len(SOURCE), PAGE, HEADS, DIM).bfloat16()

    wire = {}
    for name, known in (("blind", None), ("told", rope)):
        key = TransferKey(name)
        got = into.receive(key, TARGET)
        how = CodecRequest("quant", {"step": 0.25}, rope=known, first_position=first)
        if known:
            for t in (a["kv1"],):
                t[SOURCE, 0] = a["kv0"][SOURCE, 0]
        sent = out.transfer(SOURCE, into.node_id, key=key, codec=how).wait(20)
        got.wait(20)
        x, y = (t.float() for t in (a["kv0"][SOURCE, 0], b["kv0"][TARGET, 0]))
        wire[name] = float((x - y).norm())

    # channels that rotate are as wide as their means: with means off, the steps are finer
    assert wire["told"] < 0.7 * wire["blind"]
    assert sent.metrics.retries == 0


def test_keys_that_contradict_rope_fail_both_sides(coded):
    out, a, into, _ = coded()
    rope = RopeSpec.of(DIM)
    tokens = len(SOURCE) * PAGE
    keys = 5 + torch.randn(tokens, HEADS, DIM) / 10
    for t in a.values():  # rotated the other way round
        t[SOURCE, 0] = (
            rotated(keys, RopeSpec.of(DIM, interleaved=True))
            .view(len(SOURCE), PAGE, HEADS, DIM)
            .bfloat16()
        )

    key = TransferKey("k")
    got = into.receive(key, TARGET, source_node=out.node_id)
    sent = out.transfer(SOURCE, into.node_id, key=key, codec=CodecRequest("quant", rope=rope))

    for handle in (sent, got):
        with pytest.raises(KVTransferError, match="RoPE"):
            handle.wait(20)


def test_padding_is_neither_read_nor_written(coded):
    out, a, into, b = coded()
    tokens = 37 * PAGE + 5
    for t in a.values():
        t[SOURCE[37], :, 5:] = float("nan")
        t[SOURCE[38:]] = float("nan")
    kept = {n: t.clone() for n, t in b.items()}

    key = TransferKey("k")
    got = into.receive(key, TARGET)
    how = CodecRequest("int8", num_tokens=tokens)
    out.transfer(SOURCE, into.node_id, key=key, codec=how).wait(20)
    got.wait(20)

    for n in b:
        assert b[n].isfinite().all()
        assert torch.equal(b[n][TARGET[37], :, 5:], kept[n][TARGET[37], :, 5:])
        assert torch.equal(b[n][TARGET[38:]], kept[n][TARGET[38:]])
        assert not torch.equal(b[n][TARGET[36]], kept[n][TARGET[36]])


@pytest.mark.parametrize("asked", [None, "lossless", "none"])
def test_a_pull_is_coded_as_offered_or_as_asked(coded, asked):
    out, a, into, b = coded()

    key = TransferKey("k")
    offer = out.offer(key, SOURCE, num_tokens=640, ttl_s=20, codec="quant", max_error=0.25)
    got = into.fetch(key, out.node_id, TARGET, codec=asked).wait(20)
    offer.wait(20)

    exact = all(torch.equal(b[n][TARGET], a[n][SOURCE]) for n in b)
    assert exact == (asked is not None)
    want = {None: label(quant_within(0.25)), "lossless": "lossless", "none": ""}
    assert got.metrics.codec == want[asked]


@pytest.mark.parametrize("chosen", [False, True])
def test_a_pull_with_a_codec_of_its_own_keeps_the_positions_of_the_offer(coded, chosen):
    out, a, into, b = coded()
    for tensor in a.values():
        tensor[SOURCE[-1], :, 4:] = 1e4  # behind the tokens: would widen steps, and move

    key, request = TransferKey("k"), CodecRequest("lossless", num_tokens=len(SOURCE) * PAGE - 12)
    kept = {n: t[TARGET[-1], :, 4:].clone() for n, t in b.items()}
    offer = out.offer(key, SOURCE, num_tokens=request.num_tokens, ttl_s=20, codec=request)
    picked = {"src_blocks": SOURCE} if chosen else {}
    into.fetch(key, out.node_id, TARGET, codec="quant", **picked).wait(20)
    offer.cancel() if chosen else offer.wait(20)

    untouched = all(torch.equal(b[n][TARGET[-1], :, 4:], kept[n]) for n in b)
    assert untouched == (not chosen)  # chosen blocks are not those that the offer counts tokens of


def test_a_stream_is_coded_layer_by_layer(coded):
    out, a, into, b = coded()

    got = into.receive(key := TransferKey("k"), TARGET)
    stream = out.begin(key, into.node_id, SOURCE, codec="lossless")
    stream.send_layer(0)
    got.wait_layer(0, 20)
    assert torch.equal(b["kv0"][TARGET], a["kv0"][SOURCE])
    stream.send_layer(1)
    stream.seal(640).wait(20)
    got.wait(20)

    assert torch.equal(b["kv1"][TARGET], a["kv1"][SOURCE])


def test_shards_are_coded_on_their_way_into_one_pool(channel):
    s = KVTransferSettings(transport="tcp")
    whole = KVLayout((group(),), model="m")
    into = channel(settings=s)
    into.register(whole, b := memory(whole, seed=9))
    halves = []
    for rank in range(2):
        part = group(shape=(2, PAGE, HEADS // 2, DIM), shard=Shard("head", rank, 2))
        layout = KVLayout((part,), model="m")
        out = channel(settings=s)
        out.register(layout, a := memory(layout, seed=rank))
        halves.append((out, a))

    key = TransferKey("k")
    got = into.receive(key, TARGET, source_node=[out.node_id for out, _ in halves])
    sent = [out.transfer(SOURCE, into.node_id, key=key, codec="lossless") for out, _ in halves]
    for handle in (*sent, got):
        handle.wait(20)

    for n in b:
        both = torch.cat([a[n][SOURCE] for _, a in halves], 3)
        assert torch.equal(b[n][TARGET], both)


@pytest.mark.parametrize("codec", ["lossless", "auto"])
def test_plain_tensors_keep_their_bits(coded, codec):
    out, _, into, _ = coded()
    tensors = [torch.randn(1000, 65).bfloat16(), torch.randn(300, 1001).bfloat16()]

    key = TransferKey("k")
    got = into.receive(key)
    out.transfer(tensors, into.node_id, key=key, codec=codec).wait(20)

    got.wait(20)
    assert all(torch.equal(x.tensor, t) for x, t in zip(got.blocks, tensors, strict=True))
    with pytest.raises(ConfigError, match="plain tensors"):
        out.transfer(tensors, into.node_id, codec="quant")


def test_arguments_that_do_not_fit_are_refused_at_once(coded):
    out, _, into, _ = coded()
    for kw, text in (
        ({"codec": "qant"}, "did you mean 'quant'"),
        ({"max_error": "near"}, "needs a codec"),
        ({"codec": "auto", "max_error": "exact"}, "max_error 'exact'"),
        ({"codec": "quant", "max_error": "tiny"}, "max_error 'tiny'"),
        ({"codec": "auto", "max_error": -1.0}, r"not in 1/256\.\.8"),
        ({"codec": "int4", "max_error": "lossless"}, "cannot promise"),
        ({"codec": CodecRequest("auto", {"step": 1.0})}, "takes no options"),
        ({"codec": CodecRequest("quant", {"workers": 9})}, "no options"),
        ({"codec": CodecRequest("quant"), "max_error": 1.0}, "stands in"),
        ({"codec": CodecRequest("quant", num_tokens=-1)}, "not negative"),
    ):
        with pytest.raises(ConfigError, match=text):
            out.transfer([1], into.node_id, **kw)


def test_hundreds_of_coded_requests_at_once_within_bounds(leakless, coded):
    limit = 1 << 20
    out, a, into, _ = coded(max_codec_bytes=limit, codec_workers=2)
    count = 300
    rounds = [[(7 * i + j) % 80 for j in range(3)] for i in range(count)]

    handles, inside = [], []
    for i, ids in enumerate(rounds):
        key = TransferKey(f"k{i}")
        codec = ("lossless", "zstd", "auto", "lossless-fast")[i % 4]
        handles.append(out.transfer(ids, into.node_id, key=key, codec=codec, deadline_s=60))
        inside.append(into.receive(key, None, deadline_s=60))
    for handle in handles:
        handle.wait(60)

    for ids, got in zip(rounds, inside, strict=True):
        for x in got.wait(60).blocks:
            assert torch.equal(x.tensor, a[f"kv{x.layer}"][ids[x.index]])
    for channel in (out, into):
        threads = channel._engine.codecs.threads
        assert threads.encoding.used == threads.decoding.used == 0
        assert max(threads.encoding.most, threads.decoding.most) <= limit
    assert into._engine.codecs.threads.decoding.most > 0


def test_two_nodes_that_push_to_each_other_do_not_block_one_another(coded):
    out, _, into, _ = coded(max_codec_bytes=1 << 18)

    handles = []
    for i in range(20):
        for one, other in ((out, into), (into, out)):
            key = TransferKey(f"{one.node_id}-{i}")
            other.receive(key)
            handles.append(one.transfer([i, i + 1], other.node_id, key=key, codec="lossless"))

    for handle in handles:
        handle.wait(30)


def test_codec_threads_leave_torch_s_threads_to_others(coded):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        out, _, into, _ = coded(codec_workers=1)
        seen = []
        into.receive(key := TransferKey("k"), TARGET)
        out.transfer(SOURCE, into.node_id, key=key, codec="quant").wait(20)
        threads = out._engine.codecs.threads
        threads.submit(lambda: seen.append(torch.get_num_threads()))
        threads._pool.submit(int).result(20)
        other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        other.start()
        other.join()

        assert seen == [1, 3]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_a_closed_channel_leaves_no_thread(leakless):
    layout = KVLayout((group(),), model="m")
    out, into = KVTransferChannel(), KVTransferChannel()
    out.register(layout, memory(layout))
    into.register(layout, memory(layout))
    handle = out.transfer(list(range(80)), into.node_id, codec="quant")
    into.receive(handle.key, list(range(80)))
    out.close()
    into.close()

    assert handle.done()

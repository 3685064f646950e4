import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from sagellm.comm.kv_transfer.plan import Part, check_layouts, coverage_gap, slab_runs
from sagellm.core.protocols import (
    CacheGroup,
    ConfigError,
    KVLayout,
    KVTransferError,
    LayoutMismatchError,
    Shard,
    TransferKey,
)

HEADS = 4


def heads_of(tp, rank):
    count = max(1, HEADS // tp)
    first = rank * HEADS // tp
    return slice(first, first + count)


@pytest.mark.parametrize("target_tp", [1, 2, 4, 8])
@pytest.mark.parametrize("source_tp", [1, 2, 4, 8])
def test_every_decode_rank_gets_its_heads_from_all_prefill_ranks(
    channel, layout, tensors, source_tp, target_tp
):
    whole = tensors(layout(HEADS), 6)
    sources = [channel() for _ in range(source_tp)]
    targets = [channel() for _ in range(target_tp)]
    for rank, c in enumerate(sources):
        part = {n: t[:, :, heads_of(source_tp, rank)].contiguous() for n, t in whole.items()}
        c.register(layout(HEADS, source_tp, rank), part)
    got = []
    for rank, c in enumerate(targets):
        got.append(tensors(layout(HEADS, target_tp, rank), 6))
        c.register(layout(HEADS, target_tp, rank), got[-1])
    key = TransferKey("r")

    received = [c.receive(key, [5, 0, 3], source_node=range(source_tp)) for c in targets]
    streams = [s.begin(key, t.node_id, [1, 2, 4]) for s in sources for t in targets]
    for layer in range(3):
        for stream in streams:
            stream.send_layer(layer)
        for r in received:
            r.wait_layer(layer, 10)
    sent = [stream.seal(num_tokens=11) for stream in streams]

    for rank, r in enumerate(received):
        r.wait(10)
        assert r.num_tokens == 11
        for n, t in whole.items():
            assert torch.equal(got[rank][n][[5, 0, 3]], t[[1, 2, 4], :, heads_of(target_tp, rank)])
    for t in sent:
        t.wait(10)
    moved = sum(c.get_stats().bytes_sent for c in sources)
    assert moved == sum(r.progress.bytes_total for r in received), "replicas crossed the wire twice"


def test_separate_k_and_v_tensors_with_token_major_heads(channel):
    def layout(rank, tp):
        return KVLayout(
            (
                CacheGroup(
                    "kv",
                    "kv",
                    ("l0", "l1"),
                    ("block", "token", "head", "dim"),
                    (3, 4 // tp, 5),
                    "float16",
                    3,
                    parts=("k", "v"),
                    shard=Shard("head", rank, tp),
                ),
            )
        )

    names = layout(0, 1).groups[0].tensor_names
    whole = {n: torch.randn(7, 3, 4, 5).half() for n in names}
    into = channel()
    got = {n: torch.zeros(7, 3, 4, 5).half() for n in names}
    into.register(layout(0, 1), got)
    r = into.receive(TransferKey("r"), [6, 1], source_node=[1, 2])
    for rank in range(2):
        c = channel()
        c.register(layout(rank, 2), {n: t[:, :, 2 * rank : 2 * rank + 2] for n, t in whole.items()})
        c.transfer([0, 5], 0, key=TransferKey("r"))

    r.wait(10)

    assert names == ("l0.k", "l0.v", "l1.k", "l1.v")
    assert all(torch.equal(got[n][[6, 1]], whole[n][[0, 5]]) for n in names)


def test_block_and_layer_axes_may_lie_anywhere(channel):
    def layout(axes):
        return KVLayout((CacheGroup("kv", "kv", ("a", "b"), axes, (2, 3, 4), "float32", 3),))

    one = torch.randn(2, 2, 5, 3, 4)  # kv, layer, block, token, dim
    out, into = channel(), channel()
    out.register(layout(("kv", "layer", "block", "token", "dim")), {"kv": one})
    per_layer = {"a": torch.zeros(6, 2, 3, 4), "b": torch.zeros(6, 2, 3, 4)}
    into.register(layout(("block", "kv", "token", "dim")), per_layer)

    out.transfer([4, 0], 1, key=TransferKey("r"))
    into.receive(TransferKey("r"), [0, 5]).wait(10)

    for i, name in enumerate(("a", "b")):
        assert torch.equal(per_layer[name][[0, 5]], one[:, i].transpose(0, 1)[[4, 0]])


def test_groups_have_their_own_block_tables(channel):
    def layout():
        return KVLayout(
            (
                CacheGroup("full", "mla", ("a",), ("block", "token", "dim"), (4, 3), "bfloat16", 4),
                CacheGroup("state", "state", ("s",), ("block", "dim"), (9,), "float32"),
            )
        )

    def made():
        return {"a": torch.randn(8, 4, 3).bfloat16(), "s": torch.randn(5, 9)}

    out, into = channel(), channel()
    a, b = made(), made()
    out.register(layout(), a)
    into.register(layout(), b)

    out.transfer({"full": [1, 2, 3], "state": [4]}, 1, key=TransferKey("r"))
    into.receive(TransferKey("r"), {"full": [7, 0, 5], "state": [2]}).wait(10)
    out.transfer({"state": [0, 1]}, 1)
    bounced = into.receive(None).wait(10)

    assert torch.equal(a["a"][[1, 2, 3]], b["a"][[7, 0, 5]])
    assert torch.equal(a["s"][4], b["s"][2])
    assert [(x.layer, x.index) for x in bounced.blocks] == [(1, 0), (1, 1)]


@pytest.mark.parametrize(
    ("ours", "theirs", "what"),
    [
        ({"dtype": "float32"}, {"dtype": "float16"}, "dtype"),
        ({"layers": 3}, {"layers": 2}, "layers"),
        ({"page": 4}, {"page": 8}, "page_tokens"),
        ({"dim": 8}, {"dim": 16}, "over all shards"),
        ({"heads": 4}, {"heads": 8}, "over all shards"),
        ({"model": "a"}, {"model": "b"}, "model"),
        (
            {},
            {"axes": ("block", "kv", "token", "head", "dim"), "block_shape": (2, 4, 4, 8)},
            "order of axes",
        ),
    ],
)
def test_layouts_that_do_not_fit_are_refused_on_both_sides(
    channel, layout, tensors, ours, theirs, what
):
    out, into = channel(), channel()
    a, b = layout(**ours), layout(**theirs)
    out.register(a, tensors(a))
    into.register(b, tensors(b))
    r = into.receive(TransferKey("r"), [1], source_node=0, deadline_s=10)

    with pytest.raises(LayoutMismatchError, match=what) as caught:
        out.connect(1, timeout_s=10)
    t = out.transfer([1], 1, key=TransferKey("r"))
    for handle in (t, r):
        with pytest.raises(KVTransferError, match=what) as failed:
            handle.wait(10)
        assert failed.value.cause == "layout_mismatch"
        assert isinstance(failed.value.__cause__, LayoutMismatchError)
        assert a.describe() in str(failed.value)
        assert b.describe() in str(failed.value)

    assert caught.value.ours == a.describe()
    assert caught.value.theirs == b.describe()
    assert r.exception().invalid_blocks == (1,)


def test_a_mismatch_reaches_a_receiver_that_named_nobody(channel, layout, tensors):
    out, into = channel(), channel()
    out.register(layout(dim=8), tensors(layout(dim=8)))
    into.register(layout(dim=4), tensors(layout(dim=4)))
    r = into.receive(TransferKey("r"), [1])

    out.transfer([1], 1, key=TransferKey("r"))

    with pytest.raises(KVTransferError, match=r"4, 8.*4, 4|4, 4.*4, 8"):
        r.wait(10)


def test_a_pool_registered_late_is_told_to_the_peer(channel, layout, tensors):
    out, into = channel(), channel()
    assert out.connect(1, timeout_s=10).layout is None
    out.register(layout(), a := tensors(layout()))
    into.register(layout(), b := tensors(layout()))

    t = out.transfer([1], 1, key=TransferKey("r"))
    into.receive(TransferKey("r"), [2]).wait(10)

    t.wait(10)
    assert torch.equal(a["layer0"][1], b["layer0"][2])


@given(
    wanted=st.tuples(st.integers(0, 20), st.integers(1, 20)),
    parts=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 10)), max_size=6),
)
def test_coverage_gap_is_what_is_left(wanted, parts):
    first, length = wanted
    want = Part("head", first, first + length)
    granted = [Part("head", a, a + n) for a, n in parts]

    gaps = coverage_gap(want, granted)

    left = set(range(want.first, want.stop)) - {i for p in granted for i in range(p.first, p.stop)}
    assert {i for a, b in gaps for i in range(a, b)} == left


@settings(deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=3, max_size=3),
    order=st.permutations(range(3)),
    data=st.data(),
)
def test_runs_name_the_bytes_of_the_slice(shape, order, data):
    first = data.draw(st.integers(0, shape[1] - 1))
    stop = data.draw(st.integers(first + 1, shape[1]))
    base = torch.arange(math.prod(shape), dtype=torch.int32)
    block = base.reshape([shape[i] for i in order]).permute([order.index(i) for i in range(3)])
    group = CacheGroup("g", "kv", ("l",), ("block", "kv", "head", "dim"), tuple(shape), "int32")
    strides = dict(zip(("kv", "head", "dim"), (4 * s for s in block.stride()), strict=True))

    runs = slab_runs(group, Part("head", first, stop), strides, 4)

    found = [
        base[o // 4 + i].item()
        for o, n in zip(runs.offsets.tolist(), runs.lengths.tolist(), strict=True)
        for i in range(n // 4)
    ]
    assert found == block[:, first:stop].reshape(-1).tolist()


def test_replicated_layouts_fit_their_own_kind(layout):
    check_layouts(layout(HEADS, 8, 3), layout(HEADS, 2, 1))


def test_a_part_says_nothing_of_another_axis():
    assert coverage_gap(Part("head", 0, 4), [Part("", 0, 1)]) == []
    with pytest.raises(ConfigError, match="not along the axis"):
        coverage_gap(Part("", 0, 1), [Part("head", 0, 2)])


@pytest.mark.parametrize("whole_first", [True, False])
def test_a_sharded_sender_and_an_unsharded_one_fill_the_blocks_together(
    channel, layout, tensors, eventually, whole_first
):
    half, full, into = channel(), channel(), channel()
    a = tensors(layout(HEADS))
    full.register(layout(HEADS), a)
    half.register(layout(HEADS, 2, 0), {n: t[:, :, :2].contiguous() for n, t in a.items()})
    into.register(layout(HEADS), b := tensors(layout(HEADS)))
    key = TransferKey("r")
    r = into.receive(key, [4], source_node=[half.node_id, full.node_id])

    sent = []
    for c in (full, half) if whole_first else (half, full):
        stream = c.begin(key, into.node_id, [1])
        sent.append(stream)
        eventually(lambda: len(r.owner.came) == len(sent))
    for stream in sent:
        for layer in range(3):
            stream.send_layer(layer)
        stream.seal(4)
    r.wait(10)

    assert all(torch.equal(a[n][1], b[n][4]) for n in b)
    moved = sum(c.get_stats().bytes_sent for c in (half, full))
    assert moved == r.progress.bytes_total == sum(t[1].nbytes for t in a.values())


def test_no_layer_is_there_while_nobody_sends(channel, layout, tensors):
    into = channel()
    into.register(layout(), tensors(layout()))
    r = into.receive(TransferKey("r"), [1])

    r.owner.check_layers(range(3))

    assert r.progress.layers_done == 0

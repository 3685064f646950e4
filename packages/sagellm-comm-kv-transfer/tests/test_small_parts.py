"""States, pools, discovery and settings, each on its own."""

import json
import select
import threading
import time

import numpy as np
import pytest
import torch

from sagellm.comm.kv_transfer import TRANSITIONS, KVTransferSettings
from sagellm.comm.kv_transfer._flows import Inflow
from sagellm.comm.kv_transfer._loop import EventLoop
from sagellm.comm.kv_transfer._records import CompletionQueue, Memory
from sagellm.comm.kv_transfer.frames import Header
from sagellm.comm.kv_transfer.memory import TensorExtent
from sagellm.comm.kv_transfer.pool import RegisteredPool
from sagellm.comm.kv_transfer.transfer import TransferHandle, Witness
from sagellm.comm.kv_transfer.transports.tcp import parse_address
from sagellm.core.protocols import (
    CacheGroup,
    ConfigError,
    IntegrityError,
    KVLayout,
    PeerLostError,
    ResourceError,
    Shard,
    TransferKey,
    TransferState,
    UnsupportedOperationError,
)

KEY = b"a key of this test, long enough"


def test_every_state_can_end_and_ends_are_final():
    for state in TransferState:
        reached, todo = set(), [state]
        while todo:
            for following in TRANSITIONS[todo.pop()] - reached:
                reached.add(following)
                todo.append(following)
        assert state.terminal or any(s.terminal for s in reached)
        assert not (state.terminal and TRANSITIONS[state])


def test_only_what_moves_can_land_and_failure_is_no_success():
    assert TransferState.LANDED not in TRANSITIONS[TransferState.OFFERED]
    assert TRANSITIONS[TransferState.LANDED] == {TransferState.RELEASED}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop("layer1"), "needs tensors"),
        (lambda t: t.update(extra=torch.ones(1)), "not in the layout"),
        (lambda t: t.update(layer1=t["layer1"].half()), "float16"),
        (lambda t: t.update(layer1=t["layer1"][:, :, :1]), "shape"),
        (lambda t: t.update(layer1=t["layer1"][:3]), "differ in blocks"),
        (lambda t: t.update(layer1=t["layer1"][:1].expand(10, -1, -1, -1, -1)), "overlap"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(layout, tensors, change, match):
    made = tensors(layout())
    change(made)

    with pytest.raises(ConfigError, match=match):
        RegisteredPool(layout(), made)


def test_device_memory_is_refused(layout, tensors):
    made = {n: t.to("meta") for n, t in tensors(layout()).items()}
    with pytest.raises(UnsupportedOperationError, match=r"on meta.*no streams"):
        RegisteredPool(layout(), made)


@pytest.mark.parametrize(
    "group",
    [
        CacheGroup("g", "kv", ("l",), ("token", "dim"), (4, 2), "float32"),
        CacheGroup("g", "kv", ("l",), ("block", "dim"), (4, 2), "float32"),
        CacheGroup("g", "kv", ("l",), ("block", "dim"), (2,), "float32", shard=Shard("head", 0, 2)),
        CacheGroup("g", "kv", ("l",), ("block", "dim"), (2,), "float32", shard=Shard("dim", 2, 2)),
    ],
)
def test_layouts_that_make_no_sense_are_refused(group):
    with pytest.raises(ConfigError):
        RegisteredPool(KVLayout((group,)), {"l": torch.zeros(3, 2)})


def test_strided_pools_and_neighbours_are_joined(layout, tensors):
    big = torch.randn(10, 3, 2, 4, 4, 8)
    pool = RegisteredPool(layout(layers=3), {f"layer{i}": big[:, i] for i in range(3)})
    from sagellm.comm.kv_transfer.plan import Part
    from sagellm.comm.kv_transfer.pool import PoolExtent

    table = pool.as_table([4, 5, 6], unique=True)
    apart = PoolExtent(pool, table, {"kv": Part("", 0, 1)})
    dense = tensors(layout())
    joined = PoolExtent(RegisteredPool(layout(), dense), table, {"kv": Part("", 0, 1)})

    assert b"".join(apart.views(1, 0, 3)) == big[4:7, 1].contiguous().numpy().tobytes()
    assert len(apart.views(1, 0, 3)) == 3
    assert len(joined.views(1, 0, 3)) == 1
    assert joined.views(1, 0, 3)[0] == dense["layer1"][4:7].numpy().tobytes()


def test_large_page_tables_are_planned_at_once(layout):
    n = 100_000
    store = torch.zeros(n, 2, 1, 1, 2)
    pool = RegisteredPool(layout(heads=1, layers=1, page=1, dim=2), {"layer0": store})
    from sagellm.comm.kv_transfer.plan import Part

    ids = np.random.default_rng(0).permutation(n)
    views = pool.slab(0, Part("", 0, 1)).views(ids)

    assert sum(map(len, views)) == store.nbytes
    assert len(pool.slab(0, Part("", 0, 1)).views(np.arange(n))) == 1


def test_static_peers_from_a_map_and_a_file(channel, tmp_path):
    first = channel(node_id=0, peers={}, key=KEY)
    path = tmp_path / "peers.json"
    path.write_text(json.dumps({"0": first.address}))
    key_file = tmp_path / "key"
    key_file.write_bytes(KEY)
    key_file.chmod(0o600)

    second = channel(node_id=1, peers=str(path), key_file=key_file)
    assert second.connect(0, timeout_s=5).address == first.address

    path.write_text("{nonsense")
    with pytest.raises(ConfigError, match="peers file"):
        channel(node_id=2, peers=path, key=KEY)


def test_its_own_entry_is_where_a_node_listens(channel):
    from sagellm.core.protocols.ports import SagePorts

    port = SagePorts().reserve("test").release()
    c = channel(node_id=3, peers={3: f"127.0.0.1:{port}"}, key=KEY)
    assert c.address == f"127.0.0.1:{port}"


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"peers": {}}, "needs node_id"),
        ({"peers": {}, "node_id": 0}, "needs the key"),
        ({"peers": {}, "node_id": 0, "key": "short"}, "5 bytes"),
        ({"peers": {1: "nowhere"}, "node_id": 0, "key": KEY}, "host:port"),
        ({"peers": {-1: "a:1"}, "node_id": 0, "key": KEY}, "peers"),
        ({"node_id": -1}, "must be 0 or more"),
        ({"key": KEY, "key_file": "x"}, "not both"),
        ({"host": "0.0.0.0", "advertise": "localhost"}, "advertise"),
        ({"host": "192.0.2.1"}, "192.0.2.1"),
    ],
)
def test_channels_that_cannot_be_are_refused(channel, arguments, match):
    with pytest.raises(ConfigError, match=match):
        channel(**arguments)


def test_node_ids_of_a_process_are_the_lowest_free(channel):
    one, zero = channel(node_id=1), channel()
    two = channel()
    assert (zero.node_id, one.node_id, two.node_id) == (0, 1, 2)
    with pytest.raises(ConfigError, match=r"\[0, 1, 2\]"):
        channel(node_id=1)
    with pytest.raises(ConfigError):
        zero.add_peer(0, "127.0.0.1:1")
    zero.close()
    assert channel().node_id == 0


def test_settings_come_from_the_environment_and_hide_the_key(monkeypatch):
    monkeypatch.setenv("SAGELLM_COMM_KV_TRANSFER_CODEC", "lz4")
    monkeypatch.setenv("SAGELLM_COMM_KV_TRANSFER_KEY", KEY.decode())
    loaded = KVTransferSettings.load()

    assert loaded.codec == "lz4"
    assert loaded.key.get_secret_value() == KEY.decode()
    assert KEY.decode() not in loaded.describe()
    with pytest.raises(ConfigError):
        KVTransferSettings(chunk_bytes=0)


@pytest.mark.parametrize("address", ["host", "host:", ":1", "host:0", "host:99999", "h:x"])
def test_addresses_are_checked(address):
    with pytest.raises(ConfigError, match="host:port"):
        parse_address(address)


def test_memory_is_bounded():
    memory = Memory(2)
    for i in range(3):
        memory[i] = i
    assert [memory.get(i) for i in range(3)] == [None, 1, 2]


def test_completions_go_only_when_their_end_was_seen():
    queue = CompletionQueue(8)
    readable = select.poll()
    readable.register(queue.fileno(), select.POLLIN)
    seen, unseen = Witness(), Witness()
    seen.seen = True
    for i in range(10):
        queue.put(i, seen if i % 2 else unseen)
    queue.check_room()  # half of them have been seen
    for i in range(10, 15):
        queue.put(i, unseen)
    for _ in range(2):
        with pytest.raises(ResourceError, match=r"10 completions wait for `poll`"):
            queue.check_room()
    queue.put(15, unseen)  # it was in flight
    assert queue.take(2) == [0, 2]
    with pytest.raises(ResourceError, match=r"9 completions wait for `poll`"):
        queue.check_room()
    assert queue.take(2) == [4, 6]

    queue.check_room()
    assert queue.take(None) == [8, 10, 11, 12, 13, 14, 15]

    assert not readable.poll(0)
    for i in range(10):
        queue.put(i, seen)
    assert readable.poll(0)
    queue.check_room()
    assert not readable.poll(0)
    queue.put(1, unseen)
    assert readable.poll(0)
    queue.close()
    queue.close()


def test_a_timer_may_be_years_away():
    loop = EventLoop("test")
    loop.start()
    try:
        loop.run(lambda: loop.call_later(9e8, print))

        assert [loop.run(lambda: 7, 5.0) for _ in range(20)] == [7] * 20
    finally:
        loop.stop()


def test_the_loop_survives_bugs_and_says_when_it_is_over(caplog):
    loop = EventLoop("test")
    loop.start()
    done = threading.Event()
    loop.call(lambda: 1 / 0)
    loop.run(lambda: [loop.call_later(3600, lambda: None).cancel() for _ in range(5000)])
    loop.run(lambda: loop.call_later(0.01, done.set))

    assert done.wait(5)
    assert "a bug in the channel's event loop" in caplog.text
    with pytest.raises(ZeroDivisionError):
        loop.run(lambda: 1 / 0)
    loop.stop()
    loop.stop()
    with pytest.raises(PeerLostError):
        loop.run(lambda: None)


def test_a_flow_takes_each_block_once_and_none_after_its_end():
    handle = TransferHandle(TransferKey("k"), "receive", 10, lambda _: False)
    flow = Inflow(handle, 1, TensorExtent([torch.zeros(4, dtype=torch.uint8)], 1))
    first, second = Header(1, 0, 0, 1, 1, 0), Header(1, 0, 1, 1, 1, 0)
    beyond = Header(1, 0, 3, 2, 2, 0)

    assert flow.claim(first)
    with pytest.raises(IntegrityError, match="again"):
        flow.claim(first)
    with pytest.raises(IntegrityError, match="not granted"):
        flow.claim(beyond)
    flow.stop()

    assert not flow.claim(second)
    assert not flow.claim(first)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8"])
def test_layers_share_no_element_and_may_be_interleaved(layout, dtype):
    made = layout(layers=2, dtype=dtype)
    kind, shape = getattr(torch, dtype), made.groups[0].block_shape
    one = torch.zeros(10, *shape, dtype=kind)
    slices = torch.zeros(12, *shape, dtype=kind)
    rows = torch.zeros(10, 2, *shape, dtype=kind)
    columns = torch.zeros(10, *shape, 2, dtype=kind)
    shifted = torch.zeros(10, *shape[:-1], 2 * shape[-1], dtype=kind)

    for a, b in (
        (one, one),
        (slices[:10], slices[2:]),
        (slices[2:], slices[:10]),
        (shifted[..., :8], shifted[..., 4:12]),
    ):
        with pytest.raises(ConfigError, match=r"'layer[01]' and 'layer[01]' share memory"):
            RegisteredPool(made, {"layer0": a, "layer1": b})
    RegisteredPool(made, {"layer0": rows[:, 0], "layer1": rows[:, 1]})
    RegisteredPool(made, {"layer0": columns[..., 0], "layer1": columns[..., 1]})


def test_many_interleaved_layers_are_told_apart_quickly(layout):
    made = layout(layers=120)
    memory = torch.zeros(16, 120, *made.groups[0].block_shape)

    began = time.monotonic()
    RegisteredPool(made, {f"layer{i}": memory[:, i] for i in range(120)})

    assert time.monotonic() - began < 5

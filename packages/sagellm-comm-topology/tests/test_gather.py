"""One topology for all ranks: agreement, equal hosts, missing ranks, spoiled bodies."""

import threading
import time

import pytest

from sagellm.comm.topology import TopologyGraph, TopologyManager
from sagellm.comm.topology._join import join_hosts
from sagellm.comm.topology._wire import decode_info, encode_info
from sagellm.comm.topology.benchmarks.fake_machine import StubNvml, draw_hgx
from sagellm.comm.topology.file_store import FileStore
from sagellm.comm.topology.placement import ring
from sagellm.core.protocols import (
    CollectiveMismatchError,
    CommTimeoutError,
    ConfigError,
    Device,
    IntegrityError,
    Link,
    SwitchDomain,
    TopologyInfo,
)


@pytest.fixture
def hosts(tmp_path, look):
    """Two equal servers that differ in their boot ids alone, and a manager per rank."""

    def managers(ranks, count=2):
        roots = []
        for i in range(count):
            machine = draw_hgx(tmp_path / f"host{i}", functions=60)
            boot = machine.root / "proc/sys/kernel/random"
            boot.mkdir(parents=True)
            (boot / "boot_id").write_text(f"boot-{i}\n")
            roots.append(machine.root)
        return [look(roots[r * count // ranks], rank=r, world_size=ranks) for r in range(ranks)]

    return managers


def together(managers, store, timeout_s=20.0):
    """Every manager gathers in a thread of its own; results or errors by rank."""
    results = [None] * len(managers)

    def work(i, manager):
        try:
            results[i] = manager.gather(store, timeout_s=timeout_s)
        except Exception as e:
            results[i] = e

    threads = [threading.Thread(target=work, args=x) for x in enumerate(managers)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
        assert not t.is_alive()
    return results


def test_every_rank_holds_the_same_topology(hosts, store):
    managers = hosts(4)

    results = together(managers, store)

    assert all(r == results[0] for r in results)
    assert (results[0].num_nodes, results[0].num_devices) == (2, 16)
    assert results[0].accelerators[8].id == "n1/0000:13:00.0"
    assert results[0].missing_nodes == ()


def test_equal_hosts_are_described_once(hosts, store):
    together(hosts(4), store)

    assert sum("/body/" in key for key in store.values) == 1


def test_paths_between_hosts_leave_by_the_near_nic_of_one_rail(hosts, store):
    managers = hosts(2)
    together(managers, store)

    path = managers[1].path("n0/0000:43:00.0", "n1/0000:a3:00.0")

    assert path.kind == "NET"
    assert "n0/0000:45:00.0" in path.devices  # mlx5_2, behind the same switch
    assert path.bottleneck_bytes_per_s == pytest.approx(50e9)


def test_ids_of_this_host_still_answer_after_a_gather(hosts, store):
    managers = hosts(2)
    together(managers, store)

    assert managers[0].path("0000:13:00.0", "0000:14:00.0").kind == "PIX"
    assert len(managers[0].rank_map(8, dp=2)) == 16


def test_missing_rank_is_named_and_the_rest_agree(hosts, store):
    managers = hosts(4)

    results = together(managers[:3], store, timeout_s=2.0)

    assert results[0].missing_nodes == (3,)
    assert any("rank 3" in w for w in results[0].warnings)
    assert results[0] == results[1] == results[2]
    assert results[0].num_nodes == 2


def test_without_rank_0_the_others_time_out(hosts, store):
    (result,) = together(hosts(2)[1:], store, timeout_s=0.3)

    assert isinstance(result, CommTimeoutError)
    assert "rank 0 of 2" in str(result)


def test_second_gather_does_not_read_the_first_one(hosts, store):
    managers = hosts(2)
    first = together(managers, store)

    second = together(managers, store)

    assert first[0] == second[0]
    assert {k.split("/")[2] for k in store.values if "/agreed" in k} == {"1", "2"}


def test_rank_that_writes_rubbish_is_missing(hosts, store):
    managers = hosts(2)
    store.values["sagellm/topology/1/rank/1"] = "{}"

    result = managers[0].gather(store, timeout_s=1.0)

    assert result.missing_nodes == (1,)
    assert any("not a record" in w for w in result.warnings)


def test_rank_and_world_size_come_from_the_environment(tmp_path, store):
    manager = TopologyManager(root=tmp_path, environ={"RANK": "5", "WORLD_SIZE": "4"}, detectors=[])
    unread = TopologyManager(root=tmp_path, environ={"RANK": "five"}, detectors=[])

    with pytest.raises(ConfigError, match=r"rank 5 is not in 0\.\.3"):
        manager.gather(store, timeout_s=1.0)
    with pytest.raises(ConfigError, match="five"):
        unread.gather(store, timeout_s=1.0)


def test_one_process_alone_gathers_itself(hgx, store):
    info = hgx.gather(store, timeout_s=5.0)

    assert (info.num_nodes, info.num_devices) == (1, 8)
    assert info.accelerators[0].uuid is None
    assert hgx.rank_map(8) == tuple(d.id for d in info.accelerators)


@pytest.mark.parametrize(
    "body", [b"", b"rubbish!", b"\xff\xfe", encode_info(TopologyInfo())[:-3].encode()]
)
def test_spoiled_body_is_an_integrity_error(body):
    with pytest.raises(IntegrityError):
        decode_info(body)


def test_body_that_unpacks_without_end_is_refused(monkeypatch):
    monkeypatch.setattr("sagellm.comm.topology._wire.MAX_PLAIN_BYTES", 1000)
    info = TopologyInfo(warnings=("x" * 5000,))

    with pytest.raises(IntegrityError, match="more than 1000"):
        decode_info(encode_info(info).encode())


def test_ranks_meet_over_files_in_a_folder_of_their_owner(hosts, tmp_path):
    folder = tmp_path / "meet"
    managers = hosts(4)

    results = together(managers, FileStore(folder, timeout_s=10))

    assert all(r == results[0] for r in results)
    assert results[0].num_nodes == 2
    assert folder.stat().st_mode & 0o077 == 0
    assert not [
        p for p in folder.iterdir() if len(p.name.split(".")) == 3 and "count" not in p.name
    ]


def test_file_store_counts_once_for_everybody(tmp_path):
    store, seen = FileStore(tmp_path), []

    def count():
        seen.extend(store.add("k", 1) for _ in range(20))

    threads = [threading.Thread(target=count) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(30)

    assert sorted(seen) == list(range(1, 81))


def test_file_store_refuses_what_it_cannot_do(tmp_path):
    store = FileStore(tmp_path, timeout_s=0.05)

    with pytest.raises(CommTimeoutError, match="nobody stored 'k'"):
        store.get("k")
    with pytest.raises(ConfigError, match="by 1, not by 2"):
        store.add("k", 2)
    with pytest.raises(ConfigError, match="more than"):
        store.set("k", "x" * ((16 << 20) + 1))
    with pytest.raises(ConfigError, match="timeout_s"):
        FileStore(tmp_path, timeout_s=0)
    store.set("big", "x")
    (file,) = tmp_path.iterdir()
    file.write_bytes(b"x" * ((16 << 20) + 1))
    with pytest.raises(IntegrityError, match="'big'"):
        store.get("big")


def labelled(hgx, *labels):
    return join_hosts([hgx.detect()] * len(labels), labels=labels)


def test_hosts_of_one_rack_are_nearer_than_those_of_another(hgx, hgx_gpus):
    info = labelled(hgx, {"rack": "a"}, {"rack": "a"}, {"rack": "b", "spine": "s"}, {"rack": "b"})
    graph = TopologyGraph(info)

    within, beyond = (graph.path(f"n0/{hgx_gpus[0]}", f"n{n}/{hgx_gpus[0]}") for n in (1, 2))

    assert within.kind == beyond.kind == "NET"
    assert within.bottleneck_bytes_per_s == pytest.approx(50e9)
    assert beyond.bottleneck_bytes_per_s is None  # what is above a rack nobody stated
    assert beyond.hops > within.hops
    assert any("/rack=a" in d for d in within.devices)
    assert ring(graph, [f"n{n}/{hgx_gpus[0]}" for n in (0, 2, 1, 3)]) in (
        tuple(f"n{n}/{hgx_gpus[0]}" for n in order) for order in ((0, 1, 2, 3), (0, 1, 3, 2),
                                                                  (0, 2, 3, 1), (0, 3, 2, 1))
    )  # fmt: skip


def test_labels_reach_the_agreed_topology_and_equal_hosts_are_still_described_once(
    tmp_path, look, store
):
    managers = []
    for i in range(2):
        machine = draw_hgx(tmp_path / f"host{i}", functions=60)
        boot = machine.root / "proc/sys/kernel/random"
        boot.mkdir(parents=True)
        (boot / "boot_id").write_text(f"boot-{i}\n")
        managers.append(look(machine.root, rank=i, world_size=2, labels={"rack": f"r{i}"}))

    results = together(managers, store)

    assert [d.attrs["rack"] for d in results[1].accelerators] == ["r0"] * 8 + ["r1"] * 8
    assert sum("/body/" in key for key in store.values) == 1


def test_unknown_label_is_refused(look, hgx_root, store):
    with pytest.raises(ConfigError, match="known: rack, spine"):
        look(hgx_root, labels={"rak": "1"}).gather(store, timeout_s=1)


def test_ports_are_rails_numbered_as_people_count(hgx):
    graph = TopologyGraph(labelled(hgx, {}, {}))

    rails = graph.rails()

    assert all(len(rail) == 2 for rail in rails)
    names = [graph.device(rail[1]).attrs["ib"] for rail in rails]
    assert names == sorted(names, key=lambda n: int(n.removeprefix("mlx5_")))
    assert TopologyGraph(hgx.detect()).rails() == ()


def tray(clique):
    """A host whose GPUs sit on the switches of a fabric that may leave the host."""
    devices = (*(Device(f"g{i}", "gpu") for i in range(4)), Device("sw", "fabric_switch"))
    links = tuple(Link(f"g{i}", "sw", "nvlink", 18, 900e9) for i in range(4))
    domain = SwitchDomain("d", "nvlink", tuple(f"g{i}" for i in range(4)), clique)
    return TopologyInfo(devices=devices, links=links, domains=(domain,))


def test_trays_of_one_clique_are_one_fabric():
    info = join_hosts([tray("c/1"), tray("c/1"), tray("c/2"), tray(None), tray(None)])
    graph = TopologyGraph(info)

    path = graph.path("n0/g0", "n1/g3")

    assert (path.kind, path.hops, path.bottleneck_bytes_per_s) == ("LINK", 2, 900e9)
    assert [len(d.members) for d in info.domains] == [8, 4, 4, 4]
    assert len(graph.components("nvlink")[0]) == 8
    assert graph.path("n0/g0", "n2/g0").kind is None
    assert graph.path("n3/g0", "n4/g0").kind is None
    assert graph.device("fabric:nvlink:c/1").node == -1


def test_a_clique_shows_in_the_fingerprint():
    joined, apart = (join_hosts([tray("c/1"), tray(c)]) for c in ("c/1", "c/2"))

    assert joined.fingerprint != apart.fingerprint


def test_five_hundred_equal_hosts_are_joined_and_sent_in_a_moment(hgx):
    started = time.process_time()

    joined = join_hosts([hgx.detect()] * 500)
    text = encode_info(joined)

    assert joined.num_devices == 4000
    assert len(text) < 2 << 20
    assert decode_info(text.encode()) == joined
    assert time.process_time() - started < 20


class Dying(FileStore):
    """A store of a rank that dies before it publishes what it promised."""

    def set(self, key, value):
        if "/body/" in key:
            raise OSError("killed here")
        super().set(key, value)


@pytest.mark.parametrize("first", ["its own host", "another host"])
def test_a_rank_that_dies_with_the_description_leaves_it_to_others(tmp_path, look, first):
    folder = tmp_path / "store"
    roots = [draw_hgx(tmp_path / f"h{i}", functions=60 + 12 * i).root for i in range(2)]
    for i, root in enumerate(roots):
        (root / "proc/sys/kernel/random").mkdir(parents=True)
        (root / "proc/sys/kernel/random/boot_id").write_text(f"boot-{i}")
        if i:
            next(root.glob("sys/devices/system/node/node0/meminfo")).write_text("MemTotal: 5 kB")
    other = first == "another host"
    dying = look(roots[other], rank=3, world_size=4)
    with pytest.raises(OSError, match="killed"):
        dying.gather(Dying(folder), timeout_s=4)
    others = [look(roots[other and r > 0], rank=r, world_size=4) for r in range(3)]

    results = together(others, FileStore(folder), timeout_s=4.0)

    assert [r.num_nodes for r in results] == [1 + other] * 3
    assert [r.missing_nodes for r in results] == [(3,)] * 3


def test_ranks_of_one_host_that_see_different_gpus_are_put_together(tmp_path, look, store):
    roots = [draw_hgx(tmp_path / f"view{i}", functions=60).root for i in range(3)]
    for i, root in enumerate(roots):
        boot = root / "proc/sys/kernel/random"
        boot.mkdir(parents=True)
        (boot / "boot_id").write_text("one-host")
        functions = root / "sys/bus/pci/devices"
        gpus = [f for f in sorted(functions.iterdir()) if (f / "class").read_text()[:6] == "0x0302"]
        for hidden in gpus[:4] if i == 0 else gpus[4:]:  # ranks 1 and 2 see the same
            hidden.unlink()
    managers = [look(root, rank=i, world_size=3) for i, root in enumerate(roots)]

    results = together(managers, store)

    assert [r.num_devices for r in results] == [8] * 3
    assert results[0] == results[1] == results[2]
    assert (results[0].num_nodes, results[0].missing_nodes) == (1, ())
    assert any(w.startswith("ranks 0, 1 of one host do not") for w in results[0].warnings)
    ids = [d.id for d in results[0].accelerators]
    assert managers[0].path(ids[0], ids[-1]).kind is not None


def test_gpus_that_each_rank_alone_may_ask_the_driver_about_are_all_known(
    hgx_root, hgx_gpus, look, store
):
    halves = [
        StubNvml(half, peers={g: ["switch"] * 18 for g in half})
        for half in (hgx_gpus[:4], hgx_gpus[4:])
    ]
    managers = [look(hgx_root, nvml=n, rank=i, world_size=2) for i, n in enumerate(halves)]

    agreed = together(managers, store)[0]

    assert agreed.num_nodes == 1
    assert [d.model for d in agreed.accelerators] == ["NVIDIA Fake 80GB"] * 8
    assert len(agreed.domains[0].members) == 8


def test_a_description_that_cannot_be_is_refused():
    twice = TopologyInfo((Device("g", "gpu"), Device("g", "gpu")))

    with pytest.raises(IntegrityError, match="two devices are called 'g'"):
        decode_info(encode_info(twice).encode())


def test_a_rank_that_is_out_of_step_is_told_and_takes_no_old_answer(hosts, store):
    managers = hosts(2)
    together(managers, store)
    managers[0].gather(store, timeout_s=0.4)  # as after a restart of rank 0 alone
    managers[0].gather(store, timeout_s=0.4)

    with pytest.raises(
        CollectiveMismatchError, match="rank 1 is at its gather 2, rank 0 at its gather 3"
    ):
        managers[1].gather(store, timeout_s=2.0)


def test_a_rank_that_is_merely_late_takes_what_was_agreed_without_it(hosts, store):
    managers = hosts(2)
    agreed = managers[0].gather(store, timeout_s=0.4)

    assert managers[1].gather(store, timeout_s=2.0) == agreed
    assert agreed.missing_nodes == (1,)

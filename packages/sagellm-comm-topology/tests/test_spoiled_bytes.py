"""Every format with bytes cut, flipped, doubled and shuffled: read or refused in words."""

import random
import re

import pytest
from printers import (
    Bridge,
    Drawn,
    print_hwloc,
    print_list,
    print_lspci,
    print_metax,
    print_npu,
    print_nvidia,
    print_p2p,
    print_rocm,
)

from sagellm.comm.topology.export import to_json, to_matrix
from sagellm.comm.topology.importers import import_topology
from sagellm.core.protocols import IntegrityError

ROUNDS = 400


def drawn(*classes):
    cells = {(a, b): classes[(a + b) % len(classes)] for a in range(4) for b in range(a + 1, 4)}
    return Drawn(cells, ["0-3", "0-3", "4-7", "4-7"], ["0", "0", "1", "1"])


def hwloc():
    def root(at):
        gpu = Bridge(
            f"0000:{at:02x}:00.0",
            code=0x0302,
            vendor=0x10DE,
            device=0x20B0,
            gp=at,
            name=f"nvml{at % 2}",
        )
        return [Bridge(f"0000:00:{at:02x}.0", [gpu], gp=at + 50)]

    text = print_hwloc([(0, "0x0f", [root(2)]), (1, "0xf0", [root(3)])], {(2, 3): 50000})
    # Packages are ends of links too: what they stand for may be damaged away.
    package = '<object type="Package" os_index="1" gp_index="99" '
    text = text.replace('<object type="Package" os_index="1" ', package)
    text = text.replace(
        "</topology>",
        '<distances2hetero nbobjs="2" kind="25" name="NVLinkBandwidth"><indexes>OSDev:5002 '
        "Package:99 </indexes><u64values>0 40000 40000 0 </u64values></distances2hetero>"
        "</topology>",
    )
    return text


NCCL = (
    '<system version="1"><cpu numaid="0" affinity="f" arch="x86_64" vendor="GenuineIntel">'
    '<pci busid="0000:01:00.0" class="0x060400" link_speed="16.0 GT/s PCIe" link_width="16">'
    '<pci busid="0000:02:00.0" class="0x030200" vendor="0x10de"><gpu dev="0" sm="90">'
    '<nvlink target="0000:03:00.0" count="4" tclass="0x030200"/></gpu></pci>'
    '<pci busid="0000:04:00.0" class="0x020700"><nic><net name="mlx5_0" speed="400000"/>'
    "</nic></pci>"
    '</pci></cpu><cpu numaid="1"><pci busid="0000:03:00.0" class="0x030200" vendor="0x10de">'
    '<gpu dev="1"><c2c bw="45000" count="10"/></gpu></pci></cpu></system>'
)
WHOLE = {
    "nccl-xml": NCCL,
    "hwloc-xml": hwloc(),
    "json": to_json(import_topology(NCCL.encode())),
    "own-matrix": to_matrix(import_topology(NCCL.encode())),
    "nvidia": print_nvidia(drawn("NV4", "PIX", "SYS")),
    "p2p": print_p2p(drawn("OK", "CNS")),
    "npu": print_npu(drawn("HCCS", "SIO", "PHB")),
    "metax": print_metax(drawn("MX", "NODE")),
    "rocm": print_rocm(drawn("XGMI", "PCIE")),
    "list": print_list([("NVIDIA A100", "GPU-1", [("1g.10gb", "MIG-1")])] * 3),
    "lspci": print_lspci([(f"0000:0{i}:00.0", 0x0302, "X [Y]", 0x10DE, 0x20B0) for i in range(3)]),
}


def spoil(data: bytes, rng: random.Random) -> bytes:
    """The bytes with one to three things wrong."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(out) + 1)
        end = min(len(out), at + rng.randint(1, 40))
        how = rng.randrange(7)
        if how == 0:
            del out[at:end]
        elif how == 1:
            out[at:end] = out[at:end] * 2
        elif how == 2 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif how == 3 and len(out) > 100:
            del out[max(at, 60) :]
        elif how == 4:
            out[at:at] = rng.choice([b"\x00", b"\xff", b"-1", b"9" * 30, b"\t", b"\n", b"<", b'"'])
        elif how == 5:
            lines = bytes(out).split(b"\n")
            rng.shuffle(lines)
            out = bytearray(b"\n".join(lines))
        elif numbers := list(re.finditer(rb"\d+", out)):
            found = rng.choice(numbers)
            odd = rng.choice([b"", b"-1", b"7", b"x", b"99999999999999999999"])
            out[found.start() : found.end()] = odd
    return bytes(out)


def read_spoiled(data: bytes, name: str, rounds: int) -> int:
    """How many of the spoiled copies could be read at all; the others were refused in words."""
    read = 0
    for seed in range(rounds):
        spoiled = spoil(data, random.Random(f"{name} {seed}"))
        try:
            to_matrix(import_topology(spoiled))
        except IntegrityError:
            continue
        except Exception as e:
            pytest.fail(f"{name}, seed {seed}: {type(e).__name__}: {e} of {spoiled[:4000]!r}")
        read += 1
    return read


@pytest.mark.parametrize("name", WHOLE)
def test_spoiled_bytes_are_read_or_refused_in_words(name):
    data = WHOLE[name].encode()
    import_topology(data)

    assert read_spoiled(data, name, ROUNDS) > ROUNDS // 20


def test_spoiled_records_are_read_or_refused_in_words(shared_samples):
    files = [
        f
        for f in sorted((shared_samples / "samples").iterdir())
        if f.suffix in (".xml", ".txt") and f.stat().st_size < 100_000
    ]

    assert sum(read_spoiled(f.read_bytes(), f.name, 8) for f in files) > len(files)


def test_a_package_whose_node_is_damaged_away_costs_its_links():
    text = hwloc()
    node = '<object type="NUMANode" os_index="1"'
    assert node in text

    info = import_topology(text.replace(node, '<object type="NUMANode" os_index=""').encode())

    assert info.num_devices == 2
    assert any("leads to an object that is not known" in w for w in info.warnings)


@pytest.mark.parametrize(
    ("version", "network", "rdma"), [("", "2", "3"), ('version="2.0"', "2", "3"),
                                     ('version="3.0"', "16", "48")],
)  # fmt: skip
def test_kinds_of_network_devices_name_them_without_infos(version, network, rdma):
    card = (
        '<object type="PCIDev" pci_busid="0000:0{0}:00.0" pci_type="0207 [15b3:1013]">'
        '<object type="OSDev" name="{1}" osdev_type="{2}"/></object>'
    )
    text = (
        f'<topology {version}><object type="Machine"><distances nbobjs="2"/>'
        '<object type="NUMANode" os_index="0"/><object type="Bridge" bridge_type="0-1" '
        'bridge_pci="0000:[00-1f]">' + card.format(1, "eth0", network)
        + card.format(2, "mlx5_0", rdma) + card.format(3, "disk", "1")
        + "</object></object></topology>"
    )  # fmt: skip

    info = import_topology(text.encode())

    names = {d.id[5:7]: (d.attrs.get("netdev"), d.attrs.get("ib")) for d in info.devices if d.bdf}
    assert names == {"01": ("eth0", None), "02": (None, "mlx5_0"), "03": (None, None)}
    assert any("distances of hwloc 1" in w for w in info.warnings)

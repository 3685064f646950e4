"""Rows of vendors whose torch calls the device `cuda` and the library `nccl`."""

from __future__ import annotations

from sagellm.core.protocols import LinkClaim

from ._row_words import ARITHMETIC, FLOATS, GB, INTEGERS, average, no_bits
from .vendor_spec import VendorSpec

__all__ = ["HYGON", "ILUVATAR", "KUNLUN", "METAX"]

HYGON = VendorSpec(
    backend="hygon",
    vendor="hygon",
    title="Hygon DCU",
    library="RCCL",
    c10d_name="nccl",
    module=None,
    device="cuda",
    dispatch="cuda",
    grade="third-party",
    source="repositories that run on DTK builds of torch",
    install_hint="install the torch of the vendor's DTK and source DTK's env.sh",
    aliases=("dcu",),
    in_default_map=True,
    reduce_ops=ARITHMETIC | {"avg"},
    reduce_dtypes=INTEGERS | FLOATS | {"float64"},
    lowering=no_bits("RCCL"),
    uneven=True,
    visible_env=("HIP_VISIBLE_DEVICES",),
    env={
        "NCCL_SOCKET_IFNAME": "names of interfaces RCCL may use",
        "NCCL_IB_HCA": "names of InfiniBand devices RCCL may use",
        "NCCL_TOPO_FILE": "topology file RCCL reads first",
    },
    libraries={
        "librccl": "source DTK's env.sh",
        "libgalaxyhip": "source DTK's env.sh",
        "libamdhip64": "source DTK's env.sh",
    },
    device_nodes=("dev/kfd",),
    tool="hy-smi",
    tool_paths=("opt/hyhal/bin/hy-smi",),
    claims=(
        LinkClaim("BW1000", None, "unstated", "device", "unverified", "no vendor figure found"),
        LinkClaim("K100", None, "unstated", "device", "unverified", "no vendor figure found"),
    ),
    notes=("answers torch.cuda and torch.version.hip, as AMD does",),
)

KUNLUN = VendorSpec(
    backend="kunlun",
    vendor="kunlun",
    title="Kunlunxin",
    library="BKCL",
    c10d_name="nccl",
    module="torch_xmlir",
    device="cuda",
    dispatch="cuda",
    grade="third-party",
    source="baidu/vLLM-Kunlun",
    install_hint="install the vendor's torch_xmlir wheel and XRE",
    aliases=("bkcl", "kunlunxin", "xccl"),
    in_default_map=True,
    reduce_ops=ARITHMETIC,
    reduce_dtypes=frozenset({"int32", "int64"}) | FLOATS,
    lowering=(average("BKCL"), *no_bits("BKCL")),
    uneven=True,
    visible_env=("XPU_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"),
    env={
        "BKCL_RDMA_NICS": "NICs for each device",
        "BKCL_FORCE_RDMA_NICS_ORDER": "keep that order",
        "BKCL_PCIE_RING": "build rings over PCIe",
    },
    libraries={
        "libbkcl": "install XCCL/BKCL and put its so directory in LD_LIBRARY_PATH",
        "libxpurt": "install XRE and put its so directory in LD_LIBRARY_PATH",
    },
    device_nodes=("dev/xpu[0-9]*", "dev/xpuctrl"),
    tool="xpu-smi",
    claims=(
        LinkClaim(
            "P800", None, "unstated", "device", "unverified",
            "the vendor only says x8 of a box without links",
        ),
    ),
    notes=(
        "torch's own c10d name xccl is Intel's oneCCL on device xpu, and is never used here",
        "the dtypes of BKCL are not public: only those that public programs reduce are let through",
    ),
)  # fmt: skip

METAX = VendorSpec(
    backend="metax",
    vendor="metax",
    title="MetaX",
    library="MCCL (MACA)",
    c10d_name="nccl",
    module=None,
    device="cuda",
    dispatch="cuda",
    grade="vendor-source",
    source="MetaX-MACA/vLLM-metax; torch.version.maca was seen on a C550",
    install_hint="install the torch of the vendor's MACA SDK",
    aliases=("maca", "muxi"),
    in_default_map=True,
    reduce_ops=ARITHMETIC | {"avg"},
    reduce_dtypes=INTEGERS | FLOATS | {"float64"},
    lowering=no_bits("MACA's MCCL"),
    uneven=True,
    visible_env=("CUDA_VISIBLE_DEVICES", "MACA_VISIBLE_DEVICES"),
    env={
        "MCCL_IB_HCA": "names of InfiniBand devices it may use",
        "MCCL_SOCKET_IFNAME": "names of interfaces it may use",
        "MACA_MPS_MODE": "needed for two processes on one device",
    },
    libraries={
        "libmccl": "install the MACA SDK and put /opt/maca/lib in LD_LIBRARY_PATH",
        "libmcruntime": "install the MACA SDK and put /opt/maca/lib in LD_LIBRARY_PATH",
    },
    device_nodes=("dev/mxcd",),
    tool="mx-smi",
    tool_paths=("opt/maca/bin/mx-smi", "opt/mxdriver/bin/mx-smi"),
    claims=(
        LinkClaim(
            "C500", None, "unstated", "device", "vendor-document",
            "no official figure; the vendor's diagnosis passes 49 GB/s one way in a pair",
        ),
    ),
    notes=("the library is called MCCL but is not Moore Threads'; torch's name for it is nccl",),
)  # fmt: skip

ILUVATAR = VendorSpec(
    backend="iluvatar",
    vendor="iluvatar",
    title="Iluvatar CoreX",
    library="IXCCL",
    c10d_name="nccl",
    module=None,
    device="cuda",
    dispatch="cuda",
    grade="third-party",
    source="repositories that run on CoreX builds of torch",
    install_hint="install the torch of the vendor's CoreX SDK",
    aliases=("corex", "ixccl"),
    in_default_map=True,
    reduce_ops=ARITHMETIC,
    reduce_dtypes=frozenset({"int8", "uint8", "int32", "int64"}) | FLOATS,
    lowering=(average("IXCCL"), *no_bits("IXCCL")),
    uneven=True,
    visible_env=("CUDA_VISIBLE_DEVICES",),
    libraries={
        "libixccl": "put CoreX's lib (/usr/local/corex/lib) in LD_LIBRARY_PATH",
        "libcuda": "put CoreX's lib (/usr/local/corex/lib) in LD_LIBRARY_PATH",
    },
    device_nodes=("dev/iluvatar[0-9]*",),
    tool="ixsmi",
    tool_paths=("usr/local/corex/bin/ixsmi",),
    claims=(
        LinkClaim(
            "BI-V100", 64 * GB, "bidirectional", "device", "vendor-document",
            "product page and prospectus; PCIe, shared with the host",
        ),
        LinkClaim("BI-V150", None, "unstated", "device", "unverified", "not published"),
    ),
)  # fmt: skip

"""Rows of vendors whose device has a torch device type of its own."""

from __future__ import annotations

from sagellm.core.protocols import LinkClaim, Lowering

from ._row_words import ARITHMETIC, FLOATS, GB, INTEGERS, average, no_bits
from .vendor_spec import VendorSpec

__all__ = ["ASCEND", "BIREN", "BIREN_1", "CAMBRICON", "ENFLAME", "MOORE_THREADS", "TECORIGIN"]

ASCEND = VendorSpec(
    backend="hccl",
    vendor="huawei",
    title="Huawei Ascend",
    library="HCCL",
    c10d_name="hccl",
    module="torch_npu",
    device="npu",
    dispatch="privateuse1",
    grade="vendor-source",
    source="Ascend/pytorch at 9e73e708 and the torch_npu 2.13.0 wheel",
    install_hint="pip install torch-npu (same version as torch), then source CANN's set_env.sh",
    aliases=("ascend", "npu"),
    in_default_map=True,
    options={
        "hccl_buffer_size": (int, "communication buffer in MB"),
        "group_name": (str, "name of the communicator"),
        "qos_traffic_class": (int, "RoCE traffic class"),
        "qos_service_level": (int, "RoCE service level"),
        "hccl_sdma_qos": (int, "SDMA quality of service"),
        "hccl_op_expansion_mode": (int, "where operations are expanded"),
        "hccl_world_rank_id": (int, "rank in the world"),
        "hccl_job_id": (int, "id of the job"),
        "hccl_exec_timeout": (int, "seconds an operation may take, at least 0"),
        "hccl_algo": (str, "algorithm per level"),
        "hccl_retry_enable": (str, "levels that retry"),
        "hccl_retry_params": (str, "retry count and waits"),
        "hccl_buffer_name": (str, "name of a shared buffer"),
    },
    options_path="torch_npu._C._distributed_c10d:ProcessGroupHCCL.Options",
    options_attribute="hccl_config",
    reduce_ops=ARITHMETIC,
    reduce_dtypes=frozenset({"int8", "int16", "int32", "int64"}) | FLOATS,
    move_dtypes=INTEGERS
    | FLOATS
    | {"int16", "uint16", "uint32", "uint64", "float64", "float8_e4m3fn", "float8_e5m2"},
    lowering=(
        average("HCCL"),
        *no_bits("HCCL"),
        Lowering("uint8", "via_int32", "HCCL does not reduce uint8; reduce int32, cast back"),
        Lowering("bool", "via_int32", "HCCL does not reduce bool; reduce int32, cast back"),
        Lowering("float64", "refuse", "HCCL reduces float64 on the 950 alone; cast to float32"),
        Lowering("uint64", "refuse", "HCCL reduces uint64 on the 950 alone; cast to int64"),
    ),
    uneven=True,
    visible_env=("ASCEND_RT_VISIBLE_DEVICES",),
    env={
        "HCCL_IF_IP": "address of the interface HCCL connects through",
        "HCCL_SOCKET_IFNAME": "names of interfaces HCCL may use",
        "HCCL_CONNECT_TIMEOUT": "seconds to connect, 120 unless set",
        "HCCL_EXEC_TIMEOUT": "seconds an operation may take, 1800 unless set",
        "HCCL_BUFFSIZE": "communication buffer in MB",
        "HCCL_ASYNC_ERROR_HANDLING": "whether a watchdog reports failures",
        "RANK_TABLE_FILE": "absolute path of a rank table",
    },
    libraries={
        "libhccl": "source the set_env.sh of the CANN toolkit (and of nnal) in this shell",
        "libascendcl": "source the set_env.sh of the CANN toolkit in this shell",
        "libacl_op_compiler": "source the set_env.sh of the CANN toolkit in this shell",
        "libge_runner": "source the set_env.sh of the CANN toolkit in this shell",
        "libgraph": "source the set_env.sh of the CANN toolkit in this shell",
        "ASCEND_OPP_PATH": "source the set_env.sh of the CANN toolkit in this shell",
    },
    device_nodes=("dev/davinci[0-9]*",),
    tool="npu-smi",
    claims=(
        LinkClaim(
            "910B", 392 * GB, "bidirectional", "device", "third-party",
            "tables of others, contested (one reads about 90 per part); the page cited for it "
            "could not be read",
        ),
        LinkClaim(
            "910C", 784 * GB, "bidirectional", "device", "vendor-document",
            "Atlas 900 A3 page; arXiv 2506.12708 states 392 per direction",
        ),
        LinkClaim(
            "910C RoCE", 50 * GB, "unidirectional", "device", "vendor-document",
            "arXiv 2506.12708",
        ),
        LinkClaim(
            "950", 2016 * GB, "bidirectional", "device", "vendor-document",
            "Ascend 950 white paper, UB 2.0",
        ),
    ),
    notes=(
        "the communicator is made by the first collective: a wrong interface shows there",
        "a forked child cannot use the device: start processes by spawn",
        "on 910A with CANN 8.3 all_to_all was seen to return zeros and success: run self_test()",
    ),
)  # fmt: skip

CAMBRICON = VendorSpec(
    backend="cncl",
    vendor="cambricon",
    title="Cambricon MLU",
    library="CNCL",
    c10d_name="cncl",
    module="torch_mlu",
    device="mlu",
    dispatch="privateuse1",
    grade="vendor-source",
    source="Cambricon/torch_mlu at d578002c (2024-09)",
    install_hint="install the vendor's torch_mlu wheel and Neuware",
    aliases=("cambricon", "mlu"),
    in_default_map=True,
    options={"is_high_priority_stream": (bool, "run on a stream of high priority")},
    options_path="torch_mlu._MLUC:ProcessGroupCNCL.Options",
    reduce_ops=ARITHMETIC,
    reduce_dtypes=INTEGERS | FLOATS,
    move_dtypes=INTEGERS | FLOATS,
    lowering=(
        average("CNCL"),
        *no_bits("CNCL"),
        Lowering("float64", "refuse", "CNCL sends float64 as float32 without a word"),
        Lowering("int16", "refuse", "CNCL has no int16; cast to int32"),
    ),
    uneven=True,
    visible_env=("MLU_VISIBLE_DEVICES",),
    env={
        "CNCL_ASYNC_ERROR_HANDLING": "whether a watchdog reports failures, off unless set",
        "CNCL_BLOCKING_WAIT": "whether wait() blocks the host",
        "NEUWARE_HOME": "where Neuware is installed",
    },
    libraries={
        "libcncl": "install Neuware and put its lib64 in LD_LIBRARY_PATH",
        "libcnrt": "install Neuware and put its lib64 in LD_LIBRARY_PATH",
        "libcndrv": "install the MLU driver",
    },
    device_nodes=("dev/cambricon_dev[0-9]*",),
    tool="cnmon",
    claims=(
        LinkClaim(
            "MLU370-X8", 200 * GB, "unstated", "device", "vendor-document",
            "launch coverage quoting the vendor",
        ),
        LinkClaim(
            "MLU290-M5", 600 * GB, "bidirectional", "device", "third-party",
            "6 ports x 8 lanes x 50 Gb/s x 2, in an article",
        ),
        LinkClaim("MLU590", None, "unstated", "device", "unverified", "no public figure found"),
    ),
    notes=("the public source has no autoload: `import torch_mlu` is required",),
)  # fmt: skip

MOORE_THREADS = VendorSpec(
    backend="mccl",
    vendor="moorethreads",
    title="Moore Threads",
    library="MCCL",
    c10d_name="mccl",
    module="torch_musa",
    device="musa",
    dispatch="privateuse1",
    grade="vendor-source",
    source="MooreThreads/torch_musa at 8b583b3f (2026-01)",
    install_hint="install the vendor's torch_musa wheel and the MUSA SDK",
    aliases=("moorethreads", "moore-threads", "musa"),
    in_default_map=False,
    reduce_ops=ARITHMETIC | {"avg"},
    reduce_dtypes=INTEGERS | FLOATS | {"float64"},
    lowering=no_bits("MCCL"),
    uneven=True,
    visible_env=("MUSA_VISIBLE_DEVICES",),
    env={
        "TORCH_MCCL_ASYNC_ERROR_HANDLING": "how a watchdog reports failures, 3 unless set",
        "TORCH_MCCL_BLOCKING_WAIT": "whether wait() blocks the host",
        "MCCL_DEBUG": "log level of the library",
    },
    libraries={
        "libmccl": "install the MUSA SDK and put its lib in LD_LIBRARY_PATH",
        "libmusart": "install the MUSA SDK and put its lib in LD_LIBRARY_PATH",
        "libmusa": "install the MUSA driver",
    },
    device_nodes=("dev/mtgpu.[0-9]*", "dev/mtgpu[0-9]*"),
    tool="mthreads-gmi",
    claims=(
        LinkClaim(
            "MTT S4000", 240 * GB, "bidirectional", "device", "third-party",
            "a curated public table; the direction is assumed there",
        ),
        LinkClaim(
            "MTT S5000", 784 * GB, "unstated", "device", "vendor-document",
            "vendor figure quoted by others",
        ),
    ),
    notes=(
        "registered for the letters of `musa`, not for the device: always pass the explicit map",
        "bfloat16 depends on how torch_musa was built",
        "MCCL_ALGO was seen to crash MCCL 2.11.4",
    ),
)  # fmt: skip

ENFLAME = VendorSpec(
    backend="eccl",
    vendor="enflame",
    title="Enflame GCU",
    library="ECCL",
    c10d_name="eccl",
    module="torch_gcu",
    device="gcu",
    dispatch="privateuse1",
    grade="vendor-document",
    source="vendor examples and support pages",
    install_hint="install the vendor's torch_gcu wheel and TopsRider",
    aliases=("enflame", "gcu"),
    reduce_ops=ARITHMETIC,
    reduce_dtypes=frozenset({"int32"}) | FLOATS,
    lowering=(
        average("ECCL"),
        *no_bits("ECCL"),
        Lowering("int64", "refuse", "torch_gcu casts int64 to 32 bits without a word"),
        Lowering("float64", "refuse", "torch_gcu casts float64 to 32 bits without a word"),
    ),
    visible_env=("TOPS_VISIBLE_DEVICES",),
    env={"TORCH_GCU_ENABLE_INT64_AND_UINT64": "keep 64-bit integers"},
    libraries={
        "libtopsrt": "put /opt/tops/lib in LD_LIBRARY_PATH",
        "libeccl": "put /opt/tops/lib in LD_LIBRARY_PATH",
    },
    device_nodes=("dev/gcu[0-9]*",),
    tool="efsmi",
    claims=(
        LinkClaim(
            "T20", 300 * GB, "bidirectional", "device", "vendor-document",
            "vendor's support pages and launch",
        ),
        LinkClaim("L600", 800 * GB, "unstated", "device", "third-party", "press"),
        LinkClaim(
            "S60", None, "unstated", "device", "vendor-document",
            "the manual states PCIe 5.0 x16 only",
        ),
    ),
    notes=("the dtypes of ECCL are not public: only those that examples reduce are let through",),
)  # fmt: skip

_BIREN_LOWERING = (average("BCCL"), *no_bits("BCCL"))

BIREN = VendorSpec(
    backend="bccl",
    vendor="biren",
    title="Biren",
    library="BCCL",
    c10d_name="bccl",
    module="torch_supa",
    device="supa",
    dispatch="privateuse1",
    grade="third-party",
    source="repositories that use torch_supa 2.x",
    install_hint="install the vendor's torch_supa wheel and the BIRENSUPA SDK",
    aliases=("biren", "supa"),
    options={"is_high_priority_stream": (bool, "run on a stream of high priority")},
    reduce_ops=ARITHMETIC,
    reduce_dtypes=frozenset({"int32"}) | FLOATS,
    lowering=_BIREN_LOWERING,
    libraries={"libbccl": "install the BIRENSUPA SDK and source its environment script"},
    tool="brsmi",
    claims=(
        LinkClaim("BR100", None, "unstated", "device", "unverified", "no sourced figure"),
        LinkClaim("BR104", None, "unstated", "device", "unverified", "no sourced figure"),
    ),
)

BIREN_1 = VendorSpec(
    backend="sccl",
    vendor="biren",
    title="Biren (torch_br 1.x)",
    library="SCCL",
    c10d_name="sccl",
    module="torch_br",
    device="supa",
    dispatch="privateuse1",
    grade="third-party",
    source="repositories that use torch_br 1.x",
    install_hint="install the vendor's torch_br wheel and the BIRENSUPA SDK",
    aliases=("torch-br",),
    reduce_ops=ARITHMETIC,
    reduce_dtypes=frozenset({"int32"}) | FLOATS,
    lowering=_BIREN_LOWERING,
    tool="brsmi",
)

TECORIGIN = VendorSpec(
    backend="tccl",
    vendor="tecorigin",
    title="Tecorigin SDAA",
    library="TCCL",
    c10d_name="tccl",
    module="torch_sdaa",
    device="sdaa",
    dispatch="privateuse1",
    grade="third-party",
    source="huggingface/accelerate state.py: names only",
    install_hint="install the vendor's torch_sdaa wheel",
    aliases=("sdaa", "tecorigin"),
    reduce_ops=ARITHMETIC,
    reduce_dtypes=frozenset({"int32"}) | FLOATS,
    lowering=(average("TCCL"), *no_bits("TCCL")),
)

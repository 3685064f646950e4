"""Signs of vendors on invented hosts, whose torch it is, and the order of `auto`."""

import dataclasses

import pytest

from sagellm.comm.domestic import VENDORS, HostView, choose_vendor, find_vendor
from sagellm.comm.domestic.cuda_alias import TorchBuild, classify_cuda, read_torch_build
from sagellm.comm.domestic.detect import probe_vendor, sight
from sagellm.core.protocols import ConfigError, Probe


@pytest.fixture
def host(tmp_path):
    """Builds a host: installed modules, files below the root, tools, torch's version file."""

    def build(modules=(), files=(), tools=(), torch="", environ=None, texts=None):
        for name in files:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text((texts or {}).get(name, ""))
        version = tmp_path / "torch" / "version.py"
        version.parent.mkdir(exist_ok=True)
        version.write_text(torch)
        return HostView(
            environ=environ or {},
            root=tmp_path,
            find_module=lambda name: name in modules,
            distribution_version=lambda name: None,
            autoloads=lambda: tuple(modules),
            which=lambda name: f"/usr/bin/{name}" if name in tools else None,
            torch_version_file=lambda: version,
            loaded=lambda name: False,
        )

    return build


def test_a_plug_in_with_a_device_node_is_available(host):
    view = host(modules=["torch_npu"], files=["dev/davinci0", "dev/davinci_manager"])
    seen = sight(find_vendor("hccl"), view)

    assert seen.nodes == ("/dev/davinci0",)
    assert seen.autoloads
    probe = probe_vendor(find_vendor("hccl"), view)
    assert probe.available
    assert "/dev/davinci0" in probe.reason


def test_a_tool_is_a_sign_too_also_off_path(host):
    row = find_vendor("metax")
    torch = "__version__ = '2.6.0'\nmaca: str = '3.0'\ncuda = '11.6'\n"

    assert not probe_vendor(row, host(torch=torch)).available
    assert probe_vendor(row, host(torch=torch, tools=["mx-smi"])).available
    assert probe_vendor(row, host(torch=torch, files=["opt/maca/bin/mx-smi"])).available


def test_a_missing_plug_in_is_named(host):
    probe = probe_vendor(find_vendor("cncl"), host(files=["dev/cambricon_dev0"]))

    assert probe == Probe(False, "torch_mlu is not installed")


@pytest.mark.parametrize("name", ["hccl", "tccl"])
def test_a_plug_in_without_a_sign_of_a_device_is_not_taken_for_one(host, name):
    row = find_vendor(name)
    probe = probe_vendor(row, host(modules=[row.module]))

    assert not probe.available
    assert "nothing shows a device" in probe.reason
    assert f"import {row.module} first" in probe.reason


@pytest.mark.parametrize(
    ("build", "vendor"),
    [
        (TorchBuild("2.6.0", hip="6.1", archs=("gfx936",)), "hygon"),
        (TorchBuild("2.6.0", hip="6.1", archs=("gfx906",)), "amd"),
        (TorchBuild("2.6.0", hip="6.1", archs=("gfx906",), hygon_signs=("/opt/dtk",)), "hygon"),
        (TorchBuild("2.6.0", hip="6.1", device_name="K100_AI"), "hygon"),
        (TorchBuild("2.6.0", hip="6.1", archs=("gfx942",)), "amd"),
        (TorchBuild("2.6.0", cuda="11.6", maca="3.0.0"), "metax"),
        (TorchBuild("2.6.0+metax3.0", cuda="11.6"), "metax"),
        (TorchBuild("2.6.0", cuda="12.4", xmlir=True), "kunlun"),
        (TorchBuild("2.6.0", cuda="10.2", corex=True), "iluvatar"),
        (TorchBuild("2.6.0", cuda="10.2", device_name="Iluvatar BI-V150"), "iluvatar"),
        (TorchBuild("2.6.0", cuda="12.4"), "nvidia"),
        (TorchBuild("2.6.0+cpu"), None),
        (TorchBuild(), None),
    ],
)
def test_whose_torch_answers_to_cuda(build, vendor):
    assert classify_cuda(build).vendor == vendor


def test_torchs_build_is_read_without_importing_it(host):
    node = "sys/class/kfd/kfd/topology/nodes/1/properties"
    text = "gfx_target_version 90306\nvendor_id 7572\nname\n"
    torch = (
        "from typing import Optional\n__version__ = '2.4.1+das.opt1'\n"
        "cuda: Optional[str] = None\nhip: Optional[str] = '6.1.25'\n"
    )
    build = read_torch_build(host(torch=torch, files=[node], texts={node: text}))

    assert build.archs == ("gfx936",)
    assert build.hip == "6.1.25"
    assert build.cuda is None
    assert len(build.hygon_signs) == 2
    assert read_torch_build(host(torch="not python (")).version == ""
    assert read_torch_build(host(environ={"COREX_HOME": "/x"})).corex


def test_the_installed_torch_is_nobodys_here():
    assert classify_cuda(read_torch_build(HostView.local())).vendor in (None, "nvidia", "amd")


def test_the_setting_comes_first(host):
    view = host(environ={"SAGELLM_COMM_BACKEND": "cncl"}, modules=["torch_npu"], tools=["npu-smi"])
    choice = choose_vendor(view, probe=None)

    assert choice.row is find_vendor("cncl")
    assert set(choice.refused) == set(VENDORS) - {"cncl"}
    with pytest.raises(ConfigError, match="no domestic backend 'x'"):
        choose_vendor(host(environ={"SAGELLM_COMM_BACKEND": "x"}))


def test_whoever_is_behind_cuda_comes_before_plug_ins(host):
    torch = "__version__ = '2.6.0'\nmaca = '3.0'\n"
    view = host(torch=torch, modules=["torch_npu"], tools=["mx-smi", "npu-smi"])
    choice = choose_vendor(view, probe=None)

    assert choice.row is find_vendor("metax")
    assert "torch belongs to MetaX" in choice.refused["hccl"]
    assert choice.explain().startswith("metax: torch.version.maca is 3.0")


def test_installed_plug_ins_are_asked_those_with_a_sign_first(host):
    asked = []

    def ask(row):
        asked.append(row.backend)
        return Probe(row.backend == "cncl", f"{row.backend} was asked")

    view = host(modules=["torch_npu", "torch_mlu", "torch_musa"], tools=["mthreads-gmi"])
    choice = choose_vendor(view, probe=ask)

    assert asked == ["mccl", "hccl", "cncl"]
    assert choice.row is find_vendor("cncl")
    assert choice.refused["mccl"] == "mccl was asked"
    assert "torch_gcu is not installed" in choice.refused["eccl"]
    assert set(choice.refused) == set(VENDORS) - {"cncl"}


def test_a_host_without_any_says_why_for_each(host):
    choice = choose_vendor(host(torch="__version__ = '2.13.0+cpu'\ncuda = None\n"))

    assert choice.row is None
    assert set(choice.refused) == set(VENDORS)
    assert len(choice.explain().splitlines()) == 1 + len(VENDORS)


def test_a_view_is_data(host):
    assert dataclasses.replace(host(), environ={"A": "1"}).environ == {"A": "1"}

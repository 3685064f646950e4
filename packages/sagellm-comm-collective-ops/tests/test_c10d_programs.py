"""Torch's own layers over `torch.distributed` run on a group of ours as on any other."""

import copy
import re
import shutil
import socket
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import sagellm.comm.collective_ops as package

HOSTS = [[0, 2], [1, 3]]


def same(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def model():
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def batch(size):
    torch.manual_seed(11)
    return torch.randn(2 * size, 8)


def my_share(size):
    return batch(size).chunk(size)[dist.get_rank()]


def gradients(net):
    return [p.grad for p in net.parameters()]


def one_process_gradients(size):
    net = model()
    net(batch(size)).square().mean().backward()
    return gradients(net)


# -- data parallel --------------------------------------------------------------------------


def ddp(groups, ours):
    g = groups[ours]
    size = dist.get_world_size(g)
    net = nn.parallel.DistributedDataParallel(model(), process_group=g, bucket_cap_mb=1e-4)
    net(my_share(size)).square().mean().backward()
    for got, wanted in zip(gradients(net.module), one_process_gradients(size), strict=True):
        same(got, wanted)
    with net.no_sync():
        net(my_share(size)).sum().backward()


@pytest.mark.parametrize("ours", ["sagellm", "sagellm_gloo"])
def test_ddp_gradients_equal_those_of_one_process(c10d_worlds, ours):
    c10d_worlds(2).run(ddp, ours)


def test_ddp_gradients_over_hosts_equal_those_of_one_process(c10d_worlds):
    c10d_worlds(4, HOSTS).run(ddp, "sagellm")


def fsdp(groups, size):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("dp",))
    single, net = model(), model()
    for layer in (net[0], net[2], net):
        fully_shard(layer, mesh=mesh)
    ours = torch.optim.SGD(net.parameters(), lr=0.1)
    theirs = torch.optim.SGD(single.parameters(), lr=0.1)
    for _ in range(2):
        net(my_share(size)).square().mean().backward()
        single(batch(size)).square().mean().backward()
        ours.step(), theirs.step()
        ours.zero_grad(), theirs.zero_grad()
    for got, wanted in zip(net.parameters(), single.parameters(), strict=True):
        same(got.full_tensor(), wanted)


@pytest.mark.skipif(torch.__version__.startswith("2.6"), reason="FSDP2 of torch 2.6 needs a device")
@pytest.mark.parametrize("size", [2, 3])
def test_an_fsdp2_training_step_equals_one_process(c10d_worlds, size):
    c10d_worlds(size).run(fsdp, size)


# -- tensors that know their mesh -----------------------------------------------------------


def dtensor(groups):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    size, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("tp",))
    whole = torch.arange(8.0 * size).view(2 * size, 4)
    sharded = distribute_tensor(whole, mesh, [Shard(0)])
    same(sharded.redistribute(placements=[Replicate()]).to_local(), whole)
    columns = sharded.redistribute(placements=[Shard(1)])
    same(columns.full_tensor(), whole)
    part = DTensor.from_local(torch.full((2 * size, 2), 1.0 + rank), mesh, [Partial()])
    total = float(sum(range(1, size + 1)))
    same(part.redistribute(placements=[Replicate()]).to_local(), torch.full((2 * size, 2), total))
    same(part.redistribute(placements=[Shard(0)]).to_local(), torch.full((2, 2), total))


def test_dtensors_are_redistributed(c10d_worlds):
    c10d_worlds(2).run(dtensor)


def mesh_of_two_dimensions(groups):
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    found = []
    for name in ("dp", "tp"):
        x = torch.full((1,), float(10 ** dist.get_rank()))
        dist.all_reduce(x, group=mesh.get_group(name))
        found.append(x.item())
    return found


def test_a_mesh_has_groups_of_ours_along_each_dimension(c10d_worlds):
    found = c10d_worlds(4, HOSTS).run(mesh_of_two_dimensions)
    assert found == [[101.0, 11.0], [1010.0, 11.0], [101.0, 1100.0], [1010.0, 1100.0]]


# -- functional collectives, compiled and not -----------------------------------------------


def functional(groups, ours):
    import torch.distributed._functional_collectives as fc

    g = groups[ours]
    size, rank = dist.get_world_size(g), dist.get_rank(g)
    x = torch.arange(2.0 * size) + rank
    total = sum(torch.arange(2.0 * size) + r for r in range(size))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same(fc.all_reduce(x, "sum", g), total)
        same(fc.all_reduce(x, "avg", g), total / size)
        same(fc.all_gather_tensor(x, 0, g), torch.cat([x - rank + r for r in range(size)]))
        same(fc.reduce_scatter_tensor(x, "sum", 0, g), total.chunk(size)[rank])
        same(fc.broadcast(x, 0, g), x - rank)
        wanted = torch.cat([(x - rank + r).chunk(size)[rank] for r in range(size)])
        same(fc.all_to_all_single(x, None, None, g), wanted)
        same(fc.all_reduce_coalesced([x, x], "sum", g)[1], total)
        both = fc.all_gather_into_tensor_coalesced([x, x], g)
        same(both[0], torch.cat([x - rank + r for r in range(size)]))
        parts = fc.reduce_scatter_tensor_coalesced([x, x], "sum", [0, 0], g)
        same(parts[1], total.chunk(size)[rank])


@pytest.mark.parametrize("ours", ["sagellm", "sagellm_gloo"])
def test_functional_collectives(c10d_worlds, ours):
    c10d_worlds(2).run(functional, ours)


def compiled(groups, compiler):
    import torch.distributed._functional_collectives as fc

    g = groups["sagellm"]

    def by_function(x):
        return fc.all_reduce(x * 2, "sum", g) + 1

    def in_place(x):
        y = x * 2
        dist.all_reduce(y, group=g)
        return y + 1

    for fn in (by_function, in_place):
        same(torch.compile(fn, backend=compiler)(torch.ones(4)), torch.full((4,), 5.0))


def test_compiled_programs_call_it(c10d_worlds):
    c10d_worlds(2).run(compiled, "aot_eager")


def fused(groups):
    """Compiled in this process: a pool of compilers would be a process tree per rank."""
    import torch._inductor.config as config
    import torch.distributed._functional_collectives as fc

    g, size = groups["sagellm"], 2

    def fn(x):
        y = fc.all_reduce(x * 2, "sum", g) + 1
        z = fc.all_gather_tensor(y.relu(), 0, g)
        return fc.reduce_scatter_tensor(z * 3, "sum", 0, g)

    settings = {"compile_threads": 1}
    if hasattr(config, "cpp_cache_precompile_headers"):  # takes minutes for one small kernel
        settings["cpp_cache_precompile_headers"] = False
    x = torch.arange(4.0) - 2 + dist.get_rank()
    with config.patch(settings):
        got = torch.compile(fn, backend="inductor", fullgraph=True)(x)
    wanted = (2 * (2 * (torch.arange(4.0) - 2) + 1) + 1).relu() * 3 * size
    same(got, wanted)


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
def test_inductor_compiles_programs_that_call_it(c10d_worlds):
    c10d_worlds(2).run(fused, timeout_s=110.0)


# -- pipelines ------------------------------------------------------------------------------


def pipeline(groups):
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    size, rank = dist.get_world_size(), dist.get_rank()
    torch.manual_seed(3)
    layers = [nn.Linear(4, 4) for _ in range(size)]
    x = torch.randn(6, 4)
    example = torch.zeros(2, 4)
    stage = PipelineStage(
        copy.deepcopy(layers[rank]), rank, size, torch.device("cpu"), input_args=(example,),
        output_args=(example,),
    )  # fmt: skip
    schedule = ScheduleGPipe(stage, n_microbatches=3)
    out = schedule.step(x) if rank == 0 else schedule.step()
    wanted = x
    for layer in layers:
        wanted = layer(wanted)
    if rank == size - 1:
        same(out, wanted)


def test_a_pipeline_runs_its_stages_on_it(c10d_worlds):
    c10d_worlds(2).run(pipeline)


# -- the README -----------------------------------------------------------------------------


def test_the_readmes_program_runs(monkeypatch):
    text = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
    program = re.search(r"## Any PyTorch program\n+```python\n(.*?)```", text, re.DOTALL)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in {**world, "GLOO_SOCKET_IFNAME": "lo"}.items():
        monkeypatch.setenv(name, value)

    names = {}
    try:
        exec(program[1], names)
        assert names["x"].tolist() == [1.0] * 4
        assert dist.get_backend() == "sagellm"
    finally:
        dist.destroy_process_group()


# -- the registration -----------------------------------------------------------------------


def test_registering_again_is_nothing_but_with_other_arguments_an_error():
    package.register_c10d_backend("sagellm_twice", backend="gloo")
    package.register_c10d_backend("SAGELLM_twice", backend="gloo")

    with pytest.raises(package_error(), match=r"sagellm_twice.*take another name"):
        package.register_c10d_backend("sagellm_twice")


@pytest.mark.parametrize("name", ["gloo", "nccl"])
def test_the_names_of_torchs_libraries_are_taken(name):
    with pytest.raises(package_error(), match=rf"{name}.*take another name"):
        package.register_c10d_backend(name)


def test_a_name_that_torch_would_misread_is_refused():
    with pytest.raises(package_error(), match="letters, digits and _ only"):
        package.register_c10d_backend("cpu:mine")


def package_error():
    from sagellm.core.protocols import ConfigError

    return ConfigError

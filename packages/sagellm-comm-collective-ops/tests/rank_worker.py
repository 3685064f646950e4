"""One rank of the tests' pool: runs functions of test files until its pipe closes."""

import importlib.util
import sys
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection


def load(path, modules):
    if path not in modules:
        spec = importlib.util.spec_from_file_location(f"ranked_{len(modules)}", path)
        modules[path] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(modules[path])
    return modules[path]


def main():
    import torch.distributed as dist

    from sagellm.comm.collective_ops import GlooBackend

    pipe = Connection(int(sys.argv[1]))
    rank, size, path = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    dist.init_process_group(
        "gloo",
        init_method=f"file://{path}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=30),
    )
    backend = GlooBackend(timeout_s=20)
    modules = {}
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        if task is None:
            return
        file, name, args = task
        try:
            pipe.send((True, getattr(load(file, modules), name)(backend, *args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


if __name__ == "__main__":
    main()

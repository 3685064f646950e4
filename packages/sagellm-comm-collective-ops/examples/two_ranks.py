"""Two ranks of one process: results, a late rank, and what a hook sees.

python examples/two_ranks.py

The same functions run unchanged over gloo or NCCL under torchrun: hand them
`create_comm_backend("auto")` instead of a mock backend.
"""

import torch

from sagellm.comm.collective_ops import MockBackend, MockWorld, fused_all_reduce
from sagellm.core.protocols import CommTimeoutError


def tensor_parallel_step(backend: MockBackend) -> float:
    """Half a matrix product on each rank, summed."""
    x = torch.ones(4, 8)
    weight = torch.full((8 // backend.size, 3), 1.0)
    partial = x.chunk(backend.size, dim=1)[backend.rank] @ weight
    work = backend.all_reduce(partial, async_op=True)
    return float(work.wait().sum())


def many_small_tensors(backend: MockBackend) -> int:
    """Two hundred reductions in one bucket."""
    fused_all_reduce(backend, [torch.ones(100) for _ in range(200)])
    return backend.get_stats().ops["all_reduce"].calls


def main() -> None:
    """Print what each part gives."""
    world = MockWorld(2, timeout_s=5)
    print("sum of a split product:", world.run(tensor_parallel_step))
    print("all_reduce calls for 201 tensors:", world.run(many_small_tensors))
    print("bytes rank 0 would have sent round a ring:", world.sent_bytes(0))

    late = MockWorld(2, timeout_s=0.2)
    try:
        late.run(lambda b: b.barrier() if b.rank == 0 else None)
    except CommTimeoutError as e:
        print("deadline:", e)


if __name__ == "__main__":
    main()

"""The same program on an Ascend NPU, or on an emulated one where there is none.

python examples/emulated_ascend.py
torchrun --nproc-per-node 2 examples/emulated_ascend.py
"""

from sagellm.comm.domestic import choose_vendor, create_domestic_backend, emulate, preflight


def main() -> None:
    """Reduce a tensor, and show what is refused and why."""
    if choose_vendor().row is None:
        emulate("hccl")  # CPU bytes and gloo beneath; a real device needs no such line
    for finding in preflight("hccl"):
        print(f"{finding.severity}: {finding.variable} {finding.message}")
    with create_domestic_backend("auto", self_test=True) as backend:
        x = backend.empty((4,), dtype=float32()).fill_(backend.rank + 1.0)
        backend.all_reduce(x, "avg")
        print(f"rank {backend.rank} of {backend.size} on {backend.device}: {x.cpu().tolist()}")
        print(backend.efficiency("910C", 100e9).reason)
        print(f"{backend.library}: {backend.row.status}")


def float32():  # noqa: ANN201  # a torch.dtype
    """Torch's float32; torch is imported by the backend, not before it."""
    import torch

    return torch.float32


if __name__ == "__main__":
    main()

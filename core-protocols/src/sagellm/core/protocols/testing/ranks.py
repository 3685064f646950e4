"""What a check of the comm-backend suite sees on one rank, and the oracle it compares with.

Inputs are small integers that every rank can compute for every other, so that sums are exact
in every dtype and the expected values come from numpy, never from another collective.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sagellm.core.protocols.comm_backend import CommBackendProtocol
from sagellm.core.protocols.errors import CommTimeoutError, UnsupportedOperationError
from sagellm.core.protocols.work import Work

from .contract import Refused

__all__ = ["DTYPES", "REDUCE_OPS", "Ranks", "expect_equal", "expect_raises", "require", "values"]

T = TypeVar("T")

DTYPES = (
    "float32", "float64", "float16", "bfloat16", "int8", "uint8", "int16", "int32", "int64", "bool",
)  # fmt: skip
REDUCE_OPS = ("sum", "avg", "min", "max", "product", "band", "bor", "bxor")


def values(rank: int, shape: Sequence[int] | int, salt: int = 0) -> NDArray[np.int64]:
    """Rank's input as integers of 0..3, never all equal between ranks."""
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    count = int(np.prod(shape, dtype=np.int64))
    index = np.arange(count, dtype=np.int64)
    flat = (index * (rank + 3) + (index // 5) * 7 + rank * 2 + salt * 3 + 1) % 4
    found: NDArray[np.int64] = flat.reshape(shape)
    return found


def as_tensor(x: NDArray[Any], dtype: str, device: str) -> Tensor:  # Any: bool, int or float
    """A tensor of torch dtype `dtype`."""
    return torch.from_numpy(np.array(x, order="C")).to(getattr(torch, dtype)).to(device)


def reduced(op: str, inputs: Sequence[NDArray[Any]], dtype: str) -> NDArray[Any]:
    """What the ranks' inputs reduce to, before rounding to the dtype."""
    stacked = np.stack(inputs)
    if dtype == "bool":
        stacked = stacked.astype(bool)
        if op in ("sum", "max", "bor"):
            return np.asarray(stacked.any(axis=0))
        if op in ("product", "min", "band"):
            return np.asarray(stacked.all(axis=0))
        return np.asarray(np.logical_xor.reduce(stacked, axis=0))
    if op == "avg":
        return np.asarray(stacked.mean(axis=0))
    ufuncs = {
        "sum": np.add, "min": np.minimum, "max": np.maximum, "product": np.multiply,
        "band": np.bitwise_and, "bor": np.bitwise_or, "bxor": np.bitwise_xor,
    }  # fmt: skip
    return np.asarray(ufuncs[op].reduce(stacked, axis=0))


def expect_equal(found: object, expected: NDArray[Any] | Tensor, what: str) -> None:
    """Raise AssertionError unless a tensor has the expected values, rounded to its dtype."""
    if not isinstance(found, Tensor):
        raise AssertionError(f"{what}: got a {type(found).__name__}, not a tensor")
    wanted = expected if isinstance(expected, Tensor) else torch.from_numpy(expected)
    wanted = wanted.to(found.device, found.dtype)
    if tuple(found.shape) != tuple(wanted.shape):
        raise AssertionError(f"{what}: shape {tuple(found.shape)}, not {tuple(wanted.shape)}")
    if found.dtype.is_floating_point:
        same = torch.isclose(found.double(), wanted.double(), rtol=1e-2, atol=1e-3)
    else:
        same = found == wanted
    if not bool(same.all()):
        wrong = int((~same).sum())
        where = [int(i) for i in (~same).nonzero()[0]] if found.dim() else []
        raise AssertionError(
            f"{what}: {wrong} of {found.numel()} elements are wrong, the first at {where}: "
            f"{found[tuple(where)].item()} instead of {wanted[tuple(where)].item()}"
        )


def require(holds: object, what: str) -> None:
    """Raise AssertionError with `what` unless something holds, whatever Python's options are."""
    if not holds:
        raise AssertionError(what)


def expect_raises(kind: type[BaseException] | tuple[type[BaseException], ...], what: str,
                  call: Callable[[], object]) -> BaseException:  # fmt: skip
    """The exception of a call that has to raise `kind`."""
    try:
        result = call()
    except kind as e:
        return e
    raise AssertionError(f"{what}: nothing was raised; the result is {result!r}")


@dataclass
class Ranks:
    """One rank of a group under test.

    Attributes:
        backend: The group.
        rank: This rank.
        size: Ranks.
        timeout_s: The group's own deadline.
        meet: Path prefix that only this check's ranks share.

    """

    backend: CommBackendProtocol
    rank: int
    size: int
    timeout_s: float
    meet: str

    @property
    def others(self) -> list[int]:
        """The other ranks."""
        return [r for r in range(self.size) if r != self.rank]

    @property
    def device(self) -> str:
        """Device for inputs."""
        return self.backend.device_type

    def input(self, rank: int, shape: Sequence[int] | int, dtype: str, salt: int = 0) -> Tensor:
        """Input of any rank, fresh."""
        return as_tensor(values(rank, shape, salt), dtype, self.device)

    def mine(self, shape: Sequence[int] | int, dtype: str = "float32", salt: int = 0) -> Tensor:
        """This rank's input, fresh."""
        return self.input(self.rank, shape, dtype, salt)

    def attempt(self, *names: str, call: Callable[[], T]) -> T:
        """The result of a call that the backend may refuse, if it refuses by name.

        Args:
            *names: Operation, then reduction and dtype where they matter. The backend's message
                has to name one that its capabilities do not list.
            call: Makes the call.

        """
        try:
            return call()
        except UnsupportedOperationError as e:
            have = self.backend.capabilities
            claimed = {*have.ops, *have.reduce_ops, *have.dtypes}
            unclaimed = [n for n in names if n not in claimed]
            if not unclaimed:
                raise AssertionError(f"capabilities list {names}, but it was refused: {e}") from e
            if not any(n in str(e) for n in unclaimed):
                raise AssertionError(f"a refusal of {unclaimed} names none of them: {e}") from e
            raise Refused(str(e)) from e

    def each_way(
        self, call: Callable[[bool], Any], *names: str
    ) -> Iterator[tuple[str, Any]]:  # Any: results differ by operation
        """Results of a call made synchronously and asynchronously, with what to call them.

        `call(async_op)` makes fresh tensors every time.
        """
        result = self.attempt(*names, call=lambda: call(False))
        yield f"{names[0]}", result
        work = call(True)
        if not isinstance(work, Work):
            raise AssertionError(f"{names[0]} with async_op=True gave a {type(work).__name__}")
        result = work.wait(self.timeout_s)
        if not work.done() or work.exception() is not None:
            raise AssertionError(f"{names[0]}: after wait, done is {work.done()}")
        yield f"{names[0]} with async_op", result

    # -- apart from the group under test ---------------------------------------------------

    def signal(self, name: str) -> None:
        """Tell the other ranks something, without using the group."""
        Path(f"{self.meet}.{name}.{self.rank}").touch()

    def await_signal(self, name: str, ranks: Sequence[int], timeout_s: float = 20.0) -> None:
        """Wait until ranks have signalled, or one has failed its check."""
        wanted = [Path(f"{self.meet}.{name}.{r}") for r in ranks]
        failures = [(r, Path(f"{self.meet}.failed.{r}")) for r in self.others]
        deadline = time.monotonic() + timeout_s
        while not all(p.exists() for p in wanted):
            failed = [r for r, path in failures if path.exists()]
            if failed:
                raise CommTimeoutError(f"rank {failed} failed before it signalled {name!r}")
            if time.monotonic() > deadline:
                late = [r for r, p in zip(ranks, wanted, strict=True) if not p.exists()]
                raise CommTimeoutError(f"ranks {late} did not signal {name!r} in {timeout_s:g} s")
            time.sleep(0.002)  # polling a file: there is no other channel that all runners have

    def meet_all(self, name: str) -> None:
        """Wait for all ranks, without using the group."""
        self.signal(name)
        self.await_signal(name, range(self.size))

"""Every error a sagellm.comm package raises on purpose.

* CommError
  + ConfigError (ValueError, `invalid_argument`): can never work as asked
  + BackendUnavailableError (RuntimeError, `unavailable`): a library or device is missing here
  + CommTimeoutError (TimeoutError, `comm_timeout`): not finished in time
  + PeerLostError (ConnectionError, `peer_lost`): a rank is gone
  + CollectiveMismatchError (RuntimeError, `mismatch`): ranks made different calls
  + LayoutMismatchError (ValueError, `layout_mismatch`): two KV layouts do not fit
  + IntegrityError (OSError, `integrity`): bytes arrived changed
  + AuthenticationError (PermissionError, `unauthenticated`): the peer did not prove itself
  + ResourceError (MemoryError, `resource_exhausted`): a bound or the machine is full
  + UnsupportedOperationError (NotImplementedError, `not_implemented`): no such operation here
  + KVTransferError (RuntimeError, `kv_transfer_failed`): one KV transfer failed
  + DistributedRuntimeError (RuntimeError, `distributed_runtime_error`): the library beneath failed

Each class also derives from the builtin it specialises, so a caller may catch either. `code`
is stable across versions and languages; it is what metrics and wire messages carry. An error
that is none of these is a bug in this project.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

__all__ = [
    "AuthenticationError",
    "BackendUnavailableError",
    "CollectiveMismatchError",
    "CommError",
    "CommTimeoutError",
    "ConfigError",
    "DistributedRuntimeError",
    "IntegrityError",
    "KVTransferError",
    "LayoutMismatchError",
    "PeerLostError",
    "ResourceError",
    "UnsupportedOperationError",
    "error_from_code",
]


class CommError(Exception):
    """Root of the hierarchy; catching it catches every error raised on purpose.

    Attributes:
        code: Stable identifier of the kind of failure.

    """

    code: ClassVar[str] = "comm_error"


class ConfigError(CommError, ValueError):
    """An argument or setting that can never work, whatever the network does."""

    code = "invalid_argument"


class BackendUnavailableError(CommError, RuntimeError):
    """The backend is known, but what it needs is missing here.

    The message names the missing piece and the `pip install` line, driver or setting that
    brings it.
    """

    code = "unavailable"


class CommTimeoutError(CommError, TimeoutError):
    """A wait ended before the work did; the work itself may still finish."""

    code = "comm_timeout"


class PeerLostError(CommError, ConnectionError):
    """A rank stopped answering; its group, or the transfer with it, cannot be used again.

    Attributes:
        rank: Global rank or node id of the lost peer; None when it cannot be told.

    """

    code = "peer_lost"

    def __init__(self, message: str = "", *, rank: int | None = None) -> None:
        super().__init__(message or f"rank {'?' if rank is None else rank} stopped answering")
        self.rank = rank


class CollectiveMismatchError(CommError, RuntimeError):
    """Ranks of one group made different calls at the same position of their call order.

    Attributes:
        calls: What each rank called, keyed by its rank in the group.

    """

    code = "mismatch"

    def __init__(self, message: str, *, calls: dict[int, str] | None = None) -> None:
        super().__init__(message)
        self.calls = dict(calls or {})


class LayoutMismatchError(CommError, ValueError):
    """Two sides hold KV caches that cannot be mapped onto each other.

    Attributes:
        ours: This side's layout, printed.
        theirs: The peer's layout, printed.

    """

    code = "layout_mismatch"

    def __init__(self, message: str, *, ours: str = "", theirs: str = "") -> None:
        detail = f"; ours: {ours}; theirs: {theirs}" if ours or theirs else ""
        super().__init__(message + detail)
        self.ours = ours
        self.theirs = theirs


class IntegrityError(CommError, OSError):
    """Bytes that arrived, or a file that was read, are not what was sent or written."""

    code = "integrity"


class AuthenticationError(CommError, PermissionError):
    """The other side of a connection did not prove that it knows the key."""

    code = "unauthenticated"


class ResourceError(CommError, MemoryError):
    """A stated bound, or the machine itself, has no room for the request."""

    code = "resource_exhausted"


class UnsupportedOperationError(CommError, NotImplementedError):
    """The backend lacks the operation, reduction or dtype, and no documented rule lowers it."""

    code = "not_implemented"


class KVTransferError(CommError, RuntimeError):
    """One KV transfer failed; the channel and its other transfers go on.

    Attributes:
        key: (transfer id, attempt) of the failed transfer.
        cause: The `code` of what went wrong beneath, such as `peer_lost`.
        invalid_blocks: Destination blocks whose content must not be used, of all groups together.
        invalid_by_group: The same by cache group.

    """

    code = "kv_transfer_failed"

    def __init__(
        self,
        message: str,
        *,
        key: tuple[str, int] | None = None,
        cause: str = "kv_transfer_failed",
        invalid_blocks: Sequence[int] = (),
        invalid_by_group: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        super().__init__(message)
        self.key = key
        self.cause = cause
        self.invalid_blocks = tuple(invalid_blocks)
        self.invalid_by_group = {g: tuple(ids) for g, ids in (invalid_by_group or {}).items()}


class DistributedRuntimeError(CommError, RuntimeError):
    """The communication library beneath reported a failure that has no name of its own here."""

    code = "distributed_runtime_error"


def error_from_code(code: str, message: str) -> CommError:
    """The error that a peer named by its stable code; an unknown code keeps its name in the text.

    >>> error_from_code("peer_lost", "rank 3 left")
    PeerLostError('rank 3 left')
    >>> error_from_code("from_the_future", "odd")
    DistributedRuntimeError('from_the_future: odd')
    """
    for cls in CommError.__subclasses__():
        if cls.code == code:
            return cls(message)
    return DistributedRuntimeError(f"{code}: {message}")

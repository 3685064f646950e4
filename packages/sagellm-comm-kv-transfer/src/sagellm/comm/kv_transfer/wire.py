"""Control messages: what two channels say to each other, and how it is framed.

A message is a 4-byte big-endian length and a msgpack map with a `type`. Nothing is ever unpickled.

Each side states the oldest and the newest version it speaks; the newest common one holds for the
link. Within a version fields may be added that have a default; whoever does not know a field
ignores it. A type of message is added with a version and sent over links of that version or a
newer one, unless it has a field `optional: true`: then whoever does not know it ignores it. Any
other unknown type ends the link, with its name in the error.

"I" is the side that opened the link, "A" the one that accepted it; "S" sends blocks and "R"
receives them. Transfer ids (`tid`) mean something on this link only and are never used again:
I gives out those below `INVITED`, A the others, each in rising order.
"""

from __future__ import annotations

import struct
import typing
from collections.abc import Iterator

import msgspec

from sagellm.core.protocols import DistributedRuntimeError, KVLayout

from .plan import Part

__all__ = [
    "INVITED",
    "MAX_HANDSHAKE_BYTES",
    "PROTOCOL",
    "VERSIONS",
    "BasisOffer",
    "BasisPiece",
    "BasisRefused",
    "BasisWanted",
    "Bye",
    "Challenge",
    "Done",
    "Fail",
    "Fetch",
    "FrameBuffer",
    "Grant",
    "Hello",
    "Invite",
    "KeyFail",
    "Lane",
    "LayerDone",
    "LayoutChanged",
    "Message",
    "MoreLanes",
    "Nack",
    "Offer",
    "Proof",
    "Ready",
    "Reject",
    "Release",
    "Sealed",
    "TensorInfo",
    "Unknown",
    "Welcome",
    "decode",
    "encode",
    "held_bytes",
    "layout_bytes",
]

PROTOCOL = "sagellm-kv"
VERSIONS = (1, 1)
"""Oldest and newest version of this protocol that is spoken here."""

INVITED = 1 << 31
"""The first transfer id of invitations."""

MAX_HANDSHAKE_BYTES = 4096
"""Longest message of a peer that has not authenticated."""

_LENGTH = struct.Struct(">I")


class _Message(msgspec.Struct, tag_field="type", frozen=True, omit_defaults=True):
    pass


class Hello(_Message, frozen=True, tag="hello"):
    """I → A, first: who calls whom."""

    protocol: str
    node_id: int
    target: int
    nonce: bytes
    min_version: int
    max_version: int
    instance: bytes = b""


class Challenge(_Message, frozen=True, tag="challenge"):
    """A → I: the version chosen, and what to prove the key over."""

    node_id: int
    nonce: bytes
    version: int
    instance: bytes = b""


class Proof(_Message, frozen=True, tag="proof"):
    """I → A: I know the key."""

    mac: bytes


class Welcome(_Message, frozen=True, tag="welcome"):
    """A → I: so do I; and what I have."""

    mac: bytes
    layout: KVLayout | None
    endpoints: dict[str, str]
    checksum: bool
    address: str
    codecs: dict[str, int] = {}
    """Codecs that coded frames may use, with versions; `frame` stands for the frames' own,
    and `basis` for the messages by which bases are handed over."""


class Ready(_Message, frozen=True, tag="ready"):
    """I → A: what I have and have chosen; the link is up."""

    layout: KVLayout | None
    transport: str
    checksum: bool
    address: str
    codecs: dict[str, int] = {}


class Reject(_Message, frozen=True, tag="reject"):
    """A → I: no link, and why."""

    code: str
    message: str


class LayoutChanged(_Message, frozen=True, tag="layout"):
    """Either way: a pool was registered or forgotten."""

    layout: KVLayout | None


class TensorInfo(msgspec.Struct, frozen=True, array_like=True):
    """One plain tensor of an offer."""

    shape: tuple[int, ...]
    dtype: str
    layer: int
    index: int


class Offer(_Message, frozen=True, tag="offer"):
    """S → R: a push. Blocks per cache group, or plain tensors."""

    tid: int
    id: str
    attempt: int
    counts: dict[str, int] = {}
    tensors: list[TensorInfo] | None = None
    page_bytes: int = 0
    dst_blocks: dict[str, bytes] | None = None
    sealed: bool = True
    num_tokens: int = 0


class Grant(_Message, frozen=True, tag="grant"):
    """R → S: send these parts of the sharded axis, per cache group; absent groups not at all."""

    tid: int
    parts: dict[str, Part]


class Invite(_Message, frozen=True, tag="invite"):
    """R → S, on a link that S opened: a grant ahead of the offer.

    S may take it, by sending frames under this tid, or ignore it and offer. An offer of the same
    key withdraws it: whoever has offered never takes one.
    """

    tid: int
    id: str
    attempt: int
    counts: dict[str, int]
    parts: dict[str, Part]
    layouts: int
    """How many layouts of S were known to R; S ignores the invitation when it has told more."""


class Sealed(_Message, frozen=True, tag="sealed"):
    """S → R: every layer of a stream has been queued, or all that was fetched."""

    tid: int
    num_tokens: int


class Fetch(_Message, frozen=True, tag="fetch"):
    """R → S: a pull of offered blocks, into destinations that are ready."""

    tid: int
    id: str
    attempt: int
    counts: dict[str, int]
    parts: dict[str, Part]
    src_blocks: dict[str, bytes] | None = None
    layers: list[int] | None = None
    deadline_s: float = 30.0
    codec: str = ""
    options: dict[str, bool | int | float | str] = {}
    max_error: str | float | None = None


class Nack(_Message, frozen=True, tag="nack"):
    """R → S: these (layer, first, count) arrived changed; send them once more."""

    tid: int
    spans: list[tuple[int, int, int]]


class LayerDone(_Message, frozen=True, tag="layer_done"):
    """R → S: what you sent of this layer is in place and verified."""

    tid: int
    layer: int


class Done(_Message, frozen=True, tag="done"):
    """R → S: everything landed and was verified."""

    tid: int


class Release(_Message, frozen=True, tag="release"):
    """S → R: I know; the transfer can be forgotten."""

    tid: int


class Fail(_Message, frozen=True, tag="fail"):
    """Either way: this transfer is over; layouts when they are why, as the teller sees them."""

    tid: int
    code: str
    message: str
    ours: str = ""
    theirs: str = ""


class KeyFail(_Message, frozen=True, tag="key_fail"):
    """To every peer: the attempt of this key has failed somewhere, so it has everywhere."""

    id: str
    attempt: int
    code: str
    message: str
    ours: str = ""
    theirs: str = ""


class Lane(_Message, frozen=True, tag="lane"):
    """I → A: I am about to open this data connection, by this transport; others I could not."""

    number: int
    transport: str
    refused: dict[str, str] = {}


class MoreLanes(_Message, frozen=True, tag="more_lanes"):
    """A → I: I have much to send; open data connections until there are so many."""

    count: int


class Ask(_Message, frozen=True, tag="ask"):
    """Either way: what do you hold, and whom do you wait for?"""

    number: int


class Answer(_Message, frozen=True, tag="answer"):
    """To an `Ask`: a JSON object."""

    number: int
    text: str


class BasisOffer(_Message, frozen=True, tag="basis_offer"):
    """S → R: I am about to code with this basis, which has so many bytes.

    Only to peers whose `codecs` have `basis`, as the three that follow.
    """

    basis: str
    nbytes: int


class BasisWanted(_Message, frozen=True, tag="basis_wanted"):
    """R → S: send it from this byte on; from its end on once it is checked and kept."""

    basis: str
    offset: int
    piece_bytes: int = 0
    """Longest piece that is taken."""


class BasisPiece(_Message, frozen=True, tag="basis_piece"):
    """S → R: bytes of a basis, in order."""

    basis: str
    offset: int
    data: bytes


class BasisRefused(_Message, frozen=True, tag="basis_refused"):
    """R → S: I do not take it, and why."""

    basis: str
    code: str
    message: str


class Bye(_Message, frozen=True, tag="bye"):
    """Either way: this link ends, and why; the last message."""

    message: str = ""


class Unknown(_Message, frozen=True, tag="unknown"):
    """A message of a type that is not known here, and that its sender has called optional."""


Handshake = Hello | Challenge | Proof | Welcome | Ready | Reject
Session = (
    LayoutChanged
    | Offer
    | Grant
    | Invite
    | Sealed
    | Fetch
    | Nack
    | LayerDone
    | Done
    | Release
    | Fail
    | KeyFail
    | Lane
    | MoreLanes
    | Ask
    | Answer
    | BasisOffer
    | BasisWanted
    | BasisPiece
    | BasisRefused
    | Bye
    | Unknown
)
Message = Handshake | Session

_encoder = msgspec.msgpack.Encoder()
_KNOWN = frozenset(m.__struct_config__.tag for m in typing.get_args(Message))


class _Kind(msgspec.Struct):
    type: str
    optional: bool = False


_kind_decoder = msgspec.msgpack.Decoder(_Kind)
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """The message with its length in front."""
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


def decode(body: bytes | bytearray | memoryview) -> Message:
    """The message in a frame's body; `Unknown` for an optional one of a type not known here.

    Raises:
        DistributedRuntimeError: These bytes are no message of this protocol.

    """
    try:
        return _decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        error = e
    try:
        kind = _kind_decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        kind = None
    if kind is None or kind.type in _KNOWN:
        raise DistributedRuntimeError(f"not a message of {PROTOCOL}: {error}") from None
    if kind.optional:
        return Unknown()
    raise DistributedRuntimeError(
        f"a message of type {kind.type[:64]!r}, which {PROTOCOL} {VERSIONS[0]}..{VERSIONS[1]} does "
        "not have; types of newer versions go over links of those versions, or are optional"
    )


def held_bytes(message: Offer | Fetch | Invite) -> int:
    """Bytes of memory that a message takes while it waits for its other half, about."""
    if isinstance(message, Invite):
        return 512 + sum(256 + len(n) for n in [*message.counts, *message.parts])
    if isinstance(message, Offer):
        ids, names = message.dst_blocks, [*message.counts]
        more = sum(256 + 32 * len(i.shape) + len(i.dtype) for i in message.tensors or ())
    else:
        ids, names = message.src_blocks, [*message.counts, *message.parts]
        more = 32 * len(message.layers or ())
    named = sum(len(n) + len(i) for n, i in (ids or {}).items())
    return 512 + named + sum(256 + len(n) for n in names) + more


def layout_bytes(layout: KVLayout | None) -> int:
    """Bytes of memory that a peer's layout takes, about."""
    if layout is None:
        return 0
    words = len(layout.model) + sum(
        512 + len(g.name) + sum(64 + len(n) for n in (*g.layers, *g.axes)) for g in layout.groups
    )
    return 256 + words + 32 * sum(len(g.block_shape) for g in layout.groups)


class FrameBuffer:
    """Cuts a byte stream into message bodies; holds at most one message and one read.

    Args:
        max_bytes: Longest body that is accepted; may be raised once the peer has authenticated.

    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._data = bytearray()

    @property
    def held_bytes(self) -> int:
        """Bytes of the message that is not whole yet."""
        return len(self._data)

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The bodies that are complete with these bytes.

        Raises:
            DistributedRuntimeError: A length is beyond the bound; nothing was allocated for it.

        """
        self._data += data
        while len(self._data) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._data)
            if length > self.max_bytes:
                raise DistributedRuntimeError(
                    f"a control message of {length} bytes, more than {self.max_bytes}"
                )
            end = _LENGTH.size + length
            if len(self._data) < end:
                return
            body = bytes(self._data[_LENGTH.size : end])
            del self._data[:end]
            yield body

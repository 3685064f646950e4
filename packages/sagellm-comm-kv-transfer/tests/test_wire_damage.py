"""What happens between the machines: bytes and frames changed, dropped, repeated, swapped, cut."""

import random
import struct
import time

import pytest
import torch

from sagellm.comm.kv_transfer import KVTransferSettings
from sagellm.comm.kv_transfer.frames import HEADER_BYTES
from sagellm.core.protocols import KVTransferError, TransferKey

KEY = b"a key of this test, long enough"
TOKEN_BYTES = 48
SOURCE, TARGET = [1, 2, 3], [4, 5, 6]


class Cutter:
    """Cuts a stream into frames, and lets a test decide what goes on in the place of each."""

    def __init__(self, length_of, edit, skip=0):
        self._length_of, self._edit, self._skip = length_of, edit, skip
        self._held = bytearray()
        self.count = 0

    def __call__(self, position, data):
        out = bytearray()
        self._held += data
        if self._skip:
            out += self._held[: self._skip]
            skipped = len(out)
            del self._held[:skipped]
            self._skip -= skipped
        while (length := self._length_of(self._held)) and len(self._held) >= length:
            frame = self._edit(self.count, bytes(self._held[:length]))
            del self._held[:length]
            self.count += 1
            if frame is None:
                return None
            out += frame
        return out


def message_length(held):
    return len(held) >= 4 and 4 + struct.unpack_from(">I", held)[0]


def frame_length(held):
    if len(held) < HEADER_BYTES:
        return 0
    count, payload = struct.unpack_from("<20xIQ", held)
    return HEADER_BYTES + 8 * count + payload


def damage(kind, which, rng):
    """An edit that does one thing to one frame."""
    kept = []

    def edit(index, frame):
        if index == which + 1 and kind == "swap":
            return frame + kept[0]
        if index != which:
            return frame
        if kind == "flip":
            at = rng.randrange(4, len(frame))
            return frame[:at] + bytes([frame[at] ^ 1 << rng.randrange(8)]) + frame[at + 1 :]
        if kind == "swap":
            kept.append(frame)
            return b""
        return {"drop": b"", "repeat": 2 * frame, "cut": None}[kind]

    return edit


@pytest.fixture
def between(channel, proxy, layout, tensors):
    """Two channels with a proxy on the control and on the data connection."""

    def make(codec="none"):
        s = KVTransferSettings(
            lanes=1, transport="tcp", quiesce_s=0.1, handshake_timeout_s=0.3, codec=codec
        )
        out = channel(node_id=0, peers={}, key=KEY, settings=s)
        into = channel(node_id=1, peers={}, key=KEY, settings=s)
        tcp = into._engine.paths["tcp"]
        data, control = proxy(tcp.endpoint()), proxy(into.address)
        tcp.endpoint = lambda reached_at="": data.address
        out.add_peer(1, control.address)
        out.register(layout(), a := tensors(layout()))
        into.register(layout(), b := tensors(layout()))
        return out, a, into, b, control, data

    return make


def attempt(out, a, into, b, number, deadline_s=0.4):
    """Whether it landed on each side; no byte may be wrong where it did, nor late anywhere."""
    before = {n: t.clone() for n, t in b.items()}
    key = TransferKey("k", number)
    started = time.monotonic()
    handles = [
        out.transfer(SOURCE, 1, key=key, deadline_s=deadline_s),
        into.receive(key, TARGET, source_node=0, deadline_s=deadline_s),
    ]
    ended = []
    for handle in handles:
        try:
            handle.wait(deadline_s + 3)
            ended.append(True)
        except KVTransferError:
            ended.append(False)
    assert time.monotonic() - started < deadline_s + 5
    if ended[1]:
        assert all(torch.equal(a[n][SOURCE], b[n][TARGET]) for n in b)
    others = [i for i in range(10) if i not in TARGET]
    assert all(torch.equal(b[n][others], before[n][others]) for n in b)
    after = {n: t.clone() for n, t in b.items()}
    return ended, after


def heal(out, a, into, b, after, gates):
    """What is there after the end stays; and when the damage is over, transfers go through."""
    for gate in gates:
        gate.flip = gate.flip_back = lambda position, data: data
    assert all(torch.equal(b[n], after[n]) for n in b)
    assert out._engine.pool.leases == into._engine.pool.leases == 0
    # the first may still go by a link of which one side has not heard yet that it is lost
    assert any(
        attempt(out, a, into, b, n, s)[0] == [True, True] for n, s in ((11, 2.0), (12, 10.0))
    )


@pytest.mark.parametrize("kind", ["flip", "drop", "repeat", "swap", "cut"])
@pytest.mark.parametrize("back", [False, True], ids=["there", "back"])
def test_a_control_message_is_right_or_ends_the_link(leakless, between, at_once, kind, back):
    """Every message of a transfer in turn, the handshake's included."""
    counts = {}

    def one(which):
        for deadline_s in (0.8, 10.0):  # the longer one where a busy machine did not get that far
            out, a, into, b, control, data = between()
            cutter = Cutter(message_length, damage(kind, which, random.Random(which)))
            if back:
                control.flip_back = cutter
            else:
                control.flip = cutter

            ended, after = attempt(out, a, into, b, 0, deadline_s)

            heal(out, a, into, b, after, [control, data])
            out.close()
            into.close()
            if cutter.count > which or ended == [True, True]:
                break
        counts[which] = cutter.count
        if cutter.count <= which:  # there were no more messages
            assert ended == [True, True]

    at_once(one, range(6))
    assert sum(count > which for which, count in counts.items()) > 2


@pytest.mark.parametrize("kind", ["flip", "drop", "repeat", "swap", "cut"])
def test_a_data_frame_is_right_or_not_taken(leakless, between, at_once, kind):
    """Frames say where they belong: in another order they land as well."""

    def one(which):
        out, a, into, b, control, data = between()
        cutter = Cutter(frame_length, damage(kind, which, random.Random(which)), TOKEN_BYTES)
        data.flip = cutter
        out.connect(1, timeout_s=10)

        stuck = kind == "drop" or (kind == "swap" and which == 2)  # nothing comes behind the last
        ended, after = attempt(out, a, into, b, 0, 1.0 if stuck else 10.0)

        assert cutter.count > which
        if kind == "swap" and which < 2:
            assert ended == [True, True]
        if kind in ("drop", "cut"):
            assert ended == [False, False]
        heal(out, a, into, b, after, [control, data])
        out.close()
        into.close()

    at_once(one, range(3))


def test_any_bit_of_the_data_stream_may_flip(leakless, between, at_once):
    """Token, header, sums, payload: noticed where it matters, mended where it can be."""
    rng = random.Random(4)
    landed = []

    def one(at):
        out, a, into, b, control, data = between()
        flipped = []

        def flip(position, chunk):
            if not flipped and position <= at < position + len(chunk):
                chunk[at - position] ^= 1 << (at % 8)
                flipped.append(at)
            return chunk

        data.flip = flip
        if at >= TOKEN_BYTES:
            out.connect(1, timeout_s=10)
        ended, after = attempt(out, a, into, b, 0, 5.0)

        assert flipped
        if ended == [True, True]:
            landed.append(at)
        heal(out, a, into, b, after, [control, data])
        out.close()
        into.close()

    positions = [*range(0, 48, 16), *range(48, 130, 7)]
    at_once(one, positions + [rng.randrange(130, 5000) for _ in range(9)])
    assert len(landed) > 9


def test_a_damaged_length_of_a_coded_block_is_mended(between):
    """The table's digest tells; the length itself would say that the peer breaks the rules."""
    out, a, into, b, _, data = between("lz4")
    for tensor in a.values():
        tensor.zero_()
    heard, flipped = bytearray(), []

    def flip(position, chunk):
        heard.extend(chunk)
        if len(heard) >= TOKEN_BYTES + HEADER_BYTES and not flipped:
            (count,) = struct.unpack_from("<20xI", heard, TOKEN_BYTES)
            at = TOKEN_BYTES + HEADER_BYTES + 8 * count - position
            if 0 <= at < len(chunk):
                chunk[at] ^= 4
                flipped.append(at)
        return chunk

    data.flip = flip
    out.connect(1, timeout_s=10)
    ended, _ = attempt(out, a, into, b, 0, 10.0)

    assert flipped
    assert ended == [True, True]
    (link,) = out._engine.links
    assert link.error is None
    assert out.poll()[0].status == "landed"


def test_frames_recorded_on_another_connection_are_refused(leakless, between):
    """The bytes of a whole data connection, played to the receiver once more."""
    out, a, into, b, control, data = between()
    heard = bytearray()

    def record(position, chunk):
        heard.extend(chunk)
        return chunk

    data.flip = record
    ended, _ = attempt(out, a, into, b, 0)
    assert ended == [True, True]
    for link in list(out._engine.links):
        out._engine.loop.run(lambda link=link: link.lose(KVTransferError("x", cause="peer_lost")))
    frames = bytes(heard[TOKEN_BYTES:])

    def replay(position, chunk):
        return chunk[: max(0, TOKEN_BYTES - position)] + frames + chunk[TOKEN_BYTES - position :]

    played = []

    def once(position, chunk):
        if played or position + len(chunk) < TOKEN_BYTES:
            return chunk
        played.append(1)
        return replay(position, chunk)

    data.flip = once
    a["layer0"].add_(1)  # what was recorded is out of date
    ended, after = attempt(out, a, into, b, 2)

    assert played
    assert ended == [False, False]
    heal(out, a, into, b, after, [control, data])

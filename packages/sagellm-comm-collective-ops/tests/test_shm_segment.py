"""The segment and what lies in it: reservations, arenas, rings."""

import contextlib
import fcntl
import os
import resource

import pytest
import torch
from shm_ranks import ended, forked

from sagellm.comm.collective_ops._shm import segment as segments
from sagellm.comm.collective_ops._shm.arena import Arena
from sagellm.comm.collective_ops._shm.layout import PAGE, Layout
from sagellm.comm.collective_ops._shm.rings import ANNOUNCE, SMALL, Ring, segment_words
from sagellm.comm.collective_ops._shm.segment import Segment
from sagellm.comm.collective_ops._shm.settings import ShmSettings
from sagellm.core.protocols import ConfigError, IntegrityError, ResourceError

NONCE = 0x1234_5678_9ABC


@pytest.fixture
def segment():
    made = Segment.create(Layout(2, PAGE, 1 << 30, PAGE), NONCE)
    yield made
    made.close()


def reserved(segment):
    """Bytes of memory behind the segment."""
    return os.fstat(segment.fd).st_blocks * 512


def test_everything_before_the_arenas_is_reserved_and_cannot_shrink(segment):
    assert reserved(segment) == segment.layout.arena_offset
    with pytest.raises(PermissionError):
        os.ftruncate(segment.fd, PAGE)
    assert fcntl.fcntl(segment.fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    assert "memfd:" in os.readlink(f"/proc/self/fd/{segment.fd}")


def test_both_sides_see_one_memory(segment):
    other = Segment.attach(os.dup(segment.fd), segment.layout, NONCE)

    segment.memory[PAGE] = 7

    assert other.memory[PAGE] == 7
    other.close()


@pytest.mark.parametrize(
    ("layout", "nonce"),
    [(Layout(2, PAGE, 1 << 30, PAGE), NONCE + 1), (Layout(2, PAGE, 1 << 29, PAGE), NONCE)],
)
def test_another_segment_is_refused(segment, layout, nonce):
    fds = len(os.listdir("/proc/self/fd"))
    with pytest.raises(IntegrityError, match="announced"):
        Segment.attach(os.dup(segment.fd), layout, nonce)
    assert len(os.listdir("/proc/self/fd")) == fds


@contextlib.contextmanager
def files_of_at_most(n):
    """Files of this process, its log among them, may have so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_limit_of_file_size_is_told_with_figures():
    """As near to a full /dev/shm as can be had.

    A memfd lies in the kernel's own tmpfs: the size of the mount at /dev/shm does not count for
    it, and no mount can stand in for it. What can be full is a limit of the process, here, or
    the memory of the machine or of a cgroup, below.
    """
    layout = Layout(2, PAGE, 0, PAGE)
    with files_of_at_most(PAGE), pytest.raises(ResourceError) as failed:
        Segment.create(layout, NONCE)
    for words in (f"{layout.arena_offset} bytes for the shared segment", "slot_bytes", "ulimit -f"):
        assert words in str(failed.value)


def test_no_room_for_a_symmetric_tensor_is_told_and_leaves_the_arena_whole(
    segment, arena, monkeypatch
):
    base = reserved(segment)
    monkeypatch.setattr(segments, "room_bytes", lambda: PAGE)
    with pytest.raises(ResourceError, match=r"1048576 bytes for a symmetric .*: 4096 bytes"):
        arena.empty((1 << 20,), torch.uint8)
    assert (reserved(segment), arena.used_bytes) == (base, 0)
    arena.empty((PAGE,), torch.uint8).fill_(1)


def test_more_than_the_room_that_is_left_is_refused_with_figures(monkeypatch):
    monkeypatch.setattr(segments, "room_bytes", lambda: 80000)
    with pytest.raises(ResourceError, match="80000 bytes are available here; free memory"):
        Segment.create(Layout(2, 1 << 16, 0, PAGE), NONCE)


def test_more_than_the_machine_has_is_refused_before_it_is_touched(segment):
    with pytest.raises(ResourceError, match="bytes are available here"):
        segment.grow(segment.layout.arena_offset, 1 << 50, "a test")


def test_forked_child_holds_nothing(segment):
    segment.memory[PAGE] = 1

    def child():
        assert segments._identity(segment.fd) != segment._file
        assert not [p for p in os.listdir("/proc/self/fd") if _is_memfd(p)]
        with open("/proc/self/maps") as maps:
            assert not [line for line in maps if "memfd:" in line]

    assert ended(forked(child)) == 0
    assert segment.memory[PAGE] == 1


def _is_memfd(name):
    try:
        return "memfd:" in os.readlink(f"/proc/self/fd/{name}")
    except OSError:
        return False


# -- arena ----------------------------------------------------------------------------------


@pytest.fixture
def arena(segment):
    made = Arena(segment, 1)
    yield made
    made.close()


def test_symmetric_tensors_lie_in_the_arena_and_are_aligned(segment, arena):
    xs = [arena.empty((n,), torch.uint8) for n in (1, 63, 65, 5000)]

    start = segment.base + segment.layout.arena(1)
    for x in xs:
        assert x.data_ptr() % 64 == 0
        assert start <= x.data_ptr() < start + segment.layout.arena_bytes
    assert len({x.data_ptr() for x in xs}) == 4
    y = arena.empty((2, 3), torch.bfloat16)
    y.fill_(1)
    assert y.shape == (2, 3)
    assert y.sum() == 6
    assert arena.empty((0, 4), torch.float32).shape == (0, 4)


def test_memory_goes_with_the_last_view(segment, arena):
    base = reserved(segment)
    x = arena.empty((1 << 20,), torch.float32)
    x.fill_(1)
    assert reserved(segment) == base + (4 << 20)
    view = x[5:].view(-1)[3:7]
    del x
    assert view.tolist() == [1.0] * 4
    assert reserved(segment) == base + (4 << 20)
    del view
    assert reserved(segment) == base
    assert arena.used_bytes == 0


def test_pages_shared_by_two_tensors_stay_until_both_are_gone(segment, arena):
    x, y = arena.empty((100,), torch.uint8), arena.empty((PAGE,), torch.uint8)
    y.fill_(9)
    del x
    assert y.eq(9).all()
    z = arena.empty((64,), torch.uint8)
    z.fill_(3)
    assert y.eq(9).all()
    del y
    assert z.eq(3).all()


def test_freed_room_is_used_again(arena):
    size = 1 << 28
    for _ in range(4):
        xs = [arena.empty((PAGE,), torch.uint8) for _ in range(8)]
        del xs[1::2]
        xs += [arena.empty((PAGE,), torch.uint8) for _ in range(4)]
        assert arena.used_bytes == 12 * PAGE - 4 * PAGE
        del xs
    assert arena.used_bytes == 0
    with pytest.raises(ResourceError, match="largest gap has 1073741824"):
        arena.empty((5, size), torch.uint8)


def test_tensor_outlives_the_group(segment, arena):
    x = arena.empty((8,), torch.int64)
    arena.close()
    segment.close()
    x.fill_(4)
    assert x.sum() == 32


# -- rings ----------------------------------------------------------------------------------


@pytest.fixture
def ring(segment):
    words = segment_words(segment.memory)
    ends = [Ring(segment.memory, words, segment.layout, 0, 1) for _ in range(2)]
    yield ends
    del ends, words


def test_frames_come_out_as_they_went_in_around_the_end_many_times(ring):
    writer, reader = ring
    generator = torch.Generator().manual_seed(1)
    sent, got = [], 0
    for number in range(2000):
        count = int(torch.randint(0, 900, (1,), generator=generator))
        while writer.space() < count:
            frame = reader.peek()
            assert frame[:4] == (SMALL, *sent[got][:3])
            assert frame[4].tolist() == sent[got][3]
            reader.drop(frame)
            got += 1
        payload = torch.randint(0, 255, (count,), generator=generator, dtype=torch.uint8)
        writer.write(SMALL, number, number % 7, count, payload)
        sent.append((number, number % 7, count, payload.tolist()))
    while (frame := reader.peek()) is not None:
        assert frame[4].tolist() == sent[got][3]
        reader.drop(frame)
        got += 1
    assert got == 2000


def test_full_ring_says_so_and_a_header_needs_room_too(ring):
    writer, reader = ring
    count = 0
    while writer.space() >= 0:
        writer.write(ANNOUNCE, count, 0, 1 << 40, None)
        count += 1
    assert count == writer.room // 32
    frame = reader.peek()
    assert frame[:4] == (ANNOUNCE, 0, 0, 1 << 40)
    reader.drop(frame)
    assert writer.space() == 0


# -- options --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ({"engine": "rust"}, "engine 'rust' is not one of auto, native, python"),
        ({"slot_bytes": 5000}, "slot_bytes 5000 is not a multiple of 4096"),
        ({"arena_bytes": -4096}, "arena_bytes -4096"),
        ({"statistics": 1}, "option statistics is 1"),
        ({"algorithms": "all_reduce=ring"}, "is not op:low-high:algorithm"),
        ({"algorithms": "all_reduce:x-64k:one_shot"}, "size 'x' in .* is not a number"),
        ({"slots": 3}, "shm has no option slots; known: algorithms, arena_bytes"),
    ],
)
def test_bad_options_are_refused_with_the_form(option, text):
    with pytest.raises(ConfigError, match=text):
        ShmSettings.of("shm", option)


def test_overrides_are_read():
    text = "all_reduce:0-64k:one_shot, all_reduce:64k-1m:native, all_reduce:1m-:two_shot"
    assert ShmSettings.of("shm", {"algorithms": text}).overrides() == (
        ("all_reduce", 0, 65536, "one_shot"),
        ("all_reduce", 1 << 20, 1 << 62, "two_shot"),
    )
    assert ShmSettings().overrides() == ()

"""Device calls in one launch, on a stand-in for a vendor's group."""

import pytest

torch = pytest.importorskip("torch")

from sagellm.core.protocols._process_group.torch_transport import TorchTransport  # noqa: E402
from sagellm.core.protocols.process_group import RawCall  # noqa: E402


class Done:
    def wait(self):
        return True

    def is_completed(self):
        return True


class Group:
    """Writes down what is called, as torch's own coalescing would see it."""

    _device_types = ()

    def __init__(self):
        self.seen = []

    def rank(self):
        return 0

    def size(self):
        return 2

    def __getattr__(self, name):
        known = {"allreduce", "broadcast", "barrier", "send", "recv"}
        if name not in {*known, "_start_coalescing", "_end_coalescing"}:
            raise AttributeError(name)

        def call(*args):
            self.seen.append(name)
            return Done()

        return call


@pytest.fixture
def transport():
    made = TorchTransport(Group(), torch.device("meta"), 5)
    yield made
    made.close()


def reduce_call():
    return RawCall("all_reduce", outputs=[torch.ones(1)], device=torch.device("meta"))


def barrier_call():
    return RawCall("barrier", device=torch.device("meta"))


def test_collectives_of_a_context_are_one_launch(transport):
    transport.start_coalescing()
    works = [transport.issue(reduce_call()) for _ in range(3)]
    assert not any(work.done() for work in works)
    transport.end_coalescing()
    assert all(work.done() and work.wait(1) and work.synchronize(1) for work in works)
    assert transport.group.seen == ["_start_coalescing", *["allreduce"] * 3, "_end_coalescing"]


def test_wait_within_the_context_sends_what_there_is(transport):
    transport.start_coalescing()
    assert transport.issue(reduce_call()).wait(1)
    transport.issue(reduce_call())
    transport.end_coalescing()
    assert transport.group.seen == ["_start_coalescing", "allreduce", "_end_coalescing"] * 2


def test_barriers_and_messages_are_in_no_launch_of_collectives(transport):
    message = RawCall("send", [torch.ones(1)], peer=1, device=torch.device("meta"))
    transport.start_coalescing()
    transport.issue(reduce_call())
    transport.issue(barrier_call())
    transport.issue_batch([message])
    transport.end_coalescing()
    assert transport.group.seen == [
        "_start_coalescing", "allreduce", "_end_coalescing", "barrier",
        "_start_coalescing", "send", "_end_coalescing",
    ]  # fmt: skip


def test_context_without_calls_touches_nothing(transport):
    transport.start_coalescing()
    transport.end_coalescing()
    transport.end_coalescing()
    assert transport.group.seen == []

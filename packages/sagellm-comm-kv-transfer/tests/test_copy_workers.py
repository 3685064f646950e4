"""Copy workers outlive what is cancelled, and none is left behind."""

import os
from types import SimpleNamespace

import numpy as np
import pytest

from sagellm.comm.kv_transfer import _copy_workers, _offering
from sagellm.comm.kv_transfer._copy_workers import CopyWorkers, Working
from sagellm.core.protocols import CommError, TransferKey

JOB = SimpleNamespace(units=np.zeros((4, 0), dtype=np.uint64))


def working(answer, given_up, timeout_s=20.0):
    lost, done = [], []
    workers = SimpleNamespace(lost=lambda w, e: lost.append(e), done=done.append)
    worker = SimpleNamespace(send=lambda job, again: None, answer=answer)
    return Working(workers, worker, JOB, given_up, timeout_s), lost, done


def test_a_worker_whose_transfer_is_cancelled_finishes_its_job():
    def answer(count, again):
        again()
        again()
        return []

    job, lost, done = working(answer, lambda: True)
    assert job.wait() == []
    assert not lost
    assert len(done) == 1


def test_a_worker_that_never_answers_is_ended_after_a_while(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(_copy_workers, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def answer(count, again):
        while True:
            now[0] += 0.1
            again()

    job, lost, done = working(answer, lambda: True)
    assert job.wait() is None
    assert len(lost) == 1
    assert not done
    assert now[0] < 3


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="this system has no memory files")
def test_whoever_is_stopped_while_they_start_leaves_no_worker(monkeypatch):
    made = []

    def stop(self):
        made.append(self._process)
        raise KeyboardInterrupt

    monkeypatch.setattr(_copy_workers._Worker, "wait_ready", stop)
    fd = os.memfd_create("test")
    try:
        os.truncate(fd, 4096)
        with pytest.raises(KeyboardInterrupt):
            CopyWorkers(fd, 4096, 2)
    finally:
        os.close(fd)
    assert [p.poll() is not None for p in made] == [True]


def test_a_fetch_that_hits_a_bug_keeps_no_room(pair, monkeypatch, eventually):
    out, _, into, _ = pair()
    key = TransferKey("x")
    out.offer(key, [1], num_tokens=4, ttl_s=20)
    into.connect(out.node_id)
    hit = []

    def bug(*args):
        hit.append(out._engine.waiting.used)
        raise ValueError("a bug")

    monkeypatch.setattr(_offering, "check_parts", bug)
    handle = into.fetch(key, out.node_id, [2], deadline_s=2)
    eventually(lambda: hit)
    assert hit[0] > 0
    eventually(lambda: out._engine.waiting.used == 0)
    handle.cancel()
    with pytest.raises(CommError):
        handle.wait()

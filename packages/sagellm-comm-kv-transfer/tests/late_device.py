"""A device that is the host's memory, and does what it is told later, on threads of its own."""

import queue
import threading

import torch


class LateEvent:
    """The end of one piece of work."""

    def __init__(self):
        self.error = None
        self.over = threading.Event()

    def query(self):
        if not self.over.is_set():
            return False
        if self.error is not None:
            raise self.error
        return True

    def synchronize(self):
        assert self.over.wait(20)


class LateQueue:
    """Work in order, each piece when the device's `gate` lets it."""

    def __init__(self, device):
        self._device = device
        self.work = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def follow(self):
        self.work.put((self._device.mark(), None))

    def submit(self, work):
        event = LateEvent()
        self.work.put((event, work))
        self._device.submitted.release()
        return event

    def _run(self):
        while True:
            event, work = self.work.get()
            if work is None:
                event.synchronize()
                continue
            assert self._device.gate.wait(20)
            if self._device.fail:
                event.error = RuntimeError("device-side assert")
            else:
                try:
                    work()
                except Exception as e:
                    event.error = e
            self._device.done += 1
            event.over.set()


class LateDevice:
    """Stands for a device: tests open and close its `gate`, and have it `fail`.

    `current` are events of the caller's stream that have not happened yet.
    """

    def __init__(self):
        self.gate = threading.Event()
        self.gate.set()
        self.fail = False
        self.done = 0
        self.submitted = threading.Semaphore(0)
        self.current = LateEvent()
        self.current.over.set()

    def __repr__(self):
        return "late:0"

    def pinned(self, nbytes):
        return torch.full((nbytes,), 0xAA, dtype=torch.uint8)

    empty = pinned

    def queue(self):
        return LateQueue(self)

    def mark(self):
        return self.current

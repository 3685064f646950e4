"""Two hosts on one machine: network namespaces joined by a link of a given speed.

A namespace lives for as long as the process that was started in it, which ends when its standard
input does, hence with the process that made it: nothing stays behind, however that one ends.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import time
from types import TracebackType
from typing import Self

__all__ = ["ShapedHosts", "enter_namespace", "why_not"]

_CLONE_NEWNET = 0x40000000
_READY_S = 5.0


def why_not() -> str | None:
    """What is missing to make namespaces and shape a link; None when nothing is."""
    for tool, package in (("unshare", "util-linux"), ("nsenter", "util-linux"),
                          ("ip", "iproute2"), ("tc", "iproute2")):  # fmt: skip
        if shutil.which(tool) is None:
            return f"{tool} is missing; install {package}"
    try:
        with ShapedHosts("1gbit"):
            return None
    except (OSError, RuntimeError, subprocess.SubprocessError) as e:
        return f"network namespaces cannot be made: {e}; run as root"


def enter_namespace(pid: int) -> None:
    """Move the calling thread, and what it starts from now on, to the network of a process."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/proc/{pid}/ns/net", "rb") as file:
        if libc.setns(file.fileno(), _CLONE_NEWNET) != 0:
            code = ctypes.get_errno()
            raise OSError(code, f"setns: {os.strerror(code)}")


class ShapedHosts:
    """A context with two namespaces, `10.77.0.1` and `10.77.0.2`, joined by one link.

    Args:
        rate: Of the link in each direction, as tc writes it: `1gbit`.

    Attributes:
        pids: A process in each namespace; see `enter_namespace`.
        interfaces: The name of the link's end in each.
        addresses: The address of each.

    """

    interfaces = ("cv0", "cv1")
    addresses = ("10.77.0.1", "10.77.0.2")

    def __init__(self, rate: str) -> None:
        self._rate = rate
        self._holders: list[subprocess.Popen[bytes]] = []

    @property
    def pids(self) -> tuple[int, ...]:
        """A process in each namespace."""
        return tuple(holder.pid for holder in self._holders)

    def __enter__(self) -> Self:
        try:
            for _ in range(2):
                self._hold()
            second = self.pids[1]
            self._run(0, "ip", "link", "add", "cv0", "type", "veth", "peer", "name", "cv1",
                      "netns", str(second))  # fmt: skip
            for i in range(2):
                name = self.interfaces[i]
                self._run(i, "ip", "addr", "add", f"{self.addresses[i]}/24", "dev", name)
                self._run(i, "ip", "link", "set", name, "up")
                self._run(i, "ip", "link", "set", "lo", "up")
            self.shape(self._rate)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def cut(self) -> None:
        """Take the link down."""
        self._run(0, "ip", "link", "set", self.interfaces[0], "down")

    def restore(self) -> None:
        """Bring it up again."""
        self._run(0, "ip", "link", "set", self.interfaces[0], "up")

    def shape(self, rate: str) -> None:
        """Give the link another rate in both directions."""
        for i in range(2):
            self._run(i, "tc", "qdisc", "replace", "dev", self.interfaces[i], "root", "tbf",
                      "rate", rate, "burst", "256kb", "latency", "50ms")  # fmt: skip

    def unshape(self) -> None:
        """Let the link be as fast as the machine moves packets, until it is shaped again."""
        for i in range(2):
            self._run(i, "tc", "qdisc", "del", "dev", self.interfaces[i], "root")

    def _hold(self) -> None:
        ours = os.readlink("/proc/self/ns/net")
        holder = subprocess.Popen(
            ["unshare", "--net", "cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        self._holders.append(holder)
        end = time.monotonic() + _READY_S
        while os.readlink(f"/proc/{holder.pid}/ns/net") == ours:
            if holder.poll() is not None:
                said = holder.stderr.read().decode().strip() if holder.stderr else ""
                raise RuntimeError(said or f"unshare ended with {holder.returncode}")
            if time.monotonic() > end:
                raise RuntimeError(f"no namespace within {_READY_S:g} s")
            time.sleep(0.002)

    def _run(self, index: int, *command: str) -> None:
        target = f"--net=/proc/{self.pids[index]}/ns/net"
        done = subprocess.run(
            ["nsenter", target, *command], capture_output=True, timeout=10, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.decode().strip()}")

    def _close(self) -> None:
        for holder in self._holders:
            if holder.stdin is not None:
                holder.stdin.close()
            try:
                holder.wait(2)
            except subprocess.TimeoutExpired:
                holder.kill()
                holder.wait(2)
            if holder.stderr is not None:
                holder.stderr.close()
        self._holders = []

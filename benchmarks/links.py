"""Ranks with links of their own, on one machine: a network namespace each, tied to one bridge at a given rate.

Linux only, as root, with `ip` and `tc` (iproute2) and `unshare` (util-linux). Everything is made in a network
namespace of the calling program, and is gone with it.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

_NEW_NETWORK = 0x40000000  # CLONE_NEWNET of sched.h
_TICK_S, _QUEUE = 0.01, "200ms"  # what may be sent at once, what may wait


class Links:
    """A bridge, and for each rank a pair of interfaces whose ends both send at `mbit` million bits a second."""

    def __init__(self, mbit: float) -> None:
        self._rate = f"{mbit}mbit"
        self._burst = max(65536, round(mbit * 1e6 / 8 * _TICK_S))  # bytes
        _run("ip link set dev lo up")
        _run("ip link add switch type bridge")
        _run("ip link set dev switch up")

    @staticmethod
    def enter() -> None:
        """Starts the program again in a network namespace of its own, unless it is in one."""
        if os.environ.get("_IN_NAMESPACE") != "1":
            os.environ["_IN_NAMESPACE"] = "1"
            command = ["unshare", "--net", sys.executable, *sys.argv]
            os.execvp(command[0], command)

    @staticmethod
    def leave_host() -> None:
        """In a rank's process: a network namespace of its own, as yet without a link."""
        if ctypes.CDLL(None, use_errno=True).unshare(_NEW_NETWORK):
            error = ctypes.get_errno()
            raise OSError(error, f"{os.strerror(error)}: a namespace of the network needs root")
        os.environ["GLOO_SOCKET_IFNAME"] = "wire"

    def connect(self, rank: int, pid: int) -> None:
        """Ties the namespace of process `pid` to the bridge, as 10.0.0.(rank + 1)."""
        _run(f"ip link add port{rank} type veth peer name wire netns {pid}")
        _run(f"ip link set dev port{rank} master switch up")
        limit = f"root tbf rate {self._rate} burst {self._burst} latency {_QUEUE}"
        _run(f"tc qdisc add dev port{rank} {limit}")  # what the rank receives
        inside = f"nsenter --net=/proc/{pid}/ns/net"
        _run(f"{inside} ip address add 10.0.0.{rank + 1}/24 dev wire")
        _run(f"{inside} ip link set dev lo up")
        _run(f"{inside} ip link set dev wire up")
        _run(f"{inside} tc qdisc add dev wire {limit}")  # what it sends


def _run(command: str) -> None:
    subprocess.run(command.split(), check=True)

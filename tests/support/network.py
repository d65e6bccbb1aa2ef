"""Hosts with a network of their own on this machine, and links that can be cut, slow or lossy.

A host is a namespace of processes and of the network, with a TUN device. A thread of this process carries the IP
packets from device to device: it can delay and drop them, for which not every kernel has `netem`.
"""

import os
import random
import struct
import subprocess
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fcntl import ioctl
from heapq import heappop, heappush
from ipaddress import IPv4Address
from itertools import count
from math import inf
from pathlib import Path
from select import select
from shutil import which

TUN_DEVICES = Path("/dev/net/tun")
SET_INTERFACE, IP_PACKETS_ONLY = 0x400454CA, 0x1001
"""`TUNSETIFF`, and `IFF_TUN | IFF_NO_PI`, of `linux/if_tun.h`."""
TCP = 6
LONGEST_PACKET = 65536
LONGEST_WAIT_SECONDS = 1.0
"""How long a packet waits for a link with a limited rate until it is dropped, as by a full queue."""


@dataclass
class Link:
    """What connects a host with all others; each property holds for both directions.

    Attributes:
        cut: whether it carries nothing.
        loss: share of packets that get lost.
        delay: seconds that a packet takes.
        rate: bytes per second.
        free_at: when the packets before have left, in each direction.
    """

    cut: bool = False
    loss: float = 0.0
    delay: float = 0.0
    rate: float = inf
    free_at: list[float] = field(default_factory=lambda: [0.0, 0.0])

    def carry(self, size: int, start: float, direction: int, rng: random.Random) -> float | None:
        """When a packet of `size` bytes that comes at `start` is through; None if it is lost."""
        begin = max(start, self.free_at[direction])
        if self.cut or rng.random() < self.loss or begin > start + LONGEST_WAIT_SECONDS:
            return None
        self.free_at[direction] = begin + size / self.rate
        return self.free_at[direction] + self.delay


@dataclass
class Host:
    """Processes that see only each other and one network device, with one address and one link.

    `process` holds the namespaces. What runs in them ends with it, and it ends with the thread that started it.
    """

    process: subprocess.Popen[str]
    address: str
    device: int
    link: Link = field(default_factory=Link)

    def command(self, *arguments: object) -> list[str]:
        """The command that runs `arguments` on this host."""
        number = self.process.pid
        spaces = ["--mount", "--net", f"--pid=/proc/{number}/ns/pid_for_children"]
        return ["nsenter", "--target", str(number), *spaces, *map(str, arguments)]

    def processes(self, name: str) -> set[int]:
        """Numbers that the processes with this name (15 characters) have on this host."""
        command = self.command("ps", "-eo", "pid=,comm=")
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        processes = (line.split(maxsplit=1) for line in printed.splitlines())
        return {int(number) for number, of_process in processes if of_process == name}

    def kill_processes(self) -> None:
        """Kill everything that runs on this host, as if its power failed."""
        subprocess.run(self.command("sh", "-c", "kill -KILL -1"), check=True)


INIT = "echo ready; while :; do sleep 1000 & wait; done"
"""Script of the first process of a host: it waits for all orphans."""


def start_host_process() -> subprocess.Popen[str]:
    """Start the process of a host."""
    flags = ("--net", "--mount-proc", "--pid", "--fork", "--kill-child")
    process = subprocess.Popen(["unshare", *flags, "sh", "-c", INIT], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        raise OSError(f"unshare failed with status {process.wait()}")
    return process


def run(*command: str) -> None:
    """Run a command that must succeed."""
    subprocess.run(command, check=True, capture_output=True)


def why_no_network() -> str | None:
    """Why hosts cannot be made here; None if they can."""
    if os.geteuid():
        return "only root can make namespaces and TUN devices"
    if missing := [command for command in ("ip", "nsenter", "ps", "unshare") if which(command) is None]:
        return f"no command {missing[0]}"
    try:
        with running_network() as network:
            network.add()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"namespaces and TUN devices are not available ({error})"
    return None


class Network:
    """Hosts whose links meet in one switch, the thread, with a firewall: hosts accept connections at `ports` only."""

    def __init__(self, ports: Collection[int]) -> None:
        self.ports = ports
        self.hosts: dict[bytes, Host] = {}
        self.closed = threading.Event()
        self.switch = threading.Thread(target=self._carry, daemon=True)
        self.switch.start()

    def add(self) -> Host:
        """Add a host with an address of the network 10.0.0.0/24, which only its hosts see."""
        address = IPv4Address("10.0.0.0") + len(self.hosts) + 1
        name = f"wmtp{os.getpid()}-{len(self.hosts)}"  # until it has moved to the host
        process = start_host_process()
        device = os.open(TUN_DEVICES, os.O_RDWR | os.O_NONBLOCK)
        ioctl(device, SET_INTERFACE, struct.pack("16sH", name.encode(), IP_PACKETS_ONLY))
        host = Host(process, str(address), device)
        self.hosts[address.packed] = host
        run("ip", "link", "set", name, "netns", str(process.pid), "name", "eth0")
        run(*host.command("ip", "address", "add", f"{address}/24", "dev", "eth0"))
        for interface in ("lo", "eth0"):
            run(*host.command("ip", "link", "set", interface, "up"))
        return host

    def close(self) -> None:
        """Kill everything on the hosts, and remove them."""
        for host in self.hosts.values():
            host.process.kill()
            host.process.wait()
        self.closed.set()
        self.switch.join()
        for host in self.hosts.values():
            os.close(host.device)

    def _carry(self) -> None:
        rng = random.Random(0)
        under_way: list[tuple[float, int, Host, bytes]] = []
        numbers = count()
        while not self.closed.is_set():
            senders = {host.device: host for host in list(self.hosts.values())}
            wait = under_way[0][0] - time.monotonic() if under_way else 0.1
            for device in select(list(senders), [], [], min(max(wait, 0.0), 0.1))[0]:
                for packet in read_packets(device):
                    receiver = self.hosts.get(packet[16:20])  # the destination in an IPv4 header
                    if receiver is None or self._is_refused(packet):
                        continue
                    left = senders[device].link.carry(len(packet), time.monotonic(), 0, rng)
                    arrived = left and receiver.link.carry(len(packet), left, 1, rng)
                    if arrived:
                        heappush(under_way, (arrived, next(numbers), receiver, packet))
            while under_way and under_way[0][0] <= time.monotonic():
                _, _, receiver, packet = heappop(under_way)
                if not receiver.link.cut:
                    with suppress(OSError):
                        os.write(receiver.device, packet)

    def _is_refused(self, packet: bytes) -> bool:
        """Whether an IPv4 packet asks for a TCP connection (SYN without ACK) to a closed port."""
        return packet[9] == TCP and packet[33] & 0x12 == 0x02 and int.from_bytes(packet[22:24]) not in self.ports


def read_packets(device: int) -> Iterator[bytes]:
    """All packets that a device has sent."""
    with suppress(OSError):  # none left, or the device is not up yet
        while True:
            yield os.read(device, LONGEST_PACKET)


@contextmanager
def running_network(ports: Collection[int] = ()) -> Iterator[Network]:
    """A network with these open ports that is removed at the end."""
    network = Network(ports)
    try:
        yield network
    finally:
        network.close()

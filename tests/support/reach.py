"""What other users of a machine can reach of running processes."""

import os
import re
import socket
from collections.abc import Iterable
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil

LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
NOBODY = 65534


def open_ports(processes: Iterable[psutil.Process]) -> dict[tuple[str, int], str]:
    """Address and port of each TCP socket that listens and each UDP socket, and the name of its process."""
    found = {}
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            for connection in process.net_connections("inet"):
                datagrams = connection.type == socket.SOCK_DGRAM
                if connection.laddr and (datagrams or connection.status == psutil.CONN_LISTEN):
                    found[connection.laddr.ip, connection.laddr.port] = process.name()
    return found


def named_sockets(processes: Iterable[psutil.Process]) -> set[Path]:
    """Paths of their Unix sockets."""
    found: set[Path] = set()
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            found |= {Path(unix.laddr) for unix in process.net_connections("unix") if unix.laddr.startswith("/")}
    return found


def named_files(processes: Iterable[psutil.Process], *parents: Path) -> set[Path]:
    """Files below `parents` that the processes have open or mapped, and that have a name."""
    found: set[str] = set()
    for process in processes:
        with suppress(psutil.NoSuchProcess, FileNotFoundError):
            found |= set(re.findall(r" (/.+)$", Path(f"/proc/{process.pid}/maps").read_text(), re.MULTILINE))
            for descriptor in os.scandir(f"/proc/{process.pid}/fd"):
                with suppress(FileNotFoundError):
                    found.add(os.readlink(descriptor.path))
    return {path for path in map(Path, found) if any(map(path.is_relative_to, parents)) and path.exists()}


def reachable(paths: Iterable[Path]) -> set[Path]:
    """Those of these sockets, files and directories that the user `nobody` can connect to, read or write. For root."""
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_try_all, args=(sorted(paths), sender))
    process.start()
    found = receiver.recv()
    process.join()
    return found


def _try_all(paths: list[Path], sender: Any) -> None:
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    sender.send({path for path in paths if _connects(path) or os.access(path, os.R_OK) or os.access(path, os.W_OK)})


def _connects(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client, suppress(OSError):
        client.connect(str(path))
        return True
    return False

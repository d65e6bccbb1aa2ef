"""Addresses of Ray clusters, without Ray."""

import re
import socket

from weighted_mtp.schemas.errors import UserError, first_line


def check_cluster(address: str) -> None:
    """Raise UserError if nothing listens at the address of a cluster."""
    try:
        check_reachable(address)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"--ray_address {address}: cannot connect to Ray ({first_line(error)}); check it, and that Ray runs"
        ) from error


def check_reachable(address: str) -> None:
    """Raise OSError if nothing listens at `host:port`; Ray itself retries for many minutes."""
    if match := re.fullmatch(r"(?:ray://)?(.+):(\d+)", address):
        socket.create_connection((match[1], int(match[2])), timeout=10).close()

"""What a launcher such as torchrun says in the environment: which of how many processes this is."""

import os
import socket
from typing import NamedTuple

MAX_DIGITS = 9  # of a number in the environment
MAX_PORT = 65535


class Place(NamedTuple):
    """One process among `world_size`; `local_rank` is its number on this machine, if it is said."""

    rank: int = 0
    world_size: int = 1
    local_rank: int | None = None

    @property
    def is_alone(self) -> bool:
        """Whether there are no others."""
        return self.world_size == 1


def read_place() -> Place:
    """This process's place; empty variables count as unset.

    Raises ValueError that names the variable that is no number, out of range, or missing.
    """
    rank = _read_number("RANK")
    world_size = _read_number("WORLD_SIZE")
    local_rank = _read_number("LOCAL_RANK")
    if world_size is None:
        if rank:
            raise ValueError(
                f"RANK is {rank} in the environment, but WORLD_SIZE is not set: unset "
                "RANK, or start the processes by torchrun"
            )
        return Place(local_rank=local_rank)
    if world_size < 1:
        raise ValueError(f"WORLD_SIZE is {world_size} in the environment, expected at least 1")
    if rank is None:
        if world_size > 1:
            raise ValueError(
                f"WORLD_SIZE is {world_size} in the environment, but RANK is not set: start the "
                "processes by torchrun"
            )
        rank = 0
    if rank >= world_size:
        raise ValueError(
            f"RANK is {rank} in the environment, expected less than WORLD_SIZE, {world_size}"
        )
    return Place(rank, world_size, local_rank)


class MeetingPoint(NamedTuple):
    """Where the processes find each other."""

    host: str
    port: int


def read_meeting_point() -> MeetingPoint:
    """Raises ValueError that names the variable that is missing, out of range, or no known host."""
    host = os.environ.get("MASTER_ADDR", "").strip()
    port = _read_number("MASTER_PORT")
    missing = "MASTER_PORT" if host else "MASTER_ADDR"
    if not host or port is None:
        raise ValueError(
            f"{missing} is not set in the environment: start the processes by torchrun"
        )
    if not 1 <= port <= MAX_PORT:
        raise ValueError(f"MASTER_PORT is {port} in the environment, expected 1 to {MAX_PORT}")
    try:
        socket.getaddrinfo(host, port)
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"MASTER_ADDR is {host!r} in the environment: {reason}") from None
    return MeetingPoint(host, port)


def read_restart_count() -> int | None:
    """How often torchrun has restarted the processes; None if it cannot restart them, or if they
    do not meet at its own store.

    Raises ValueError for a variable that is no number.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    if not _read_number("TORCHELASTIC_MAX_RESTARTS"):
        return None
    return _read_number("TORCHELASTIC_RESTART_COUNT") or 0


def _read_number(name: str) -> int | None:
    text = os.environ.get(name, "").strip()
    if not text:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > MAX_DIGITS:
        raise ValueError(f"{name} is {text!r} in the environment, expected a whole number")
    return int(text)

"""A file system that refuses what buckets, FAT, network and FUSE mounts refuse, in this process."""

import errno
import fcntl
import os
from collections.abc import Callable
from typing import Any, NoReturn

import pytest

# What is taken away -> the functions that refuse it, and the error that they raise.
REFUSALS = {
    "links": ((os, "symlink"), (os, "link"), errno.EOPNOTSUPP),
    "chmod": ((os, "chmod"), (os, "fchmod"), errno.EPERM),
    "fsync": ((os, "fsync"), (os, "fdatasync"), errno.EINVAL),
    "locks": ((fcntl, "flock"), (fcntl, "lockf"), errno.ENOLCK),
    "space": ((os, "statvfs"), errno.ENOSYS),
}


def refuse(patch: pytest.MonkeyPatch, *kinds: str) -> list[str]:
    """Take the kinds away; returns a list to which each refused call adds its function's name."""
    refused: list[str] = []
    for kind in kinds:
        *functions, number = REFUSALS[kind]
        for module, name in functions:
            patch.setattr(module, name, _raise(number, name, refused))
    return refused


def _raise(number: int, name: str, refused: list[str]) -> Callable[..., NoReturn]:
    def raise_error(*_: Any, **__: Any) -> NoReturn:
        refused.append(name)
        raise OSError(number, os.strerror(number))

    return raise_error

"""Decodes visitors' pictures in a separate process with limits on time and memory.

A small file can keep a decoder busy for hours, or crash it. Neither may affect the page itself.
"""

import multiprocessing
import signal
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection

from PIL import Image

from dataloaders.picture_files import TooManyPixels, known_formats, read_image

try:
    import resource
except ImportError:  # Windows
    resource = None

MEMORY = 4 << 30  # bytes of address space that a decoding process may take
HOW = "spawn" if sys.platform == "win32" else "forkserver"
READ, TOO_LARGE, UNREADABLE = "read", "too large", "unreadable"


class PictureError(ValueError):
    """What is wrong with a visitor's picture, in words for the visitor, without a server path."""


def start_decoding() -> None:
    """Start the fork server in advance, so that the first visitor need not wait for it."""
    context = multiprocessing.get_context(HOW)
    if HOW == "forkserver":
        context.set_forkserver_preload([__name__])
    process = context.Process(target=_nothing, daemon=True)
    process.start()
    process.join()


def _nothing() -> None:
    """What a first process does."""


def decode(
    paths: Sequence[str], names: Sequence[str], most_pixels: int, longest: int, seconds: float
) -> list[Image.Image]:
    """The pictures in RGB. `names` ("before", "after") are what messages call them.

    Raises PictureError for a picture that cannot be read, has too many pixels or a side above
    `longest`, or is not decoded within `seconds`, all pictures together.
    """
    context = multiprocessing.get_context(HOW)
    ours, theirs = context.Pipe(duplex=False)
    arguments = (theirs, list(paths), most_pixels, longest, seconds)
    process = context.Process(target=_decode_into, args=arguments, daemon=True)
    process.start()
    theirs.close()
    try:
        deadline = time.monotonic() + seconds
        return [_receive(ours, name, most_pixels, longest, deadline) for name in names]
    finally:
        process.kill()
        process.join()
        process.close()
        ours.close()


def _receive(
    connection: Connection, name: str, most_pixels: int, longest: int, deadline: float
) -> Image.Image:
    if not connection.poll(max(deadline - time.monotonic(), 0)):
        raise PictureError(f"The {name} image takes too long to be read.")
    try:
        kind, size = connection.recv()
        if kind == READ:
            return Image.frombytes("RGB", size, connection.recv_bytes())
    except (EOFError, OSError):  # its process has crashed, or had to end
        kind = UNREADABLE
    if kind == TOO_LARGE:
        limits = f"{most_pixels / 1e6:g} million pixels, or a side of more than {longest}"
        raise PictureError(f"The {name} image has more than {limits}.")
    formats = ", ".join(known_formats())
    raise PictureError(f"The {name} file is not an image that can be read ({formats}).")


def _decode_into(
    connection: Connection, paths: Sequence[str], most_pixels: int, longest: int, seconds: float
) -> None:
    """In a process of its own: send what each file holds, until one cannot be read."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which ends this
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if resource is not None:
        whole = int(seconds) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (whole, whole))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for path in paths:
        try:
            image = read_image(path, most_pixels, longest)
        except TooManyPixels:
            connection.send((TOO_LARGE, None))
            return
        except (ValueError, OSError):
            connection.send((UNREADABLE, None))
            return
        connection.send((READ, image.size))
        connection.send_bytes(image.tobytes())

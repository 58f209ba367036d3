"""Decodes visitors' pictures in a separate process, with limits on size, time and memory.

A small file can keep a decoder busy for hours, or crash it. Neither may affect the page itself.
"""

import multiprocessing
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection

from PIL import Image

from dataloaders.picture_files import NO_HEIF, ImageTooLarge, known_formats, read_image
from modules.web.uploads import UploadFolder
from system.signals import leave_signals_to_parent

try:
    import resource
except ImportError:  # Windows
    resource = None

MAX_MEGABYTES = 20  # of an upload; of 2**20 bytes each, as Gradio counts in its own messages
MAX_MEGAPIXELS = 50
MAX_SIDE = 20_000  # pixels: resizing a long, thin picture takes far more memory than the picture
MAX_SECONDS = 10  # for decoding the pictures of a request
MAX_MEMORY = 4 << 30  # bytes of address space of a decoding process
START_METHOD = "spawn" if sys.platform == "win32" else "forkserver"

# What a decoding process says about a file.
DECODED = "decoded"
TOO_LARGE = "too large"
UNREADABLE = "unreadable"
HEIC = "HEIC, for which a package is missing"


class PictureError(ValueError):
    """What is wrong with a visitor's picture: a message for the visitor, without a server path.

    `side` is "before" or "after".
    """

    def __init__(self, side: str, problem: str) -> None:
        super().__init__(f"The {side} picture {problem}")
        self.side = side


def start_fork_server() -> None:
    """Start the fork server in advance, so that the first visitor does not wait for it."""
    context = multiprocessing.get_context(START_METHOD)
    if START_METHOD == "forkserver":
        context.set_forkserver_preload([__name__])
    process = context.Process(target=_do_nothing, daemon=True)
    process.start()
    process.join()


def _do_nothing() -> None:
    """The job of a process that only starts the fork server."""


def decode_uploads(paths: Sequence[str | None], uploads: UploadFolder) -> list[Image.Image]:
    """The two uploads of a request, before and after, in RGB.

    Raises PictureError for an image that is missing, is not an upload, is too large, or cannot be
    decoded in time.
    """
    sides = ("before", "after")
    found = [check_upload(path, side, uploads) for path, side in zip(paths, sides, strict=True)]
    return decode_images(found, sides, int(MAX_MEGAPIXELS * 1e6), MAX_SIDE, MAX_SECONDS)


def check_upload(path: str | None, side: str, uploads: UploadFolder) -> str:
    """The real path of an upload. Raises PictureError if there is none, or if it is too large."""
    if path is None:
        raise PictureError(side, f"is missing: choose one in the field “{side.title()}”.")
    try:
        real = uploads.resolve(path)
    except PermissionError:
        raise PictureError(side, "was not uploaded to this page.") from None
    if not real.is_file():
        raise PictureError(side, "is no longer on the server: choose it again.")
    if real.stat().st_size > MAX_MEGABYTES * 2**20:
        raise PictureError(side, f"is larger than {MAX_MEGABYTES} MB: make it smaller.")
    return str(real)


def decode_images(
    paths: Sequence[str], sides: Sequence[str], max_pixels: int, max_side: int, seconds: float
) -> list[Image.Image]:
    """The pictures in RGB. Messages call them by their `sides` ("before", "after").

    Raises PictureError for a picture that cannot be read, that has too many pixels or a side above
    `max_side`, or that is not decoded in time; all pictures together have `seconds`.
    """
    context = multiprocessing.get_context(START_METHOD)
    receiver, sender = context.Pipe(duplex=False)
    arguments = (sender, list(paths), max_pixels, max_side, seconds)
    process = context.Process(target=_decode_into, args=arguments, daemon=True)
    process.start()
    sender.close()
    try:
        deadline = time.monotonic() + seconds
        return [_receive(receiver, side, max_pixels, max_side, deadline) for side in sides]
    finally:
        process.kill()
        process.join()
        process.close()
        receiver.close()


def _receive(
    connection: Connection, side: str, max_pixels: int, max_side: int, deadline: float
) -> Image.Image:
    if not connection.poll(max(deadline - time.monotonic(), 0)):
        raise PictureError(side, "took too long to decode: save it as an ordinary JPEG.")
    try:
        result, size = connection.recv()
        if result == DECODED:
            return Image.frombytes("RGB", size, connection.recv_bytes())
    except (EOFError, OSError):  # the process crashed, or its limits ended it
        result = UNREADABLE
    if result == TOO_LARGE:
        limits = f"{max_pixels / 1e6:g} million pixels, or a side of more than {max_side}"
        raise PictureError(side, f"has more than {limits}: make it smaller.")
    if result == HEIC:
        raise PictureError(side, "is HEIC, which cannot be read here: save it as JPEG.")
    formats = ", ".join(known_formats())
    raise PictureError(side, f"cannot be read: choose an intact file in one of {formats}.")


def _decode_into(
    connection: Connection, paths: Sequence[str], max_pixels: int, max_side: int, seconds: float
) -> None:
    """In the separate process: send each decoded picture, until one cannot be read."""
    leave_signals_to_parent()
    _limit_resources(seconds)
    for path in paths:
        try:
            image = read_image(path, max_pixels, max_side)
        except ImageTooLarge:
            connection.send((TOO_LARGE, None))
            return
        except (ValueError, OSError) as error:
            connection.send((HEIC if NO_HEIF in str(error) else UNREADABLE, None))
            return
        connection.send((DECODED, image.size))
        connection.send_bytes(image.tobytes())


def _limit_resources(seconds: float) -> None:
    if resource is None:
        return
    whole = int(seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (whole, whole))
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

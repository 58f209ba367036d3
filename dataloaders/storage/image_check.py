"""Whether all images of a dataset can be decoded: looked at once, before hours of training depend on it."""

import hashlib
import logging
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from dataloaders.picture_files import read_image
from system.files import cache_folder
from system.json_files import read_json, write_json

log = logging.getLogger(__name__)

CHUNK_IMAGES = 1024  # images in the hands of the threads


def unreadable_images(
    paths: Iterable[str], cache_dir: str | None, progress: Callable[[Iterable, str, str], Iterable]
) -> dict[str, str]:
    """Path and reason of every image that does not exist or cannot be decoded; looked at on all cores.

    `progress(iterable, what, unit)` draws the bar. The answer for these very files, by their sizes and times, is kept in the cache
    folder.
    """
    paths = list(paths)
    known = cache_folder(cache_dir) / "checked-images" / f"{_fingerprint_files(paths)}.json"
    try:
        found = read_json(known, dict)
        if all(isinstance(reason, str) for reason in found.values()):
            return found
    except (OSError, ValueError):
        log.info("checking that %d images can be read", len(paths))
    bar = iter(progress(paths, "images checked", "image"))
    bad = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(paths), CHUNK_IMAGES):
            part = paths[start : start + CHUNK_IMAGES]
            for path, reason in zip(part, pool.map(_decode_error, part), strict=True):
                next(bar)
                if reason:
                    bad[path] = reason
    next(bar, None)  # closes it
    try:
        write_json(known, bad)
    except OSError as error:
        log.warning("%s: the images will be checked again next time", error)
    return bad


def _decode_error(path: str) -> str | None:
    try:
        read_image(path)
    except (ValueError, OSError) as error:
        return " ".join(str(error).split())
    return None


def _fingerprint_files(paths: list[str]) -> str:
    digest = hashlib.sha256()
    for path in sorted(paths):
        try:
            status = os.stat(path)
            stamp = f"{status.st_size} {status.st_mtime_ns}"
        except OSError:
            stamp = "missing"
        digest.update(f"{os.path.abspath(path)}\0{stamp}\n".encode())
    return digest.hexdigest()

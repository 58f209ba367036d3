"""Which images of a dataset cannot be decoded, found before hours of training depend on them."""

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dataloaders.picture_files import read_image
from dataloaders.storage.image_cache import stamp_file
from system.files import choose_cache_folder
from system.json_files import read_json, write_json

log = logging.getLogger(__name__)

CHUNK_IMAGES = 1024  # handed to the threads at a time


def unreadable_images(
    paths: Iterable[str],
    cache_dir: str | None,
    progress: Callable[[Iterable, str, str], Iterable],
) -> dict[str, str]:
    """Path → reason for every image that is missing or cannot be decoded. Uses all cores.

    `progress(iterable, what, unit)` draws the bar. The answer is kept in the cache folder, for
    files of exactly these paths, sizes and modification times.
    """
    paths = list(paths)
    name = f"{_fingerprint_files(paths)}.json"
    known_file = choose_cache_folder(cache_dir) / "checked-images" / name
    known = _read_known(known_file)
    if known is not None:
        return known
    log.info("checking that %d images can be read", len(paths))
    bad = _decode_all(paths, progress)
    try:
        write_json(known_file, bad)
    except OSError as error:
        log.warning("%s: the images will be checked again next time", error)
    return bad


def _read_known(path: Path) -> dict[str, str] | None:
    """The answer of an earlier check; None if there is none, or it is corrupt."""
    try:
        answer = read_json(path, dict)
    except (OSError, ValueError):
        return None
    is_sound = all(isinstance(reason, str) for reason in answer.values())
    return answer if is_sound else None


def _decode_all(paths: list[str], progress: Callable) -> dict[str, str]:
    bar = progress(paths, "images checked", "image")
    bad = {}
    for path, reason in zip(bar, _find_reasons(paths), strict=True):
        if reason:
            bad[path] = reason
    return bad


def _find_reasons(paths: list[str]) -> Iterator[str | None]:
    """Why each image cannot be decoded; None if it can."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(paths), CHUNK_IMAGES):
            yield from pool.map(_find_reason, paths[start : start + CHUNK_IMAGES])


def _find_reason(path: str) -> str | None:
    try:
        read_image(path)
    except (ValueError, OSError) as error:
        return " ".join(str(error).split())
    return None


def _fingerprint_files(paths: list[str]) -> str:
    digest = hashlib.sha256()
    for path in sorted(paths):
        try:
            size, modification_time = stamp_file(path)
            stamp = f"{size} {modification_time}"
        except OSError:
            stamp = "missing"
        digest.update(f"{os.path.abspath(path)}\0{stamp}\n".encode())
    return digest.hexdigest()

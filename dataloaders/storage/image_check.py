"""Which images of a dataset cannot be decoded, found before hours of training depend on them."""

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from dataloaders.picture_files import UnknownFormat, read_image
from dataloaders.storage.image_cache import stamp_file
from system.files import choose_cache_folder
from system.json_files import read_json, write_json

log = logging.getLogger(__name__)

CHUNK_IMAGES = 1024  # handed to the threads at a time
VERSION = 2  # of what is kept

Reason = str | None  # why an image cannot be decoded; None: to be looked at again


def unreadable_images(
    paths: Iterable[str],
    cache_dir: str | None,
    progress: Callable[[Iterable, str, str], Iterable],
) -> dict[str, str]:
    """Path → reason for every image that is missing or cannot be decoded. Uses all cores.

    `progress(iterable, what, unit)` draws the bar. The answer is kept in the cache folder, for
    files of exactly these paths, sizes and modification times. What may be due to this machine,
    such as a permission or a missing decoder, is looked at again each time.
    """
    paths = list(paths)
    name = f"{_fingerprint_files(paths)}.json"
    known_file = choose_cache_folder(cache_dir) / "checked-images" / name
    known = _read_known(known_file)
    if known is None:
        log.info("checking that %d images can be read", len(paths))
        known = {}
        uncertain = paths
    else:
        uncertain = [path for path, reason in known.items() if reason is None]
    bad = {path: reason for path, reason in known.items() if reason is not None}
    if not uncertain:
        return bad
    kept: dict[str, Reason] = dict(bad)
    for path, finding in _decode_all(uncertain, progress).items():
        bad[path] = finding.reason
        kept[path] = finding.reason if finding.is_certain else None
    try:
        write_json(known_file, kept)
    except OSError as error:
        log.warning("%s: the images will be checked again next time", error)
    return bad


def _read_known(path: Path) -> dict[str, Reason] | None:
    """The answer of an earlier check; None if there is none, or it is corrupt."""
    try:
        answer = read_json(path, dict)
    except (OSError, ValueError):
        return None
    is_sound = all(isinstance(reason, str | None) for reason in answer.values())
    return answer if is_sound else None


class _Finding(NamedTuple):
    """Why an image cannot be decoded, and whether that is certain to lie in its bytes."""

    reason: str
    is_certain: bool


def _decode_all(paths: Sequence[str], progress: Callable) -> dict[str, _Finding]:
    """Path → finding of the images that cannot be decoded."""
    bar = progress(paths, "images checked", "image")
    findings = zip(bar, _examine_all(paths), strict=True)
    return {path: finding for path, finding in findings if finding is not None}


def _examine_all(paths: Sequence[str]) -> Iterator[_Finding | None]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(paths), CHUNK_IMAGES):
            yield from pool.map(_examine, paths[start : start + CHUNK_IMAGES])


def _examine(path: str) -> _Finding | None:
    try:
        read_image(path)
    except (ValueError, OSError) as error:
        is_certain = not isinstance(error, OSError | UnknownFormat)
        return _Finding(" ".join(str(error).split()), is_certain)
    return None


def _fingerprint_files(paths: list[str]) -> str:
    digest = hashlib.sha256(f"{VERSION}\n".encode())
    for path in sorted(paths):
        try:
            size, modification_time = stamp_file(path)
            stamp = f"{size} {modification_time}"
        except OSError:
            stamp = "missing"
        digest.update(os.fsencode(f"{os.path.abspath(path)}\0{stamp}\n"))
    return digest.hexdigest()

"""An optional cache of resized images: one memory-mapped file, shared by all processes and runs."""

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dataloaders.images import load_image
from system.escaping import name_as_text
from system.json_files import read_json, write_json
from system.locks import hold_lock

log = logging.getLogger(__name__)

CHUNK_IMAGES = 2048  # decoded and written before the index is saved

Progress = Callable[[Iterable, str, str], Iterable]  # (iterable, what, unit): draws a bar
Stamp = list[int]  # a source's size in bytes and its modification time in nanoseconds
Entry = list[int]  # row in the data file, then the source's stamp


class ImageCache:
    """Paths → (n, 3, R, R) uint8 from a data file. `open_image_cache` makes it."""

    def __init__(self, data: Path, resolution: int, rows: dict[str, int]) -> None:
        self.data = data
        self.resolution = resolution
        # Tensors instead of a dictionary, for the reason that `packed_list` gives.
        self.keys, order = torch.tensor([_key(path) for path in rows]).sort()
        self.rows = torch.tensor(list(rows.values()))[order]
        # Opened where it is used, so that workers map the file instead of copying it.
        self.pixels: np.memmap | None = None
        if (self.keys[1:] == self.keys[:-1]).any():
            raise ValueError(
                f"two of the images for {data} have the same 64-bit hash: rename one of them"
            )

    def __call__(self, paths: Sequence[str]) -> Tensor:
        """Images of source files. Raises KeyError for one that the cache was not opened for."""
        if self.pixels is None:
            shape = (int(self.rows.max()) + 1, 3, self.resolution, self.resolution)
            self.pixels = _map_file(self.data, shape)
        wanted = torch.tensor([_key(path) for path in paths])
        found = torch.searchsorted(self.keys, wanted).clamp(max=len(self.keys) - 1)
        if not torch.equal(self.keys[found], wanted):
            raise KeyError(f"not all of {', '.join(paths)} are in {self.data}")
        return torch.from_numpy(self.pixels[self.rows[found].numpy()])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "pixels": None}


def _map_file(path: Path, shape: tuple[int, ...]) -> np.memmap:
    try:
        return np.memmap(path, np.uint8, mode="r", shape=shape)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(
            f"cannot map {path} ({reason}): put --image_cache on a disk of this machine"
        ) from None


def open_image_cache(
    folder: str | Path, paths: Iterable[str], resolution: int, progress: Progress
) -> ImageCache:
    """The cache of these images at this resolution; images that are new or have changed are added.

    A lock lets one process build while others wait; a complete cache is only read. A failed build
    keeps what it has done; a killed one loses only its last chunk. Raises ValueError or OSError
    that names an image that cannot be read, a corrupt index, or a folder that cannot be written.
    """
    files = CacheFiles.in_folder(Path(folder), resolution)
    absolute_paths = {path: os.path.abspath(path) for path in paths}
    stamps = {path: stamp_file(path) for path in absolute_paths.values()}
    entries = _read_index(files)
    if _missing(entries, stamps):
        try:
            entries = _add_missing(files, stamps, progress)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and error.strerror is None:
                raise  # one of ours, about an image
            reason = error.strerror or error
            raise OSError(
                f"cannot build the image cache in {folder} (--image_cache): {reason}"
            ) from None
    rows = {path: entries[name_as_text(full)][0] for path, full in absolute_paths.items()}
    return ImageCache(files.data, resolution, rows)


class CacheFiles(NamedTuple):
    """The files of a cache of one resolution."""

    data: Path
    index: Path
    lock: Path
    resolution: int

    @classmethod
    def in_folder(cls, folder: Path, resolution: int) -> "CacheFiles":
        name = f"images-{resolution}"
        return cls(
            data=folder / f"{name}.uint8",
            index=folder / f"{name}.json",
            lock=folder / f"{name}.lock",
            resolution=resolution,
        )

    @property
    def image_bytes(self) -> int:
        """The size of an image in the data file."""
        return 3 * self.resolution * self.resolution


def _missing(entries: dict[str, Entry], stamps: dict[str, Stamp]) -> list[str]:
    return [
        path
        for path, stamp in stamps.items()
        if name_as_text(path) not in entries or entries[name_as_text(path)][1:] != stamp
    ]


def _add_missing(
    files: CacheFiles, stamps: dict[str, Stamp], progress: Progress
) -> dict[str, Entry]:
    """Add the missing images to data file and index; returns the entries of all images."""
    files.index.parent.mkdir(parents=True, exist_ok=True)
    with hold_lock(files.lock):
        entries = _read_index(files)  # again: another process may have built meanwhile
        missing = _missing(entries, stamps)
        first = _num_rows(entries)
        bar = iter(progress(missing, "image cache", "image"))
        for start in range(0, len(missing), CHUNK_IMAGES):
            chunk = missing[start : start + CHUNK_IMAGES]
            try:
                for row, path in _append(files, first + start, chunk):
                    entries[name_as_text(path)] = [row, *stamps[path]]
                    next(bar)
            finally:
                write_json(files.index, {"resolution": files.resolution, "images": entries})
        next(bar, None)  # closes it
        if missing:
            gigabytes = files.data.stat().st_size / 1e9
            log.info("%s: %d images added, %.2f GB in all", files.data, len(missing), gigabytes)
    return entries


def _append(files: CacheFiles, first: int, paths: list[str]) -> Iterator[tuple[int, str]]:
    """Decode on all cores, write in order from row `first` on, and yield each (row, path) written.

    What an earlier build that was killed has left from this row on is overwritten.
    """
    with open(files.data, "ab") as file, ThreadPoolExecutor(os.cpu_count()) as pool:
        file.truncate(first * files.image_bytes)
        images = [pool.submit(load_image, path, files.resolution) for path in paths]
        try:
            for row, (path, image) in enumerate(zip(paths, images, strict=True), first):
                file.write(image.result().numpy().tobytes())
                yield row, path
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _key(path: str) -> int:
    digest = hashlib.blake2b(os.fsencode(path), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def stamp_file(path: str) -> Stamp:
    """What changes if the file does. Raises FileNotFoundError that names a missing image."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"no image {path}") from None
    return [status.st_size, status.st_mtime_ns]


def _num_rows(entries: dict[str, Entry]) -> int:
    return 1 + max((row for row, *_ in entries.values()), default=-1)


def _read_index(files: CacheFiles) -> dict[str, Entry]:
    """Path, as text, → entry; empty if the cache is new, or its data file is missing or cut short.

    Raises ValueError for an index that is corrupt or of another resolution.
    """
    if not files.index.is_file():
        return {}
    try:
        content = read_json(files.index, dict)
    except ValueError as error:
        raise ValueError(f"{error}: delete it, and the image cache is built again") from None
    entries = content.get("images")
    is_sound = isinstance(entries, dict) and all(map(_is_entry, entries.values()))
    if not is_sound or content.get("resolution") != files.resolution:
        raise ValueError(
            f"{files.index} is not an index of an image cache: delete it, and the cache is built "
            "again"
        )
    needed = _num_rows(entries) * files.image_bytes
    if entries and not files.data.is_file():
        log.warning("%s is missing: the cache is built again", files.data)
        return {}
    if entries and files.data.stat().st_size < needed:
        log.warning("%s is shorter than its index says: the cache is built again", files.data)
        return {}
    return entries


def _is_entry(entry: Any) -> bool:
    is_list = isinstance(entry, list) and len(entry) == 3
    if not is_list or not all(type(number) is int for number in entry):
        return False
    row, size, _ = entry  # the time may lie before 1970
    return row >= 0 and size >= 0

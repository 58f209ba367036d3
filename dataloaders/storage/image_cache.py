"""An optional cache of resized images: one memory-mapped file, built once, shared by all workers, processes and runs."""

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from dataloaders.images import load_image
from system.json_files import read_json, write_json

log = logging.getLogger(__name__)

CHUNK_IMAGES = 2048  # images that are decoded and written before the index is saved


Entry = list[
    int
]  # row in the data file, then the source's size in bytes and its time of change in nanoseconds


class ImageCache:
    """Paths → (n, 3, R, R) uint8, read from `<folder>/images-<R>.uint8`. Make it with `open_image_cache`."""

    def __init__(self, data: Path, resolution: int, rows: dict[str, int]) -> None:
        self.data, self.resolution = data, resolution
        keys, order = torch.tensor([_key(path) for path in rows]).sort()
        if (keys[1:] == keys[:-1]).any():
            raise ValueError(
                f"two of the images for {data} have one key of 64 bits: rename one of them"
            )
        self.keys, self.rows = (
            keys,
            torch.tensor(list(rows.values()))[order],
        )  # tensors, no dict: see PackedList
        self.pixels: np.memmap | None = (
            None  # opened where it is used, so that workers map the file and copy nothing
        )

    def __call__(self, paths: Sequence[str]) -> Tensor:
        """Images of the given source files; KeyError for one that the cache was not opened for."""
        if self.pixels is None:
            shape = (int(self.rows.max()) + 1, 3, self.resolution, self.resolution)
            self.pixels = np.memmap(self.data, np.uint8, mode="r", shape=shape)
        wanted = torch.tensor([_key(path) for path in paths])
        places = torch.searchsorted(self.keys, wanted).clamp(max=len(self.keys) - 1)
        if not torch.equal(self.keys[places], wanted):
            raise KeyError(f"not all of {', '.join(paths)} are in {self.data}")
        return torch.from_numpy(self.pixels[self.rows[places].numpy()])

    def __getstate__(self) -> dict:
        return {**self.__dict__, "pixels": None}


def open_image_cache(
    folder: str | Path,
    paths: Iterable[str],
    resolution: int,
    progress: Callable[[Iterable, str, str], Iterable],
) -> ImageCache:
    """The cache of these images at this resolution; what it lacks, or holds of another size or time, is decoded and added.

    A lock lets one process build while others wait; a complete cache is only read. A build that breaks off keeps what it has
    done, a killed one all but the last thousands. `progress(iterable, what, unit)` draws the bar. Raises ValueError or OSError
    naming an image that cannot be read, a damaged index, or a folder that cannot be written.
    """
    folder = Path(folder)
    data, index = (folder / f"images-{resolution}.{ending}" for ending in ("uint8", "json"))
    names = {path: os.path.abspath(path) for path in paths}
    stamps = {path: _stamp(path) for path in names.values()}
    entries = _read_index(index, data, resolution)
    if _missing(entries, stamps):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / f"images-{resolution}.lock"):
                entries = _read_index(
                    index, data, resolution
                )  # another process may have built meanwhile
                _build(data, index, entries, stamps, resolution, progress)
        except OSError as error:
            if error.strerror is None:  # ours, about an image
                raise
            raise OSError(
                f"cannot build the image cache in {folder} (--image_cache): {error.strerror}"
            ) from None
    return ImageCache(data, resolution, {path: entries[name][0] for path, name in names.items()})


def _missing(entries: dict[str, Entry], stamps: dict[str, list[int]]) -> list[str]:
    return [
        path for path, stamp in stamps.items() if path not in entries or entries[path][1:] != stamp
    ]


def _build(
    data: Path,
    index: Path,
    entries: dict[str, Entry],
    stamps: dict[str, list[int]],
    resolution: int,
    progress: Callable,
) -> None:
    """Add what is missing to the data file and to `entries`, saving the index every AT_ONCE images."""
    missing = _missing(entries, stamps)
    first = 1 + max((entry[0] for entry in entries.values()), default=-1)
    bar = iter(progress(missing, "image cache", "image"))
    for start in range(0, len(missing), CHUNK_IMAGES):
        try:
            for row, path in _append(
                data, first + start, missing[start : start + CHUNK_IMAGES], resolution
            ):
                entries[path] = [row, *stamps[path]]
                next(bar)
        finally:
            write_json(index, {"resolution": resolution, "images": entries})
    next(bar, None)  # closes it
    if missing:
        log.info(
            "%s: %d images added, %.2f GB in all", data, len(missing), data.stat().st_size / 1e9
        )


def _append(data: Path, first: int, paths: list[str], resolution: int) -> Iterator[tuple[int, str]]:
    """Decode on all cores and write in order from row `first` on, over whatever a killed build left there; (row, path) done."""
    with open(data, "ab") as file, ThreadPoolExecutor(os.cpu_count()) as pool:
        file.truncate(first * _bytes_of(resolution))
        images = [pool.submit(load_image, path, resolution) for path in paths]
        try:
            for row, (path, image) in enumerate(zip(paths, images, strict=True), first):
                file.write(image.result().numpy().tobytes())
                yield row, path
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _key(path: str) -> int:
    return int.from_bytes(
        hashlib.blake2b(path.encode(), digest_size=8).digest(), "little", signed=True
    )


def _bytes_of(resolution: int) -> int:
    return 3 * resolution * resolution


def _stamp(path: str) -> list[int]:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"no image {path}") from None
    return [status.st_size, status.st_mtime_ns]


def _read_index(index: Path, data: Path, resolution: int) -> dict[str, Entry]:
    """Entries by path; none where the cache is new or its data file has lost rows."""
    if not index.is_file():
        return {}
    try:
        content = read_json(index, dict)
    except ValueError as error:
        raise ValueError(f"{error}: delete it, and the image cache is built anew") from None
    entries = content.get("images")
    sound = (
        content.get("resolution") == resolution
        and isinstance(entries, dict)
        and all(
            isinstance(entry, list)
            and len(entry) == 3
            and all(type(n) is int and n >= 0 for n in entry)
            for entry in entries.values()
        )
    )
    if not sound:
        raise ValueError(
            f"{index} is no index of an image cache: delete it, and the cache is built anew"
        )
    rows = 1 + max((entry[0] for entry in entries.values()), default=-1)
    if not data.is_file() or data.stat().st_size < rows * _bytes_of(resolution):
        log.warning("%s is shorter than its index says: the cache is built anew", data)
        return {}
    return entries

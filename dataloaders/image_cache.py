"""An optional cache of resized images: one memory-mapped file, built once, shared by all workers, processes and runs."""

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
from modules.files import read_json, write_json

log = logging.getLogger(__name__)

Entry = list[int]  # row in the data file, then the source's size in bytes and its time of change in nanoseconds


class ImageCache:
    """Paths → (n, 3, R, R) uint8, read from `<folder>/images-<R>.uint8`. Make it with `open_image_cache`."""

    def __init__(self, data: Path, resolution: int, rows: dict[str, int]) -> None:
        self.data, self.resolution, self.rows = data, resolution, rows
        self.pixels: np.memmap | None = None  # opened where it is used, so that workers map the file and copy nothing

    def __call__(self, paths: Sequence[str]) -> Tensor:
        """Images of the given source files, each of which was among those the cache was opened for."""
        if self.pixels is None:
            self.pixels = np.memmap(self.data, np.uint8, mode="r").reshape(-1, 3, self.resolution, self.resolution)
        return torch.from_numpy(self.pixels[[self.rows[path] for path in paths]])

    def __getstate__(self) -> dict:
        return {**self.__dict__, "pixels": None}


def open_image_cache(folder: str | Path, paths: Iterable[str], resolution: int, progress: Callable[[Iterable, str, str], Iterable]
                     ) -> ImageCache:
    """The cache of these images at this resolution; what it lacks, or holds of another size or time, is decoded and added.

    A lock lets one process build while others wait. A build that breaks off keeps what it has done. `progress(iterable, what,
    unit)` draws the bar. Raises ValueError or OSError naming an image that cannot be read, or a damaged index.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data, index = (folder / f"images-{resolution}.{ending}" for ending in ("uint8", "json"))
    names = {path: os.path.abspath(path) for path in paths}
    with FileLock(folder / f"images-{resolution}.lock"):
        entries = _read_index(index, data, resolution)
        stamps = {path: _stamp(path) for path in names.values()}
        missing = [path for path, stamp in stamps.items() if path not in entries or entries[path][1:] != stamp]
        if missing:
            first = 1 + max((entry[0] for entry in entries.values()), default=-1)
            try:
                for row, path in _append(data, first, missing, resolution, progress):
                    entries[path] = [row, *stamps[path]]
            finally:
                write_json(index, {"resolution": resolution, "images": entries})
            log.info("%s: %d images added, %.2f GB in all", data, len(missing), data.stat().st_size / 1e9)
    return ImageCache(data, resolution, {path: entries[name][0] for path, name in names.items()})


def _append(data: Path, first: int, paths: list[str], resolution: int, progress: Callable) -> Iterator[tuple[int, str]]:
    """Decode on all cores and write in order from row `first` on, over whatever a killed build left there; (row, path) done."""
    with open(data, "ab") as file, ThreadPoolExecutor(os.cpu_count()) as pool:
        file.truncate(first * _bytes_of(resolution))
        images = [pool.submit(load_image, path, resolution) for path in paths]
        try:
            for row, path in enumerate(progress(paths, "image cache", "image"), first):
                file.write(images[row - first].result().numpy().tobytes())
                images[row - first] = None  # or all images would stay in memory
                yield row, path
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


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
    content = read_json(index, dict)
    entries = content.get("images")
    sound = content.get("resolution") == resolution and isinstance(entries, dict) and all(
        isinstance(entry, list) and len(entry) == 3 and all(type(n) is int and n >= 0 for n in entry) for entry in entries.values())
    if not sound:
        raise ValueError(f"{index} is no index of an image cache: delete it, and the cache is built anew")
    rows = 1 + max((entry[0] for entry in entries.values()), default=-1)
    if not data.is_file() or data.stat().st_size < rows * _bytes_of(resolution):
        log.warning("%s is shorter than its index says: the cache is built anew", data)
        return {}
    return entries

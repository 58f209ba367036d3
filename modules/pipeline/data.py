"""The data of a run: its splits, with images that can be read, and what it reads images by."""

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence

from dataloaders.images import ImageFiles
from dataloaders.pairs import ImagePair
from dataloaders.samples import ImageReader
from dataloaders.storage.image_cache import open_image_cache
from dataloaders.storage.image_check import unreadable_images
from dataloaders.storage.packed_list import PackedList
from modules.options import Options
from system.runtime import Runtime

log = logging.getLogger(__name__)

Splits = Mapping[str, Sequence[ImagePair]]


def read_splits(options: Options, runtime: Runtime) -> dict[str, Sequence[ImagePair]]:
    """The splits that this run needs, in memory that worker processes share.

    Captioning needs the training captions even in an evaluation, for the baselines. An image that
    cannot be read is a ValueError, or with --on_bad_image skip its pair is left out.
    """
    dataset = options.data.open_dataset()
    skips = options.data.on_bad_image == "skip"
    splits = {
        split: PackedList(dataset.checked_pairs(split, need_images=not skips))
        for split in _needed_splits(options)
    }
    if options.data.image_cache and not skips:
        return splits  # building the cache reads all images
    read = _splits_with_images(splits, options)
    paths = list(dict.fromkeys(_image_paths(read)))
    cache_dir = options.model.cache_dir
    bad = runtime.on_main(lambda: unreadable_images(paths, cache_dir, runtime.progress_bar))
    if bad and not skips:
        more = f"; {len(bad) - 1} more of {len(paths)} images cannot be read either"
        raise ValueError(
            f"{next(iter(bad.values()))}{more if len(bad) > 1 else ''} "
            "(--on_bad_image skip would leave their pairs out)"
        )
    for split, pairs in read.items():
        splits[split] = drop_unreadable(bad, split, pairs)
    return splits


def _needed_splits(options: Options) -> list[str]:
    needed = []
    if options.run.do_train or options.task == "caption":
        needed.append("train")
    if options.run.do_train:
        needed.append(options.data.select_on)
    needed.append(options.data.eval_split)
    return list(dict.fromkeys(needed))


def _splits_with_images(splits: Splits, options: Options) -> dict[str, Sequence[ImagePair]]:
    """The splits whose images this run reads: an evaluation reads one split's only."""
    if options.run.do_train:
        return dict(splits)
    return {options.data.eval_split: splits[options.data.eval_split]}


def _image_paths(splits: Splits) -> Iterable[str]:
    return (path for pairs in splits.values() for pair in pairs for path in pair.image_paths)


def drop_unreadable(
    bad: Mapping[str, str], split: str, pairs: Sequence[ImagePair]
) -> Sequence[ImagePair]:
    """The pairs without those that have a bad image, which are logged. `bad` is path → reason."""
    readable = [pair for pair in pairs if not any(path in bad for path in pair.image_paths)]
    if len(readable) == len(pairs):
        return pairs
    for path in _image_paths({split: pairs}):
        if path in bad:
            log.warning("%s", bad[path])
    log.warning(
        "leaving out %d of the %d pairs of the %s split, whose images cannot be read "
        "(--on_bad_image skip)",
        len(pairs) - len(readable),
        len(pairs),
        split,
    )
    if not readable:
        raise ValueError(f"no pair of the {split} split has images that can be read")
    return PackedList(readable)


def fingerprint(options: Options, splits: Splits) -> str:
    """A hash of the ids and captions that training reads, but not of images or where they are."""
    digest = hashlib.sha256()
    for split in ("train", options.data.select_on):
        for pair in splits[split]:
            content = (pair.id, pair.captions, pair.distractor_captions)
            digest.update(repr(content).encode())
    return digest.hexdigest()


def open_images(resolution: int, splits: Splits, options: Options, runtime: Runtime) -> ImageReader:
    """What reads images at this resolution: from their files, or from the cache if there is one."""
    folder = options.data.image_cache
    if not folder:
        return ImageFiles(resolution)
    paths = _image_paths(_splits_with_images(splits, options))
    return open_image_cache(folder, paths, resolution, runtime.progress_bar)

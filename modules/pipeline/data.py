"""The data of a run: its splits, with images that can be read, and the reader of its images."""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence

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


def read_splits(options: Options) -> dict[str, Sequence[ImagePair]]:
    """The splits that this run needs, in memory that worker processes share; no image is read.

    Captioning uses the training captions even in an evaluation, for the baselines. Raises
    ValueError or OSError for annotations that cannot be used, and for an image that is absent,
    except with --on_bad_image skip.
    """
    dataset = options.data.open_dataset()
    need_images = options.data.on_bad_image != "skip"
    return {
        split: PackedList(dataset.checked_pairs(split, need_images)[: options.data.limit])
        for split in _needed_splits(options)
    }


def leave_out_unreadable(
    splits: Splits, options: Options, runtime: Runtime
) -> dict[str, Sequence[ImagePair]]:
    """The splits without the pairs whose images cannot be read.

    Raises ValueError if there is such an image, except with --on_bad_image skip.
    """
    kept = dict(splits)
    if options.data.image_cache and options.data.on_bad_image != "skip":
        return kept  # building the cache reads all images
    read = _splits_with_images(splits, options)
    bad = _find_unreadable(read, options, runtime)
    for split, pairs in read.items():
        kept[split] = drop_unreadable(bad, split, pairs)
    return kept


def _find_unreadable(splits: Splits, options: Options, runtime: Runtime) -> dict[str, str]:
    """Path → what is wrong, for every image that cannot be read.

    Raises ValueError if there is one, except with --on_bad_image skip.
    """
    paths = list(dict.fromkeys(_image_paths(splits)))
    cache_dir = options.model.cache_dir
    bad = runtime.on_main(lambda: unreadable_images(paths, cache_dir, runtime.progress_bar))
    if not bad or options.data.on_bad_image == "skip":
        return bad
    message = next(iter(bad.values()))
    if len(bad) > 1:
        message += f"; {len(bad) - 1} more of {len(paths)} images cannot be read either"
    raise ValueError(f"{message} (--on_bad_image skip would leave their pairs out)")


def _has_training_captions(options: Options) -> bool:
    """Whether an evaluation can show baselines: a table may hold nothing but what is scored."""
    if "train" in options.data.open_dataset().splits():
        return True
    log.info("there is no train split: the baselines are left out")
    return False


def _needed_splits(options: Options) -> list[str]:
    needed = []
    if options.run.do_train or (options.task == "caption" and _has_training_captions(options)):
        needed.append("train")
    if options.run.do_train:
        needed.append(options.data.select_on)
    needed.append(options.data.eval_split)
    return list(dict.fromkeys(needed))


def _splits_with_images(splits: Splits, options: Options) -> dict[str, Sequence[ImagePair]]:
    """The splits whose images this run reads: an evaluation reads only those of one split."""
    if options.run.do_train:
        return dict(splits)
    return {options.data.eval_split: splits[options.data.eval_split]}


def _image_paths(splits: Splits) -> Iterator[str]:
    for pairs in splits.values():
        for pair in pairs:
            yield from pair.image_paths


def drop_unreadable(
    bad: Mapping[str, str], split: str, pairs: Sequence[ImagePair]
) -> Sequence[ImagePair]:
    """The pairs without those that have a bad image, which are logged.

    `bad` is path → what is wrong. Raises ValueError if no pair is left.
    """
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
    """A hash of the ids and captions of the training pairs and of those that select the best epoch.

    It depends neither on the images nor on where they are.
    """
    digest = hashlib.sha256()
    for split in ("train", options.data.select_on):
        for pair in splits[split]:
            content = (pair.id, pair.captions, pair.distractor_captions)
            digest.update(repr(content).encode())
    return digest.hexdigest()


def open_images(resolution: int, splits: Splits, options: Options, runtime: Runtime) -> ImageReader:
    """The reader of images at this resolution: from their files, or from --image_cache."""
    folder = options.data.image_cache
    if not folder:
        return ImageFiles(resolution)
    paths = _image_paths(_splits_with_images(splits, options))
    return open_image_cache(folder, paths, resolution, runtime.progress_bar)

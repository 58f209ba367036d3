"""TODO."""

import hashlib
import logging
from collections.abc import Mapping, Sequence

from dataloaders.datasets import load_pairs
from dataloaders.images import ImageFiles
from dataloaders.pairs import ImagePair
from dataloaders.samples import ImageReader
from dataloaders.storage.image_cache import open_image_cache
from dataloaders.storage.image_check import unreadable_images
from dataloaders.storage.packed_list import PackedList
from modules.options import Options
from system.runtime import Runtime

log = logging.getLogger(__name__)


def read_splits(options: Options, runtime: Runtime) -> dict[str, Sequence[ImagePair]]:
    """The splits that this run needs; captioning's baselines need the training captions even in an evaluation.

    The images of those that are read must be sound, or with --on_bad_image skip their pairs are left out.
    """
    data, training = options.data, options.run.do_train
    wanted = ["train"] if training or options.task == "caption" else []
    wanted += [data.select_on] if training else []
    skip = data.on_bad_image == "skip"
    splits = {
        split: load_pairs(
            data.datatype, data.data_path, data.features_path, split, need_images=not skip
        )
        for split in dict.fromkeys([*wanted, data.eval_split])
    }
    used = splits if training else {data.eval_split: splits[data.eval_split]}
    if data.image_cache and not skip:  # building it reads them all
        return splits
    paths = dict.fromkeys(
        path for scenes in used.values() for scene in scenes for path in scene.image_paths
    )
    bad = runtime.on_main(
        lambda: unreadable_images(paths, options.model.cache_dir, runtime.progress)
    )
    if bad and not skip:
        more = (
            f"; {len(bad) - 1} more of {len(paths)} images cannot be read either"
            if len(bad) > 1
            else ""
        )
        raise ValueError(
            f"{next(iter(bad.values()))}{more} (--on_bad_image skip would leave their pairs out)"
        )
    return splits | {split: drop_unreadable(bad, split, scenes) for split, scenes in used.items()}


def drop_unreadable(
    bad: Mapping[str, str], split: str, scenes: Sequence[ImagePair]
) -> Sequence[ImagePair]:
    """The scenes all of whose images can be read; the others are told."""
    sound = [scene for scene in scenes if not any(path in bad for path in scene.image_paths)]
    if len(sound) == len(scenes):
        return scenes
    for path in (path for scene in scenes for path in scene.image_paths if path in bad):
        log.warning("%s", bad[path])
    log.warning(
        "the %s split goes without %d of its %d pairs, whose images cannot be read (--on_bad_image skip)",
        split,
        len(scenes) - len(sound),
        len(scenes),
    )
    if not sound:
        raise ValueError(f"no pair of the {split} split has images that can be read")
    return PackedList(sound)


def fingerprint(options: Options, splits: Mapping[str, Sequence[ImagePair]]) -> str:
    """Of the ids and captions that training reads: where they lie, and what their images show, is not in it."""
    digest = hashlib.sha256()
    for split in ("train", options.data.select_on):
        for scene in splits[split]:
            digest.update(repr((scene.id, scene.captions, scene.distractor_captions)).encode())
    return digest.hexdigest()


def open_images(
    resolution: int, splits: Mapping[str, Sequence[ImagePair]], options: Options, runtime: Runtime
) -> ImageReader:
    if not options.data.image_cache:
        return ImageFiles(resolution)
    used = (
        splits
        if options.run.do_train
        else {options.data.eval_split: splits[options.data.eval_split]}
    )
    paths = (path for scenes in used.values() for scene in scenes for path in scene.image_paths)
    return open_image_cache(options.data.image_cache, paths, resolution, runtime.progress)

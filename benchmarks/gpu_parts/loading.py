"""Parts of benchmarks/gpu.py that measure the loader, and how long a run takes to start."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from benchmarks.data_path import SAMPLES, pair_rate, replicate_clevr
from benchmarks.gpu_parts.setting import (
    Row,
    Setting,
    adaptation_words,
    attempt,
    draw_scenes,
    start,
    wait_for_line,
    write_sizes,
)
from dataloaders.datasets import open_dataset
from dataloaders.images import ImageFiles
from dataloaders.pairs import ImagePair
from dataloaders.samples import ImageReader
from dataloaders.storage.image_cache import open_image_cache
from system.runtime import Runtime


def measure_loader(setting: Setting) -> Iterator[Row]:
    """Pairs per second from files and from the image cache, for both stages."""
    scale = setting.scale
    drawn = draw_scenes(setting, "drawn", scale.scenes)
    root = setting.folder / "data"
    replicate_clevr(drawn, root, scale.loader_pairs, scale.scenes)
    pairs = open_dataset("clevr", root).checked_pairs("train")
    readers = {
        "files": ImageFiles(scale.model.clip.image_resolution),
        "cache": _open_cache(setting, pairs),
    }
    for source, reader in readers.items():
        for stage in SAMPLES:
            work = partial(_measure_rate, setting, stage, pairs, reader)
            yield attempt("loader", work, stage=stage, images=source, workers=setting.workers)


def _open_cache(setting: Setting, pairs: Sequence[ImagePair]) -> ImageReader:
    paths = [path for pair in pairs for path in pair.image_paths]
    resolution = setting.scale.model.clip.image_resolution
    return open_image_cache(setting.folder / "cache", paths, resolution, Runtime().progress_bar)


def _measure_rate(
    setting: Setting, stage: str, pairs: Sequence[ImagePair], images: ImageReader
) -> Row:
    scale = setting.scale
    rate = pair_rate(
        SAMPLES[stage],
        pairs,
        setting.workers,
        scale.read_pairs,
        images,
        scale.loader_batch,
        for_gpu=setting.device.type == "cuda",
    )
    return {"pairs_per_second": rate}


def measure_start(setting: Setting) -> Iterator[Row]:
    """Seconds from the command to the first step of an adaptation, with random weights."""
    data = draw_scenes(setting, "start", setting.scale.scenes, test=2)
    yield attempt("start of a training", partial(_time_start, setting, data))


def _time_start(setting: Setting, data: Path) -> Row:
    model = setting.scale.model
    sizes = write_sizes(setting.folder, model.clip)
    words = adaptation_words(
        setting,
        data,
        setting.folder / "started",
        *("--pretrained_clip_name", str(sizes), "--batch_size", "4", "--epochs", "1"),
        *("--intra_num_hidden_layers", str(model.intra_layers), "--max_words", "12"),
    )
    with start(words) as process:
        seconds = wait_for_line(process, "epoch 1/1 step 1/")
    return {"seconds": round(seconds, 1)}

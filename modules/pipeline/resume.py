"""TODO."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from dataloaders.pairs import ImagePair
from modules.options import Options
from modules.options.groups import ModelOptions
from modules.pipeline.data import fingerprint
from modules.training.states import STATE_FILE, ResumePoint, named_state, newest_state, state_at
from system.runtime import Runtime

log = logging.getLogger(__name__)


def find_resume_point(
    options: Options, splits: Mapping[str, Sequence[ImagePair]], runtime: Runtime
) -> ResumePoint | None:
    """What --resume_model names, or --resume auto finds; ValueError where it is another run's than these options'."""
    source, folder = options.model, Path(options.run.output_dir)
    if not (source.resume_model or source.resume):
        return None
    point = runtime.on_main(lambda: open_resume_point(source, folder))
    if point is None:
        log.info("--resume auto: no state in %s, this run starts afresh", folder)
        return None
    if not point.path.is_file():
        raise FileNotFoundError(
            f"process {runtime.rank} does not see {point.path}: all machines must share its folder"
        )
    serious, others = point.changed_options(dict(options.items()), fingerprint(options, splits))
    if serious and not source.resume_force:
        raise ValueError(
            f"{point.path} is of another run: {'; '.join(serious)}. Give these as they were, or --resume_force to go "
            "on all the same"
        )
    for text in serious + others:
        log.warning("continuing although %s", text)
    log.info(
        "continuing from %s; --init_model and --pretrained_clip_name give no weights", point.path
    )
    return point


def open_resume_point(source: ModelOptions, folder: Path) -> ResumePoint | None:
    """What is asked for: the newest state of the folder, a file's, or that at an address."""
    if source.resume:
        return newest_state(folder)
    if not source.resume_model.is_remote:
        return named_state(source.resume_model.reveal())
    if any(folder.glob(f"{STATE_FILE}.*")):
        raise ValueError(
            f"{folder} holds states of a run already: --resume auto continues it; to continue that at "
            f"{source.resume_model} give --output_dir an empty folder"
        )
    return state_at(source.resume_model, source.cache_dir)

"""Finds the state that a run continues from, and refuses one that its options do not fit."""

import logging
from pathlib import Path

from modules.options import Options
from modules.options.groups import ModelOptions
from modules.training.states import (
    ResumePoint,
    list_complete_states,
    named_state,
    newest_state,
    state_at,
)
from system.runtime import Runtime

log = logging.getLogger(__name__)


def find_resume_point(
    options: Options, data_fingerprint: str, runtime: Runtime
) -> ResumePoint | None:
    """The state that --resume_model names, or that --resume auto finds; None for a new run.

    The main process looks for it, and every process checks it. Raises ValueError if it was saved
    with other options, and OSError if it does not exist.
    """
    source = options.model
    folder = Path(options.run.output_dir)
    if not (source.resume_model or source.resume):
        return None
    resume = runtime.on_main(lambda: _find_on_main(source, folder))
    if resume is None:
        log.info("--resume auto: no state in %s, a new run begins", folder)
        return None
    if not resume.path.is_file():
        raise FileNotFoundError(
            f"process {runtime.rank} does not see {resume.path}: all machines must share its folder"
        )
    _refuse_changed_options(resume, options, data_fingerprint)
    log.info(
        "continuing from %s; --init_model and --pretrained_clip_name are not read", resume.path
    )
    return resume


def _find_on_main(source: ModelOptions, folder: Path) -> ResumePoint | None:
    """The newest state in the run's folder, the one in a file, or the one at a URL."""
    if source.resume:
        return newest_state(folder)
    if not source.resume_model.is_remote:
        return named_state(source.resume_model.reveal())
    if list_complete_states(folder):
        raise ValueError(
            f"{folder} holds states of a run already: --resume auto continues it; to continue the "
            f"one at {source.resume_model}, give --output_dir an empty folder"
        )
    return state_at(source.resume_model, source.cache_dir)


def _refuse_changed_options(resume: ResumePoint, options: Options, data_fingerprint: str) -> None:
    """Refuse options that would change the result, unless --resume_force allows it; log others."""
    affecting, harmless = resume.changed_options(dict(options.items()), data_fingerprint)
    if affecting and not options.model.resume_force:
        raise ValueError(
            f"{resume.path} was saved with other options: {'; '.join(affecting)}. Restore them, "
            "or pass --resume_force to continue anyway"
        )
    for change in affecting:
        log.warning("continuing although %s", change)
    for change in harmless:
        log.info("changed since the state was saved: %s", change)

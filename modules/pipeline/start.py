"""The runtime that a run's options ask for, and the first lines of its log."""

import logging
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from modules.options import Options
from system.compute import allows_onednn
from system.json_files import write_json
from system.runtime import Runtime, open_runtime

log = logging.getLogger(__name__)

OPTIONS_FILE = "options.json"


@contextmanager
def start_runtime(options: Options) -> Iterator[Runtime]:
    """Open the runtime, and log the hardware and the options. A prediction logs only warnings."""
    run = options.run
    precision = "fp16" if run.fp16 else run.precision
    with open_runtime(
        precision,
        run.local_rank,
        run.seed,
        run.deterministic,
        quiet=run.do_predict,
        device_name=run.device,
    ) as runtime:
        _log_start(options, runtime)
        yield runtime


def _log_start(options: Options, runtime: Runtime) -> None:
    log.info(
        "%s · %d process(es) on %s (%s), %s · torch %s, Python %s",
        options.task,
        runtime.world_size,
        runtime.device.type,
        _device_name(runtime.device),
        runtime.precision,
        torch.__version__,
        platform.python_version(),
    )
    log.info("options that differ from their defaults (all are in %s):", OPTIONS_FILE)
    for option, value in options.changed_items():
        log.info("  --%s = %s", option, value)
    if options.ignored:
        names = ", ".join(options.ignored)
        log.warning("accepted but without effect, as in the published code: %s", names)
    if allows_onednn():
        log.info("float32 matrix products use oneDNN")


def write_options(folder: Path, options: Options) -> None:
    """Write the values of all options into a run's folder."""
    write_json(folder / OPTIONS_FILE, dict(options.items()))


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or "CPU"

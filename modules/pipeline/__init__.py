"""What both entry scripts do around their stage: read the data, build the model, train or evaluate, report."""

import logging
import warnings
from contextlib import nullcontext
from pathlib import Path

from modules.options import Options
from modules.pipeline.data import open_images, read_splits
from modules.pipeline.evaluate import build_evaluator, evaluate_and_report
from modules.pipeline.model import build_model
from modules.pipeline.resume import find_resume_point
from modules.pipeline.start import start_runtime
from modules.pipeline.train import train
from modules.weights.sources import LoadedWeights
from system.java import ensure_java
from system.run_folder import open_run_folder
from system.signals import StopSignals

log = logging.getLogger(__name__)


def run(options: Options) -> None:
    """A whole run of either script. What the user can mend is a ValueError or OSError, mostly before anything is written."""
    warnings.filterwarnings("ignore", message="This DataLoader will create .* worker processes")
    with (
        StopSignals() if options.run.do_train else nullcontext() as stop,
        start_runtime(options) as runtime,
    ):
        if options.task == "caption" and runtime.is_main:
            ensure_java()
        splits = read_splits(options, runtime)
        point = find_resume_point(options, splits, runtime)
        tensors = point.tensors() if point else None
        model = build_model(
            options, LoadedWeights(tensors["model"], point.info, str(point.path)) if point else None
        )
        images = open_images(model.clip.visual.image_resolution, splits, options, runtime)
        if options.run.do_train:
            train(model, splits, images, options, runtime, stop, point, tensors)
        else:
            evaluator = build_evaluator(splits, images, options.data.eval_split, options, runtime)
            with open_run_folder(Path(options.run.output_dir), runtime) as folder:
                evaluate_and_report(
                    model, evaluator, str(options.model.init_model), folder, options, runtime
                )

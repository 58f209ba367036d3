"""Training or evaluation: read the data, build the model, then do what was asked."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from dataloaders.pairs import ImagePair
from dataloaders.samples import ImageReader
from modules.clip4idc import CLIP4IDC
from modules.options import Options
from modules.pipeline.data import open_images, read_splits
from modules.pipeline.evaluate import build_evaluator, evaluate_and_report
from modules.pipeline.model import build_model
from modules.pipeline.resume import find_resume_point
from modules.pipeline.start import start_runtime
from modules.pipeline.train import choose_objective, train
from modules.registries import PROTOCOLS
from modules.training.states import ResumePoint
from modules.weights.sources import LoadedWeights
from system.run_folder import open_run_folder
from system.runtime import Runtime
from system.signals import StopSignals

Splits = Mapping[str, Sequence[ImagePair]]


def train_or_evaluate(options: Options) -> None:
    """A whole run with --do_train or --do_eval."""
    warnings.filterwarnings("ignore", message="This DataLoader will create .* worker processes")
    if options.run.do_train:
        with StopSignals() as stop, start_runtime(options) as runtime:
            _train(options, runtime, stop)
    else:
        with start_runtime(options) as runtime:
            _evaluate(options, runtime)


def _train(options: Options, runtime: Runtime, stop: StopSignals) -> None:
    objective = choose_objective(options)
    prepare_scoring(options, runtime)
    splits = read_splits(options, runtime)
    resume = find_resume_point(options, splits, runtime)
    model = build_model(options, _weights_of(resume) if resume else None)
    images = _open_images(model, splits, options, runtime)
    train(model, objective, splits, images, options, runtime, stop, resume)


def _evaluate(options: Options, runtime: Runtime) -> None:
    prepare_scoring(options, runtime)
    splits = read_splits(options, runtime)
    model = build_model(options)
    images = _open_images(model, splits, options, runtime)
    evaluator = build_evaluator(splits, images, options.data.eval_split, options, runtime)
    with open_run_folder(Path(options.run.output_dir), runtime):
        evaluate_and_report(model, evaluator, str(options.model.init_model), options, runtime)


def prepare_scoring(options: Options, runtime: Runtime) -> None:
    """Raises OSError where captions are to be scored and a program for that is missing."""
    if options.task == "caption" and runtime.is_main:
        for name in options.data.open_dataset().protocols:
            PROTOCOLS[name].prepare()


def _weights_of(resume: ResumePoint) -> LoadedWeights:
    return LoadedWeights(resume.tensors()["model"], resume.info, str(resume.path))


def _open_images(
    model: CLIP4IDC, splits: Splits, options: Options, runtime: Runtime
) -> ImageReader:
    return open_images(model.image_resolution, splits, options, runtime)

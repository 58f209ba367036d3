"""--do_train and --do_eval: read the data, build the model, then train or evaluate it."""

import warnings
from pathlib import Path

from modules.options import Options
from modules.pipeline.data import fingerprint, leave_out_unreadable, open_images, read_splits
from modules.pipeline.evaluate import build_evaluator, evaluate_and_report
from modules.pipeline.model import build_model
from modules.pipeline.resume import find_resume_point
from modules.pipeline.start import start_runtime, write_options
from modules.pipeline.train import check_batch_size, choose_objective, train
from modules.registries import PROTOCOLS
from modules.training.states import ResumePoint
from modules.weights.sources import LoadedWeights
from system.run_folder import open_run_folder
from system.runtime import Runtime
from system.signals import StopSignals


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
    splits = read_splits(options)
    check_batch_size(objective, splits["train"], options, runtime.world_size)
    splits = leave_out_unreadable(splits, options, runtime)
    data_fingerprint = fingerprint(options, splits)
    resume = find_resume_point(options, data_fingerprint, runtime)
    resumed_weights = _weights_of(resume) if resume else None
    built = build_model(options, resumed_weights)
    images = open_images(built.model.image_resolution, splits, options, runtime)
    train(built, objective, splits, data_fingerprint, images, options, runtime, stop, resume)


def _evaluate(options: Options, runtime: Runtime) -> None:
    prepare_scoring(options, runtime)
    splits = leave_out_unreadable(read_splits(options), options, runtime)
    model = build_model(options).model
    images = open_images(model.image_resolution, splits, options, runtime)
    evaluator = build_evaluator(splits, images, options.data.eval_split, options, runtime)
    with open_run_folder(Path(options.run.output_dir), runtime) as folder:
        if runtime.is_main:
            write_options(folder, options)
        evaluate_and_report(model, evaluator, str(options.model.init_model), options, runtime)


def prepare_scoring(options: Options, runtime: Runtime) -> None:
    """Raise OSError on all processes if captions are to be scored and a program is missing."""
    if options.task == "caption":
        runtime.on_main(lambda: _prepare_protocols(options))


def _prepare_protocols(options: Options) -> None:
    for name in options.data.open_dataset().protocols:
        PROTOCOLS[name].prepare()


def _weights_of(resume: ResumePoint) -> LoadedWeights:
    started_from = resume.info.get("started_from", "")
    return LoadedWeights(resume.tensors()["model"], resume.info, str(resume.path), started_from)

"""Evaluation within a run: the evaluator of a split, the final evaluation and its report."""

import logging
from pathlib import Path

from dataloaders.batches import build_batches
from dataloaders.samples import EvaluationPairs, ImageReader
from modules.clip4idc import CLIP4IDC
from modules.evaluation import RunDescription
from modules.evaluation.captions import CaptionEvaluator
from modules.evaluation.retrieval import RetrievalEvaluator
from modules.evaluation.split_scorer import SplitScorer
from modules.options import Options
from modules.pipeline.data import Splits
from modules.training.progress import Progress
from modules.training.states import weights_path
from modules.weights.tensor_files import read_weights
from system.command import quote_script
from system.json_files import write_json
from system.runtime import Runtime

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.json"

SplitEvaluator = RetrievalEvaluator | CaptionEvaluator


def build_evaluator(
    splits: Splits,
    images: ImageReader,
    split: str,
    options: Options,
    runtime: Runtime,
) -> SplitEvaluator:
    """The evaluator of the options' task for a split.

    Raises ValueError or OSError if the ground truth does not fit the pairs.
    """
    pairs = splits[split]
    data = options.data
    samples = EvaluationPairs(pairs, images, distractors=options.task == "caption")
    loader = build_batches(
        samples,
        data.batch_size_val,
        training=False,
        num_workers=data.num_thread_reader,
        rank=runtime.rank,
        world_size=runtime.world_size,
        for_gpu=runtime.device.type == "cuda",
    )
    run = _describe_run(split, options)
    if options.task == "retrieval":
        return RetrievalEvaluator(pairs, loader, data.max_words, run, runtime)
    dataset = data.open_dataset()
    return CaptionEvaluator(
        pairs,
        loader,
        SplitScorer.build(pairs, splits.get("train", ()), dataset, split),
        data.max_words,
        options.decoding,
        run,
        runtime,
        keeps_references=split not in dataset.ground_truth_splits,
    )


def _describe_run(split: str, options: Options) -> RunDescription:
    return RunDescription(
        Path(options.run.output_dir),
        options.data.data_path,
        split,
        options={f"--{name}": value for name, value in options.changed_items()},
        defaults={f"--{name}": value for name, value in options.default_items()},
    )


def evaluate_best_epoch(
    model: CLIP4IDC,
    progress: Progress,
    evaluator: SplitEvaluator,
    options: Options,
    runtime: Runtime,
) -> None:
    """After training: load the weights of the chosen epoch, evaluate them and report."""
    chosen = weights_path(evaluator.run.folder, progress.chosen_epoch)
    if progress.best_epoch < 0:
        log.warning(
            "no epoch has a score on the %s split: the last one, %s, is used as the best",
            options.data.select_on,
            chosen,
        )
    else:
        log.info(
            "best epoch: %d with %.4f on the %s split, %s",
            progress.best_epoch + 1,
            progress.best_score,
            options.data.select_on,
            chosen,
        )
    runtime.wait_for_main()  # until it has written the weights
    model.load_state_dict(read_weights(chosen))
    evaluate_and_report(model, evaluator, str(chosen), options, runtime)
    if options.task == "caption":
        words = ("--init_model", options.run.output_dir)
        command = quote_script("CLIP4IDCinference.py", "BEFORE", "AFTER", *words)
        log.info("to caption two images with it: %s", command)


def evaluate_and_report(
    model: CLIP4IDC,
    evaluator: SplitEvaluator,
    checkpoint: str,
    options: Options,
    runtime: Runtime,
) -> None:
    """Evaluate, then write metrics.json and the report.

    `checkpoint` says where the weights come from.
    """
    split = evaluator.run.split
    log.info("evaluating on the %s split", split)
    model.to(runtime.device).eval()
    _, scores = evaluator.evaluate(model, "eval")
    if runtime.is_main:
        description = {"stage": options.task, "datatype": options.data.datatype, "split": split}
        write_json(evaluator.run.folder / METRICS_FILE, {**description, **scores})
        evaluator.write_report(model, checkpoint)

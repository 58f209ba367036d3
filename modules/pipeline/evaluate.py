"""Evaluation within a run: the evaluator of a split, and the last evaluation with its report."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from dataloaders.batches import build_loader
from dataloaders.pairs import ImagePair
from dataloaders.samples import EvaluationPairs, ImageReader
from modules.clip4idc import CLIP4IDC
from modules.evaluation.captions import CaptionEvaluator
from modules.evaluation.judge import CaptionJudge
from modules.evaluation.retrieval import RetrievalEvaluator
from modules.options import Options
from modules.training.loop import Evaluator
from modules.training.progress import Progress
from modules.training.states import weights_path
from modules.weights.tensor_files import read_weights
from system.json_files import write_json
from system.runtime import Runtime

log = logging.getLogger(__name__)


def build_evaluator(
    splits: Mapping[str, Sequence[ImagePair]],
    images: ImageReader,
    split: str,
    options: Options,
    runtime: Runtime,
) -> Evaluator:
    scenes, data = splits[split], options.data
    pairs = EvaluationPairs(scenes, images, distractors=options.task == "caption")
    loader = build_loader(
        pairs, data.batch_size_val, False, data.num_thread_reader, runtime.rank, runtime.world_size
    )
    if options.task == "retrieval":
        return RetrievalEvaluator(scenes, loader, options, runtime)
    return CaptionEvaluator(
        scenes,
        loader,
        CaptionJudge.build(scenes, splits["train"], options, split),
        options,
        runtime,
    )


def report_best(
    model: CLIP4IDC,
    progress: Progress,
    reporter: Evaluator,
    folder: Path,
    options: Options,
    runtime: Runtime,
) -> None:
    chosen = weights_path(folder, progress.chosen_epoch)
    if progress.best_epoch < 0:
        log.warning(
            "no epoch scored on the %s split: the last one, %s, stands for the best epoch",
            options.data.select_on,
            chosen,
        )
    else:
        log.info(
            "best epoch: %d with %.4f on the %s split, %s",
            progress.best_epoch,
            progress.best_score,
            options.data.select_on,
            chosen,
        )
    runtime.on_main(lambda: None)  # the main process has written the weights that all now read
    model.load_state_dict(read_weights(chosen))
    evaluate_and_report(model, reporter, str(chosen), folder, options, runtime)


def evaluate_and_report(
    model: CLIP4IDC,
    evaluator: Evaluator,
    checkpoint: str,
    folder: Path,
    options: Options,
    runtime: Runtime,
) -> None:
    split = options.data.eval_split
    log.info("evaluating on the %s split", split)
    model.to(runtime.device).eval()
    _, scores = evaluator(model, "eval", folder)
    if runtime.is_main:
        write_json(
            folder / "metrics.json",
            {"stage": options.task, "datatype": options.data.datatype, "split": split, **scores},
        )
        evaluator.report(model, checkpoint, split, folder)

"""What both entry scripts do around their stage: read the data, build the model, train or evaluate, report."""

import logging
import platform
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from dataloaders import load_scenes
from dataloaders.image_cache import open_image_cache
from dataloaders.images import ImageFiles
from dataloaders.pairs import AdaptationSamples, Batches, EvaluationPairs, FinetuningSamples, ImageReader, Scene, build_loader
from modules.bert_config import load_cross_config, load_decoder_config
from modules.captioning import CaptionJudge, generate_captions, write_hypotheses
from modules.checkpoint import Progress, load_for_resume, resume_files, weights_path, write_card
from modules.clip4idc import CLIP4IDC
from modules.files import write_json
from modules.options import Options
from modules.predictor import Decoding, Predictor
from modules.pretrained import load_weights, read_weights
from modules.report import Shown, write_report
from modules.retrieval import evaluate_retrieval
from modules.runtime import Runtime, format_table, open_output_dir, open_runtime
from modules.scoring import ensure_java
from modules.tokenizer import VOCAB_SIZE
from modules.training import build_trainer, fit

log = logging.getLogger(__name__)

SAMPLES = {"retrieval": AdaptationSamples, "caption": FinetuningSamples}


class Evaluator(Protocol):
    """Evaluates one split, epoch after epoch."""

    def __call__(self, model: CLIP4IDC, label: str, folder: Path) -> tuple[float, dict[str, float]]:
        """The score that chooses epochs, and all scores; `label` names the epoch in files."""


@dataclass
class RetrievalEvaluator:
    """Stage 1: R@k both ways; text→pair R@1 chooses."""

    scenes: Sequence[Scene]
    loader: Batches
    options: Options
    runtime: Runtime

    def __post_init__(self) -> None:
        if len(self.scenes) < self.runtime.world_size:
            raise ValueError(f"{len(self.scenes)} pairs to evaluate on are fewer than {self.runtime.world_size} processes")

    def __call__(self, model: CLIP4IDC, label: str, folder: Path) -> tuple[float, dict[str, float]]:
        metrics = evaluate_retrieval(model, self.scenes, self.loader, self.options.data.max_words, self.runtime)
        rows = [("text → pair", metrics["text_to_pair"]), ("pair → text", metrics["pair_to_text"])]
        log.info("retrieval among %d pairs\n%s", len(self.scenes), format_table(rows, digits=1))
        return metrics["text_to_pair"]["R1"], {f"{way}_{name}": v for way, scores in metrics.items() for name, v in scores.items()}


@dataclass
class CaptionEvaluator:
    """Stage 2: captions to hyp_ep_<label>.json, scored on the main process; CIDEr chooses."""

    scenes: Sequence[Scene]
    loader: Batches
    judge: CaptionJudge
    options: Options
    runtime: Runtime
    captions: dict[str, str] = field(default_factory=dict)  # the latest, and on the main process their scores
    scores: dict[str, dict[str, float]] = field(default_factory=dict)

    def __call__(self, model: CLIP4IDC, label: str, folder: Path) -> tuple[float, dict[str, float]]:
        self.captions = generate_captions(model, self.scenes, self.loader, self.options, self.runtime)
        scores = None
        if self.runtime.is_main:
            log.info("captions in %s", write_hypotheses(folder, label, self.captions))
            self.scores = self.judge.score(self.captions)
            scores = self.scores["all"]
        scores = self.runtime.from_main(scores)
        return scores["CIDEr"], scores

    def report(self, model: CLIP4IDC, checkpoint: str, split: str, folder: Path) -> None:
        """report.html of the latest evaluation, on the main process."""
        single = self.judge.cider_by_id(self.captions)
        images = {scene.id: (scene.before, scene.after) for scene in self.scenes}
        images |= {scene.distractor_id: (scene.before, scene.distractor) for scene in self.scenes if scene.distractor}
        shown = {key: Shown(key, *images[key], text, self.judge.truth[key], single[key]) for key, text in self.captions.items()}
        groups = {name: [shown[key] for key in ids] for name, ids in (self.judge.subsets or {"all": list(shown)}).items() if ids}
        predictor = Predictor(model, self.options.data.max_words, self.runtime)
        versions = [("checkpoint", checkpoint), ("torch", torch.__version__), ("Python", platform.python_version())]
        counts = f"{len(self.scenes)} scenes of the {split} split, {len(self.captions)} captions. Best and worst go by CIDEr."
        how = Decoding(self.options.caption.beam_size, self.options.caption.length_penalty)
        write_report(folder / "report.html", counts, self.scores, self.judge.baselines, groups, predictor, how,
                     folder / "history.csv", versions + [(f"--{name}", value) for name, value in self.options.items()])
        log.info("report in %s", folder / "report.html")


def run(options: Options) -> None:
    """A whole run of either script. What the user can mend is a ValueError or OSError, mostly before anything is written."""
    warnings.filterwarnings("ignore", message="This DataLoader will create .* worker processes")
    with open_runtime(options) as runtime:
        if options.stage == "caption" and runtime.is_main:
            ensure_java()
        splits = _read_splits(options)
        model = build_model(options)
        images = _open_images(model.clip.visual.image_resolution, splits, options, runtime)
        if options.run.do_train:
            _train(model, splits, images, options, runtime)
        else:
            evaluator = _build_evaluator(splits, images, options.data.eval_split, options, runtime)
            folder = open_output_dir(options, runtime)
            _report(model, evaluator, str(options.model.init_model), folder, options, runtime)


def build_model(options: Options) -> CLIP4IDC:
    """The stage's model from --init_model, --pretrained_clip_name or nothing, tensor by tensor (SPEC §2, Weights)."""
    source = options.model
    if source.resume_model:
        log.info("--resume_model is given: --init_model %s is not used", source.init_model)
        weights = read_weights(resume_files(source.resume_model)[0])
    else:
        weights = load_weights(source.init_model, source.pretrained_clip_name, source.cache_dir)
    if options.run.do_eval and options.stage == "caption" and not any(key.startswith("decoder.") for key in weights):
        raise ValueError(f"--do_eval needs the weights of a captioner (decoder.*): --init_model is {source.init_model}")
    decoder_config = cross_config = None
    if options.stage == "caption":
        decoder_config = load_decoder_config(source.decoder_model).with_layers(source.decoder_num_hidden_layers)
    if source.sim_header == "tight":
        cross_config = load_cross_config(source.cross_model).with_layers(source.cross_num_hidden_layers)
    model = CLIP4IDC.from_weights(weights, options.stage, source.intra_num_hidden_layers, source.linear_patch, decoder_config,
                                  source.sim_header, cross_config)
    if model.vocab_size != VOCAB_SIZE:
        raise ValueError(f"this CLIP has a vocabulary of {model.vocab_size}, expected CLIP's {VOCAB_SIZE}")
    if options.data.max_words > model.clip.sizes.context_length:
        raise ValueError(f"--max_words is {options.data.max_words}, expected at most {model.clip.sizes.context_length}, this "
                         "CLIP's context length")
    return model


def _read_splits(options: Options) -> dict[str, list[Scene]]:
    """The splits that this run needs; captioning's baselines need the training captions even in an evaluation."""
    data = options.data
    wanted = ["train"] if options.run.do_train or options.stage == "caption" else []
    wanted += [data.select_on] if options.run.do_train else []
    return {split: load_scenes(data.datatype, data.data_path, data.features_path, split)
            for split in dict.fromkeys([*wanted, data.eval_split])}


def _open_images(resolution: int, splits: dict[str, list[Scene]], options: Options, runtime: Runtime) -> ImageReader:
    if not options.data.image_cache:
        return ImageFiles(resolution)
    used = splits if options.run.do_train else {options.data.eval_split: splits[options.data.eval_split]}
    paths = (path for scenes in used.values() for scene in scenes for path in scene.image_paths)
    return open_image_cache(options.data.image_cache, paths, resolution, runtime.progress)


def _build_evaluator(splits: dict[str, list[Scene]], images: ImageReader, split: str, options: Options,
                     runtime: Runtime) -> Evaluator:
    scenes, data = splits[split], options.data
    pairs = EvaluationPairs(scenes, images, distractors=options.stage == "caption")
    loader = build_loader(pairs, data.batch_size_val, False, data.num_thread_reader, runtime.rank, runtime.world_size)
    if options.stage == "retrieval":
        return RetrievalEvaluator(scenes, loader, options, runtime)
    return CaptionEvaluator(scenes, loader, CaptionJudge.build(scenes, splits["train"], options, split), options, runtime)


def _train(model: CLIP4IDC, splits: dict[str, list[Scene]], images: ImageReader, options: Options, runtime: Runtime) -> None:
    data, select_on = options.data, options.data.select_on
    samples = SAMPLES[options.stage](splits["train"], images, data.max_words, options.run.seed)
    per_process = data.batch_size // options.training.gradient_accumulation_steps // runtime.world_size
    loader = build_loader(samples, per_process, True, data.num_thread_reader, runtime.rank, runtime.world_size, options.run.seed)
    chooser = _build_evaluator(splits, images, select_on, options, runtime)
    reporter = chooser if data.eval_split == select_on else _build_evaluator(splits, images, data.eval_split, options, runtime)
    trainer = build_trainer(model, loader, options, runtime)
    progress = Progress()
    if options.model.resume_model:
        progress = load_for_resume(options.model.resume_model, model, trainer.optimizer, trainer.scaler)
    folder = open_output_dir(options, runtime)
    if runtime.is_main:
        write_card(folder, model, data.max_words)
    log.info("epochs are chosen on the %s split%s", select_on, ", as in the paper" if select_on == "test" else "")
    fit(trainer, folder, progress, lambda model, epoch: chooser(model, str(epoch), folder))
    _report_best(model, progress, reporter, folder, options, runtime)


def _report_best(model: CLIP4IDC, progress: Progress, reporter: Evaluator, folder: Path, options: Options,
                 runtime: Runtime) -> None:
    chosen = weights_path(folder, progress.chosen_epoch)
    if progress.best_epoch < 0:
        log.warning("no epoch scored on the %s split: the last one, %s, stands for the best epoch", options.data.select_on, chosen)
    else:
        log.info("best epoch: %d with %.4f on the %s split, %s", progress.best_epoch, progress.best_score, options.data.select_on,
                 chosen)
    runtime.from_main(None)  # the main process has written the weights that all now read
    model.load_state_dict(read_weights(chosen))
    _report(model, reporter, str(chosen), folder, options, runtime)


def _report(model: CLIP4IDC, evaluator: Evaluator, checkpoint: str, folder: Path, options: Options, runtime: Runtime) -> None:
    split = options.data.eval_split
    log.info("evaluating on the %s split", split)
    model.to(runtime.device).eval()
    _, scores = evaluator(model, "eval", folder)
    if runtime.is_main:
        write_json(folder / "metrics.json", {"stage": options.stage, "split": split, **scores})
        if isinstance(evaluator, CaptionEvaluator):
            evaluator.report(model, checkpoint, split, folder)

"""What both entry scripts do around their stage: read the data, build the model, train or evaluate, report."""

import logging
import warnings
from pathlib import Path

from dataloaders import load_scenes
from dataloaders.image_cache import open_image_cache
from dataloaders.images import ImageFiles
from dataloaders.pairs import AdaptationSamples, EvaluationPairs, FinetuningSamples, ImageReader, Scene, build_loader
from modules.bert_config import load_cross_config, load_decoder_config
from modules.captioning import CaptionJudge
from modules.checkpoint import Progress, load_for_resume, resume_files, weights_path, write_card
from modules.cider import CiderReward
from modules.clip4idc import CLIP4IDC
from modules.evaluation import CaptionEvaluator, Evaluator, RetrievalEvaluator
from modules.files import write_json
from modules.java import ensure_java
from modules.options import Options
from modules.pretrained import load_weights, read_weights
from modules.runtime import Runtime, open_output_dir, open_runtime
from modules.stages import SelfCriticalStep
from modules.tensorboard import Board
from modules.tokenizer import VOCAB_SIZE
from modules.training import build_trainer, fit

log = logging.getLogger(__name__)


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
        if source.init_model:
            log.info("--resume_model is given: --init_model %s is not used", source.init_model)
        weights = read_weights(resume_files(source.resume_model)[0])
    else:
        weights = load_weights(source.init_model, source.pretrained_clip_name, source.cache_dir)
    needy = "--do_eval" if options.run.do_eval else "--scst" if options.training.scst else None
    if needy and options.stage == "caption" and not any(key.startswith("decoder.") for key in weights):
        raise ValueError(f"{needy} needs the weights of a captioner (decoder.*): --init_model is {source.init_model}")
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
    common = splits["train"], images, data.max_words, options.run.seed
    samples = (AdaptationSamples(*common, both=options.training.distractor_negatives) if options.stage == "retrieval" else
               FinetuningSamples(*common))
    per_process = data.batch_size // options.training.gradient_accumulation_steps // runtime.world_size
    loader = build_loader(samples, per_process, True, data.num_thread_reader, runtime.rank, runtime.world_size, options.run.seed)
    chooser = _build_evaluator(splits, images, select_on, options, runtime)
    reporter = chooser if data.eval_split == select_on else _build_evaluator(splits, images, data.eval_split, options, runtime)
    step = _self_critical_step(model, splits["train"], options) if options.training.scst else None
    trainer = build_trainer(model, loader, options, runtime, step)
    progress = Progress()
    if options.model.resume_model:
        progress = load_for_resume(options.model.resume_model, model, trainer.optimizer, trainer.scaler, trainer.averaged)
    replaced = not options.model.resume_model and weights_path(Path(options.run.output_dir), "best").exists()
    folder = open_output_dir(options, runtime)
    if replaced:
        log.warning("%s holds an earlier run, whose files of the same names are replaced; --resume_model would continue it", folder)
    if runtime.is_main:
        write_card(folder, model, data.max_words)
        trainer.board = Board(folder, progress.trained_epochs * trainer.steps_per_epoch)
    log.info("epochs are chosen on the %s split%s", select_on, ", as in the paper" if select_on == "test" else "")
    fit(trainer, folder, progress, chooser)
    _report_best(model, progress, reporter, folder, options, runtime)


def _self_critical_step(model: CLIP4IDC, scenes: list[Scene], options: Options) -> SelfCriticalStep:
    captions = {scene.id: scene.captions for scene in scenes}
    captions |= {scene.distractor_id: scene.distractor_captions for scene in scenes if scene.distractor}
    names = [[scene.id, scene.distractor_id] if scene.distractor else [scene.id] for scene in scenes]
    return SelfCriticalStep(model, CiderReward(captions, options.data.num_thread_reader), names, options.data.max_words)


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
        evaluator.report(model, checkpoint, split, folder)

"""What both entry scripts do around their stage: read the data, build the model, train or evaluate, report."""

import hashlib
import logging
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from dataloaders import load_scenes
from dataloaders.image_cache import open_image_cache
from dataloaders.image_check import unreadable_images
from dataloaders.images import ImageFiles
from dataloaders.packed import PackedList
from dataloaders.pairs import EvaluationPairs, ImageReader, Scene, build_loader
from modules.bert_config import load_cross_config, load_decoder_config
from modules.captioning import CaptionJudge
from modules.card import CARD, describe_model, with_card, write_card
from modules.checkpoint import (
    STATE,
    Progress,
    ResumePoint,
    RunFiles,
    named_state,
    newest_state,
    state_at,
    weights_path,
)
from modules.cider import CiderReward
from modules.clip4idc import CLIP4IDC
from modules.evaluation import CaptionEvaluator, Evaluator, RetrievalEvaluator
from modules.files import write_json
from modules.java import ensure_java
from modules.options import ModelOptions, Options
from modules.pretrained import Loaded, load_weights
from modules.runtime import Runtime, open_output_dir, open_runtime
from modules.stages import SAMPLES, SelfCriticalStep
from modules.stopping import StopSignals
from modules.tensorboard import Board
from modules.tokenizer import VOCAB_SIZE
from modules.training import Trainer, build_trainer, fit
from modules.weight_files import read_weights

log = logging.getLogger(__name__)


def run(options: Options) -> None:
    """A whole run of either script. What the user can mend is a ValueError or OSError, mostly before anything is written."""
    warnings.filterwarnings("ignore", message="This DataLoader will create .* worker processes")
    with (
        StopSignals() if options.run.do_train else nullcontext() as stop,
        open_runtime(options) as runtime,
    ):
        if options.stage == "caption" and runtime.is_main:
            ensure_java()
        splits = _read_splits(options, runtime)
        point = _find_state(options, splits, runtime)
        tensors = point.tensors() if point else None
        model = build_model(
            options, Loaded(tensors["model"], point.card, str(point.path)) if point else None
        )
        images = _open_images(model.clip.visual.image_resolution, splits, options, runtime)
        if options.run.do_train:
            _train(model, splits, images, options, runtime, stop, point, tensors)
        else:
            evaluator = _build_evaluator(splits, images, options.data.eval_split, options, runtime)
            with open_output_dir(options, runtime) as folder:
                _report(model, evaluator, str(options.model.init_model), folder, options, runtime)


def build_model(options: Options, loaded: Loaded | None = None) -> CLIP4IDC:
    """The stage's model of what a state held, else from --init_model, --pretrained_clip_name or nothing, tensor by tensor (SPEC §2,
    Weights). A card beside the weights goes before the options."""
    source = options.model
    if loaded is None:
        loaded = load_weights(
            source.init_model,
            source.pretrained_clip_name,
            source.cache_dir,
            source.image_resolution,
            source.quick_gelu,
        )
    weights = loaded.tensors
    needy = "--do_eval" if options.run.do_eval else "--scst" if options.training.scst else None
    if (
        needy
        and options.stage == "caption"
        and not any(key.startswith("decoder.") for key in weights)
    ):
        raise ValueError(
            f"{needy} needs the weights of a captioner (decoder.*): --init_model is {source.init_model}"
        )
    decoder_config = cross_config = None
    settings = with_card(
        {
            "intra_num_hidden_layers": source.intra_num_hidden_layers,
            "linear_patch": source.linear_patch,
        },
        loaded.card,
        loaded.origin,
    )
    if options.stage == "caption":
        decoder_config = load_decoder_config(source.decoder_model).with_layers(
            source.decoder_num_hidden_layers
        )
        if "decoder_config" in loaded.card:
            asked, decoder_config = (
                decoder_config,
                load_decoder_config(loaded.card["decoder_config"]),
            )
            if asked != decoder_config:
                log.info("the captioner's config is the one beside %s", loaded.origin)
    if source.sim_header == "tight":
        cross_config = load_cross_config(source.cross_model).with_layers(
            source.cross_num_hidden_layers
        )
    model = CLIP4IDC.from_weights(
        weights, options.stage, *settings.values(), decoder_config, source.sim_header, cross_config
    )
    if model.vocab_size != VOCAB_SIZE:
        raise ValueError(
            f"this CLIP has a vocabulary of {model.vocab_size}, expected CLIP's {VOCAB_SIZE}"
        )
    if options.data.max_words > model.clip.sizes.context_length:
        raise ValueError(
            f"--max_words is {options.data.max_words}, expected at most {model.clip.sizes.context_length}, this "
            "CLIP's context length"
        )
    return model


def _read_splits(options: Options, runtime: Runtime) -> dict[str, Sequence[Scene]]:
    """The splits that this run needs; captioning's baselines need the training captions even in an evaluation.

    The images of those that are read must be sound, or with --on_bad_image skip their pairs are left out.
    """
    data, training = options.data, options.run.do_train
    wanted = ["train"] if training or options.stage == "caption" else []
    wanted += [data.select_on] if training else []
    skip = data.on_bad_image == "skip"
    splits = {
        split: load_scenes(
            data.datatype, data.data_path, data.features_path, split, need_images=not skip
        )
        for split in dict.fromkeys([*wanted, data.eval_split])
    }
    used = splits if training else {data.eval_split: splits[data.eval_split]}
    if data.image_cache and not skip:  # building it reads them all
        return splits
    paths = dict.fromkeys(
        path for scenes in used.values() for scene in scenes for path in scene.image_paths
    )
    bad = runtime.from_main(
        lambda: unreadable_images(paths, options.model.cache_dir, runtime.progress)
    )
    if bad and not skip:
        more = (
            f"; {len(bad) - 1} more of {len(paths)} images cannot be read either"
            if len(bad) > 1
            else ""
        )
        raise ValueError(
            f"{next(iter(bad.values()))}{more} (--on_bad_image skip would leave their pairs out)"
        )
    return splits | {split: _without(bad, split, scenes) for split, scenes in used.items()}


def _without(bad: Mapping[str, str], split: str, scenes: Sequence[Scene]) -> Sequence[Scene]:
    """The scenes all of whose images can be read; the others are told."""
    sound = [scene for scene in scenes if not any(path in bad for path in scene.image_paths)]
    if len(sound) == len(scenes):
        return scenes
    for path in (path for scene in scenes for path in scene.image_paths if path in bad):
        log.warning("%s", bad[path])
    log.warning(
        "the %s split goes without %d of its %d pairs, whose images cannot be read (--on_bad_image skip)",
        split,
        len(scenes) - len(sound),
        len(scenes),
    )
    if not sound:
        raise ValueError(f"no pair of the {split} split has images that can be read")
    return PackedList(sound)


def _find_state(
    options: Options, splits: Mapping[str, Sequence[Scene]], runtime: Runtime
) -> ResumePoint | None:
    """What --resume_model names, or --resume auto finds; ValueError where it is another run's than these options'."""
    source, folder = options.model, Path(options.run.output_dir)
    if not (source.resume_model or source.resume):
        return None
    point = runtime.from_main(lambda: _open_state(source, folder))
    if point is None:
        log.info("--resume auto: no state in %s, this run starts afresh", folder)
        return None
    if not point.path.is_file():
        raise FileNotFoundError(
            f"process {runtime.rank} does not see {point.path}: all machines must share its folder"
        )
    serious, others = point.differences(dict(options.items()), _fingerprint(options, splits))
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


def _open_state(source: ModelOptions, folder: Path) -> ResumePoint | None:
    """What is asked for: the newest state of the folder, a file's, or that at an address."""
    if source.resume:
        return newest_state(folder)
    if not source.resume_model.is_remote:
        return named_state(source.resume_model.reveal())
    if any(folder.glob(f"{STATE}.*")):
        raise ValueError(
            f"{folder} holds states of a run already: --resume auto continues it; to continue that at "
            f"{source.resume_model} give --output_dir an empty folder"
        )
    return state_at(source.resume_model, source.cache_dir)


def _fingerprint(options: Options, splits: Mapping[str, Sequence[Scene]]) -> str:
    """Of the ids and captions that training reads: where they lie, and what their images show, is not in it."""
    digest = hashlib.sha256()
    for split in ("train", options.data.select_on):
        for scene in splits[split]:
            digest.update(repr((scene.id, scene.captions, scene.distractor_captions)).encode())
    return digest.hexdigest()


def _open_images(
    resolution: int, splits: Mapping[str, Sequence[Scene]], options: Options, runtime: Runtime
) -> ImageReader:
    if not options.data.image_cache:
        return ImageFiles(resolution)
    used = (
        splits
        if options.run.do_train
        else {options.data.eval_split: splits[options.data.eval_split]}
    )
    paths = (path for scenes in used.values() for scene in scenes for path in scene.image_paths)
    return open_image_cache(options.data.image_cache, paths, resolution, runtime.progress)


def _build_evaluator(
    splits: Mapping[str, Sequence[Scene]],
    images: ImageReader,
    split: str,
    options: Options,
    runtime: Runtime,
) -> Evaluator:
    scenes, data = splits[split], options.data
    pairs = EvaluationPairs(scenes, images, distractors=options.stage == "caption")
    loader = build_loader(
        pairs, data.batch_size_val, False, data.num_thread_reader, runtime.rank, runtime.world_size
    )
    if options.stage == "retrieval":
        return RetrievalEvaluator(scenes, loader, options, runtime)
    return CaptionEvaluator(
        scenes,
        loader,
        CaptionJudge.build(scenes, splits["train"], options, split),
        options,
        runtime,
    )


def _train(
    model: CLIP4IDC,
    splits: dict[str, Sequence[Scene]],
    images: ImageReader,
    options: Options,
    runtime: Runtime,
    stop: StopSignals,
    point: ResumePoint | None,
    tensors: dict[str, Any] | None,
) -> None:
    data, select_on = options.data, options.data.select_on
    samples = SAMPLES[options.stage](splits["train"], images, data.max_words, options.run.seed)
    per_process = (
        data.batch_size // options.training.gradient_accumulation_steps // runtime.world_size
    )
    loader = build_loader(
        samples,
        per_process,
        True,
        data.num_thread_reader,
        runtime.rank,
        runtime.world_size,
        options.run.seed,
    )
    chooser = _build_evaluator(splits, images, select_on, options, runtime)
    reporter = (
        chooser
        if data.eval_split == select_on
        else _build_evaluator(splits, images, data.eval_split, options, runtime)
    )
    step = _self_critical_step(model, splits["train"], options) if options.training.scst else None
    trainer = build_trainer(model, loader, options, runtime, step, stop)
    if point:
        trainer.restore(tensors, point.path)
    progress = point.progress if point else Progress()
    with open_output_dir(options, runtime) as folder:
        if runtime.is_main:
            _open_files(trainer, folder, progress, _fingerprint(options, splits), point)
        log.info(
            "epochs are chosen on the %s split%s",
            select_on,
            ", as in the paper" if select_on == "test" else "",
        )
        fit(trainer, folder, progress, chooser)
        _report_best(model, progress, reporter, folder, options, runtime)


def _open_files(
    trainer: Trainer, folder: Path, progress: Progress, data: str, point: ResumePoint | None
) -> None:
    """Everything that the main process writes into."""
    options = trainer.options
    card = describe_model(trainer.model, options.data.max_words)
    trainer.files = RunFiles(
        folder,
        options.training.keep_checkpoints,
        dict(options.items()),
        data,
        card,
        afresh=point is None,
    )
    if point:
        trainer.files.adopt(point)
    elif weights_path(folder, "best").exists():
        log.warning(
            "%s holds an earlier run, whose files go as soon as this one saves its own; until then it can be stopped, and "
            "--resume auto continues the earlier one",
            folder,
        )
    write_card(folder / CARD, card)
    done = (
        progress.trained_epochs * trainer.steps_per_epoch
        + progress.batches // options.training.gradient_accumulation_steps
    )
    trainer.board = Board(folder, done)


def _self_critical_step(
    model: CLIP4IDC, scenes: Sequence[Scene], options: Options
) -> SelfCriticalStep:
    captions = {scene.id: scene.captions for scene in scenes}
    captions |= {
        scene.distractor_id: scene.distractor_captions for scene in scenes if scene.distractor
    }
    names = [
        [scene.id, scene.distractor_id] if scene.distractor else [scene.id] for scene in scenes
    ]
    return SelfCriticalStep(
        model, CiderReward(captions, options.data.num_thread_reader), names, options.data.max_words
    )


def _report_best(
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
    runtime.from_main(lambda: None)  # the main process has written the weights that all now read
    model.load_state_dict(read_weights(chosen))
    _report(model, reporter, str(chosen), folder, options, runtime)


def _report(
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
            {"stage": options.stage, "datatype": options.data.datatype, "split": split, **scores},
        )
        evaluator.report(model, checkpoint, split, folder)

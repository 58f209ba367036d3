"""TODO."""

from dataclasses import dataclass, fields
from typing import Any

from system.flags import flag
from system.urls import Address, redact

IGNORED_FLAGS = (
    "do_pretrain",
    "do_lower_case",
    "lr_decay",
    "margin",
    "hard_negative_rate",
    "negative_weighting",
    "n_pair",
    "use_mil",
    "sampled_use_mil",
    "feature_framerate",
    "fp16_opt_level",
    "n_gpu",
    "world_size",
    "rank",
    "text_num_hidden_layers",
    "visual_num_hidden_layers",
)


CONTEXT_LENGTH = 77


MAX_CAPTIONS = 100  # beams, or captions drawn, of a pair: memory grows with them


TASKS = ("retrieval", "caption")


@dataclass(frozen=True)
class RunOptions:
    """What to do, where, and how exactly."""

    do_train: bool = flag(False, "train, evaluating after every epoch", bool)
    do_eval: bool = flag(False, "evaluate --init_model", bool)
    do_predict: bool = flag(False, "caption your own images", bool, stage="caption")
    output_dir: str | None = flag(None, "folder for checkpoints, log.txt and results")
    task_type: str | None = flag(None, "the script's own stage, when given at all", choices=TASKS)
    seed: int = flag(42, "seed of every random draw", int)
    precision: str = flag(
        "auto",
        "auto: bf16 or fp16 on a GPU, whichever it has, fp32 elsewhere",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    fp16: bool = flag(False, "old name of --precision fp16", bool)
    local_rank: int | None = flag(
        None,
        "set by old launchers; torchrun sets the environment instead",
        int,
        aliases=("--local-rank",),
    )
    n_display: int = flag(100, "steps between two lines of the log", int)
    deterministic: bool = flag(
        False,
        "refuse computations that come out a little differently each time (GPUs have such)",
        bool,
    )


@dataclass(frozen=True)
class DataOptions:
    """Which pairs, and how they are read."""

    datatype: str | None = flag(
        None, "dataset; pairs: a table of your own", choices=("spot", "clevr", "pairs")
    )
    data_path: str | None = flag(
        None,
        "folder of the annotations (CLEVR-Change's images lie below it), or the table of pairs",
    )
    features_path: str | None = flag(None, "folder of Spot-the-Diff's images")
    max_words: int = flag(20, "tokens of a caption, special ones included", int)
    image_cache: str | None = flag(
        None,
        "folder that keeps the resized images, so that they are decoded once and not every epoch",
    )
    on_bad_image: str = flag(
        "error",
        "an image that is missing or cannot be decoded ends the run, or its pair is left out",
        choices=("error", "skip"),
    )
    num_thread_reader: int = flag(
        1, "worker processes that read images, and with --scst as many that score", int
    )
    batch_size: int = flag(256, "global training batch, divided over the processes", int)
    batch_size_val: int = flag(3500, "evaluation batch of each process", int)
    eval_split: str = flag("test", "split that results are reported on", choices=("test", "val"))
    select_on: str = flag(
        "test",
        "split that chooses the best epoch; the paper used test, val is the sound choice",
        choices=("test", "val"),
    )


@dataclass(frozen=True)
class ModelOptions:
    """Where the weights come from, and what their shapes cannot say."""

    init_model: Address | None = flag(
        None,
        "weights to start from: a file or folder, as given or below ckpts/, an address "
        "(https://, s3://), or owner/name on the Hugging Face hub",
        Address,
    )
    resume: str | None = flag(
        None,
        "auto: continue the run in --output_dir from its newest sound state, or begin it",
        choices=("auto",),
    )
    resume_model: Address | None = flag(
        None,
        "continue from this pytorch_model.bin.<epoch> or "
        "training_state.bin.<epoch>[.<steps>]: a file in --output_dir, or an address",
        Address,
    )
    resume_force: bool = flag(
        False, "continue although options have changed that change what comes out", bool
    )
    pretrained_clip_name: Address = flag(
        Address("ViT-B/32"),
        "CLIP: a name of OpenAI's, whatever --init_model takes, or a .json "
        "of sizes for random weights",
        Address,
    )
    quick_gelu: bool = flag(
        False,
        "vouch for CLIP weights that do not say it: they were trained with the quick GELU",
        bool,
    )
    image_resolution: int | None = flag(
        None, "side of the images, where not the weights': position embeddings are resized", int
    )
    cache_dir: str | None = flag(None, "folder for downloads (default: the user's cache folder)")
    intra_num_hidden_layers: int = flag(9, "vision blocks that see each image alone", int)
    linear_patch: str = flag(
        "2d", "patches from each image (2d) or from both as two frames (3d)", choices=("2d", "3d")
    )
    decoder_model: str = flag(
        "decoder-base", "captioner's config: a name below modules/, a folder or a file"
    )
    decoder_num_hidden_layers: int | None = flag(
        None, "captioner's layers, instead of the config's", int
    )
    cross_model: str = flag(
        "cross-base", "cross encoder's config: a name below modules/, a folder or a file"
    )
    cross_num_hidden_layers: int | None = flag(
        None, "cross encoder's layers, instead of the config's", int
    )
    sim_header: str = flag(
        "loose",
        "similarity: cosine (loose) or cross encoder (tight)",
        stage="retrieval",
        choices=("loose", "tight"),
    )


@dataclass(frozen=True)
class TrainingOptions:
    """Optimisation."""

    epochs: int = flag(20, "passes over the training split", int)
    lr: float = flag(1e-4, "peak learning rate", float)
    coef_lr: float = flag(1.0, "factor on the learning rate inside CLIP", float)
    warmup_proportion: float = flag(0.1, "share of the steps that warm up; -1 for none", float)
    gradient_accumulation_steps: int = flag(1, "parts that a batch is worked off in", int)
    freeze_layer_num: int = flag(0, "freeze CLIP below this block; -1 freezes nothing", int)
    freeze_vision: bool = flag(
        False, "leave the whole vision tower as the adaptation made it", bool, stage="caption"
    )
    optimizer: str = flag(
        "bertadam",
        "bertadam, as published, or adamw: bias correction, and no clip of each parameter's gradient",
        choices=("bertadam", "adamw"),
    )
    scst: bool = flag(
        False,
        "self-critical training: raise the CIDEr of a captioner that has learned already",
        bool,
        stage="caption",
    )
    save_every_steps: int = flag(
        0, "steps after which to save also within an epoch; 0: at its end alone", int
    )
    keep_checkpoints: int = flag(
        2, "newest states and weights kept, beside the best weights; -1 keeps all", int
    )
    compile: bool = flag(
        False,
        "torch.compile the transformer blocks; gains little on CPUs (benchmarks/README.md)",
        bool,
    )


@dataclass(frozen=True)
class CaptionOptions:
    """Decoding and scoring."""

    gt_dir: str = flag(
        "gt", "folder of <datatype>_total_change_captions_reformat.json", stage="caption"
    )
    beam_size: int = flag(1, "beams of the decoding; 1 is greedy", int, stage="caption")
    length_penalty: float = flag(
        0.0, "beams compare log-probability / length ** this", float, stage="caption"
    )


@dataclass(frozen=True)
class PredictOptions:
    """Your own images, with --do_predict."""

    before: str | None = flag(None, "an image, or a folder of them", stage="caption")
    after: str | None = flag(
        None,
        "an image, or a folder; without it --before is a folder of x.png and x_2.png",
        stage="caption",
    )
    pairs: str | None = flag(
        None, "table of pairs, .csv or .jsonl: before, after, optional id", stage="caption"
    )
    predictions: str | None = flag(
        None, "file to write, .csv or .jsonl; a broken run goes on with it", stage="caption"
    )
    num_captions: int = flag(
        1, "captions of each pair; above 1 they are drawn", int, stage="caption"
    )
    temperature: float | None = flag(
        None, "draw words, logits divided by this", float, stage="caption"
    )
    top_p: float | None = flag(
        None,
        "draw words, of the likeliest that together reach this probability",
        float,
        stage="caption",
    )
    save_attention: str | None = flag(
        None, "folder for pictures of where the model looked", stage="caption"
    )


@dataclass(frozen=True)
class Options:
    """Every option of a run, checked."""

    stage: str
    run: RunOptions
    data: DataOptions
    model: ModelOptions
    training: TrainingOptions
    caption: CaptionOptions
    predict: PredictOptions
    ignored: tuple[str, ...] = ()

    def items(self, changed: bool | None = None) -> list[tuple[str, Any]]:
        """Name and value of every option of this stage and task; of those alone that are changed, or are not, from the default.

        They are for people and files: addresses are without what may be secret in them.
        """
        parts = (getattr(self, name) for name in GROUPS if name != "predict" or self.run.do_predict)
        found = [
            (f, getattr(part, f.name))
            for part in parts
            for f in fields(part)
            if belongs_to(f, self.stage)
        ]
        return [
            (f.name, _as_text(value))
            for f, value in found
            if changed is None or (value != f.default) == changed
        ]


def _as_text(value: Any) -> Any:
    """An option's value for people and files."""
    if isinstance(value, Address):
        return str(value)
    return redact(value) if isinstance(value, str) else value


GROUPS: dict[str, type] = {
    "run": RunOptions,
    "data": DataOptions,
    "model": ModelOptions,
    "training": TrainingOptions,
    "caption": CaptionOptions,
    "predict": PredictOptions,
}


def belongs_to(f: Any, stage: str) -> bool:
    return f.metadata["stage"] in (None, stage)

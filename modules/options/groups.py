"""The flags, by group: each field made by `flag` is a flag of the same name."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataloaders.datasets import DATASETS, open_dataset
from modules.registries import OBJECTIVES
from system.flags import MAX_SEED, MAX_WORKERS, FlagGroup, device_name, flag
from system.urls import Location

if TYPE_CHECKING:
    from dataloaders.pairs import PairDataset

TASKS = ("retrieval", "caption")
MAX_RESOLUTION = 4096  # attention over more patches fits no memory
CONTEXT_LENGTH = 77  # tokens that CLIP's text encoder reads at most


@dataclass(frozen=True)
class RunOptions(FlagGroup):
    """What to do, where, and how exactly."""

    do_train: bool = flag(False, "train, and evaluate after every epoch", bool)
    do_eval: bool = flag(False, "evaluate the weights of --init_model", bool)
    do_predict: bool = flag(False, "caption your own images", bool, task="caption")
    output_dir: str | None = flag(None, "folder for checkpoints, log.txt and results")
    task_type: str | None = flag(
        None, "if given, must be this script's own task (kept for compatibility)", choices=TASKS
    )
    seed: int = flag(42, "seed of every random number", int, at_least=0, at_most=MAX_SEED)
    device: str = flag(
        "auto",
        "where to compute: auto, cpu, cuda, cuda:NUMBER or mps; auto: a GPU, or else the CPU",
        device_name,
    )
    precision: str = flag(
        "auto",
        "number format for computing; auto: bf16, or else fp16, on a GPU, and fp32 elsewhere",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    fp16: bool = flag(False, "old name of --precision fp16", bool)
    local_rank: int | None = flag(
        None,
        "set by old launchers; torchrun sets environment variables instead",
        int,
        aliases=("--local-rank",),
    )
    n_display: int = flag(100, "write a log line every this many steps", int, at_least=1)
    deterministic: bool = flag(
        False, "use only deterministic algorithms, and fail if there is none", bool
    )

    def find_problems(self) -> list[str]:
        problems = super().find_problems()
        if self.fp16 and self.precision not in ("auto", "fp16"):
            problems.append(f"--fp16 contradicts --precision {self.precision}")
        return problems


@dataclass(frozen=True)
class DataOptions(FlagGroup):
    """Which pairs, and how they are read.

    `settings` holds the dataset's own settings, an object of its `Settings`.
    """

    datatype: str | None = flag(
        None,
        "dataset: %(choices)s; pairs is a table of your own. With --help, its own flags are listed",
        choices=DATASETS,
    )
    data_path: str | None = flag(
        None,
        "folder of the annotations (and of CLEVR-Change's images), or the table of pairs",
    )
    features_path: str | None = flag(None, "folder of Spot-the-Diff's images")
    gt_dir: str = flag(
        "gt",
        "folder of <datatype>_total_change_captions_reformat.json, the reference captions of "
        "the splits that the dataset scores against that file",
        task="caption",
    )
    max_words: int = flag(
        20,
        "tokens of a caption, including its start and end tokens",
        int,
        at_least=3,
        at_most=CONTEXT_LENGTH,
    )
    image_cache: str | None = flag(
        None, "folder for resized images, so that each is decoded once and not in every epoch"
    )
    on_bad_image: str = flag(
        "error",
        "for a missing or corrupt image: error ends the run, skip leaves its pair out",
        choices=("error", "skip"),
    )
    num_thread_reader: int = flag(
        1,
        "worker processes that read images; with --scst, the same number again scores captions",
        int,
        at_least=0,
        at_most=MAX_WORKERS,
    )
    limit: int | None = flag(
        None, "use only the first pairs of each split, this many, for a trial", int, at_least=1
    )
    batch_size: int = flag(
        256,
        "pairs per optimizer step, divided by the processes and by --gradient_accumulation_steps",
        int,
        at_least=1,
    )
    batch_size_val: int = flag(3500, "pairs per evaluation batch, in each process", int, at_least=1)
    eval_split: str = flag(
        "test", "split whose scores are the result of the run", choices=("test", "val")
    )
    select_on: str = flag(
        "test",
        "split that chooses the best epoch: test, as in the paper, or val, the sound choice",
        choices=("test", "val"),
    )

    settings: Any = None

    def open_dataset(self) -> "PairDataset":
        """The dataset that --datatype names. Nothing is read yet."""
        return open_dataset(
            self.datatype,
            self.data_path or "",
            self.features_path or None,
            self.gt_dir,
            self.settings,
        )

    def find_problems(self) -> list[str]:
        problems = super().find_problems()
        if self.image_cache and os.path.isfile(self.image_cache):
            problems.append(f"--image_cache {self.image_cache} is a file, expected a folder")
        return problems


@dataclass(frozen=True)
class ModelOptions(FlagGroup):
    """Where the weights come from, and what their shapes do not show."""

    init_model: Location | None = flag(
        None,
        "weights to start from: a name that clip4idc models lists; a file or folder, also one in "
        "ckpts/; a URL (https://, s3://); or owner/name on the Hugging Face hub",
        Location,
    )
    resume: str | None = flag(
        None,
        "auto: continue the run in --output_dir from its newest intact state, "
        "or start a new run if there is none",
        choices=("auto",),
    )
    resume_model: Location | None = flag(
        None,
        "continue from this pytorch_model.bin.<epoch> or "
        "training_state.bin.<epoch>[.<steps>]: a file in --output_dir, or a URL",
        Location,
    )
    resume_force: bool = flag(
        False, "continue even if changed options will change the results", bool
    )
    pretrained_clip_name: Location = flag(
        Location("ViT-B/32"),
        "CLIP: the name of one of OpenAI's, anything that --init_model takes, or a .json "
        "file of sizes for random weights",
        Location,
    )
    quick_gelu: bool = flag(
        False, "assume quick GELU for CLIP weights whose config does not name the activation", bool
    )
    image_resolution: int | None = flag(
        None,
        "side of the images in pixels, if it differs from that of the weights; "
        "position embeddings are interpolated",
        int,
        at_least=1,
        at_most=MAX_RESOLUTION,
    )
    cache_dir: str | None = flag(None, "folder for downloads (default: the user's cache folder)")
    intra_num_hidden_layers: int = flag(
        9,
        "vision blocks that see each image alone; the rest see both",
        int,
        at_least=0,
    )
    linear_patch: str = flag(
        "2d",
        "how images become patches: each alone (2d) or the pair as two frames (3d)",
        choices=("2d", "3d"),
    )
    decoder_model: str = flag(
        "decoder-base", "config of the captioner: a name below modules/, a folder or a file"
    )
    decoder_num_hidden_layers: int | None = flag(
        None,
        "layers of the captioner, instead of its config's",
        int,
        at_least=1,
    )
    cross_model: str = flag(
        "cross-base", "config of the cross encoder: a name below modules/, a folder or a file"
    )
    cross_num_hidden_layers: int | None = flag(
        None,
        "layers of the cross encoder, instead of its config's",
        int,
        at_least=1,
    )
    sim_header: str = flag(
        "loose",
        "similarity of a sentence and a pair: cosine (loose) or cross encoder (tight)",
        task="retrieval",
        choices=("loose", "tight"),
    )

    def find_problems(self) -> list[str]:
        problems = super().find_problems()
        for name in ("init_model", "resume_model", "pretrained_clip_name"):
            if getattr(self, name) == Location(""):
                problems.append(f"--{name} is empty")
        if self.resume_model and self.resume:
            problems.append("give either --resume auto or --resume_model")
        if self.resume_force and not (self.resume_model or self.resume):
            problems.append("--resume_force works only with --resume auto or --resume_model")
        return problems


@dataclass(frozen=True)
class TrainingOptions(FlagGroup):
    """How the model is trained."""

    objective: str | None = flag(
        None,
        "training objective: %(choices)s; by default contrastive in adaptation, and "
        "cross_entropy in finetuning, or self_critical with --scst",
        choices=OBJECTIVES,
    )
    epochs: int = flag(20, "passes over the training split", int, at_least=1)
    max_steps: int | None = flag(
        None, "end training after this many steps, even before --epochs", int, at_least=1
    )
    patience: int | None = flag(
        None,
        "end training after this many epochs in a row without a better score, once an epoch has "
        "scored; 0: never (default: 11 with cross_entropy, otherwise never)",
        int,
        at_least=0,
    )
    lr: float = flag(1e-4, "peak learning rate", float, above=0, at_most=10**6)
    coef_lr: float = flag(
        1.0,
        "factor on the learning rate of CLIP's own weights",
        float,
        at_least=0,
        at_most=10**6,
    )
    warmup_proportion: float = flag(
        0.1,
        "share of the steps in which the learning rate rises; -1: no warmup, and finetuning then "
        "starts at half of --lr, as published",
        float,
    )
    gradient_accumulation_steps: int = flag(
        1, "micro-batches per optimizer step; --batch_size is divided by it", int, at_least=1
    )
    freeze_layer_num: int = flag(
        0,
        "freeze CLIP's blocks below this number and what precedes the blocks; -1 freezes nothing",
        int,
        at_least=-1,
    )
    freeze_vision: bool = flag(False, "freeze the whole vision tower", bool, task="caption")
    optimizer: str = flag(
        "bertadam",
        "bertadam, as published, or adamw, which corrects the bias of its moments and does not "
        "clip each parameter's gradient separately",
        choices=("bertadam", "adamw"),
    )
    scst: bool = flag(
        False,
        "self-critical training, which raises the CIDEr of a finetuned captioner",
        bool,
        task="caption",
    )
    save_every_steps: int = flag(
        0,
        "also save a state every this many steps; 0 saves only at the end of an epoch",
        int,
        at_least=0,
    )
    keep_checkpoints: int = flag(
        2,
        "number of newest states and weights to keep, besides the best weights; -1 keeps all",
        int,
    )
    compile: bool = flag(
        False,
        "torch.compile the transformer blocks, except the captioner's decoder; "
        "gains little on CPUs (benchmarks/README.md)",
        bool,
    )

    def find_problems(self) -> list[str]:
        problems = super().find_problems()
        if self.warmup_proportion != -1 and not 0 <= self.warmup_proportion < 1:
            problems.append(
                f"--warmup_proportion is {self.warmup_proportion}, expected a share in [0, 1), "
                "or -1 for no warmup"
            )
        if self.keep_checkpoints < -1 or self.keep_checkpoints == 0:
            problems.append(
                f"--keep_checkpoints is {self.keep_checkpoints}, expected at least 1, or -1 for all"
            )
        if self.scst and self.objective not in (None, "self_critical"):
            problems.append(f"--scst contradicts --objective {self.objective}")
        return problems


@dataclass(frozen=True)
class PredictOptions(FlagGroup):
    """Your own images, with --do_predict."""

    before: str | None = flag(None, "an image, or a folder of images", task="caption")
    after: str | None = flag(
        None,
        "an image, or a folder; without it, --before is a folder of x.png and x_2.png",
        task="caption",
    )
    pairs: str | None = flag(
        None,
        "table of pairs, .csv or .jsonl, with the columns before, after and, optionally, id",
        task="caption",
    )
    predictions: str | None = flag(
        None,
        "file for the captions, .csv or .jsonl; the next run continues an interrupted one",
        task="caption",
    )
    save_attention: str | None = flag(
        None, "folder for pictures of where the model looked", task="caption"
    )

    def find_problems(self) -> list[str]:
        problems = super().find_problems()
        if self.pairs and self.after:
            problems.append("--after goes with --before, not with --pairs")
        if self.predictions and Path(self.predictions).suffix.lower() not in (".csv", ".jsonl"):
            problems.append(
                f"--predictions {self.predictions}: expected a name that ends in .csv or .jsonl"
            )
        if self.save_attention and os.path.isfile(self.save_attention):
            problems.append(f"--save_attention {self.save_attention} is a file, expected a folder")
        return problems

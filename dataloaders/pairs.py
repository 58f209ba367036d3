"""What a pair of images is, and what a dataset of pairs is. Needs no torch."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from dataloaders.coco_files import read_ground_truth
from dataloaders.file_names import require_file
from system.command import quote_script
from system.escaping import has_control_characters

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
# Groups that are scored: everything and, if pairs have distractors, changes and distractors. A type
# of change must not have the name of such a group.
ALL_PAIRS = "all"
CHANGES = "change"
DISTRACTORS = "distractor"
DISTRACTOR_ENDING = "_n"


def distractor_id_of(pair_id: str) -> str:
    """The caption id of a pair's distractor."""
    return pair_id + DISTRACTOR_ENDING


def is_distractor(caption_id: str, known_ids: Container[str]) -> bool:
    """Whether a caption id is a distractor's: `known_ids` then has the id of its pair, too."""
    return caption_id.endswith(DISTRACTOR_ENDING) and pair_id_of(caption_id) in known_ids


def pair_id_of(caption_id: str) -> str:
    """The id of the pair whose distractor's caption id this is; other ids stay as they are."""
    return caption_id.removesuffix(DISTRACTOR_ENDING)


@dataclass(frozen=True)
class ImagePair:
    """Two images and the sentences about what changed; none if they are still to be written.

    A distractor is a third image: compared with `before`, nothing has changed in it.
    """

    id: str
    before: str
    after: str
    captions: tuple[str, ...] = ()
    distractor: str | None = None
    distractor_captions: tuple[str, ...] = ()
    change_type: str | None = None

    @property
    def image_paths(self) -> list[str]:
        """before, after and, if there is one, the distractor."""
        return [self.before, self.after] + ([self.distractor] if self.distractor else [])

    @property
    def distractor_id(self) -> str | None:
        """The caption id of the distractor, if there is one."""
        return distractor_id_of(self.id) if self.distractor else None

    @property
    def captions_by_id(self) -> dict[str, tuple[str, ...]]:
        """Caption id → sentences, of the change and, if there is one, of the distractor."""
        captions = {self.id: self.captions}
        if self.distractor:
            captions[self.distractor_id] = self.distractor_captions
        return captions

    @property
    def caption_ids(self) -> list[str]:
        """The pair's id and, if there is a distractor, that one's."""
        return list(self.captions_by_id)


def check_pairs(pairs: Sequence[ImagePair], source: str) -> None:
    """Refuse a split that cannot be trained on or scored.

    Raises ValueError that names `source` for no pairs, a pair that has a problem, or a repeated id.
    """
    if not pairs:
        raise ValueError(f"{source} lists no pairs")
    for pair in pairs:
        problem = _find_problem(pair, has_distractors=pairs[0].distractor is not None)
        if problem:
            raise ValueError(f"{source}: pair {pair.id!r} {problem}")
    repeated = find_repeated(caption_id for pair in pairs for caption_id in pair.caption_ids)
    if repeated is not None:
        raise ValueError(f"{source}: the caption id {repeated!r} occurs twice")


def find_repeated(ids: Iterable[str]) -> str | None:
    """The first id that occurs a second time, if one does."""
    seen: set[str] = set()
    for one in ids:
        if one in seen:
            return one
        seen.add(one)
    return None


def require_images(paths: Iterable[str | Path], source: str) -> None:
    """Raises what `require_file` does for an image that is no file, naming what lists it."""
    for path in paths:
        require_file(path, source)


def list_captions(pairs: Iterable[ImagePair]) -> list[str]:
    """All captions, pair by pair: those of the change, then those of the distractor."""
    return [text for pair in pairs for texts in pair.captions_by_id.values() for text in texts]


def list_change_captions(pairs: Iterable[ImagePair]) -> list[str]:
    """The captions of the changes, pair by pair."""
    return [caption for pair in pairs for caption in pair.captions]


def _find_problem(pair: ImagePair, has_distractors: bool) -> str | None:
    """What is wrong with a pair, if its split's pairs all have distractors, or none do."""
    if not all(pair.captions_by_id.values()):
        return "has no caption"
    if (pair.distractor is not None) != has_distractors:
        return "breaks the rule that either all pairs have a distractor or none do"
    if has_control_characters(pair.id):
        return "has a control character in its id"
    reserved = (ALL_PAIRS, CHANGES, DISTRACTORS) if has_distractors else (ALL_PAIRS,)
    if pair.change_type in reserved:
        return f"is of type {pair.change_type!r}, which is reserved for the scores over a group"
    return None


@dataclass(frozen=True)
class DataSource:
    """Where a dataset's files are, and its own settings, as the options say."""

    data_path: Path
    image_path: Path | None = None  # --features_path
    gt_dir: Path = Path("gt")
    settings: Any = None  # an instance of the dataset's Settings; None: their defaults


class PairDataset(ABC):
    """How one dataset's files are read: everything that differs between datasets.

    Opening one reads nothing. Reading raises FileNotFoundError or ValueError that names the file,
    the value found and what was expected. CONTRIBUTING.md shows how to add a dataset.
    """

    name: ClassVar[str]
    """What --datatype calls it, also in metrics.json and in the ground truth's file name."""
    title: ClassVar[str]
    """What people call its data, to be put into a sentence."""
    trains_token_embedding: ClassVar[bool] = True
    """Whether finetuning trains the token embedding while it freezes CLIP's first layers."""
    ground_truth_splits: ClassVar[tuple[str, ...]] = ()
    """Splits scored against the file in gt_dir; others against the captions that pairs hold."""
    protocols: ClassVar[tuple[str, ...]] = ("coco",)
    """How its captions are scored: names in modules.registries.PROTOCOLS."""
    Settings: ClassVar[type | None] = None
    """A frozen dataclass of `system.flags.flag` fields: flags once --datatype names the dataset."""
    defaults: ClassVar[Mapping[str, Any]] = {}
    """Defaults of other flags, such as max_words; the command line takes precedence."""
    no_change_phrases: ClassVar[tuple[str, ...]] = ()
    """Sentences that say that nothing changed."""
    vocabulary: ClassVar[Mapping[str, Sequence[str]]] = {}
    """Attribute → the words for its values, for accuracy by attribute."""

    def __init__(self, source: DataSource) -> None:
        self.source = source
        self.settings = source.settings
        if self.settings is None and self.Settings is not None:
            self.settings = self.Settings()

    def find_problems(self) -> list[str]:
        """What the options alone show to be wrong, such as a flag that is missing."""
        return []

    def splits(self) -> tuple[str, ...]:
        """Those of train, val and test that the dataset has."""
        return SPLITS

    @abstractmethod
    def pairs(self, split: str, need_images: bool = True) -> list[ImagePair]:
        """A split's pairs in file order.

        need_images=False does not check whether each image exists. The folders that hold them must
        exist all the same.
        """

    def annotation_file(self, split: str) -> Path:
        """The file that lists a split's pairs, to be named in messages."""
        return self.source.data_path

    def checked_pairs(self, split: str, need_images: bool = True) -> list[ImagePair]:
        """`pairs`, in which neither `find_problems` nor `check_pairs` finds anything wrong."""
        problems = self.find_problems()
        if problems:
            raise ValueError("; ".join(problems))
        pairs = self.pairs(split, need_images)
        source = f"{self.annotation_file(split)}, split {split}"
        check_pairs(pairs, source)
        _log_size(pairs, source)
        return pairs

    def ground_truth(self, split: str) -> list[tuple[str, list[str]]]:
        """(caption id, sentences) in the order in which gt/eval_utils.py writes them."""
        references = collect_references(self.checked_pairs(split, need_images=False))
        return list(references.items())

    def ground_truth_file(self) -> Path:
        """Where the references of `ground_truth_splits` are read from."""
        return self.source.gt_dir / f"{self.name}_total_change_captions_reformat.json"

    def references(self, split: str, pairs: Sequence[ImagePair]) -> dict[str, list[str]]:
        """Caption id → the sentences against which its caption is scored."""
        own = collect_references(pairs)
        if split not in self.ground_truth_splits:
            return own
        path = self.ground_truth_file()
        if not path.is_file():
            source = ("--datatype", self.name, "--data_path", self.source.data_path)
            command = quote_script("gt/eval_utils.py", *source, "--output", path)
            raise FileNotFoundError(f"no ground truth {path}: make it with {command}")
        references = read_ground_truth(path)
        missing = [caption_id for caption_id in own if caption_id not in references]
        if missing:
            more = f" and {len(missing) - 1} more ids" if len(missing) > 1 else ""
            raise ValueError(
                f"{path} has no captions for {missing[0]}{more} of this split; rebuild it with "
                "gt/eval_utils.py"
            )
        return {caption_id: references[caption_id] for caption_id in own}

    def subsets(self, pairs: Sequence[ImagePair]) -> dict[str, list[str]]:
        """Name → caption ids of groups that are also scored alone: distractors, types of change."""
        subsets = split_change_distractor(pairs)
        for change_type in sorted({pair.change_type for pair in pairs if pair.change_type}):
            subsets[change_type] = [pair.id for pair in pairs if pair.change_type == change_type]
        return subsets

    def download(self, folder: Path) -> None:
        """Fetch the dataset into a folder. Raises ValueError if it must be fetched by hand."""
        raise ValueError(f"{self.title} cannot be downloaded from here: fetch it by hand")


def _log_size(pairs: Sequence[ImagePair], source: str) -> None:
    captions = list_captions(pairs)
    num_empty = sum(not caption.strip() for caption in captions)
    empty = f", {num_empty} of them empty" if num_empty else ""
    log.info("%s: %d pairs, %d captions%s", source, len(pairs), len(captions), empty)


def collect_references(pairs: Sequence[ImagePair]) -> dict[str, list[str]]:
    """Caption id → the captions that the pairs hold: all changes, then all distractors."""
    changes = {pair.id: list(pair.captions) for pair in pairs}
    distractors = {}
    for pair in pairs:
        if pair.distractor:
            distractors[pair.distractor_id] = list(pair.distractor_captions)
    return changes | distractors


def split_change_distractor(pairs: Sequence[ImagePair]) -> dict[str, list[str]]:
    """The caption ids of changes and of distractors; nothing if there are no distractors."""
    distractors = [pair.distractor_id for pair in pairs if pair.distractor]
    if not distractors:
        return {}
    return {CHANGES: [pair.id for pair in pairs], DISTRACTORS: distractors}

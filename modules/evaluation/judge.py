"""Stage-2 evaluation: pairs → captions → hyp_ep_*.json → COCO scores beside two baselines (SPEC §6, Captions)."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dataloaders.coco_files import read_ground_truth
from dataloaders.datasets.clevr_change import change_types
from dataloaders.pairs import ImagePair
from modules.metrics.baselines import best_constant, random_captions
from modules.metrics.ptb import tokenize
from modules.metrics.scorer import CaptionScorer
from modules.options import Options
from modules.report.tables import format_table
from system.java import JavaError

log = logging.getLogger(__name__)

SHOWN = 4  # captions in the log of an evaluation


def own_references(options: Options, split: str) -> bool:
    """Whether a split is scored against the captions that it brings itself: a user's table is, and Spot-the-Diff's val split,
    which the ground-truth file does not hold."""
    return options.data.datatype == "pairs" or (options.data.datatype == "spot" and split == "val")


def references_of(
    scenes: Sequence[ImagePair], options: Options, split: str
) -> dict[str, list[str]]:
    """The ground truth of a split by caption id: gt_dir's file, or the pairs' own captions."""
    if own_references(options, split):
        return {scene.id: list(scene.captions) for scene in scenes}
    path = (
        Path(options.data.gt_dir)
        / f"{options.data.datatype}_total_change_captions_reformat.json"
    )
    if not path.is_file():
        raise FileNotFoundError(
            f"no ground truth {path}: make it with python gt/eval_utils.py --datatype {options.data.datatype} "
            f"--data_path {options.data.data_path} --output {path}"
        )
    truth, ids = read_ground_truth(path), _ids(scenes)
    missing = [key for key in ids if key not in truth]
    if missing:
        more = f" and {len(missing) - 1} more ids" if len(missing) > 1 else ""
        raise ValueError(
            f"{path} has no captions of {missing[0]}{more} to be evaluated; make it anew with gt/eval_utils.py"
        )
    return {key: truth[key] for key in ids}


def _ids(scenes: Sequence[ImagePair]) -> list[str]:
    return [scene.id for scene in scenes] + [
        scene.distractor_id for scene in scenes if scene.distractor_id
    ]


@dataclass
class CaptionJudge:
    """Scores a split's captions, epoch after epoch, against references tokenised once and two baselines scored once.

    Of either, what is missing is tried again in the next epoch. Build it before training: ground truth that does not fit is found
    then.
    """

    references: Mapping[str, Sequence[str]]
    training_captions: Sequence[str]
    subsets: Mapping[str, Sequence[str]] = field(default_factory=dict)
    baselines: list[tuple[str, dict[str, float]]] = field(
        default_factory=list
    )  # (label, scores), once something was scored
    _references: CaptionScorer | None = None

    @classmethod
    def build(
        cls,
        scenes: Sequence[ImagePair],
        training_scenes: Sequence[ImagePair],
        options: Options,
        split: str,
    ) -> "CaptionJudge":
        """For a split's scenes; CLEVR-Change's ids are also scored as change, distractor and by change type, a table's by type."""
        types_of_own = sorted({s.change_type for s in scenes if s.change_type})
        subsets = {name: [s.id for s in scenes if s.change_type == name] for name in types_of_own}
        if scenes[0].distractor:
            types = {name: set(ids) for name, ids in change_types(options.data.data_path).items()}
            subsets = {
                "change": [s.id for s in scenes],
                "distractor": [s.distractor_id for s in scenes],
                **{name: [s.id for s in scenes if s.id in ids] for name, ids in types.items()},
            }
        captions = [c for s in training_scenes for c in s.captions + s.distractor_captions]
        return cls(references_of(scenes, options, split), captions, subsets)

    def score(self, captions: Mapping[str, str]) -> dict[str, dict[str, float]]:
        """Scores of `all` and of each subset, NaN where they are missing; the first call logs the baselines'."""
        if self._references is None:
            self._references = CaptionScorer(self.references)
        if not self.baselines or any(
            math.isnan(value) for _, scores in self.baselines for value in scores.values()
        ):
            self._score_baselines()
        scores = self._references.score(captions, self.subsets)
        log.info("caption scores\n%s", format_table(list(scores.items())))
        for key in list(captions)[:: max(1, len(captions) // SHOWN)][:SHOWN]:
            log.info("  %s: “%s” (a reference: “%s”)", key, captions[key], self.references[key][0])
        return scores

    def cider_by_id(self, captions: Mapping[str, str]) -> dict[str, float]:
        """CIDEr of each caption, after `score`."""
        return self._references.cider_by_id(captions)

    def _score_baselines(self) -> None:
        """Score them, or say why that has to wait for the next evaluation."""
        try:
            self.baselines = self._baselines()
            log.info("baselines\n%s", format_table(self.baselines))
        except JavaError as error:
            log.warning("the baselines are missing: %s", error)

    def _baselines(self) -> list[tuple[str, dict[str, float]]]:
        baselines = []
        tokens = [
            texts[0]
            for texts in tokenize(
                {str(n): [c] for n, c in enumerate(self.training_captions)}
            ).values()
        ]
        drawn = random_captions(tokens, list(self.references))
        apart = {
            name: ids for name, ids in self.subsets.items() if name in ("change", "distractor")
        }
        random_scores = self._references.score_tokens(drawn, apart)
        for name, ids in {"all": list(self.references), **apart}.items():
            constant = best_constant(tokens, {key: self._references.tokens[key] for key in ids})
            constant_scores = self._references.score_tokens(dict.fromkeys(ids, constant))["all"]
            baselines.append((f"best constant ({name}: “{constant}”)", constant_scores))
            baselines.append((f"random training caption ({name})", random_scores[name]))
        return baselines

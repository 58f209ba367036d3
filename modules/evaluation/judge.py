"""Stage-2 evaluation: pairs → captions → hyp_ep_*.json → COCO scores beside two baselines (SPEC §6, Captions)."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dataloaders.pairs import ImagePair, PairDataset
from modules.metrics.baselines import best_constant, random_captions
from modules.metrics.ptb import tokenize
from modules.metrics.scorer import CaptionScorer
from modules.report.tables import format_table
from system.java import JavaError

log = logging.getLogger(__name__)

SHOWN = 4  # captions in the log of an evaluation


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
        pairs: Sequence[ImagePair],
        training_pairs: Sequence[ImagePair],
        dataset: PairDataset,
        split: str,
    ) -> "CaptionJudge":
        """For a split of a dataset, with its references and subsets."""
        captions = [
            caption
            for pair in training_pairs
            for sentences in pair.captions_by_id.values()
            for caption in sentences
        ]
        return cls(
            dataset.references(split, pairs),
            captions,
            dataset.subsets(pairs),
        )

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

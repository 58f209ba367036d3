"""Scores of a split's captions beside two baselines (docs/reference.md, Caption metrics)."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dataloaders.pairs import ALL_PAIRS, CHANGES, DISTRACTORS, ImagePair, PairDataset
from modules.metrics.baselines import best_constant, random_captions
from modules.metrics.metric import ScoringContext, Subsets
from modules.metrics.scorer import CaptionScorer, ScoredCaptions
from modules.registries import PROTOCOLS
from modules.report.tables import format_table

log = logging.getLogger(__name__)

NUM_EXAMPLES = 4  # captions in the log of an evaluation
BASELINE_GROUPS = (CHANGES, DISTRACTORS)  # subsets that have baselines of their own


@dataclass
class SplitScorer:
    """Scores a split's captions, epoch after epoch, beside two baselines that are scored once.

    References are tokenized once. What is missing, of references or baselines, is tried again in
    the next evaluation. Build one before training: references that do not fit are found then.
    """

    references: Mapping[str, Sequence[str]]
    context: ScoringContext = field(default_factory=ScoringContext)
    subsets: Subsets = field(default_factory=dict)
    protocols: Sequence[str] = ("coco",)
    baselines: list[tuple[str, dict[str, float]]] = field(default_factory=list)
    """(label, scores), once something was scored and there are training captions."""
    scorers: list[CaptionScorer] = field(init=False)
    _scored: list[ScoredCaptions] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        """Raises ValueError for protocols that are unknown or have scores of the same name."""
        self.scorers = []
        for name in self.protocols:
            self.scorers.append(CaptionScorer(self.references, PROTOCOLS[name], self.context))
        names = [name for scorer in self.scorers for name in scorer.names]
        if len(set(names)) < len(names):
            raise ValueError(f"the protocols {self.protocols} have scores of the same name")

    @classmethod
    def build(
        cls,
        pairs: Sequence[ImagePair],
        training_pairs: Sequence[ImagePair],
        dataset: PairDataset,
        split: str,
    ) -> "SplitScorer":
        """For a split of a dataset, with its references, subsets and protocols."""
        captions = [
            caption
            for pair in training_pairs
            for sentences in pair.captions_by_id.values()
            for caption in sentences
        ]
        context = ScoringContext(pairs, dataset.no_change_phrases, dataset.vocabulary, captions)
        references = dataset.references(split, pairs)
        return cls(references, context, dataset.subsets(pairs), dataset.protocols)

    @property
    def selection(self) -> str:
        """The name of the score that chooses the best epoch."""
        return self.scorers[0].selection

    def score(self, captions: Mapping[str, str]) -> dict[str, dict[str, float]]:
        """Scores of all captions and of each subset, NaN where they are missing, which are logged.

        The first call also logs the baselines' scores.
        """
        self._scored = [scorer.score(captions) for scorer in self.scorers]
        scores = _merge([scored.scores(self.subsets) for scored in self._scored])
        if self._lacks_baselines():
            self._score_baselines()
        log.info("caption scores\n%s", format_table(list(scores.items())))
        step = max(1, len(captions) // NUM_EXAMPLES)
        for key in list(captions)[::step][:NUM_EXAMPLES]:
            log.info("  %s: “%s” (a reference: “%s”)", key, captions[key], self.references[key][0])
        return scores

    def scores_by_id(self) -> dict[str, float]:
        """Caption id → the `selection` of each caption that was scored last."""
        return self._scored[0].whole.scores_by_id(self.selection)

    def _lacks_baselines(self) -> bool:
        values = [value for _, scores in self.baselines for value in scores.values()]
        return bool(self.context.train_captions) and (not values or any(map(math.isnan, values)))

    def _score_baselines(self) -> None:
        """Score the best constant and random training captions, of each group in BASELINE_GROUPS.

        The first protocol's CIDEr-D decides which constant is the best.
        """
        if not all(scorer.train_tokens for scorer in self.scorers):
            log.warning("the baselines are missing: training captions could not be tokenized")
            return
        candidates, references = self.scorers[0].train_tokens, self.scorers[0].reference_tokens
        apart = {name: ids for name, ids in self.subsets.items() if name in BASELINE_GROUPS}
        drawn = random_captions(range(len(candidates)), list(self.references))
        random_scores = self._score_training_captions(drawn, apart)
        self.baselines = []
        for name, ids in {ALL_PAIRS: list(self.references), **apart}.items():
            constant = best_constant(candidates, {key: references[key] for key in ids})
            places = dict.fromkeys(ids, candidates.index(constant))
            constant_scores = self._score_training_captions(places)[ALL_PAIRS]
            self.baselines.append((f"best constant ({name}: “{constant}”)", constant_scores))
            self.baselines.append((f"random training caption ({name})", random_scores[name]))
        log.info("baselines\n%s", format_table(self.baselines))

    def _score_training_captions(
        self, places: Mapping[str, int], subsets: Subsets | None = None
    ) -> dict[str, dict[str, float]]:
        """Scores of captions that are training captions, by their places among those."""
        found = []
        for scorer, scored in zip(self.scorers, self._scored, strict=True):
            tokens = {key: scorer.train_tokens[place] for key, place in places.items()}
            found.append(scorer.score_tokens(tokens, scored.whole.failures).scores(subsets))
        return _merge(found)


def _merge(scores: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """The scores of several protocols as one: group → score name → value."""
    merged: dict[str, dict[str, float]] = {}
    for by_group in scores:
        for group, values in by_group.items():
            merged.setdefault(group, {}).update(values)
    return merged

"""Scores of a split's captions beside two baselines (docs/reference.md, Caption metrics)."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dataloaders.pairs import ALL_PAIRS, CHANGES, DISTRACTORS, ImagePair, PairDataset, list_captions
from modules.metrics.baselines import best_constant, random_captions
from modules.metrics.metric import ScoringContext, Subsets
from modules.metrics.scorer import CaptionScorer, ScoredCaptions
from modules.registries import PROTOCOLS
from modules.report.pictures import space_evenly
from modules.report.tables import format_table

log = logging.getLogger(__name__)

NUM_EXAMPLES = 4  # captions in the log of an evaluation
BASELINE_GROUPS = (CHANGES, DISTRACTORS)  # subsets that have baselines of their own


@dataclass
class SplitScorer:
    """Scores a split's captions, epoch after epoch, beside two baselines that are scored once.

    References are tokenized once. If references or baselines could not be computed, the next
    evaluation tries again. Build it before training, so that unusable references are found early.
    """

    references: Mapping[str, Sequence[str]]
    context: ScoringContext = field(default_factory=ScoringContext)
    subsets: Subsets = field(default_factory=dict)
    protocols: Sequence[str] = ("coco",)
    baselines: list[tuple[str, dict[str, float]]] = field(default_factory=list)
    """(label, scores); empty until captions are scored, and without training captions."""
    _has_all_baselines: bool = field(init=False, default=False)
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
        context = ScoringContext(
            pairs=pairs,
            no_change_phrases=dataset.no_change_phrases,
            vocabulary=dataset.vocabulary,
            train_captions=list_captions(training_pairs),
        )
        references = dataset.references(split, pairs)
        return cls(references, context, dataset.subsets(pairs), dataset.protocols)

    @property
    def selection(self) -> str:
        """The name of the score that chooses the best epoch."""
        return self.scorers[0].selection

    def score(self, captions: Mapping[str, str]) -> dict[str, dict[str, float]]:
        """Scores of all captions and of each subset, NaN if missing. They are also logged.

        As long as the baselines lack a score, they are scored and logged as well.
        """
        self._scored = [scorer.score(captions) for scorer in self.scorers]
        scores = _merge([scored.scores(self.subsets) for scored in self._scored])
        if self._lacks_baselines():
            self._score_baselines()
        log.info("caption scores\n%s", format_table(list(scores.items())))
        self._log_examples(captions)
        return scores

    def _log_examples(self, captions: Mapping[str, str]) -> None:
        caption_ids = list(captions)
        for index in space_evenly(len(caption_ids), NUM_EXAMPLES):
            key = caption_ids[index]
            log.info("  %s: “%s” (a reference: “%s”)", key, captions[key], self.references[key][0])

    def scores_by_id(self) -> dict[str, float]:
        """Caption id → the `selection` of each caption that was scored last."""
        return self._scored[0].whole.scores_by_id(self.selection)

    def _lacks_baselines(self) -> bool:
        return bool(self.context.train_captions) and not self._has_all_baselines

    def _score_baselines(self) -> None:
        """Score the best constant and random training captions, of each group in BASELINE_GROUPS.

        The first protocol's CIDEr-D decides which constant is the best.
        """
        if not all(scorer.train_tokens for scorer in self.scorers):
            log.warning("the baselines are missing: training captions could not be tokenized")
            return
        candidates = self.scorers[0].train_tokens
        references = self.scorers[0].reference_tokens
        apart = {name: ids for name, ids in self.subsets.items() if name in BASELINE_GROUPS}
        drawn = random_captions(range(len(candidates)), list(self.references))
        random_scores = self._score_training_captions(drawn, apart)
        self.baselines = []
        for name, ids in {ALL_PAIRS: list(self.references), **apart}.items():
            constant = best_constant(candidates, {key: references[key] for key in ids})
            indices = dict.fromkeys(ids, candidates.index(constant))
            constant_scores = self._score_training_captions(indices)[ALL_PAIRS]
            self.baselines.append((f"best constant ({name}: “{constant}”)", constant_scores))
            self.baselines.append((f"random training caption ({name})", random_scores[name]))
        self._has_all_baselines = not any(one.whole.failures.has_failure for one in self._scored)
        log.info("baselines\n%s", format_table(self.baselines))

    def _score_training_captions(
        self, indices: Mapping[str, int], subsets: Subsets | None = None
    ) -> dict[str, dict[str, float]]:
        """Scores if each id gets the training caption of that index."""
        scores = []
        for scorer, scored in zip(self.scorers, self._scored, strict=True):
            tokens = {key: scorer.train_tokens[index] for key, index in indices.items()}
            scores.append(scorer.score_tokens(tokens, scored.whole.failures).scores(subsets))
        return _merge(scores)


def _merge(scores: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """The scores of several protocols as one: group → score name → value."""
    merged: dict[str, dict[str, float]] = {}
    for by_group in scores:
        for group, values in by_group.items():
            merged.setdefault(group, {}).update(values)
    return merged

"""Caption scores by pycocoevalcap (PTB tokeniser, BLEU, METEOR, ROUGE-L, CIDEr); NaN where they are missing (SPEC §6)."""

import logging
import math
from collections.abc import Mapping, Sequence
from functools import cached_property

from modules.metrics.ptb import tokenize
from system.java import JavaError

log = logging.getLogger(__name__)

SCORE_NAMES = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr")


Subsets = Mapping[str, Sequence[str]]  # ids by name


class CaptionScorer:
    """Ground truth of the evaluated ids, tokenised once, and the scorers, METEOR's Java process kept while it lives."""

    def __init__(self, captions: Mapping[str, Sequence[str]]) -> None:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge

        from modules.metrics.meteor import MeteorProcess

        self.captions = captions
        self.bleu, self.meteor, self.rouge, self.cider = Bleu(4), MeteorProcess(), Rouge(), Cider()

    @cached_property
    def tokens(self) -> dict[str, list[str]]:
        """The tokenised ground truth by id. Raises JavaError as `tokenize` does, and then is tried again when next asked for."""
        return tokenize(self.captions)

    def score(
        self, hypotheses: Mapping[str, str], subsets: Subsets | None = None
    ) -> dict[str, dict[str, float]]:
        """Scores over all hypotheses under the key `all`, and anew on each subset of ids that has any.

        A score whose Java fails is NaN and a warning says why: METEOR alone, or all of them where there are no tokens.
        """
        try:
            tokens = tokenize({key: [text] for key, text in hypotheses.items()})
            return self.score_tokens({key: texts[0] for key, texts in tokens.items()}, subsets)
        except JavaError as error:
            log.warning("all caption scores are missing: %s", error)
            return {
                name: dict.fromkeys(SCORE_NAMES, math.nan) for name in _groups(hypotheses, subsets)
            }

    def score_tokens(
        self, tokens: Mapping[str, str], subsets: Subsets | None = None
    ) -> dict[str, dict[str, float]]:
        """The same for hypotheses that are tokenised already. Raises JavaError where the references cannot be."""
        corpora = {
            name: ({key: self.tokens[key] for key in ids}, {key: [tokens[key]] for key in ids})
            for name, ids in _groups(tokens, subsets).items()
        }
        meteor = self._meteor_scores(corpora)
        return {
            name: self._corpus_scores(*corpus, meteor[name]) for name, corpus in corpora.items()
        }

    def cider_by_id(self, hypotheses: Mapping[str, str]) -> dict[str, float]:
        """CIDEr of each hypothesis, document frequencies being those of all of them; NaN where there are no tokens."""
        try:
            results = tokenize({key: [text] for key, text in hypotheses.items()})
            truth = {key: self.tokens[key] for key in results}
        except JavaError as error:
            log.warning("CIDEr of the single captions is missing: %s", error)
            return dict.fromkeys(hypotheses, math.nan)
        _, values = self.cider.compute_score(truth, results)
        return dict(zip(results, map(float, values), strict=True))

    def _meteor_scores(self, corpora: Mapping[str, tuple[dict, dict]]) -> dict[str, float]:
        """METEOR of each corpus. Where it fails it is missing from there on: a hanging Java is waited for once in an evaluation."""
        scores = dict.fromkeys(corpora, math.nan)
        try:
            for name, corpus in corpora.items():
                scores[name] = self.meteor.compute_score(*corpus)[0]
        except JavaError as error:
            log.warning("METEOR is missing: %s", error)
        return scores

    def _corpus_scores(
        self, truth: dict[str, list[str]], results: dict[str, list[str]], meteor: float
    ) -> dict[str, float]:
        bleu, _ = self.bleu.compute_score(truth, results, verbose=0)
        rouge, cider = (
            scorer.compute_score(truth, results)[0] for scorer in (self.rouge, self.cider)
        )
        return {
            name: float(value)
            for name, value in zip(SCORE_NAMES, [*bleu, meteor, rouge, cider], strict=True)
        }


def _groups(captions: Mapping[str, str], subsets: Subsets | None) -> dict[str, list[str]]:
    """The captioned ids: all, and those of each subset that has any."""
    found = {
        "all": list(captions),
        **{name: [key for key in ids if key in captions] for name, ids in (subsets or {}).items()},
    }
    return {name: ids for name, ids in found.items() if ids}

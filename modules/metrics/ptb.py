"""TODO."""

import logging
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from system import java
from system.java import JavaError, first_error_line

log = logging.getLogger(__name__)


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
            f"{first_error_line(done.stderr)}"
        )
    return [
        " ".join(word for word in row.rstrip().split(" ") if word not in ptb.PUNCTUATIONS)
        for row in rows
    ]

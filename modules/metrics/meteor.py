"""METEOR in a supervised Java process: a crash, a hang or a malformed answer becomes a JavaError.

The program is METEOR 1.5 (Denkowski and Lavie 2014) as pycocoevalcap has it. It is asked for the
statistics of one caption at a time, and for the score of a sum of them.
"""

import logging
import math
import os
import subprocess
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import numpy as np
from pycocoevalcap.meteor import meteor as pycocoevalcap_meteor

from modules.metrics.metric import ScoringContext
from modules.metrics.paraphrases import CACHE_ERRORS, ParaphraseTable, open_table, possible_words
from system import java
from system.java import JavaError, find_error_line

log = logging.getLogger(__name__)

JAR = Path(pycocoevalcap_meteor.__file__).with_name(pycocoevalcap_meteor.METEOR_JAR)
PARAPHRASES = JAR.parent / "data" / "paraphrase-en.gz"
OPTIONS = ("-", "-", "-stdio", "-l", "en", "-norm")  # as pycocoevalcap starts it
SEPARATOR = "|||"  # of the fields in a line
NUM_STATISTICS = 23  # of a caption, in a line of METEOR's answer
# Indices in it.
LENGTH = 0
REFERENCE_LENGTH = 1
CHUNKS = 20
MATCHED = 21
REFERENCE_MATCHED = 22
# METEOR runs for seconds: thorough compiling costs more than it gains.
JAVA_OPTIONS = ("-Xmx2G", "-XX:TieredStopAtLevel=1")
# It takes the least memory. Java refuses to start if another collector is asked for as well.
COLLECTOR = "-XX:+UseSerialGC"
JAVA_VARIABLES = ("_JAVA_OPTIONS", "JAVA_TOOL_OPTIONS", "JDK_JAVA_OPTIONS")
MAX_STDERR = 100  # pieces kept to explain a failure


class Meteor:
    """METEOR of a corpus, from the sums of its captions' statistics."""

    names = ("METEOR",)
    depends_on_group = False

    def __init__(self, context: ScoringContext) -> None:
        self.process = MeteorProcess(context.train_captions)

    def rows(
        self, references: Mapping[str, Sequence[str]], captions: Mapping[str, str]
    ) -> np.ndarray:
        """METEOR's statistics of each caption, (N, NUM_STATISTICS)."""
        rows = np.array(self.process.statistics(references, captions))
        rows[_is_single_chunk(rows), CHUNKS] = 0  # as METEOR does before it sums a corpus
        return rows

    def scores(self, total: np.ndarray, count: float) -> tuple[float, ...]:
        """The score of a corpus whose rows add up to total (NUM_STATISTICS,). Raises JavaError."""
        return (self.process.score(total),)


def _is_single_chunk(rows: np.ndarray) -> np.ndarray:
    """(N,): whether caption and reference match word by word, in one piece."""
    all_matched = rows[:, LENGTH] == rows[:, MATCHED]
    all_matched &= rows[:, REFERENCE_LENGTH] == rows[:, REFERENCE_MATCHED]
    return all_matched & (rows[:, CHUNKS] == 1)


class MeteorProcess:
    """METEOR's Java process, started by the first question.

    Whatever goes wrong with it ends it and is a JavaError; the next question starts another one.
    It knows the paraphrases of the words that it has been asked for and of `expected_texts`; a
    question with other words restarts it.
    """

    def __init__(self, expected_texts: Sequence[str] = ()) -> None:
        self.process: subprocess.Popen | None = None
        self._expected_texts = expected_texts
        self._words: set[str] | None = set()  # whose paraphrases it knows; None: all
        self._table: ParaphraseTable | None = None
        self._table_file: Path | None = None
        self._stderr: deque[bytes] = deque(maxlen=MAX_STDERR)
        self._drainer: threading.Thread | None = None

    def statistics(
        self, references: Mapping[str, Sequence[str]], captions: Mapping[str, str]
    ) -> list[list[float]]:
        """METEOR's NUM_STATISTICS numbers of each tokenized caption."""
        questions = [_question(references[key], text) for key, text in captions.items()]
        with self._running(questions):
            answers = [_parse_statistics(self._ask(question)) for question in questions]
        self._remove_table()
        return answers

    def score(self, total: Sequence[float]) -> float:
        """The score of a corpus whose captions' statistics add up to these."""
        numbers = " ".join(f"{value:.1f}" for value in total)
        with self._running([]):
            self._ask(f"EVAL {SEPARATOR} {numbers}")  # answers for the one caption, then for all
            score = float(self.process.stdout.readline())
            if not math.isfinite(score):
                raise ValueError(score)
        return score

    def close(self) -> None:
        """End the process, if there is one."""
        process = self.process
        self.process = None
        if process is not None:
            process.kill()
            # Leaving the block waits for the process and closes its pipes. A pipe may hold text
            # that the process never read.
            with suppress(OSError), process:
                pass
        self._remove_table()

    def __del__(self) -> None:
        self.close()

    def _ask(self, line: str) -> str:
        """The next line of the answer."""
        self.process.stdin.write(f"{line}\n".encode())
        self.process.stdin.flush()
        return self.process.stdout.readline().decode()

    @contextmanager
    def _running(self, questions: Sequence[str]) -> Iterator[None]:
        """Inside the block the process is running. It is killed if the block takes longer than
        TIMEOUT."""
        timed_out = threading.Event()
        try:
            self._start(questions)
            arguments = [self.process, timed_out]
            timer = threading.Timer(java.TIMEOUT, _kill_on_timeout, arguments)
            timer.start()
            try:
                yield
            finally:
                timer.cancel()
        except (OSError, ValueError) as error:
            reason = self._explain_failure(error)
            if timed_out.is_set():
                reason = f"no answer within {java.TIMEOUT} s"
            self.close()
            raise JavaError(reason) from error
        except BaseException:  # the process may be in the middle of an answer
            self.close()
            raise

    def _start(self, questions: Sequence[str]) -> None:
        """Start the process, or restart it if it has ended or lacks paraphrases."""
        if self.process is not None and self.process.poll() is not None:
            reason = self._explain_failure(None)
            log.warning("METEOR's Java process has ended and is started again: %s", reason)
            self.close()
        words = possible_words(questions)
        if self.process is not None and self._knows(words):
            return
        self.close()
        options = [*JAVA_OPTIONS, *_choose_collector(), "-jar", str(JAR), *OPTIONS]
        if self._write_table(words):
            options += ["-a", str(self._table_file)]
        self._launch(options)

    def _launch(self, options: Sequence[str]) -> None:
        self._stderr.clear()
        self.process = subprocess.Popen(
            ["java", *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        arguments = (self.process.stderr, self._stderr)
        self.process.stderr = None
        self._drainer = threading.Thread(target=_drain_stderr, args=arguments, daemon=True)
        self._drainer.start()

    def _knows(self, words: set[str] | None) -> bool:
        """Whether the running process has all paraphrases of these words."""
        if self._words is None:
            return True
        if words is None:
            return False
        return self._table.bare_words.isdisjoint(words - self._words)

    def _write_table(self, words: set[str] | None) -> bool:
        """Write a table for these and all earlier words. Returns False if METEOR must read its own
        table."""
        known = self._words
        self._words = None
        if words is None or known is None:
            return False
        self._table = self._table or open_table(PARAPHRASES)
        if self._table is None:
            return False
        wanted = known | words | (possible_words(self._expected_texts) or set())
        try:
            self._table_file = _make_temporary()
            self._table.write(wanted, self._table_file)
        except CACHE_ERRORS as error:
            log.info("METEOR reads its whole table of paraphrases: %s", error)
            self._remove_table()
            return False
        self._words = wanted
        return True

    def _remove_table(self) -> None:
        """Delete the table file; METEOR has read it by the time a question is answered."""
        if self._table_file is not None:
            with suppress(OSError):  # if Java still holds it open, it goes with the process
                self._table_file.unlink()
                self._table_file = None

    def _explain_failure(self, error: Exception | None) -> str:
        """Why an answer is missing or malformed."""
        if self.process is None:
            return f"its Java process does not start: {error}"
        with suppress(subprocess.TimeoutExpired):
            code = self.process.wait(1)
            self._drainer.join(1)
            return f"its Java process ended with {code}: {find_error_line(b''.join(self._stderr))}"
        return f"its answer is malformed: {error}"


def _question(references: Sequence[str], caption: str) -> str:
    """A line that asks for a caption's statistics, with the texts changed as pycocoevalcap does."""
    texts = [reference.replace(SEPARATOR, "") for reference in references]
    texts.append(caption.replace(SEPARATOR, "").replace("  ", " "))
    return f" {SEPARATOR} ".join(["SCORE", *texts])


def _parse_statistics(answer: str) -> list[float]:
    words = answer.split()
    if len(words) != NUM_STATISTICS:
        raise ValueError(answer.strip())
    return [float(word) for word in words]


def _make_temporary() -> Path:
    handle, name = tempfile.mkstemp(prefix="meteor-", suffix=".gz")
    os.close(handle)
    return Path(name)


def _choose_collector() -> list[str]:
    settings = " ".join(os.environ.get(name, "") for name in JAVA_VARIABLES)
    return [] if "GC" in settings else [COLLECTOR]


def _kill_on_timeout(process: subprocess.Popen, timed_out: threading.Event) -> None:
    timed_out.set()
    process.kill()


def _drain_stderr(pipe: IO[bytes], pieces: deque[bytes]) -> None:
    """Read what the process reports, so that the pipe never fills up.

    It reads past Python's buffers, whose locks would outlive the thread.
    """
    with pipe:
        while piece := os.read(pipe.fileno(), 65536):
            pieces.append(piece)

"""METEOR by pycocoevalcap, in a Java process that may die, hang or answer nonsense without taking anything else with it."""

import logging
import math
import os
import subprocess
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import IO

from pycocoevalcap.meteor.meteor import Meteor

from system import java
from system.java import JavaError, first_error_line

log = logging.getLogger(__name__)

STATISTICS = 23  # numbers that METEOR 1.5 has of a caption and its references


SEPARATOR = "|||"  # of the fields in a line of its protocol


class MeteorProcess(Meteor):
    """pycocoevalcap's METEOR. Whatever goes wrong with its process ends it and is a JavaError; the next call starts a new one."""

    def __init__(self) -> None:
        self.meteor_p = None  # its process, which the first call starts
        self._stderr: deque[bytes] = deque(maxlen=100)
        self._drainer: threading.Thread | None = None

    def compute_score(
        self, gts: Mapping[str, Sequence[str]], res: Mapping[str, Sequence[str]]
    ) -> tuple[float, list[float]]:
        """Of the corpus and of each caption, from tokens by id."""
        with self._process():
            score, scores = super().compute_score(gts, res)
            if not math.isfinite(score):
                raise ValueError(score)
            return score, scores

    def statistics(
        self, references: Mapping[str, Sequence[str]], captions: Mapping[str, str]
    ) -> list[list[float]]:
        """METEOR's own STATISTICS numbers of each tokenised caption."""
        with self._process():
            return [
                [float(word) for word in self._stat(caption, references[key]).split()]
                for key, caption in captions.items()
            ]

    def score_of(self, statistics: Sequence[float]) -> float:
        """The score of a corpus whose captions' statistics add up to these."""
        with self._process():
            self.meteor_p.stdin.write(
                f"EVAL {SEPARATOR} {' '.join(f'{value:.1f}' for value in statistics)}\n".encode()
            )
            self.meteor_p.stdin.flush()
            self.meteor_p.stdout.readline()  # of the segment, which is all there is
            return float(self.meteor_p.stdout.readline())

    def close(self) -> None:
        """End the process, if there is one."""
        process, self.meteor_p = self.meteor_p, None
        if process is not None:
            process.kill()
            with (
                suppress(OSError),
                process,
            ):  # waits for it and closes its pipes, of which one may hold words that it never read
                pass

    def __del__(self) -> None:
        self.close()

    def _stat(self, hypothesis_str: str, reference_list: Sequence[str]) -> str:
        answer = super()._stat(
            hypothesis_str, [reference.replace(SEPARATOR, "") for reference in reference_list]
        )
        if len(answer.split()) != STATISTICS:
            raise ValueError(answer)
        return answer

    @contextmanager
    def _process(self) -> Iterator[None]:
        """Inside, the process runs, and is killed where all that is done with it takes longer than TIMEOUT."""
        late = threading.Event()
        try:
            self._start()
            timer = threading.Timer(java.TIMEOUT, _kill_on_timeout, [self.meteor_p, late])
            timer.start()
            try:
                yield
            finally:
                timer.cancel()
        except (OSError, ValueError) as error:
            reason = f"no answer within {java.TIMEOUT} s" if late.is_set() else self._reason(error)
            self.close()
            raise JavaError(reason) from error
        except BaseException:  # it may be in the middle of an answer
            self.close()
            raise

    def _start(self) -> None:
        if self.meteor_p is not None and self.meteor_p.poll() is not None:
            log.warning(
                "METEOR's Java process has ended since it was last asked, and is started anew: %s",
                self._reason(None),
            )
            self.close()
        if self.meteor_p is None:
            super().__init__()  # with a lock of its own: a failure leaves the former one taken
            stderr, self.meteor_p.stderr = self.meteor_p.stderr, None
            self._stderr.clear()
            self._drainer = threading.Thread(
                target=_drain_stderr, args=(stderr, self._stderr), daemon=True
            )
            self._drainer.start()

    def _reason(self, error: Exception | None) -> str:
        """Why an answer is missing or not to be read."""
        if self.meteor_p is None:
            return f"its Java process does not start: {error}"
        with suppress(subprocess.TimeoutExpired):
            code = self.meteor_p.wait(1)
            self._drainer.join(1)
            return f"its Java process ended with {code}: {first_error_line(b''.join(self._stderr))}"
        return f"it answered nonsense: {error}"


def _kill_on_timeout(process: subprocess.Popen, late: threading.Event) -> None:
    late.set()
    process.kill()


def _drain_stderr(pipe: IO[bytes], said: deque[bytes]) -> None:
    """Read what the process complains of, so that the pipe never fills up; past buffers, whose locks would outlive the thread."""
    with pipe:
        while words := os.read(pipe.fileno(), 65536):
            said.append(words)

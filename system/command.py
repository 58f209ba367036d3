"""TODO."""

import argparse
import os
import re
import sys
import traceback
from collections.abc import Sequence
from types import TracebackType
from typing import Any, NoReturn

from system.escaping import one_line
from system.files import error_line
from system.signals import EXIT_TRY_AGAIN, StopRequested
from system.urls import Address, scrub

# Of what torch raises as RuntimeError, what is no bug of ours: a pattern, the exit code and what to say.
KNOWN_RUNTIME_ERRORS = (
    (
        re.compile(r"out of memory|can't allocate memory"),
        2,
        "out of memory: a smaller --batch_size or --batch_size_val, or more "
        "--gradient_accumulation_steps, need less",
    ),
    (
        re.compile(r"DataLoader worker .* (?:killed|exited)"),
        1,
        "a worker that reads images was ended from outside, mostly for want "
        "of memory: fewer --num_thread_reader need less",
    ),
    (
        re.compile(
            r"Connection closed by peer|Connection reset by peer|Timed out waiting|Broken pipe|Socket closed|NCCL"
        ),
        1,
        "another process is gone or hangs; its own lines say why",
    ),
)


class OneLineParser(argparse.ArgumentParser):
    """argparse whose complaints are one line, in which no secret of an address stands, whatever option it was given to."""

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> Any:
        """As argparse's; what looks like an address in any word is known as one from here on."""
        words = sys.argv[1:] if args is None else args
        for word in words:
            Address(word.partition("=")[2] if word.startswith("-") else word)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        line = one_line(scrub(" ".join(message.split())))
        self.exit(2, f"{self.prog}: {line} (--help lists the options)\n")


def run_command(script: str, job: Any) -> int:
    """Run `job()`; what a user can cause (ValueError, OSError, want of memory) becomes one line on stderr and exit code 2, Ctrl-C
    130, a training that was asked to stop 75, and the loss of another process 1. The traceback of a bug has no secrets in it."""
    sys.excepthook = _print_scrubbed
    try:
        job()
    except StopRequested:
        print(
            f"{script}: stopped as asked; the same command with --resume auto goes on",
            file=sys.stderr,
        )
        raise SystemExit(EXIT_TRY_AGAIN) from None
    except KeyboardInterrupt:
        print(f"{script}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # who reads our output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except (ValueError, OSError) as error:
        _print_error(script, str(error))
        raise SystemExit(2) from None
    except MemoryError:
        _print_error(script, KNOWN_RUNTIME_ERRORS[0][2])
        raise SystemExit(2) from None
    except RuntimeError as error:
        for pattern, code, text in KNOWN_RUNTIME_ERRORS:
            if pattern.search(str(error)):
                _print_error(script, f"{text} ({error_line(error)})")
                raise SystemExit(code) from None
        raise
    return 0


def _print_scrubbed(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    print(scrub("".join(traceback.format_exception(kind, error, trace))), file=sys.stderr, end="")


def _print_error(script: str, text: str) -> None:
    rank = os.environ.get("RANK", "0")
    who = script if rank == "0" else f"{script} (process {rank})"
    print(f"{who}: {one_line(scrub(' '.join(text.split())))}", file=sys.stderr)

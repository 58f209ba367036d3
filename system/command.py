"""The outer shell of every command: its parser, and errors as one line with an exit code."""

import argparse
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NoReturn

from system.escaping import to_one_line
from system.files import summarize_error
from system.signals import EXIT_TRY_AGAIN, StopRequested
from system.urls import Location, scrub

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE

OUT_OF_MEMORY = (
    "out of memory: use a smaller --batch_size or --batch_size_val, or more "
    "--gradient_accumulation_steps"
)

# RuntimeErrors of torch that are no bugs of ours: a pattern, the exit code and the message.
KNOWN_RUNTIME_ERRORS = (
    (re.compile(r"out of memory|can't allocate memory"), EXIT_USER_ERROR, OUT_OF_MEMORY),
    (
        re.compile(r"DataLoader worker .* (?:killed|exited)"),
        1,
        "a worker process that reads images was killed, most often for lack of memory: use fewer "
        "--num_thread_reader",
    ),
    (
        re.compile(
            r"Connection closed by peer|Connection reset by peer|Timed out waiting|Broken pipe"
            r"|Socket closed|NCCL"
        ),
        1,
        "another process has ended or hangs; its own lines say why",
    ),
)


class OneLineParser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line each, without secrets of URLs."""

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> Any:
        """As in argparse. From here on, secrets of URLs in any argument are hidden in all text."""
        arguments = sys.argv[1:] if args is None else args
        for argument in arguments:
            value = argument.partition("=")[2] if argument.startswith("-") else argument
            Location(value)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print the message as one line, and exit with 2."""
        line = to_one_line(scrub(" ".join(message.split())))
        self.exit(EXIT_USER_ERROR, f"{self.prog}: {line} (--help lists the options)\n")


def run_command(script: str, job: Callable[[], None]) -> int:
    """Run `job()`; returns 0.

    Errors that a user can cause (ValueError, OSError, too little memory) become one line on stderr
    and exit code 2, Ctrl-C 130, a training that was asked to stop 75, the loss of another process
    1, and a reader of our output that has gone away 141. Other errors are bugs: their traceback is
    printed without secrets.
    """
    sys.excepthook = _print_scrubbed
    try:
        job()
    except BrokenPipeError:
        _discard_output()
        raise SystemExit(EXIT_BROKEN_PIPE) from None
    except (StopRequested, KeyboardInterrupt, Exception) as error:
        failure = _explain(error)
        if failure is None:
            raise
        code, message = failure
        _print_line(script, message)
        raise SystemExit(code) from None
    return 0


def _explain(error: BaseException) -> tuple[int, str] | None:
    """The exit code and the message for an error; None for a bug."""
    if isinstance(error, StopRequested):
        return EXIT_TRY_AGAIN, "stopped as asked; the same command with --resume auto continues"
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED, "interrupted"
    if isinstance(error, ValueError | OSError):
        return EXIT_USER_ERROR, str(error)
    if isinstance(error, MemoryError):
        return EXIT_USER_ERROR, OUT_OF_MEMORY
    if isinstance(error, RuntimeError):
        for pattern, code, message in KNOWN_RUNTIME_ERRORS:
            if pattern.search(str(error)):
                return code, f"{message} ({summarize_error(error)})"
    return None


def _discard_output() -> None:
    """Let stdout lead nowhere, so that Python can flush it at exit without another error."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_scrubbed(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    text = "".join(traceback.format_exception(kind, error, trace))
    print(scrub(text), file=sys.stderr, end="")


def _print_line(script: str, message: str) -> None:
    rank = os.environ.get("RANK", "0")
    name = script if rank == "0" else f"{script} (process {rank})"
    line = to_one_line(scrub(" ".join(message.split())))
    print(f"{name}: {line}", file=sys.stderr)

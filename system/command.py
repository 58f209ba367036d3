"""How every command runs: errors become one line on stderr and an exit code."""

import errno
import os
import re
import shlex
import sys
import textwrap
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple

from system.escaping import summarize_error
from system.parser import EXIT_USER_ERROR, format_line
from system.places import IS_PACKAGED
from system.processes import LostWorker, raise_open_files_limit
from system.requirements import explain_missing
from system.signals import EXIT_TRY_AGAIN, StopRequested, cleaning_up_when_ended
from system.streams import prepare_streams, print_if_heard
from system.urls import scrub

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as in shells
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE

EXIT_LOST_PROCESS = 1

COMMAND_WIDTH = 78  # columns of a command in a text
NO_BREAK = "\N{NO-BREAK SPACE}"

TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)

# Texts in errors of torch and of the system that are not our bugs.
OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory")
NO_ADDRESS_SPACE = re.compile(r"failed to map segment|[Cc]annot allocate memory")
NO_THREADS = re.compile(r"can't start new thread")
NOT_DETERMINISTIC = re.compile(r"does not have a deterministic implementation")
WORKER_KILLED = re.compile(r"DataLoader worker .* (?:killed|exited)")
PROCESS_LOST = re.compile(
    r"Connection closed by peer|Connection reset by peer|Timed out waiting|Broken pipe"
    r"|Socket closed|NCCL"
)


class Advice(NamedTuple):
    """What the user of a command can do about an error: the ends of messages, or nothing."""

    out_of_memory: str = ""
    worker_killed: str = ""
    stopped: str = ""


NO_ADVICE = Advice()


def quote_command(*words: object) -> str:
    """A command for a message, which works where it is pasted into a shell."""
    return shlex.join(str(word) for word in words)


def quote_script(script: str, *words: object) -> str:
    """A command that runs one of our scripts, such as "gt/eval_utils.py", here or in the wheel."""
    if not IS_PACKAGED:
        return quote_command("python", script, *words)
    module = script.removesuffix(".py").replace("/", ".")
    return quote_command("python", "-m", f"clip4idc.{module}", *words)


def wrap_command(command: str) -> list[str]:
    """A command as indented lines that a shell reads as one, each value beside its option."""
    tied = re.sub(" (?!--)", NO_BREAK, command)
    lines = textwrap.wrap(
        tied,
        COMMAND_WIDTH,
        initial_indent="  ",
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    lines = [line.replace(NO_BREAK, " ") for line in lines]
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]


def run_command(program: str, job: Callable[[], None], advice: Advice = NO_ADVICE) -> int:
    """Run `job` and return 0.

    A ValueError, an OSError, a missing package or too little memory becomes one line on stderr,
    which begins with the program's name, and exit code 2. Ctrl-C gives 130, a requested stop 75, a
    lost process 1, and a closed output pipe 141. Other errors are bugs: their traceback is printed
    without secrets.
    """
    sys.excepthook = _print_scrubbed
    prepare_streams()
    raise_open_files_limit()
    try:
        with cleaning_up_when_ended():
            job()
    except BrokenPipeError:
        _discard_output()
        raise SystemExit(EXIT_BROKEN_PIPE) from None
    except (StopRequested, KeyboardInterrupt, Exception) as error:
        failure = _explain(error, advice)
        if failure is None:
            raise
        code, message = failure
        _print_line(program, message)
        raise SystemExit(code) from None
    return 0


def _explain(error: BaseException, advice: Advice) -> tuple[int, str] | None:
    """The exit code and the message for an error; None for a bug."""
    if isinstance(error, StopRequested):
        return EXIT_TRY_AGAIN, _add_advice("stopped as asked", advice.stopped)
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED, "interrupted"
    if isinstance(error, OSError) and error.errno in TOO_MANY_FILES:
        return EXIT_USER_ERROR, f"{error}: allow more with ulimit -n"
    if isinstance(error, ValueError | OSError):
        return EXIT_USER_ERROR, str(error)
    has_no_space = isinstance(error, ImportError) and NO_ADDRESS_SPACE.search(str(error))
    if isinstance(error, MemoryError) or has_no_space:
        return EXIT_USER_ERROR, _add_advice("out of memory", advice.out_of_memory)
    if isinstance(error, ImportError):
        missing = explain_missing(error)
        return None if missing is None else (EXIT_USER_ERROR, missing)
    if isinstance(error, RuntimeError):
        return _explain_runtime_error(error, advice)
    return None


def _explain_runtime_error(error: RuntimeError, advice: Advice) -> tuple[int, str] | None:
    text = str(error)
    if OUT_OF_MEMORY.search(text):
        code = EXIT_USER_ERROR
        message = _add_advice("out of memory", advice.out_of_memory)
    elif NOT_DETERMINISTIC.search(text):
        code = EXIT_USER_ERROR
        message = "--deterministic asks for an algorithm that torch does not have here"
    elif NO_THREADS.search(text):
        code = EXIT_USER_ERROR
        message = "no more processes or threads may be started (ulimit -u)"
    elif isinstance(error, LostWorker) or WORKER_KILLED.search(text):
        code = EXIT_LOST_PROCESS
        reason = "a worker process was killed, most often for lack of memory"
        message = _add_advice(reason, advice.worker_killed)
    elif PROCESS_LOST.search(text):
        code = EXIT_LOST_PROCESS
        message = "another process has ended or hangs; its own lines say why"
    else:
        return None
    return code, f"{message} ({summarize_error(error)})"


def _add_advice(message: str, advice: str) -> str:
    return f"{message}: {advice}" if advice else message


def _discard_output() -> None:
    """Let stdout lead nowhere, so that Python can flush it at exit without another error."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_scrubbed(
    error_class: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    text = "".join(traceback.format_exception(error_class, error, trace))
    print_if_heard(scrub(text), file=sys.stderr, end="")


def _print_line(program: str, message: str) -> None:
    rank = os.environ.get("RANK") or "0"
    is_first = rank == "0" or not rank.isdigit()
    name = program if is_first else f"{program} (process {rank})"
    line = format_line(message)
    print_if_heard(f"{name}: {line}", file=sys.stderr)

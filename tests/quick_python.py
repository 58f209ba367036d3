"""A Python that has imported torch already: for tests that need processes of their own.

A process that imports torch spends seconds before its first line. `executable()` starts one server
that has imported what all commands need, and returns a program to use instead of `python`. The
program hands its arguments, folder, environment and standard files to the server, which forks. It
ends as the fork ends, with the same code or by the same signal. SIGTERM, SIGINT and SIGHUP are
passed on to the fork; if the program is killed, so is the fork. Nothing of this project is imported
early.
"""

import array
import atexit
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path

PRELOADED = (
    "torch",
    "torch.distributed",
    "torch.utils.data",
    "torchvision",
    "numpy",
    "pandas",
    "cv2",
    "PIL.Image",
    "jinja2",
    "filelock",
    "safetensors.torch",
    "tqdm",
    "requests",
    "open_clip.tokenizer",
    "pycocoevalcap.cider.cider",
)
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
STANDARD_FILES = (0, 1, 2)
CLIENT = f"""#!{sys.executable} -ISE
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import quick_python
quick_python.run_as_client({{address!r}})
"""


@cache
def executable() -> str:
    """The program to start instead of sys.executable; the server ends with this process."""
    folder = Path(tempfile.mkdtemp(prefix="quick-python-"))
    address = str(folder / "socket")
    program = folder / "python"
    program.write_text(CLIENT.format(address=address))
    program.chmod(0o755)
    server = subprocess.Popen(
        [sys.executable, __file__, address], stdout=subprocess.PIPE, start_new_session=True
    )
    atexit.register(server.kill)
    assert server.stdout.readline() == b"ready\n"
    return str(program)


# ---- the client: small, it imports nothing but what Python itself has loaded ----


def run_as_client(address: str) -> None:
    """Hand everything over, pass signals on, and end as the fork ends."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    order = json.dumps([sys.argv, os.getcwd(), dict(os.environ)]).encode()
    fds = array.array("i", STANDARD_FILES)
    connection.sendmsg(
        [len(order).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)]
    )
    connection.sendall(order)
    for number in FORWARDED:
        signal.signal(number, lambda got, _: connection.sendall(bytes([got])))
    answer = b""
    while part := connection.recv(16):
        answer += part
    if not answer:
        raise SystemExit("the server of quick_python has ended")
    code = int(answer)
    if code < 0:
        with suppress(OSError):  # SIGKILL has no handler to set
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


# ---- the server ----


def serve(address: str) -> None:
    """Fork for each client; single-threaded, since a fork has only the thread that forked."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    for name in PRELOADED:
        importlib.import_module(name)
    print("ready", flush=True)
    watched = selectors.DefaultSelector()
    watched.register(listener, selectors.EVENT_READ, "client")
    while True:
        for key, _ in watched.select():
            if key.data == "client":
                _accept(listener, watched)
            elif isinstance(key.data, int):
                _pass_signal_on(key.fileobj, key.data, watched)
            else:
                _report_end(key.fileobj, *key.data, watched)


def _accept(listener: socket.socket, watched: selectors.BaseSelector) -> None:
    connection, _ = listener.accept()
    size, ancillary, *_ = connection.recvmsg(8, socket.CMSG_SPACE(4 * len(STANDARD_FILES)))
    fds = array.array("i")
    fds.frombytes(ancillary[0][2])
    order = json.loads(connection.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL))
    pid = os.fork()
    if pid == 0:
        listener.close()
        connection.close()
        for key in list(watched.get_map().values()):
            if key.fileobj is not listener:
                _close(key.fileobj)
        watched.close()
        _run(fds, *order)
    for fd in fds:
        os.close(fd)
    watched.register(connection, selectors.EVENT_READ, pid)
    watched.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, connection))


def _close(file: socket.socket | int) -> None:
    if isinstance(file, int):
        os.close(file)
    else:
        file.close()


def _pass_signal_on(connection: socket.socket, pid: int, watched: selectors.BaseSelector) -> None:
    """What a client got; a client that is gone was killed."""
    got = connection.recv(1)
    with suppress(ProcessLookupError):
        os.kill(pid, got[0] if got else signal.SIGKILL)
    if not got:
        watched.unregister(connection)


def _report_end(
    pidfd: int, pid: int, connection: socket.socket, watched: selectors.BaseSelector
) -> None:
    watched.unregister(pidfd)
    os.close(pidfd)
    _, status = os.waitpid(pid, 0)
    with suppress(KeyError, ValueError):
        watched.unregister(connection)
    with suppress(OSError):
        connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
    connection.close()


def _run(fds: array.array, words: list[str], folder: str, environment: dict[str, str]) -> None:
    """Be the process that was asked for, and end."""
    os.setsid()
    for fd, standard in zip(fds, STANDARD_FILES, strict=True):
        os.dup2(fd, standard)
        os.close(fd)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number in FORWARDED:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _set_threads(environment)
    code = _run_program(words[1:])
    threading._shutdown()
    atexit._run_exitfuncs()
    with suppress(BrokenPipeError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _set_threads(environment: dict[str, str]) -> None:
    """OpenMP has read its variable already, when the server started."""
    import torch

    if environment.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))


def _run_program(words: list[str]) -> int:
    """As `python WORDS`, with -u, -m and -c; returns the exit code."""
    if words[0] == "-u":
        words = words[1:]
    sys.path[:] = [path for path in sys.path if path != str(Path(__file__).parent)]
    extra = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    try:
        if words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            sys.path[:0] = ["", *filter(None, extra)]
            exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
        elif words[0] == "-m":
            sys.argv = [words[1], *words[2:]]
            sys.path[:0] = [os.getcwd(), *filter(None, extra)]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(words)
            sys.path[:0] = [str(Path(words[0]).resolve().parent), *filter(None, extra)]
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
            return 1
        return int(stop.code or 0)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


if __name__ == "__main__":
    serve(sys.argv[1])

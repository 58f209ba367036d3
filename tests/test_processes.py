"""Helper processes: their death is told, and little shared memory or few files stop nothing."""

import math
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from dataloaders import batches
from dataloaders.batches import build_batches
from dataloaders.pairs import ImagePair
from dataloaders.samples import CaptionSamples, RetrievalSamples
from modules.tokenizer import tokenize_caption
from system import processes
from system.command import Advice, run_command
from system.processes import count_free_files, raise_open_files_limit, start_pool
from system.signals import holding_sigterm_back, leave_signals_to_parent
from tests.conftest import ROOT
from tests.runs import arguments, log_of, wait_for

PAIRS = [
    ImagePair(f"p{n}", f"{n}.png", f"{n}_2.png", ("a dog left", "the dog has gone"))
    for n in range(8)
]


def read_images(paths):
    """Pictures of 4×4 that tell their paths apart."""
    sums = [sum(path.encode()) % 256 for path in paths]
    return torch.tensor(sums, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4).clone()


def fail_at_five(paths):
    if paths[0] == "5.png":
        raise ValueError("5.png is broken")
    return read_images(paths)


def die(number):
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def die_in_pool():
    with start_pool(2) as pool:
        list(pool.map(die, range(6)))


def test_a_killed_worker_ends_the_command_in_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        run_command("tool", die_in_pool, Advice(worker_killed="use fewer"))
    assert stop.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tool: a worker process was killed, most often for lack of memory: use")


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_are_prepared_and_outlive_signals_to_the_whole_job(method):
    with start_pool(1, os.putenv, ("PREPARED", "yes"), method) as pool:
        worker = pool.submit(os.getpid).result()
        for name in ("INT", "HUP", "TERM"):
            subprocess.run(["kill", f"-{name}", str(worker)], check=True)
        assert pool.submit(subprocess.getoutput, "echo $PREPARED").result() == "yes"
        assert pool.submit(os.getpid).result() == worker


def work_for_ever(ready):
    leave_signals_to_parent()
    ready.set()
    time.sleep(60)


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="this system does not say who sent")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_heed_their_parent_alone(method):
    context = multiprocessing.get_context(method)
    ready = context.Event()
    worker = context.Process(target=work_for_ever, args=(ready,), daemon=True)
    with holding_sigterm_back():
        worker.start()
    assert ready.wait(60)
    for name in ("INT", "HUP", "TERM"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    worker.join(0.3)
    assert worker.is_alive()
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0


def all_batches(samples, read=read_images, **settings):
    tokenize = partial(tokenize_caption, max_words=8)
    dataset = samples(PAIRS, read, tokenize)
    return list(build_batches(dataset, 3, training=True, **settings))


@pytest.mark.parametrize("samples", [RetrievalSamples, CaptionSamples])
@pytest.mark.parametrize(
    ("name", "room", "said"),
    [
        ("read_free_shared_memory", 100, "shared memory (/dev/shm) has 0.000 GB free"),
        ("count_free_files", 20, "20 more files may be open"),
        ("has_room_for_sockets", False, "(TMPDIR) is too long"),
    ],
)
def test_batches_that_cannot_be_shared_are_copied(samples, name, room, said, monkeypatch, caplog):
    expected = all_batches(samples, num_workers=0)
    monkeypatch.setattr(batches, name, lambda: room)
    monkeypatch.setattr(batches, "default_collate", in_this_process_only(batches.default_collate))
    found = all_batches(samples, num_workers=1)
    assert said in caplog.text
    assert len(found) == len(expected) > 1
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(mine[key], value)
                assert mine[key].dtype == value.dtype
            else:
                assert mine[key] == value


def in_this_process_only(function):
    here = os.getpid()

    def checked(*arguments):
        assert os.getpid() == here
        return function(*arguments)

    return checked


def test_errors_in_copying_workers_keep_their_line(monkeypatch):
    monkeypatch.setattr(batches, "read_free_shared_memory", lambda: 0)
    with pytest.raises(ValueError, match=r"^5\.png is broken$"):
        all_batches(RetrievalSamples, fail_at_five, num_workers=1)


@pytest.mark.parametrize(("world_size", "is_enough"), [(1, True), (2, False)])
def test_no_more_room_is_needed_than_all_samples_take(world_size, is_enough, monkeypatch, caplog):
    sample = RetrievalSamples(PAIRS, read_images, partial(tokenize_caption, max_words=8))[0, 0]
    size = sum(value.nbytes for value in sample.values() if isinstance(value, torch.Tensor))
    monkeypatch.setattr(batches, "read_free_shared_memory", lambda: 16 * size)
    dataset = RetrievalSamples(PAIRS, read_images, partial(tokenize_caption, max_words=8))
    build_batches(dataset, 8, training=True, num_workers=1, world_size=world_size)
    assert (caplog.text == "") == is_enough


def test_shared_memory_that_is_not_there_has_no_room(monkeypatch, tmp_path):
    monkeypatch.setattr(processes.sys, "platform", "linux")
    monkeypatch.setattr(processes, "SHARED_MEMORY", tmp_path / "none")
    assert processes.read_free_shared_memory() == 0
    monkeypatch.setattr(processes.sys, "platform", "darwin")
    assert processes.read_free_shared_memory() == math.inf


@pytest.fixture
def _limit_kept():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.usefixtures("_limit_kept")
def test_the_limit_of_open_files_is_raised():
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    assert count_free_files() < 200
    raise_open_files_limit()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(hard, 65536), hard)
    raise_open_files_limit()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(hard, 65536), hard)


def test_too_many_open_files_are_told_with_what_helps(capsys):
    def open_many():
        raise OSError(24, os.strerror(24), "a.png")

    with pytest.raises(SystemExit) as stop:
        run_command("tool", open_many)
    assert stop.value.code == 2
    line = "tool: [Errno 24] Too many open files: 'a.png': allow more with ulimit -n\n"
    assert capsys.readouterr().err == line


@pytest.mark.slow
def test_a_signal_to_all_processes_of_a_run_is_a_stop(spot, tiny_sizes, tmp_path):
    words = arguments(spot, tmp_path / "run", tiny_sizes, "retrieval", "--do_train")
    words += ["--epochs", "200", "--num_thread_reader", "2"]
    run = subprocess.Popen(
        [sys.executable, "main_task_retrieval.py", *words],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    wait_for(lambda: "step 1/" in log_of(tmp_path / "run").partition("epoch 2/")[2])
    os.killpg(run.pid, signal.SIGTERM)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 75, errors.decode()[-500:]


def sleep_in_pool(path):
    with start_pool(1) as pool:
        Path(path).write_text(str(pool.submit(os.getpid).result()))
        pool.submit(time.sleep, 60).result()


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    parent = multiprocessing.get_context("fork").Process(
        target=sleep_in_pool, args=(tmp_path / "worker",)
    )
    parent.start()
    wait_for(lambda: (tmp_path / "worker").is_file() and (tmp_path / "worker").read_text())
    worker = int((tmp_path / "worker").read_text())
    parent.kill()
    parent.join()
    wait_for(lambda: not is_running(worker))


def is_running(number):
    try:
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("can't start new thread"), "no more processes or threads may be started"),
        (ImportError("x.so: failed to map segment from shared object"), "out of memory"),
    ],
)
def test_limits_of_the_system_are_one_line(error, message, capsys):
    def fail():
        raise error

    with pytest.raises(SystemExit) as stop:
        run_command("tool", fail)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"tool: {message}")

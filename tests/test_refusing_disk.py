"""Both stages train, resume and predict on file systems without links, chmod, fsync, locks or a
known amount of free space."""

import csv
import errno
import fcntl
import os
import shutil
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import CLIP4IDCinference
from dataloaders.storage.image_cache import open_image_cache
from modules.training.states import weights_path
from modules.weights.tensor_files import read_weights, write_safetensors
from system import files
from system.files import (
    DiskFull,
    atomic_write,
    check_free_space,
    choose_cache_folder,
    link_or_copy,
)
from system.locks import LockTaken, _warn_without_locks, hold_lock
from tests.quick_scores import skip_reports, use_quick_scores
from tests.refusing_disk import REFUSALS, refuse
from tests.runs import SCRIPTS, arguments, same_weights

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"


def raise_error(number: int):
    def refuse_it(*_, **__):
        raise OSError(number, os.strerror(number))

    return refuse_it


@pytest.fixture(autouse=True)
def _warn_again():
    _warn_without_locks.cache_clear()


def train_twice(task: str, data: Path, run: Path, sizes: Path) -> Path:
    """An epoch, and after a resumption the second; returns the best weights."""
    words = arguments(data, run, sizes, task, "--do_train", "--resume", "auto")
    assert SCRIPTS[task].main([*words, "--epochs", "1"]) == 0
    assert SCRIPTS[task].main([*words, "--resume_force"]) == 0
    return weights_path(run, "best")


def train_both_stages(data: Path, folder: Path, sizes: Path) -> list[Path]:
    """The best weights of both."""
    return [train_twice(task, data, folder / task, sizes) for task in SCRIPTS]


@pytest.fixture(scope="module")
def _quick():
    # As in each test: other numbers of threads add in another order.
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        use_quick_scores(patch.setattr)
        skip_reports(patch.setattr)
        yield


@pytest.fixture(scope="module")
def usual(_quick, spot, tiny_sizes, tmp_path_factory) -> list[Path]:
    """The best weights of both stages on a usual file system."""
    return train_both_stages(spot, tmp_path_factory.mktemp("usual"), tiny_sizes)


ALL = tuple(REFUSALS)
IN_TURN = [pytest.param((kind,), marks=pytest.mark.slow, id=kind) for kind in ALL]


@pytest.mark.parametrize("kinds", [*IN_TURN, pytest.param(ALL, id="all")])
def test_runs_and_predictions(
    kinds, usual, spot, tiny_sizes, tmp_path, monkeypatch, captioner_folder
):
    refused = refuse(monkeypatch, *kinds)
    found = train_both_stages(spot, tmp_path, tiny_sizes)
    for mine, theirs in zip(found, usual, strict=True):
        assert same_weights(mine, theirs)
        assert mine.is_symlink() == ("links" not in kinds)
    # chmod is never asked for.
    for kind in set(kinds) - {"chmod"}:
        names = {name for _, name in REFUSALS[kind][:-1]}
        assert names & set(refused), kind
    results = tmp_path / "results.csv"
    words = ["--do_predict", "--init_model", str(captioner_folder), "--predictions", str(results)]
    pair = [str(EXAMPLES / f"moved_{side}.png") for side in ("before", "after")]
    assert CLIP4IDCinference.main([*words, "--before", pair[0], "--after", pair[1]]) == 0
    assert len(list(csv.DictReader(results.open()))) == 1


@pytest.mark.parametrize("refused", ["", "symlink", "symlink link"])
def test_a_second_name_is_a_link_or_a_copy(refused, tmp_path, monkeypatch):
    for name in refused.split():
        monkeypatch.setattr(os, name, raise_error(errno.EPERM))
    source, path = tmp_path / "source", tmp_path / "second"
    source.write_bytes(b"weights")
    path.write_bytes(b"what was there before")
    link_or_copy(source, path)
    assert path.read_bytes() == b"weights"
    assert path.is_symlink() == (refused == "")
    assert source.stat().st_nlink == (2 if refused == "symlink" else 1)
    assert {file.name for file in tmp_path.iterdir()} == {"source", "second"}


def test_no_room_for_a_copy(tmp_path, monkeypatch):
    for name in ("symlink", "link"):
        monkeypatch.setattr(os, name, raise_error(errno.EOPNOTSUPP))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))
    source, path = tmp_path / "source", tmp_path / "second"
    source.write_bytes(b"weights")
    path.write_bytes(b"what was there before")
    with pytest.raises(DiskFull, match="second: it takes .* are missing"):
        link_or_copy(source, path)
    assert path.read_bytes() == b"what was there before"


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP])
def test_what_cannot_be_synced_is_written(number, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", raise_error(number))
    with atomic_write(tmp_path / "file") as temporary:
        temporary.write_text("text")
    assert (tmp_path / "file").read_text() == "text"


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_broken_or_full_disk_is_told(number, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("before")
    monkeypatch.setattr(os, "fsync", raise_error(number))
    with pytest.raises(OSError, match=os.strerror(number)), atomic_write(tmp_path / "file") as new:
        new.write_text("text")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "before"


def test_written_files_have_the_mode_that_the_umask_allows(tmp_path):
    before = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "file") as temporary:
            temporary.write_text("text")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(("total", "free"), [(0, 0), (0, 5)])
def test_unknown_space_counts_as_enough(total, free, tmp_path, monkeypatch):
    usage = shutil._ntuple_diskusage(total, 0, free)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    check_free_space(tmp_path, 10**18, "no")


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    usage = shutil._ntuple_diskusage(10**9, 10**9, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DiskFull, match="no: it takes 0.500 GB, 0.000 GB are free"):
        check_free_space(tmp_path, 5 * 10**8, "no")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL])
def test_without_locks_work_goes_on_and_that_is_said_once(number, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(fcntl, "flock", raise_error(number))
    for _ in range(2):
        with hold_lock(tmp_path / ".lock", timeout=0) as is_held:
            assert not is_held
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"{tmp_path}: its file system has no locks")
    assert line.endswith("let only one process write there")


def test_a_lock_is_held_by_one(tmp_path):
    path = tmp_path / ".lock"
    with hold_lock(path) as is_held:
        assert is_held
        with pytest.raises(LockTaken), hold_lock(path, timeout=0):
            pass
        waiting = threading.Event()

        def wait() -> None:
            with hold_lock(path):
                waiting.set()

        thread = threading.Thread(target=wait)
        thread.start()
        assert not waiting.wait(0.2)
    thread.join()
    assert waiting.is_set()


def test_a_place_where_nothing_can_be_written_is_no_place_without_locks(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"), hold_lock(tmp_path / "file" / ".lock"):
        pass


# ---- files that cannot be mapped into memory ----


def test_weights_that_cannot_be_mapped_are_read(tmp_path, monkeypatch):
    write_safetensors(tmp_path / "x.safetensors", {"a": torch.arange(3.0)})
    monkeypatch.setattr("safetensors.torch.load_file", raise_error(errno.ENODEV))
    assert torch.equal(read_weights(tmp_path / "x.safetensors")["a"], torch.arange(3.0))


def test_an_image_cache_that_cannot_be_mapped_is_told(tmp_path, monkeypatch):
    picture = str(EXAMPLES / "moved_before.png")
    cache = open_image_cache(tmp_path, [picture], 16, lambda items, *_: items)
    monkeypatch.setattr(np, "memmap", raise_error(errno.ENODEV))
    with pytest.raises(OSError, match=r"cannot map .*images-16\.uint8 .*--image_cache on a disk"):
        cache([picture])


# ---- users without a home ----


@pytest.fixture
def _no_home(monkeypatch, tmp_path):
    for name in ("HOME", "XDG_CACHE_HOME", "USERPROFILE"):
        monkeypatch.delenv(name, raising=False)

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    files._make_private_folder.cache_clear()
    yield
    files._make_private_folder.cache_clear()


@pytest.mark.usefixtures("_no_home")
def test_without_a_home_the_cache_is_a_private_temporary_folder(tmp_path):
    folder = choose_cache_folder(None)
    assert folder == tmp_path / f"clip4idc-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert choose_cache_folder("given") == Path("given")


@pytest.mark.usefixtures("_no_home")
@pytest.mark.parametrize("kind", ["open to others", "a link", "a file"])
def test_a_folder_that_others_could_have_made_is_not_used(kind, tmp_path):
    taken = tmp_path / f"clip4idc-{os.getuid()}"
    if kind == "open to others":
        taken.mkdir()
        taken.chmod(0o777)
    elif kind == "a link":
        taken.symlink_to(tmp_path)
    else:
        taken.touch()
    folder = choose_cache_folder(None)
    assert folder != taken
    assert folder.stat().st_mode & 0o777 == 0o700
    assert choose_cache_folder(None) == folder

"""A launcher's variables: empty ones count as unset, wrong ones are named in one line."""

import pytest

import CLIP4IDCinference
import main_task_retrieval
from system.launcher import Place, read_place

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@pytest.fixture(autouse=True)
def _unset(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def set_all(monkeypatch, *values: str | None) -> None:
    for name, value in zip(NAMES, values, strict=True):
        if value is not None:
            monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((None, None, None), Place()),
        (("", "", ""), Place()),
        (("0", None, " "), Place()),
        (("0", "1", "0"), Place(0, 1, 0)),
        ((" 1 ", "2", "1"), Place(1, 2, 1)),
        ((None, "1", None), Place()),
        ((None, None, "3"), Place(local_rank=3)),
    ],
)
def test_places(monkeypatch, values, expected):
    set_all(monkeypatch, *values)
    assert read_place() == expected
    assert read_place().is_alone == (expected.world_size == 1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("abc", None, None), "RANK is 'abc' in the environment, expected a whole number"),
        ((None, "two", None), "WORLD_SIZE is 'two'"),
        (("0", "1", "-1"), "LOCAL_RANK is '-1'"),
        (("0", "1", "9" * 30), "LOCAL_RANK is '999"),
        (("\u0663", None, None), "RANK is"),
        (("1", None, None), "RANK is 1 in the environment, but WORLD_SIZE is not set"),
        ((None, "2", None), "WORLD_SIZE is 2 in the environment, but RANK is not set"),
        (("2", "2", None), "RANK is 2 in the environment, expected less than WORLD_SIZE, 2"),
        (("0", "0", None), "WORLD_SIZE is 0"),
    ],
)
@pytest.mark.parametrize("main", [main_task_retrieval.main, CLIP4IDCinference.main])
def test_wrong_variables_are_named(monkeypatch, values, message, main, tmp_path, capsys):
    set_all(monkeypatch, *values)
    with pytest.raises(ValueError, match=message):
        read_place()
    words = ["--do_eval", "--datatype", "spot", "--output_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "run").exists()

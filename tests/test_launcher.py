"""A launcher's variables: empty ones count as unset, wrong ones are named in one line."""

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

import CLIP4IDCinference
import main_task_retrieval
from system.launcher import Place, read_meeting_point, read_place, read_restart_count

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
MEETING = ("MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _unset(monkeypatch):
    for name in NAMES + MEETING:
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


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("", ""), "MASTER_ADDR is not set in the environment"),
        (("localhost", ""), "MASTER_PORT is not set in the environment"),
        (("localhost", "abc"), "MASTER_PORT is 'abc' in the environment, expected a whole number"),
        (("localhost", "70000"), "MASTER_PORT is 70000 in the environment, expected 1 to 65535"),
        (("localhost", "0"), "MASTER_PORT is 0"),
        (("no.such.host.invalid", "29500"), "MASTER_ADDR is 'no.such.host.invalid'"),
    ],
)
def test_where_processes_meet(monkeypatch, values, message, tmp_path, capsys):
    set_all(monkeypatch, "0", "2", "0")
    for name, value in zip(MEETING, values, strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        read_meeting_point()
    words = ["--do_eval", "--datatype", "spot", "--data_path", "d", "--features_path", "f"]
    words += ["--output_dir", str(tmp_path / "run"), "--device", "cpu"]
    with pytest.raises(SystemExit) as stop:
        main_task_retrieval.main(words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_restarts_are_counted_where_torchrun_has_a_store_for_them(monkeypatch):
    for name in ("USE_AGENT_STORE", "MAX_RESTARTS", "RESTART_COUNT"):
        monkeypatch.delenv(f"TORCHELASTIC_{name}", raising=False)
    assert read_restart_count() is None
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    assert read_restart_count() is None
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert read_restart_count() == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert read_restart_count() == 2


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)


@given(st.tuples(*[st.one_of(st.none(), TEXTS, st.integers(-2, 9).map(str)) for _ in NAMES]))
def test_any_variables_are_a_place_or_refused_by_name(values):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in zip(NAMES, values, strict=True):
            if value is None:
                patch.delenv(name, raising=False)
            else:
                patch.setenv(name, value)
        try:
            place = read_place()
        except ValueError as error:
            named = str(error)
        else:
            assert 0 <= place.rank < place.world_size
            named = "RANK"
    assert "RANK" in named or "WORLD_SIZE" in named


def test_a_port_that_is_in_use_is_one_line(monkeypatch, tmp_path, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        set_all(monkeypatch, "0", "2", "0")
        port = taken.getsockname()[1]
        for name, value in zip(MEETING, ("127.0.0.1", str(port)), strict=True):
            monkeypatch.setenv(name, value)
        words = ["--do_eval", "--datatype", "spot", "--data_path", "d", "--features_path", "f"]
        words += ["--output_dir", str(tmp_path / "run"), "--device", "cpu"]
        with pytest.raises(SystemExit) as stop:
            main_task_retrieval.main(words)
    assert stop.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"MASTER_PORT {port} is in use on 127.0.0.1" in line

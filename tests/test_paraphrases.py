"""METEOR's table of paraphrases: the rows that texts can need, none less; the cache; restarts.

That scores stay the same on all published captions is tested in test_scoring.py.
"""

import gzip
import zipfile
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from modules.metrics import paraphrases
from modules.metrics.meteor import Meteor
from modules.metrics.metric import ScoringContext
from modules.metrics.paraphrases import open_table, possible_words
from system.java import JavaError, ensure_java

PAIRS = [
    ("the car", "the vehicle"),
    ("gone", "no longer there"),
    ("caf\xe9", "coffee shop"),
    ("u.s.", "the united states"),
    ("\u2026", "??"),  # no letters: these may occur in any text
    ("the vehicle", "the car"),
    ("gone", ""),
]

# What METEOR with its whole table gives for these texts; each score is another one without it.
REFERENCES = {
    "1": ["a few people are no longer there"],
    "2": ["the u.s. flag isn't in front of the store any more"],
    "3": ["in addition , the car has been moved to the right-hand side"],
    "4": ["the caf\xe9 is closed"],
    "5": ["there are a lot of people near the entrance"],
    "6": ["the boy 's bike is missing"],
}
CAPTIONS = {
    "1": "some individuals are gone",
    "2": "the american flag is no longer before the shop",
    "3": "furthermore the vehicle was moved to the right side",
    "4": "the coffee shop has been shut down",
    "5": "many persons close to the door",
    "6": "the bicycle of the child cannot be found",
}
SCORES = {
    "1": 0.07615516319786543,
    "2": 0.36504848928269007,
    "3": 0.3411190449511899,
    "4": 0.31206213862554094,
    "5": 0.1518330471884219,
    "6": 0.09944052443587445,
}


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache folder of METEOR's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "clip4idc" / "meteor"


def make_table(path: Path, pairs: list[tuple[str, str]]) -> Path:
    """A table in METEOR's form."""
    lines = [f"0.5\n{left}\n{right}\n" for left, right in pairs]
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("".join(lines))
    return path


def chosen_pairs(table: paraphrases.ParaphraseTable, texts: list[str], path: Path) -> list[tuple]:
    """The pairs that `write` keeps for texts."""
    table.write(possible_words(texts), path)
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[:-1]
    assert len(lines) % 3 == 0
    return list(zip(lines[1::3], lines[2::3], strict=True))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The RED car", {"the", "red", "car"}),
        ("the u.s.", {"the", "u", "s", "us"}),
        ("isn't 1,000", {"isn", "t", "isnt", "1", "000", "1000"}),
        ("a\x0bb\u2028c d\xa0e", {"a", "ab", "abc", "b", "bc", "c", "d", "de", "e"}),
        ("caf\xe9 na\xefve", {"caf", "na", "ve", "nave"}),
        ("... \u2026 ||| --", set()),
        ("x" * 101 + " y", {"y"}),
    ],
)
def test_words_are_all_that_normalization_can_make(text, words):
    assert possible_words([text]) == words


@pytest.mark.parametrize("text", ["aDOTMULTIb", "\u0130stanbul", "5 \u212a"])
def test_texts_that_become_other_letters_may_hold_any_word(text):
    assert possible_words(["the car", text]) is None


def test_pairs_stay_in_order_and_only_those_with_unknown_words_go(cache, tmp_path):
    table = open_table(make_table(tmp_path / "table.gz", PAIRS))
    always = PAIRS[4]
    path = tmp_path / "chosen.gz"
    assert chosen_pairs(table, [], path) == [always]
    both = ["the car left", "a vehicle"]
    assert chosen_pairs(table, both, path) == [PAIRS[0], always, PAIRS[5]]
    assert chosen_pairs(table, ["gone", "longer than the car"], path) == [always, PAIRS[6]]
    texts = ["The caf\xe9 is GONE", "no coffee-shop longer there"]
    assert chosen_pairs(table, texts, path) == [PAIRS[1], PAIRS[2], always, PAIRS[6]]
    assert chosen_pairs(table, ["U.S., the United States"], path) == [PAIRS[3], always]
    assert {"car", "us", "caf", ""} <= table.bare_words


def test_a_table_is_prepared_once(cache, tmp_path, monkeypatch):
    path = make_table(tmp_path / "table.gz", PAIRS)
    assert open_table(path) is not None
    (file,) = cache.iterdir()
    monkeypatch.setattr(paraphrases, "_write_numbers", None)
    assert open_table(path).file == file


def test_other_tables_have_files_of_their_own_and_the_oldest_go(cache, tmp_path):
    for number in range(4):
        path = make_table(tmp_path / "table.gz", PAIRS[: number + 1])
        open_table(path)
        assert len(list(cache.iterdir())) == min(number + 1, paraphrases.MAX_KEPT)
    assert chosen_pairs(open_table(path), ["gone is no longer there"], tmp_path / "chosen.gz") == [
        PAIRS[1]
    ]


@pytest.mark.parametrize("kept", [0, 100, 1000])
def test_a_file_that_is_cut_off_is_made_again(kept, cache, tmp_path):
    path = make_table(tmp_path / "table.gz", PAIRS)
    file = open_table(path).file
    intact = file.read_bytes()
    file.write_bytes(intact[:kept])
    assert chosen_pairs(open_table(path), ["gone"], tmp_path / "chosen.gz")[-1] == PAIRS[6]
    assert len(file.read_bytes()) == len(intact)


def test_damage_that_only_the_numbers_have_is_found_when_pairs_are_chosen(cache, tmp_path):
    """The file goes, and the next process makes it again."""
    path = make_table(tmp_path / "table.gz", PAIRS)
    file = open_table(path).file
    content = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        end_of_numbers = archive.start_dir
    content[end_of_numbers - 1] ^= 1
    file.write_bytes(content)
    table = open_table(path)
    with pytest.raises(paraphrases.CACHE_ERRORS):
        table.write({"car"}, tmp_path / "chosen.gz")
    assert not file.exists()
    assert chosen_pairs(open_table(path), ["gone"], tmp_path / "chosen.gz")[-1] == PAIRS[6]


def test_without_a_usable_cache_the_whole_table_is_read(cache, tmp_path, caplog):
    caplog.set_level("INFO")
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the folder should be")
    assert open_table(make_table(tmp_path / "table.gz", PAIRS)) is None
    assert "METEOR reads its whole table of paraphrases" in caplog.text


@pytest.mark.parametrize("text", ["1\nthe car\tleft\ngone\n", "1\nthe car\n", "1\na\r\nb\n"])
def test_a_table_of_another_form_is_left_to_meteor(text, cache, tmp_path):
    path = tmp_path / "table.gz"
    path.write_bytes(gzip.compress(text.encode()))
    assert open_table(path) is None
    path.write_bytes(b"no gzip file")
    assert open_table(path) is None
    assert open_table(tmp_path / "absent.gz") is None
    assert list(cache.iterdir()) == []


@pytest.fixture
def meteor() -> Meteor:
    ensure_java()
    return Meteor(ScoringContext(train_captions=["the man has left"]))


def test_scores_are_those_of_the_whole_table(meteor):
    rows = meteor.rows(REFERENCES, CAPTIONS)
    scores = [meteor.scores(row, 1)[0] for row in rows]
    assert dict(zip(CAPTIONS, scores, strict=True)) == SCORES
    assert meteor.scores(rows.sum(axis=0), 6) == (0.24847131284336554,)


def test_only_new_words_that_the_table_has_restart_the_process(meteor, tmp_path, monkeypatch):
    """The references stay, and an epoch's captions have words that were never seen before."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    references = {"1": REFERENCES["1"]}
    meteor.rows(references, {"1": "people"})
    assert list(tmp_path.iterdir()) == [], "the chosen pairs are removed once they are read"
    first = meteor.process.process
    meteor.rows(references, {"1": "the man has left zzyzx people"})
    assert meteor.process.process is first
    row = meteor.rows(references, {"1": CAPTIONS["1"]})[0]
    assert meteor.scores(row, 1) == (SCORES["1"],)
    second = meteor.process.process
    assert second is not first
    assert first.poll() is not None
    meteor.rows(references, {"1": "people"})
    assert meteor.process.process is second


def test_a_full_disk_leaves_the_whole_table(meteor, monkeypatch, caplog):
    caplog.set_level("INFO")

    def refuse(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(paraphrases.ParaphraseTable, "write", refuse)
    monkeypatch.setattr("modules.metrics.meteor.subprocess.Popen", start := MagicMock())
    with pytest.raises(JavaError):
        meteor.rows(REFERENCES, CAPTIONS)
    (command,) = start.call_args.args
    assert "-a" not in command
    assert "METEOR reads its whole table of paraphrases: no space left on device" in caplog.text

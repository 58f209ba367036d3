"""`gt/eval_utils.py changes`: drawn sentences are parsed as meant, and errors count as wrong."""

import json
from collections.abc import Iterator
from random import Random

import pytest

from dataloaders.clevr_vocabulary import ATTRIBUTES, NO_CHANGE_SENTENCES
from gt import eval_utils
from gt.caption_accuracy import (
    ParsedCaption,
    accuracy,
    check_by_attribute,
    check_captions,
    parse_caption,
)
from preprocess.scenes.sampling import referent, sample_clevr_pair
from preprocess.scenes.sentences import change_sentences

SMALL_RED_CUBE = {"size": "small", "color": "red", "material": "metal", "shape": "cube"}
LARGE_RED_CUBE = {**SMALL_RED_CUBE, "size": "large"}


def drawn_sentences() -> Iterator[tuple]:
    """(sentence, change, object) of 100 drawn scenes, five sentences each."""
    rng = Random(0)
    for index in range(100):
        pair = sample_clevr_pair(3, index, 0.0)
        (change,) = pair.changes
        names = referent(pair, change)
        for sentence in change_sentences(change.type, *names, change.value, 5, rng):
            yield sentence, change, change.before or change.after


def test_what_is_drawn_is_parsed_as_it_was_meant():
    """Type and new value always; attributes are never wrong, but some sentences leave them out."""
    num_complete = 0
    for sentence, change, thing in drawn_sentences():
        parsed = parse_caption(sentence)
        assert parsed.type == change.type, sentence
        assert parsed.new_value == change.value, sentence
        for name, value in parsed.attributes.items():
            assert value == getattr(thing, name), sentence
        num_complete += set(parsed.attributes) == set(ATTRIBUTES)
    assert num_complete > 150


@pytest.mark.parametrize("sentence", NO_CHANGE_SENTENCES)
def test_sentences_without_a_change_are_recognized(sentence):
    assert parse_caption(sentence) == ParsedCaption("none", {}, None)


@pytest.mark.parametrize("sentence", ["", "the cube is the same size as the ball", "brown brown"])
def test_other_sentences_say_neither(sentence):
    assert parse_caption(sentence) == ParsedCaption(None, {}, None)


@pytest.mark.parametrize(
    ("new_value", "kind", "value"),
    [
        ("a large red metal one", "color", "red"),
        ("a big shiny ball", "material", "metal"),
        ("small", "color", None),
    ],
)
def test_only_a_color_or_a_material_is_a_new_value(new_value, kind, value):
    parsed = parse_caption(f"the cube became {new_value}")
    assert (parsed.type, parsed.new_value) == (kind, value)


def test_what_is_wrong_or_left_out_counts_as_wrong():
    changed = {
        "1.png": {"type": "color", **SMALL_RED_CUBE, "new_color": "blue"},
        "2.png": {**LARGE_RED_CUBE, "new_color": "blue"},
    }
    captions = {
        "1.png": "the tiny red shiny block turned blue",
        "2.png": "the cube that is left of the red ball became matte",
        "1.png_n": "nothing has changed",
        "2.png_n": "the red cube is gone",
    }
    assert check_captions(captions, changed) == {
        "change recognised": [True, True],
        "type": [True, False],
        "type: color": [True, False],
        "size": [True, False],
        "color": [True, False],
        "material": [True, False],
        "shape": [True, True],
        "color and shape": [True, False],
        "new color": [True, False],
        "no change recognised": [True, False],
    }
    with pytest.raises(ValueError, match=r"3\.png is missing from the file"):
        check_captions({"3.png": "no change"}, changed)


def test_a_pair_whose_id_ends_like_a_distractors_is_a_change():
    changed = {"kitchen_n": {"type": "move", **LARGE_RED_CUBE}}
    captions = {"kitchen_n": "the big red metal cube moved", "kitchen_n_n": "no change"}
    rows = check_captions(captions, changed)
    assert rows["type: move"] == rows["no change recognised"] == [True]
    assert check_by_attribute("size", captions, changed)["large: type"] == [True]


def test_pairs_are_grouped_by_an_attribute_of_what_changes():
    small, large = ({"type": "move", **thing} for thing in (SMALL_RED_CUBE, LARGE_RED_CUBE))
    changed = {"0.png": small, "1.png": small, "2.png": large}
    captions = {
        "0.png": "the tiny cube moved",
        "1.png": "the big cube moved",
        "2.png": "the big ball is gone",
        "2.png_n": "no change",
    }
    rows = check_by_attribute("size", captions, changed)
    questions = {name.partition(": ")[2] for name in rows if name.startswith("small")}
    assert questions == set(check_captions({"0.png": ""}, changed))
    assert rows["small: size"] == [True, False]
    assert rows["small: shape"] == [True, True]
    assert rows["large: type"] == [False]
    assert rows["large: shape"] == [False]
    assert rows["large: no change recognised"] == [True]


def test_the_interval_is_wilsons():
    """As published tables have it."""
    row = accuracy([True] * 8 + [False] * 2)
    assert (row["share"], row["count"]) == (0.8, 10)
    assert (row["low"], row["high"]) == pytest.approx((0.490, 0.943), abs=1e-3)
    assert accuracy([True] * 5)["high"] == pytest.approx(1.0)


def test_the_command(tmp_path, capsys):
    results, changes = tmp_path / "hyp.json", tmp_path / "changes.json"
    caption = {"image_id": "1.png", "caption": "the big red metal cube moved"}
    results.write_text(json.dumps([caption]))
    changes.write_text(json.dumps({"1.png": {"type": "move", **LARGE_RED_CUBE}}))
    options = ["changes", "--changed_object", str(changes), "--results", str(results)]
    assert eval_utils.main([*options, "--output", str(tmp_path / "out.json")]) == 0
    assert "type: move         100.0  [ 20.7, 100.0]  of 1" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text())["color and shape"]["share"] == 1
    assert eval_utils.main([*options, "--by", "size"]) == 0
    assert "large: shape" in capsys.readouterr().out


def test_a_change_with_unknown_values_is_refused(tmp_path, capsys):
    changes = tmp_path / "changes.json"
    cone = {"type": "move", **LARGE_RED_CUBE, "shape": "cone"}
    changes.write_text(json.dumps({"1.png": cone}))
    with pytest.raises(SystemExit, match="2"):
        eval_utils.main(["changes", "--changed_object", str(changes), "--results", str(changes)])
    assert "1.png is" in capsys.readouterr().err

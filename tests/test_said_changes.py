"""`gt/eval_utils.py changes`: every sentence of the grammar is read as it was meant, and wrong ones count as wrong."""

import json
from random import Random

import pytest

from dataloaders.clevr_vocabulary import ATTRIBUTES, NO_CHANGE_SENTENCES
from gt import eval_utils
from gt.caption_accuracy import (
    ParsedCaption,
    accuracy,
    judge_by_attribute,
    judge_captions,
    parse_caption,
)
from preprocess.scenes.sampling import referent, sample_clevr_pair
from preprocess.scenes.sentences import change_sentences


def test_all_that_is_drawn_is_read_as_it_was_meant():
    """500 scenes' sentences: type and new value always, looks never wrong (some sentences leave them out)."""
    rng, named = Random(0), 0
    for index in range(100):
        pair = sample_clevr_pair(3, index, 0.0)
        (change,) = pair.changes
        thing = change.before or change.after
        for sentence in change_sentences(
            change.type, *referent(pair, change), change.value, 5, rng
        ):
            said = parse_caption(sentence)
            assert said.type == change.type, sentence
            assert said.value == change.value, sentence
            assert all(
                value == getattr(thing, name) for name, value in said.cross_attention.items()
            ), sentence
            named += set(said.cross_attention) == set(ATTRIBUTES)
    assert named > 150
    assert all(
        parse_caption(sentence) == ParsedCaption("none", {}, None)
        for sentence in NO_CHANGE_SENTENCES
    )
    assert all(
        parse_caption(sentence) == ParsedCaption(None, {}, None)
        for sentence in ("", "the cube is the same size as the ball", "brown brown")
    )


def test_what_is_wrong_or_left_out_counts_as_wrong():
    true = {
        "1.png": {
            "type": "color",
            "size": "small",
            "color": "red",
            "material": "metal",
            "shape": "cube",
            "new_color": "blue",
        },
        "2.png": {
            "size": "large",
            "color": "red",
            "material": "metal",
            "shape": "cube",
            "new_color": "blue",
        },
    }
    rows = judge_captions(
        {
            "1.png": "the tiny red shiny block turned blue",
            "2.png": "the cube that is left of the red ball became matte",
            "1.png_n": "nothing has changed",
            "2.png_n": "the red cube is gone",
        },
        true,
    )
    assert rows == {
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
    with pytest.raises(ValueError, match="3.png is not told"):
        judge_captions({"3.png": "no change"}, true)


def test_scenes_are_told_apart_by_a_look_of_what_changes():
    true = {
        f"{n}.png": {
            "type": "move",
            "size": size,
            "color": "red",
            "material": "metal",
            "shape": "cube",
        }
        for n, size in enumerate(("small", "small", "large"))
    }
    captions = {
        "0.png": "the tiny cube moved",
        "1.png": "the big cube moved",
        "2.png": "the big ball is gone",
        "2.png_n": "no change",
    }
    rows = judge_by_attribute("size", captions, true)
    assert {name for name in rows if name.startswith("small")} == {
        f"small: {name}" for name in judge_captions({"0.png": ""}, true)
    }
    assert (rows["small: size"], rows["small: shape"], rows["large: type"]) == (
        [True, False],
        [True, True],
        [False],
    )
    assert (rows["large: shape"], rows["large: no change recognised"]) == ([False], [True])


def test_the_interval_is_wilsons():
    row = accuracy([True] * 8 + [False] * 2)
    assert (row["share"], row["count"]) == (0.8, 10)
    assert (row["low"], row["high"]) == pytest.approx(
        (0.490, 0.943), abs=1e-3
    )  # as published tables have it
    assert accuracy([True] * 5)["high"] == pytest.approx(1.0)


def test_the_command(tmp_path, capsys):
    (tmp_path / "hyp.json").write_text(
        json.dumps([{"image_id": "1.png", "caption": "the big red metal cube moved"}])
    )
    true = {"type": "move", "size": "large", "color": "red", "material": "metal", "shape": "cube"}
    (tmp_path / "true.json").write_text(json.dumps({"1.png": true}))
    words = [
        "changes",
        "--changed_object",
        str(tmp_path / "true.json"),
        "--results",
        str(tmp_path / "hyp.json"),
    ]
    assert eval_utils.main([*words, "--output", str(tmp_path / "out.json")]) == 0
    assert "type: move         100.0" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text())["color and shape"]["share"] == 1
    assert eval_utils.main([*words, "--by", "size"]) == 0
    assert "large: shape" in capsys.readouterr().out
    (tmp_path / "true.json").write_text(json.dumps({"1.png": {**true, "shape": "cone"}}))
    with pytest.raises(SystemExit, match="2"):
        eval_utils.main(words)
    assert "1.png is" in capsys.readouterr().err

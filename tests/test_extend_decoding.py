"""A custom decoding method is one function and one line in the registry.

The method below takes part in everything: generate, Predictor, --do_predict, --do_eval, --help.
"""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import CLIP4IDCinference
from dataloaders.pairs import ImagePair
from modules.evaluation.captions import generate_captions
from modules.generation import generate, greedy_search
from modules.generation.steps import OpenCaptions
from modules.options import parse_options
from modules.options.decoding import BUILT_IN_METHODS, Decoding
from modules.predictor import Predictor
from modules.registries import DECODING_METHODS
from modules.tokenizer import EOT
from system.flags import FlagGroup, flag
from system.runtime import Runtime
from tests.conftest import draw_pair
from tests.runs import arguments

EVALUATE = ["--do_eval", "--output_dir", "o", "--datatype", "clevr", "--data_path", "d"]


@dataclass(frozen=True)
class Settings(FlagGroup):
    """The settings of `diverse_first_words`."""

    first_rank: int = flag(1, "rank of the most likely first word that is used", int, at_least=1)


def diverse_first_words(model, pair_tokens, max_words, decoding, pair_indices):
    """Greedy captions, each starting with another of the most likely first words."""
    captions = OpenCaptions(model, pair_tokens, max_words, decoding.num_captions)
    while captions.is_open:
        logits = captions.next_logits()
        next_ids = logits.argmax(dim=-1)
        if captions.length == 0:
            skipped = decoding.settings.first_rank - 1
            first_ids = logits[:, 0].topk(skipped + decoding.num_captions).indices
            next_ids = first_ids[:, skipped:]
        captions.append(next_ids)
    return captions.written_ids()


diverse_first_words.Settings = Settings


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one line, undone after each test."""
    monkeypatch.setattr(DECODING_METHODS, "targets", dict(DECODING_METHODS.targets))
    DECODING_METHODS.register("diverse", diverse_first_words)


def test_generate_looks_the_method_up_and_gives_it_its_settings(tiny_captioner):
    tokens = torch.randn(3, 10, 64, generator=torch.Generator().manual_seed(1))
    start = torch.full((3, 1), tiny_captioner.sot)
    with torch.no_grad():
        ranked = tiny_captioner.caption_logits(tokens, start, torch.ones_like(start))[:, 0]
    expected = ranked.argsort(dim=-1, descending=True)
    one = generate(tiny_captioner, tokens, 8, Decoding(decoding="diverse"))
    assert torch.equal(one[:, 0], greedy_search(tiny_captioner, tokens, 8))
    three = generate(tiny_captioner, tokens, 8, Decoding(decoding="diverse", num_captions=3))
    assert torch.equal(three[..., 0], expected[:, :3])
    others = Decoding(decoding="diverse", num_captions=2, settings={"first_rank": 2})
    two = generate(tiny_captioner, tokens, 8, others)
    width = min(two.shape[2], three.shape[2])
    assert torch.equal(two[..., :width], three[:, 1:, :width])


def test_the_predictor_captions_and_explains_with_it(tiny_captioner, tmp_path):
    draw_pair(tmp_path, ["a.png", "b.png"], "red", 0)
    predictor = Predictor(tiny_captioner, 6)
    pair = (tmp_path / "a.png", tmp_path / "b.png")
    decoding = Decoding(decoding="diverse", num_captions=3, settings=Settings(first_rank=2))
    captions = predictor.captions([pair], decoding)[0]
    assert len({caption.text for caption in captions}) == 3
    assert all(caption.score < 0 for caption in captions)
    explained = predictor.explanations([pair], decoding)[0]
    assert [one.caption.text for one in explained] == [one.text for one in captions]
    assert predictor.caption(*pair, decoding) == captions[0].text


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_predictions_are_written_and_resumed(
    suffix, captioner_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("modules.pipeline.predict.BATCH_SIZE", 2)
    for number in range(4):
        names = [f"own/{number}.png", f"own/{number}_2.png"]
        draw_pair(tmp_path, names, "red" if number % 2 else "blue", number)
    path = tmp_path / f"captions.{suffix}"
    command = ["--do_predict", "--before", str(tmp_path / "own"), "--predictions", str(path)]
    command += ["--init_model", str(captioner_folder), "--precision", "fp32"]
    command += ["--decoding", "diverse", "--num_captions", "2"]
    assert CLIP4IDCinference.main([*command, "--first_rank", "3"]) == 0
    whole = path.read_bytes()
    rows = read_captions(path)
    assert [pair_id for pair_id, _ in rows] == [str(n) for n in range(4) for _ in range(2)]
    assert rows[0][1] != rows[1][1]
    origin = json.loads((tmp_path / f"captions.{suffix}.origin.json").read_text())
    assert origin["decoding"] == "diverse"
    assert origin["first_rank"] == 3

    path.write_bytes(whole[: len(whole) * 2 // 3])
    assert CLIP4IDCinference.main([*command, "--first_rank", "3"]) == 0
    assert read_captions(path) == rows
    with pytest.raises(SystemExit, match="2"):
        CLIP4IDCinference.main(command)
    assert "was made with first_rank 3" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        CLIP4IDCinference.main([*command[:-4], "--num_captions", "2"])
    assert "decoding diverse, first_rank 3" in capsys.readouterr().err


def read_captions(path: Path) -> list[tuple[str, str]]:
    """(id, caption) of each caption in a file."""
    lines = path.read_text().splitlines()
    if path.suffix == ".csv":
        return [(row["id"], row["caption"]) for row in csv.DictReader(lines)]
    found = [json.loads(line) for line in lines]
    return [(row["id"], one["caption"]) for row in found for one in row["captions"]]


def test_an_evaluation_uses_it(captioner_folder, spot, tiny_sizes, tmp_path):
    more = ["--do_eval", "--init_model", str(captioner_folder), "--precision", "fp32"]
    more += ["--decoding", "diverse", "--first_rank", "4", "--max_words", "8"]
    command = arguments(spot, tmp_path / "run", tiny_sizes, "caption", *more)
    assert CLIP4IDCinference.main(command) == 0
    written = json.loads((tmp_path / "run" / "hyp_ep_eval.json").read_text())
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["split"] == "test"

    predictor = Predictor.load(captioner_folder, "cpu", "fp32")
    decoding = Decoding(decoding="diverse", settings={"first_rank": 4})
    for row in written:
        before = spot / "images_test" / row["image_id"]
        after = before.with_name(f"{before.stem}_2.png")
        assert row["caption"] == predictor.caption(before, after, decoding)


class StandInModel:
    """Encodes pairs as nothing: only their number counts."""

    def normalize_images(self, images):
        return images

    def encode_against_first(self, images):
        num_pairs = len(images) * (images.shape[1] - 1)
        return SimpleNamespace(tokens=torch.zeros(num_pairs, 1, 1))


class OneOfTwo(Runtime):
    """One of two processes that share five pairs. The other one seems to send the same captions."""

    def gather_objects(self, value):
        return [(value + value)[:3], value[:2]]


@pytest.mark.parametrize(
    ("runtime", "num_images", "numbers"),
    [
        (Runtime(), 2, [0, 1, 2, 3, 4]),
        (Runtime(), 3, [0, 1, 5, 6, 2, 3, 7, 8, 4, 9]),
        (OneOfTwo(0, 2), 3, [0, 2, 5, 7, 4, 9]),
        (OneOfTwo(1, 2), 3, [1, 3, 6, 8]),
    ],
)
def test_captions_of_an_evaluation_are_numbered_by_place(runtime, num_images, numbers):
    """Change pairs first, then distractors, in batches of two; whatever the process."""
    pairs = [ImagePair(f"p{n}", "a", "b", distractor="c") for n in range(5)]
    if num_images == 2:
        pairs = [ImagePair(f"p{n}", "a", "b") for n in range(5)]
    seen = []

    def record(model, pair_tokens, max_words, decoding, pair_indices):
        seen.extend(pair_indices)
        return torch.full((len(pair_tokens), 1, 1), EOT)

    DECODING_METHODS.register("record", record)
    own = runtime.own_share(torch.zeros(5, num_images, 1))
    batches = [{"images": part} for part in own.split(2)]
    decoding = Decoding(decoding="record")
    captions = generate_captions(StandInModel(), pairs, batches, 8, decoding, runtime)
    assert seen == numbers
    assert len(captions) == 5 * (num_images - 1)


def test_help_lists_the_method_and_its_settings_once_it_is_named(capsys):
    def help_of(*command):
        with pytest.raises(SystemExit, match="0"):
            parse_options([*command, "--help"], "caption", "")
        return " ".join(capsys.readouterr().out.split())

    general = help_of()
    assert "greedy, beam, sampling, diverse" in general
    assert "--first_rank" not in general
    named = help_of("--decoding", "diverse")
    assert "rank of the most likely first word that is used (default: 1)" in named


def test_settings_reach_the_options_and_their_list():
    options = parse_options([*EVALUATE, "--decoding=diverse", "--first_rank", "2"], "caption", "")
    assert options.decoding.settings == Settings(first_rank=2)
    assert options.decoding.method_name() == "diverse"
    assert dict(options.items())["first_rank"] == 2
    assert ("first_rank", 2) in options.changed_items()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--decoding", "nope"], "--decoding: invalid choice: 'nope'"),
        (["--first_rank", "2"], "unrecognized arguments: --first_rank (--help"),
        (
            ["--decoding", "beam", "--first_rank", "2"],
            "unrecognized arguments: --first_rank (--help",
        ),
        (["--decoding", "diverse", "--first_rank", "x"], "'x' is not a whole number"),
        (
            ["--decoding", "diverse", "--first_rank", "0", "--top_p", "2"],
            "--top_p is 2.0, expected 1e-30 to 1; --first_rank is 0, expected at least 1",
        ),
    ],
)
def test_wrong_words_are_one_line(more, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse_options([*EVALUATE, *more], "caption", "")
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_setting_with_the_name_of_a_flag_is_refused(monkeypatch, capsys):
    @dataclass(frozen=True)
    class Clash:
        seed: int = flag(1, "a seed of its own", int)

    monkeypatch.setattr(diverse_first_words, "Settings", Clash)
    with pytest.raises(SystemExit, match="2"):
        parse_options([*EVALUATE, "--decoding", "diverse"], "caption", "")
    assert "--decoding diverse: argument --seed: conflicting option" in capsys.readouterr().err


def test_a_method_that_cannot_be_loaded_is_refused(capsys):
    DECODING_METHODS.register("gone", "no_such_package.decoding:search")
    with pytest.raises(SystemExit, match="2"):
        parse_options([*EVALUATE, "--decoding", "gone"], "caption", "")
    error = capsys.readouterr().err
    assert "decoding method 'gone' cannot be loaded from no_such_package" in error
    assert error.count("\n") == 1


def test_built_in_methods_are_not_loaded_to_read_the_options(monkeypatch):
    assert list(DECODING_METHODS.targets)[:3] == list(BUILT_IN_METHODS)
    targets = dict.fromkeys(BUILT_IN_METHODS, "no_such_package:nothing")
    monkeypatch.setattr(DECODING_METHODS, "targets", targets)
    for name in BUILT_IN_METHODS:
        options = parse_options([*EVALUATE, "--decoding", name], "caption", "")
        assert options.decoding.method_name() == name


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"decoding": "nope"}, "unknown decoding method 'nope': expected one of greedy, beam"),
        ({"decoding": "diverse", "settings": {"x": 1}}, "settings of the decoding method diverse"),
        ({"decoding": "beam", "settings": {"x": 1}}, "decoding method beam has no setting x"),
        ({"settings": {"x": 1}}, "no setting x"),
    ],
)
def test_wrong_names_in_python_are_value_errors(values, message):
    with pytest.raises(ValueError, match=message):
        Decoding(**values)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (torch.ones(2, 8, dtype=torch.long), r"ids of shape \(2, 8\)"),
        (torch.ones(2, 2, 8, dtype=torch.long), r"ids of shape \(2, 2, 8\)"),
        (torch.ones(3, 1, 8, dtype=torch.long), r"ids of shape \(3, 1, 8\)"),
        (torch.ones(2, 1, 9, dtype=torch.long), r"expected \(2 pairs, 1 captions, 1 to 8 tokens\)"),
        (torch.ones(2, 1, 0, dtype=torch.long), r"ids of shape \(2, 1, 0\)"),
        (torch.ones(2, 1, 8), "returned torch.float32, expected token ids, torch.long"),
        ([[1]], "returned list, expected token ids"),
    ],
)
def test_a_method_that_returns_no_captions_is_a_value_error(returned, message, tiny_captioner):
    DECODING_METHODS.register("wrong", lambda *_: returned)
    with pytest.raises(ValueError, match=message):
        generate(tiny_captioner, torch.zeros(2, 10, 64), 8, Decoding(decoding="wrong"))

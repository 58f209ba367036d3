"""Captions for a user's own images: the Predictor, --do_predict in all its forms, what it refuses, and the attention behind it."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import CLIP4IDCinference
from dataloaders.images import load_image, to_tensor
from modules import predictor as predictor_module
from modules.generation.sampling import sample
from modules.generation.steps import PAD
from modules.options.decoding import Decoding
from modules.predictor import Predictor
from modules.report.pictures import draw_explanation
from modules.tokenizer import EOT, clip_tokenizer, decode, split_words
from modules.weights.sources import LoadedWeights
from preprocess import export_model
from system.command import run_command
from tests.conftest import ROOT
from tests.test_generation import Markov

RED, BLUE = (200, 30, 30), (30, 30, 200)


def draw(
    path: Path,
    color: tuple[int, int, int] | None,
    seed: int = 0,
    size: tuple[int, int] = (150, 120),
) -> Path:
    noise = np.random.default_rng(seed).integers(90, 110, (size[1], size[0], 3), dtype=np.uint8)
    if color:
        noise[30:80, 40:90] = color
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise).save(path)
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    """Seven pairs in Spot-the-Diff's naming, one of them JPEG."""
    for n in range(7):
        ending = "jpg" if n == 3 else "png"
        draw(tmp_path / "own" / f"p{n}.{ending}", RED if n % 2 else None, n)
        draw(tmp_path / "own" / f"p{n}_2.{ending}", BLUE, n)
    return tmp_path / "own"


@pytest.fixture(scope="module")
def demo() -> Predictor:
    return Predictor.load(device="cpu", precision="fp32")


def run(*words: str) -> int:
    return CLIP4IDCinference.main(["--do_predict", *map(str, words)])


def refused(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        run(*words)
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err.strip().splitlines()[-1]


def test_one_pair_prints_its_caption_and_nothing_else_on_stdout(folder, demo, capsys):
    pair = folder / "p1.png", folder / "p1_2.png"
    assert run("--before", pair[0], "--after", pair[1]) == 0
    out, err = capsys.readouterr()
    assert out == demo.caption(*pair) + "\n"
    assert len(out.split()) > 2
    assert "ckpts/demo" in err
    assert "drawn scenes" in err


def test_paths_images_and_arrays_give_the_same_captions(folder, demo):
    paths = [(folder / f"p{n}.png", folder / f"p{n}_2.png") for n in (0, 1, 2)]
    images = [tuple(Image.open(path) for path in pair) for pair in paths]
    arrays = [tuple(np.asarray(image) for image in pair) for pair in images]
    together = demo.captions(paths)
    assert demo.captions([]) == demo.explanations([]) == []
    assert together == demo.captions(images) == demo.captions(arrays)
    for pair, captions in zip(paths, together, strict=True):
        (alone,) = demo.captions([pair])
        assert alone[0].text == captions[0].text
        assert alone[0].score == pytest.approx(captions[0].score, abs=1e-3)


def test_the_score_is_the_mean_log_probability_of_the_words_and_the_end(tiny_captioner):
    ours = Predictor(tiny_captioner, 6)
    tokens = torch.randn(2, 10, 64)
    ids = torch.tensor([[3, 4, 49, 0], [5, 6, 7, 8]])
    with torch.no_grad():
        logits = tiny_captioner.caption_logits(
            tokens, torch.tensor([[48, 3, 4, 0], [48, 5, 6, 7]]), (ids != PAD).long()
        )
        expected = [
            torch.stack([logits[row].log_softmax(-1)[n, ids[row, n]] for n in range(length)]).mean()
            for row, length in ((0, 3), (1, 4))
        ]
        torch.testing.assert_close(ours._scores(tokens, ids), torch.stack(expected))


def test_drawn_captions_repeat_and_do_not_depend_on_their_batch(folder, demo, tmp_path):
    pairs = [(folder / f"p{n}.png", folder / f"p{n}_2.png") for n in (0, 1, 2)]
    how = Decoding(
        num_captions=5, top_p=0.9, seed=3
    )  # the rarest words hang on rounding, which batches change
    together = [[caption.text for caption in captions] for captions in demo.captions(pairs, how)]
    assert [len(captions) for captions in together] == [5, 5, 5]
    assert len(set(together[0])) > 1
    assert [
        [c.text for c in demo.captions([pair], how, [n])[0]] for n, pair in enumerate(pairs)
    ] == together
    assert [
        c.text for c in demo.captions(pairs[:1], Decoding(num_captions=5, top_p=0.9, seed=4))[0]
    ] != together[0]
    cold = demo.captions(pairs, Decoding(top_p=1e-6))
    assert [c[0].text for c in cold] == [c[0].text for c in demo.captions(pairs)], (
        "a nucleus of one word is greedy"
    )


def test_sampling_follows_the_probabilities():
    """4,000 two-word captions of a toy whose words depend on the last one, against the table."""
    table = (
        torch.tensor([[0.0] * 5, [0.0] * 5, [0.0] * 5, [0.5, 0.2, 0.1, 0.15, 0.05], [0.0] * 5])
        .log()
        .clamp(min=-50)
    )
    table[0] = torch.tensor([0.1, 0.1, 0.1, 0.1, 0.6]).log()
    draws = torch.rand(1, 4000, 2, generator=torch.Generator().manual_seed(0))
    ids = sample(Markov(), table[None], draws)[0]
    first = torch.bincount(ids[:, 0], minlength=5) / 4000
    torch.testing.assert_close(first, table[3].exp(), atol=0.03, rtol=0)
    second = torch.bincount(ids[ids[:, 0] == 0][:, 1], minlength=5) / (ids[:, 0] == 0).sum()
    torch.testing.assert_close(second, table[0].exp(), atol=0.04, rtol=0)
    assert (ids[ids[:, 0] == 4][:, 1] == PAD).all(), "words after the end"
    nucleus = sample(Markov(), table[None], draws, top_p=0.6)[0][:, 0]
    assert set(nucleus.tolist()) == {0, 1}, "the two likeliest reach .6"
    assert (nucleus == 0).float().mean().item() == pytest.approx(0.5 / 0.7, abs=0.03)
    hot = sample(Markov(), table[None], draws, temperature=2.0)[0][:, 0]
    expected = (table[3] / 2).softmax(-1)
    torch.testing.assert_close(torch.bincount(hot, minlength=5) / 4000, expected, atol=0.03, rtol=0)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("num_captions", [1, 3])
def test_a_broken_run_goes_on_without_losing_or_doubling(
    kind, num_captions, folder, tmp_path, monkeypatch
):
    monkeypatch.setattr("modules.pipeline.predict.BATCH_SIZE", 2)
    words = [
        "--before",
        folder,
        "--num_captions",
        num_captions,
        *(["--top_p", 0.8] if num_captions > 1 else []),
    ]
    whole = tmp_path / f"whole.{kind}"
    assert run(*words, "--predictions", whole) == 0
    content, expected = whole.read_bytes(), read_results(whole)
    assert [row[0] for row in expected] == [f"p{n}" for n in range(7) for _ in range(num_captions)]
    for cut in (0, 5, 40, len(content) // 3, len(content) // 2, len(content) - 1, len(content)):
        part = tmp_path / f"part{cut}.{kind}"
        part.write_bytes(content[:cut])
        (tmp_path / f"{part.name}.origin.json").write_bytes(
            (tmp_path / f"{whole.name}.origin.json").read_bytes()
        )
        assert run(*words, "--predictions", part) == 0
        for ours, theirs in zip(read_results(part), expected, strict=True):
            assert ours[:2] == theirs[:2], f"cut at {cut} of {len(content)} bytes"
            assert ours[2] == pytest.approx(theirs[2], abs=2e-4)


def test_results_of_other_settings_are_not_gone_on_with(folder, tmp_path, capsys):
    path = tmp_path / "out.csv"
    assert run("--before", folder, "--predictions", path) == 0
    content = path.read_bytes()
    assert "was made with beam_size 1" in refused(
        capsys, "--before", folder, "--predictions", path, "--beam_size", "2"
    )
    other = tmp_path / "other"
    assert (
        export_model.main([str(ROOT / "ckpts" / "demo"), str(other), "--trained_on", "the same"])
        == 0
    )
    capsys.readouterr()
    assert (
        run("--before", folder, "--predictions", path, "--init_model", ROOT / "ckpts" / "demo") == 0
    ), "a folder is its model"
    weights = load_file(other / "model.safetensors")
    save_file(
        {
            name: value + 1 if name.endswith("predictions.bias") else value
            for name, value in weights.items()
        },
        other / "model.safetensors",
    )
    assert "checkpoint_sha256" in refused(
        capsys, "--before", folder, "--predictions", path, "--init_model", other
    )
    (tmp_path / "out.csv.origin.json").unlink()
    assert "has no out.csv.origin.json beside it" in refused(
        capsys, "--before", folder, "--predictions", path
    )
    assert path.read_bytes() == content


def test_a_table_of_one_pair_is_a_table(folder, tmp_path, capsys):
    (tmp_path / "one.csv").write_text("before,after\nown/p0.png,own/p0_2.png\n")
    assert run("--pairs", tmp_path / "one.csv") == 0
    assert capsys.readouterr().out.startswith("id,caption,score,before,after\n0,")


def test_who_reads_no_further_and_who_interrupts_hear_no_traceback(folder):
    command = f"{sys.executable} CLIP4IDCinference.py --do_predict --before {folder}"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} | head -c 1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr
    assert "Broken pipe" not in done.stderr

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match="130"):
        run_command("x.py", stop)


def read_results(path: Path) -> list[tuple[str, str, float]]:
    """(id, caption, score) of a predictions file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".csv":
        return [
            (row["id"], row["caption"], float(row["score"]))
            for row in csv.DictReader(text.splitlines())
        ]
    return [
        (row["id"], caption["caption"], caption["score"])
        for row in map(json.loads, text.splitlines())
        for caption in row["captions"]
    ]


def test_processes_share_the_pairs(folder, tmp_path):
    alone, shared = tmp_path / "alone.jsonl", tmp_path / "shared.jsonl"
    assert run("--before", folder, "--predictions", alone) == 0
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        str(ROOT / "CLIP4IDCinference.py"),
        "--do_predict",
        "--before",
        str(folder),
        "--predictions",
        str(shared),
    ]
    subprocess.run(
        command,
        check=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
        capture_output=True,
    )
    assert [row[:2] for row in read_results(alone)] == [row[:2] for row in read_results(shared)]


def test_tables_and_parallel_folders_are_the_same_pairs(folder, tmp_path, capsys):
    for n in (0, 1):
        for place, ending in (("before", ""), ("after", "_2")):
            (tmp_path / place).mkdir(exist_ok=True)
            (tmp_path / place / f"p{n}.png").write_bytes(
                (folder / f"p{n}{ending}.png").read_bytes()
            )
    table = tmp_path / "pairs.csv"
    table.write_text(
        "\ufeffbefore,after,id\nown/p0.png,own/p0_2.png,p0\nown/p1.png,own/p1_2.png,p1\n",
        encoding="utf-8",
    )
    lines = tmp_path / "pairs.jsonl"
    lines.write_text(
        '{"before": "own/p0.png", "after": "own/p0_2.png", "id": "p0"}\n\n'
        '{"before": "own/p1.png", "after": "own/p1_2.png", "id": "p1"}\n'
    )
    outs = []
    for words in (
        ("--before", tmp_path / "before", "--after", tmp_path / "after"),
        ("--pairs", table),
        ("--pairs", lines),
    ):
        capsys.readouterr()
        assert run(*words) == 0
        outs.append(
            [
                (row["id"], row["caption"], row["score"])
                for row in csv.DictReader(capsys.readouterr().out.splitlines())
            ]
        )
    assert outs[0] == outs[1] == outs[2]
    assert [row[0] for row in outs[0]] == ["p0", "p1"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--before", "{own}/p0.png"], "--before and --after"),
        (["--before", "{own}/p0.png", "--after", "{own}/none.png"], "no image"),
        (["--before", "{own}/none.png", "--after", "{own}/p0.png"], "no image"),
        ([], "either --before"),
        (["--before", "{own}", "--pairs", "x.csv"], "either --before"),
        (["--pairs", "{own}/none.csv"], "no file"),
        (["--pairs", "{own}/p0.png"], ".csv or .jsonl"),
        (["--before", "{own}", "--predictions", "out.txt"], ".csv or .jsonl"),
        (["--before", "{own}", "--top_p", "0"], "--top_p"),
        (["--before", "{own}", "--temperature", "-1"], "--temperature"),
        (["--before", "{own}", "--num_captions", "0"], "--num_captions"),
        (["--before", "{own}", "--num_captions", "2", "--beam_size", "2"], "cannot be combined"),
        (["--before", "{own}", "--do_train"], "exactly one"),
        (["--before", "{own}", "--after", "{own}/p0.png"], "is a folder, the other is not"),
        (["--before", "{own}", "--beam_size", "101"], "expected 1 to 100"),
        (["--before", "{own}", "--init_model", "{own}"], "is a folder without"),
        (["--before", "{own}", "--init_model", "none.bin"], "no weights"),
    ],
)
def test_wrong_input_is_one_line(words, message, folder, capsys):
    assert message in refused(capsys, *(word.format(own=folder) for word in words))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "before,after\na.png\n", "line 2: no after"),
        ("t.csv", "x,y\n1,2\n", "has the columns x, y; expected before, after"),
        ("t.csv", "before,after\na.png,b, c.png\n", "line 2 has 3 fields, the header 2"),
        ("t.csv", "", "no pairs"),
        ("t.jsonl", "{]\n", "line 1 is not JSON"),
        ("t.jsonl", "[1]\n", "not a JSON object"),
        ("t.jsonl", '{"before": 3}', "no before"),
        ("t.csv", "before,after,id\na.png,b.png,x\na.png,b.png,x\n", "occurs twice"),
        ("t.csv", "before,after\na.png,c.png\n", "no image"),
    ],
)
def test_wrong_tables_are_one_line(name, content, message, tmp_path, capsys):
    draw(tmp_path / "a.png", RED)
    draw(tmp_path / "b.png", BLUE)
    (tmp_path / name).write_text(content)
    assert message in refused(capsys, "--pairs", tmp_path / name)


def test_no_image_of_a_folder_is_passed_over(folder, capsys):
    draw(folder / "p7.png", RED)
    assert "p7 has no other image" in refused(capsys, "--before", folder)
    (folder / "p7.png").unlink()
    draw(folder / "p0.jpg", RED)
    assert "differ by their ending alone" in refused(capsys, "--before", folder)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": 0.0},
        {"top_p": 2.0},
        {"num_captions": 0},
        {"num_captions": 2, "beam_size": 2},
    ],
)
def test_decoding_out_of_range_is_refused(wrong):
    with pytest.raises(ValueError, match="expected|cannot be combined"):
        Decoding(**wrong).method()


def test_a_broken_image_leaves_no_file(folder, tmp_path, capsys):
    (folder / "p0.png").write_bytes(b"no image at all")
    assert "cannot read the image" in refused(
        capsys, "--before", folder, "--predictions", tmp_path / "out.csv"
    )
    assert not (tmp_path / "out.csv").exists()


def test_results_of_other_pairs_are_not_gone_on_with(folder, tmp_path, capsys):
    other = tmp_path / "out.csv"
    for content in ("id,caption,score,before,after\nelse,x,0,a,b\n", "some,other,table\n"):
        other.write_text(content)
        assert "the results of other pairs" in refused(capsys, "--before", folder, "--predictions", other)
        assert other.read_text() == content


def test_rotation_sizes_and_modes(tmp_path):
    upright = Image.fromarray(
        np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    )
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter
    turned = tmp_path / "turned.png"
    upright.rotate(90, expand=True).save(turned, exif=exif)
    assert torch.equal(to_tensor(turned), to_tensor(upright))
    assert torch.equal(load_image(turned), to_tensor(upright))
    deep = Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000)
    deep.save(tmp_path / "deep.png")
    assert to_tensor(tmp_path / "deep.png").float().std() > 50
    for mode in ("L", "P", "RGBA", "CMYK", "1", "LA", "F", "I"):
        source = upright.convert("L") if mode in ("F", "I", "LA") else upright
        assert to_tensor(source.convert(mode)).shape == (3, 224, 224)
    for wrong in (
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 3)),
        np.zeros((0, 4, 3), np.uint8),
        7,
    ):
        with pytest.raises(ValueError, match="expected"):
            to_tensor(wrong)


def test_attention_is_shares_of_patches_and_finds_what_was_drawn(demo, tmp_path):
    """One pass explains the caption that captioning gives; on a drawn pair the strongest patch lies where a block has gone."""
    before, after = (
        ROOT / "docs" / "examples" / f"removed_{name}.png" for name in ("before", "after")
    )
    found = demo.explain(before, after)
    assert found.caption.text == demo.caption(before, after)
    assert found.words[-1] == "(end)"
    assert " ".join(found.words[:-1]) == found.caption.text
    side = demo.model.image_resolution // demo.model.clip.visual.patch_size
    assert found.class_maps.shape == (2, 2, side, side)
    assert found.word_maps.shape == (len(found.words), 2, side, side)
    for maps in (found.class_maps, found.word_maps):
        assert (maps >= 0).all()
        assert (maps.sum(axis=(1, 2, 3)) <= 1 + 1e-5).all()
    brightest = np.unravel_index(found.class_maps[1, 1].argmax(), (side, side))
    block = (
        112 * side // 320,
        152 * side // 480,
    )  # row and column of the patch with the red block's middle, in pixels of the file
    assert max(abs(a - b) for a, b in zip(brightest, block, strict=True)) <= 1, (
        f"looks at {brightest}, the block was at {block}"
    )
    assert all(
        module.recorded is None for modules in demo.model.attention_modules for module in modules
    )
    draw_explanation(tmp_path / "a.png", before, after, found)
    assert Image.open(tmp_path / "a.png").size[0] > 1000


def test_pairs_explained_together_are_explained_as_alone(folder, demo, tmp_path, capsys):
    """And --save_attention draws one picture a caption beside results that are those without it."""
    pairs = [(folder / f"p{n}.png", folder / f"p{n}_2.png") for n in (0, 1, 2)]
    how = Decoding(num_captions=2, top_p=0.8)
    together = demo.explanations(pairs, how)
    for n, (pair, captions) in enumerate(zip(pairs, demo.captions(pairs, how), strict=True)):
        (alone,) = demo.explanations([pair], how, [n])
        assert (
            [one.caption.text for one in together[n]]
            == [one.text for one in captions]
            == [one.caption.text for one in alone]
        )
        for one, other in zip(together[n], alone, strict=True):
            assert one.words == other.words
            np.testing.assert_allclose(one.class_maps, other.class_maps, atol=1e-5)
            np.testing.assert_allclose(one.word_maps, other.word_maps, atol=1e-5)
    assert not np.allclose(together[0][0].class_maps, together[1][0].class_maps, atol=1e-3)
    outs = []
    for more in ([], ["--save_attention", tmp_path / "seen"]):
        capsys.readouterr()
        assert run("--before", folder, "--num_captions", 2, "--top_p", 0.8, *more) == 0
        outs.append(
            [
                (row["id"], row["caption"])
                for row in csv.DictReader(capsys.readouterr().out.splitlines())
            ]
        )
    assert outs[0] == outs[1]
    assert sorted(path.name for path in (tmp_path / "seen").iterdir()) == [
        f"{n:05d}-p{n}-{k}.png" for n in range(7) for k in range(2)
    ]


def test_tokens_of_one_word_are_one_word():
    ids = [*clip_tokenizer().encode("the cyan zebra-like thing"), EOT]
    words = split_words(ids)
    assert [word for word, _ in words] == ["the", "cyan", "zebra", "-", "like", "thing", "(end)"]
    assert [place for _, places in words for place in places] == list(range(len(ids)))
    assert max(len(places) for _, places in words) > 1
    assert split_words(ids[:2]) == [("the", [0]), (decode(ids[1:2]), [1])]


def test_the_shipped_model_sees_the_changes_of_the_shipped_examples(demo):
    folder = ROOT / "docs" / "examples"
    expected = json.loads((folder / "captions.json").read_text())
    assert {
        name: demo.caption(folder / f"{name}_before.png", folder / f"{name}_after.png")
        for name in expected
    } == expected


def test_cards_of_the_wrong_kind_and_models_without_a_captioner_are_refused(tmp_path, monkeypatch):
    weights = tmp_path / "w.bin"
    torch.save({"clip.x": torch.ones(1)}, weights)
    (tmp_path / "model.json").write_text('{"max_words": "many"}')
    with pytest.raises(ValueError, match="max_words is 'many'"):
        Predictor.load(weights)
    (tmp_path / "model.json").unlink()
    monkeypatch.setattr(
        predictor_module,
        "load_weights",
        lambda *_: LoadedWeights({"clip.x": torch.ones(1)}, {}, "w.bin"),
    )
    with pytest.raises(ValueError, match="no captioner"):
        Predictor.load(weights)


def test_the_shipped_model_on_real_scenes_that_it_was_not_trained_on(demo, real_data):
    """A little less than what docs/experiments.md reports of the 48."""
    from dataloaders.datasets import open_dataset
    from dataloaders.pairs import distractor_id
    from gt.caption_accuracy import accuracy, judge_captions

    root = real_data / "clevr-change" / "real48"
    scenes = [
        scene
        for split in ("train", "val", "test")
        for scene in open_dataset("clevr", root).checked_pairs(split)
    ]
    assert len(scenes) == 48
    pairs = {scene.id: (scene.before, scene.after) for scene in scenes} | {
        distractor_id(scene.id): (scene.before, scene.distractor) for scene in scenes
    }
    captions = {
        key: found[0].text
        for key, found in zip(pairs, demo.captions(list(pairs.values())), strict=True)
    }
    changed = json.loads((root / "changed_object.json").read_text())
    shares = {
        name: accuracy(answers)["share"]
        for name, answers in judge_captions(captions, changed).items()
    }
    floors = {
        "change recognised": 0.9,
        "no change recognised": 0.85,
        "type": 0.85,
        "new color": 0.85,
        "color": 0.85,
        "shape": 0.4,
    }
    for name, least in floors.items():
        assert shares[name] >= least, f"{name}: {shares[name]}"

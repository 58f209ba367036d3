"""The Predictor: captions and scores, sampling, attention maps, and the model that is shipped."""

import base64
import io
import json
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from dataloaders.datasets import open_dataset
from dataloaders.images import load_image, to_tensor
from gt.caption_accuracy import accuracy, check_captions
from modules import predictor as predictor_module
from modules.clip4idc import CLIP4IDC
from modules.model.explanation import (
    Caption,
    compute_token_attention,
    explain_caption,
    patch_maps,
    rollout,
)
from modules.options.decoding import Decoding
from modules.predictor import Predictor
from modules.report.pictures import draw_explanation, space_evenly
from modules.tokenizer import EOT, decode, load_clip_tokenizer, split_words
from modules.weights.sources import LoadedWeights
from tests.conftest import COLORS, ROOT, draw_pair, tiny_weights

EXAMPLES = ROOT / "docs" / "examples"


@pytest.fixture(scope="module")
def demo() -> Predictor:
    """The small model that is shipped."""
    return Predictor.load(device="cpu", precision="fp32")


@pytest.fixture
def tiny(captioner_folder) -> Predictor:
    """A tiny captioner with random weights. Without a low temperature all its words are so rare
    when sampled that rounding, which depends on the batch, decides among them."""
    return Predictor.load(captioner_folder, "cpu", "fp32")


@pytest.fixture
def pairs(tmp_path) -> list[tuple]:
    """The paths of three pairs."""
    for number, color in enumerate(list(COLORS)[:3]):
        draw_pair(tmp_path, [f"{number}.png", f"{number}_2.png"], color, number)
    return [(tmp_path / f"{number}.png", tmp_path / f"{number}_2.png") for number in range(3)]


def texts(captions):
    return [[one.text for one in of_pair] for of_pair in captions]


def test_paths_images_and_arrays_give_the_same_captions(tiny, pairs):
    images = [tuple(Image.open(path) for path in pair) for pair in pairs]
    arrays = [tuple(np.array(image) for image in pair) for pair in images]
    tensors = [tuple(torch.from_numpy(one).permute(2, 0, 1) for one in pair) for pair in arrays]
    together = tiny.captions(pairs)
    assert tiny.captions([]) == tiny.explanations([]) == []
    assert together == tiny.captions(images) == tiny.captions(arrays)
    assert together == tiny.captions(tensors)
    assert len({captions[0].text for captions in together}) > 1
    for pair, captions in zip(pairs, together, strict=True):
        (alone,) = tiny.captions([pair])
        assert alone[0].text == captions[0].text
        assert alone[0].score == pytest.approx(captions[0].score, abs=1e-3)


def test_the_score_is_the_mean_log_probability_of_the_words_and_the_end(
    tiny_captioner, pairs, monkeypatch
):
    """Of captions that are handed in: two tokens and the end; and four tokens, one of them 0."""
    ids = torch.tensor([[3, 4, 49, 0], [5, 0, 7, 8]])
    monkeypatch.setattr(predictor_module, "generate", lambda *_: ids[:, None])
    predictor = Predictor(tiny_captioner, 4)
    found = [captions[0].score for captions in predictor.captions(pairs[:2])]
    images = torch.stack([torch.stack([to_tensor(path, 64) for path in pair]) for pair in pairs])
    expected = []
    with torch.no_grad():
        tokens = tiny_captioner.encode_pairs(tiny_captioner.normalize_images(images)).tokens
        for row, words in ((0, [3, 4, 49]), (1, [5, 0, 7, 8])):
            read = torch.tensor([[tiny_captioner.sot, *words[:-1]]])
            logits = tiny_captioner.caption_logits(
                tokens[row : row + 1], read, torch.ones_like(read)
            )[0]
            log_probs = logits.log_softmax(dim=-1)
            expected.append(sum(log_probs[n, word].item() for n, word in enumerate(words)))
    assert found == pytest.approx([expected[0] / 3, expected[1] / 4], abs=1e-4)


def test_the_sureness_is_the_mean_probability_of_a_word():
    halves = Caption("a b", math.log(0.5))
    assert halves.sureness == pytest.approx(50)
    assert Caption("certain", 0.0).sureness == 100
    assert Caption("never", -1000.0).sureness == 0
    three = Caption("a b c", (math.log(0.9) + math.log(0.6) + math.log(0.2)) / 3)
    assert three.sureness == pytest.approx(100 * (0.9 * 0.6 * 0.2) ** (1 / 3))


def test_sampled_captions_repeat_and_do_not_depend_on_their_batch(tiny, pairs):
    decoding = Decoding(num_captions=5, temperature=0.2, top_p=0.9, seed=3)
    together = texts(tiny.captions(pairs, decoding))
    assert [len(captions) for captions in together] == [5, 5, 5]
    assert len(set(together[0])) > 1
    alone = [tiny.captions([pair], decoding, [n])[0] for n, pair in enumerate(pairs)]
    assert texts(alone) == together
    other_seed = Decoding(num_captions=5, temperature=0.2, top_p=0.9, seed=4)
    assert texts(tiny.captions(pairs[:1], other_seed))[0] != together[0]


def test_a_nucleus_of_one_word_is_greedy(tiny, pairs):
    assert texts(tiny.captions(pairs, Decoding(top_p=1e-6))) == texts(tiny.captions(pairs))


def test_contradicting_settings_are_refused(tiny, pairs):
    with pytest.raises(ValueError, match="cannot be combined with sampling"):
        tiny.captions(pairs, Decoding(num_captions=2, beam_size=2))


def test_explanations_are_those_of_the_captions_in_any_batch(tiny, pairs):
    decoding = Decoding(num_captions=2, temperature=0.2, top_p=0.9)
    together = tiny.explanations(pairs, decoding)
    captions = tiny.captions(pairs, decoding)
    for number, pair in enumerate(pairs):
        (alone,) = tiny.explanations([pair], decoding, [number])
        expected = [caption.text for caption in captions[number]]
        assert [one.caption.text for one in together[number]] == expected
        for one, other in zip(together[number], alone, strict=True):
            assert one.caption.text == other.caption.text
            assert one.words == other.words
            np.testing.assert_allclose(one.class_maps, other.class_maps, atol=1e-5)
            np.testing.assert_allclose(one.word_maps, other.word_maps, atol=1e-5)
    assert not np.array_equal(together[0][0].class_maps, together[1][0].class_maps)


def test_rollout_is_written_out():
    """Two layers of two heads on three tokens, by hand."""
    generator = torch.Generator().manual_seed(0)
    joint, encoder, cross = (
        [[torch.rand(1, 2, 3, 3, generator=generator).softmax(-1)] for _ in range(2)]
        for _ in range(3)
    )
    tokens = torch.zeros(1, 3, 8)
    half = [
        [(calls[0][0].mean(0) + torch.eye(3)) / 2 for calls in part] for part in (joint, encoder)
    ]
    joint_rollout = half[0][1] @ half[0][0]
    torch.testing.assert_close(rollout(joint, tokens)[0], joint_rollout)
    assert torch.equal(rollout([], tokens)[0], torch.eye(3))
    first = cross[0][0][0].mean(0) @ half[1][0] @ joint_rollout
    second = cross[1][0][0].mean(0) @ half[1][1] @ half[1][0] @ joint_rollout
    found = compute_token_attention(encoder, cross, rollout(joint, tokens))
    torch.testing.assert_close(found[0], (first + second) / 2)


def test_a_token_0_shifts_no_words_map():
    """It decodes to "!", at which a caption is cut."""
    attention = torch.eye(5, 10)  # of each token of the caption to one token of the pair
    ids = torch.tensor([320, 0, 539, EOT, 0])  # a, !, of
    found = explain_caption(ids, torch.tensor(4), torch.tensor(-1.0), attention[:2], attention)
    assert found.caption.text == "a"
    assert found.words == ("a", "", "(end)")
    np.testing.assert_array_equal(found.word_maps[2], patch_maps(attention[3:4])[0])
    zeros = torch.zeros(5, dtype=torch.long)
    found = explain_caption(zeros, torch.tensor(5), torch.tensor(-1.0), attention[:2], attention)
    assert found.words == ("",)


def test_attention_finds_what_was_drawn(demo, tmp_path):
    """On a shipped example, the class token of after looks most where a block has gone."""
    before, after = EXAMPLES / "removed_before.png", EXAMPLES / "removed_after.png"
    found = demo.explain(before, after)
    assert found.caption.text == demo.caption(before, after)
    assert found.words[-1] == "(end)"
    assert " ".join(found.words[:-1]) == found.caption.text
    side = round((demo.model.backbone.num_tokens - 1) ** 0.5)
    assert found.class_maps.shape == (2, 2, side, side)
    assert found.word_maps.shape == (len(found.words), 2, side, side)
    for maps in (found.class_maps, found.word_maps):
        assert (maps >= 0).all()
        assert (maps.sum(axis=(1, 2, 3)) <= 1 + 1e-5).all()
    brightest = np.unravel_index(found.class_maps[1, 1].argmax(), (side, side))
    block = (112 * side // 320, 152 * side // 480)  # the block's middle, in pixels of the file
    distances = [abs(a - b) for a, b in zip(brightest, block, strict=True)]
    assert max(distances) <= 1, f"the brightest patch is {brightest}, the block was at {block}"
    modules = [module for part in demo.model.attention_modules for module in part]
    assert all(module.recorded is None for module in modules)
    draw_explanation(tmp_path / "a.png", before, after, found)
    assert Image.open(tmp_path / "a.png").size[0] > 1000


def test_without_joint_blocks_a_class_token_sees_nothing_but_words_see_patches(tmp_path):
    draw_pair(tmp_path, ["a.png", "b.png"], "red", 0)
    model = CLIP4IDC.from_weights(tiny_weights(vocab_size=49408), "caption", intra_layers=2)
    found = Predictor(model, 5).explain(tmp_path / "a.png", tmp_path / "b.png")
    assert found.class_maps.shape == (2, 2, 2, 2)
    assert (found.class_maps == 0).all()
    assert found.word_maps.shape == (len(found.words), 2, 2, 2)
    assert (found.word_maps > 0).all()


def test_a_retrieval_model_has_no_attention_maps():
    model = CLIP4IDC.from_weights(tiny_weights(), "retrieval", 1)
    with pytest.raises(ValueError, match="this is a retrieval model"):
        _ = model.attention_modules


def test_tokens_of_one_word_are_one_word():
    ids = [*load_clip_tokenizer().encode("the cyan zebra-like thing"), EOT]
    words = split_words(ids)
    assert [word for word, _ in words] == ["the", "cyan", "zebra", "-", "like", "thing", "(end)"]
    assert [place for _, places in words for place in places] == list(range(len(ids)))
    assert max(len(places) for _, places in words) > 1
    assert split_words(ids[:2]) == [("the", [0]), (decode(ids[1:2]), [1])]


def test_rotation_sizes_and_modes_of_pictures(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    upright = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: a quarter turn
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


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 3)),
        np.zeros((0, 4, 3), np.uint8),
        torch.zeros(4, 4, 3, dtype=torch.uint8),
        torch.zeros(3, 4, 4),
        7,
    ],
    ids=["gray", "float", "empty", "tensor of rows first", "float tensor", "number"],
)
def test_what_is_no_picture_is_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        to_tensor(wrong)


def test_wrong_model_info_is_refused(tmp_path):
    weights = tmp_path / "w.bin"
    torch.save({"clip.x": torch.ones(1)}, weights)
    (tmp_path / "model.json").write_text('{"max_words": "many"}')
    with pytest.raises(ValueError, match="max_words is 'many'"):
        Predictor.load(weights)


def test_a_model_without_a_captioner_is_refused(monkeypatch):
    found = LoadedWeights({"clip.x": torch.ones(1)}, {}, "w.bin")
    monkeypatch.setattr(predictor_module, "load_weights", lambda *_: found)
    with pytest.raises(ValueError, match="w.bin has no captioner"):
        Predictor.load("w.bin")


def test_the_shipped_model_sees_the_changes_of_the_shipped_examples(demo):
    expected = json.loads((EXAMPLES / "captions.json").read_text())
    for name, caption in expected.items():
        pair = (EXAMPLES / f"{name}_before.png", EXAMPLES / f"{name}_after.png")
        assert demo.caption(*pair) == caption, name


def test_the_shipped_model_on_real_scenes_that_it_was_not_trained_on(demo, real_data):
    """The floors are a little below what docs/experiments.md reports of these 48 scenes."""
    root = real_data / "clevr-change" / "real48"
    dataset = open_dataset("clevr", root)
    images = {}
    for split in ("train", "val", "test"):
        for pair in dataset.checked_pairs(split):
            images[pair.id] = (pair.before, pair.after)
            images[pair.distractor_id] = (pair.before, pair.distractor)
    assert len(images) == 2 * 48
    found = demo.captions(list(images.values()))
    captions = {key: of_pair[0].text for key, of_pair in zip(images, found, strict=True)}
    changed = json.loads((root / "changed_object.json").read_text())
    shares = {
        name: accuracy(answers)["share"]
        for name, answers in check_captions(captions, changed).items()
    }
    floors = {
        "change recognised": 0.9,
        "no change recognised": 0.85,
        "type": 0.85,
        "new color": 0.85,
        "color": 0.85,
        "shape": 0.4,
    }
    for name, floor in floors.items():
        assert shares[name] >= floor, f"{name}: {shares[name]}"


@pytest.mark.parametrize(
    ("count", "wanted", "indices"),
    [(0, 2, []), (2, 3, [0, 1]), (9, 3, [0, 4, 8]), (9, 1, [0]), (1, 1, [0])],
)
def test_indices_are_spaced_evenly(count, wanted, indices):
    assert space_evenly(count, wanted) == indices


def test_explanations_in_threads_are_those_alone(demo):
    names = ("removed", "added", "recolored")
    pairs = [(EXAMPLES / f"{name}_before.png", EXAMPLES / f"{name}_after.png") for name in names]
    alone = [demo.explain(*pair) for pair in pairs]
    with ThreadPoolExecutor(3) as pool:
        captioned = pool.map(lambda pair: demo.caption(*pair), pairs)
        together = list(pool.map(lambda pair: demo.explain(*pair), pairs))
        texts = list(captioned)
    for one, other, text in zip(alone, together, texts, strict=True):
        assert one.caption.text == other.caption.text == text
        np.testing.assert_allclose(one.word_maps, other.word_maps, atol=1e-3)
    modules = [module for part in demo.model.attention_modules for module in part]
    assert all(module._recordings is None for module in modules)


def test_settings_that_are_no_decoding_are_told(tiny):
    with pytest.raises(ValueError, match="found dict as decoding, expected a Decoding such as"):
        tiny.caption("a.png", "b.png", {"beam_size": 3})


@pytest.mark.parametrize("device", ["cuda", torch.device("cuda"), torch.device("cuda", 3)])
def test_a_gpu_that_is_not_there_is_told_in_one_line(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match=r"^device cuda(:3)?: no GPU was found .*; cpu always"):
        Predictor.load(device=device)


def test_objects_are_shown_in_a_line(demo):
    assert repr(demo) == "<Predictor: demo, 10.2 M parameters, cpu, fp32>"
    found = demo.explain(EXAMPLES / "removed_before.png", EXAMPLES / "removed_after.png")
    caption = "Caption('the big red matte block is missing', score=-0.560, sureness=57 %)"
    assert repr(found.caption) == caption
    assert repr(found) == f"<PairExplanation: {caption}, maps of 12 × 12 patches>"


def test_a_notebook_shows_an_explanation_as_a_picture(tiny, pairs):
    found = tiny.explain(*pairs[0])
    html = found._repr_html_()
    assert html.startswith('<img src="data:image/jpeg;base64,')
    picture = Image.open(io.BytesIO(base64.b64decode(html.split(",")[1].split('"')[0])))
    assert picture.size == found.draw().size
    draw_explanation(pairs[0][0].with_name("drawn.png"), *pairs[0], found)
    on_disk = np.asarray(Image.open(pairs[0][0].with_name("drawn.png")))
    assert np.array_equal(on_disk, np.asarray(found.draw()))


@pytest.mark.parametrize(
    "arguments",
    [("a.png", "b.png"), (("a.png", "b.png"),), ([("a.png", "b.png", "c.png")],), ("ab",), (5,)],
)
def test_a_pair_in_place_of_a_list_of_pairs_is_told(demo, arguments):
    for method in (demo.captions, demo.explanations):
        with pytest.raises(ValueError, match=r"captions\(\[\(before, after\)\]\)"):
            method(*arguments)

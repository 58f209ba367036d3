"""Sizes that configs and weights ask for: absurd ones are refused before memory is taken."""

import json

import pytest
import torch

from modules.clip4idc import CLIP4IDC, load_model
from modules.model.clip import CLIP, PAIR_PREFIXES
from modules.model.clip_sizes import ClipSizes
from modules.model.limits import MAX_PARAMETERS
from modules.predictor import Predictor
from modules.weights.model_info import ModelSettings
from modules.weights.sources import LoadedWeights, read_sizes
from tests.conftest import ROOT, TINY, tiny_weights
from tests.hostile import MAX_EXTRA_BYTES, peak_memory
from tests.hostile_json import CONFIG, READERS


def sizes_read_from(config: str) -> list[str]:
    """The sizes in CONFIG that a reader of `config` uses."""
    other = "num_hidden_layers" if config == "decoder config" else "num_decoder_layers"
    return [key for key, value in CONFIG.items() if type(value) is int and key != other]


CONFIG_SIZES = [
    (name, {key: value})
    for name in ("decoder config", "cross config")
    for key in sizes_read_from(name)
    for value in (10**12, 2**20 + 1)
]
CLIP_SIZES = [("CLIP's sizes", {key: value}) for key in TINY for value in (10**12, 2**21)]


@pytest.mark.parametrize(
    ("name", "absurd"),
    [
        *CONFIG_SIZES,
        *CLIP_SIZES,
        ("CLIP's sizes", {"vision_layers": 2**11}),
        ("CLIP's sizes", {"vision_width": 2**20, "transformer_width": 2**20}),
        ("CLIP's sizes", {"image_resolution": 2**20, "vision_patch_size": 1}),
        ("CLIP's sizes", {"vocab_size": 2**20, "transformer_width": 2**13}),
        ("decoder config", {"hidden_size": 2**20}),
        ("cross config", {"num_hidden_layers": 2**10, "hidden_size": 2**12}),
        ("model.json", {"decoder_config": {**CONFIG, "hidden_size": 2**20}}),
        ("model.json", {"intra_num_hidden_layers": -1}),
        ("model.json", {"linear_patch": "5d"}),
    ],
)
def test_absurd_sizes_are_refused(name, absurd, tmp_path):
    valid, file, read = READERS[name]
    (tmp_path / file).write_text(json.dumps({**valid, **absurd}))
    with pytest.raises(ValueError, match=file):
        read(tmp_path / file)


@pytest.mark.parametrize(
    "sizes", [read_sizes(ROOT / "modules" / "clip-mini.json"), ClipSizes(**TINY)]
)
def test_the_count_of_parameters_is_about_right(sizes):
    with torch.device("meta"):
        counted = sum(value.numel() for value in CLIP(sizes, 0, "2d").parameters())
    assert sizes.approximate_num_parameters == pytest.approx(counted, rel=0.02)
    assert sizes.approximate_num_parameters < MAX_PARAMETERS


def test_model_json_asks_for_no_more_words_than_the_model_has(tiny_captioner, tmp_path):
    torch.save(tiny_captioner.state_dict(), tmp_path / "weights.bin")
    for words in (10**12, 0, 78):
        info = {"intra_num_hidden_layers": 1, "max_words": words}
        (tmp_path / "model.json").write_text(json.dumps(info))
        expected = rf"weights\.bin: max_words is {words}, expected 1 to 77"
        with pytest.raises(ValueError, match=expected):
            Predictor.load(tmp_path / "weights.bin", "cpu", "fp32")


def test_model_json_opens_no_file_of_its_authors_choice(tiny_captioner):
    weights = {key: value for key, value in tiny_captioner.state_dict().items() if "clip." in key}
    info = {
        "intra_num_hidden_layers": 1,
        "sim_header": "tight",
        "cross_config": "/dev/null",
        "decoder_config": CONFIG,
    }
    loaded = LoadedWeights(weights, info, "model.json")
    model, settings = load_model(loaded, "retrieval", ModelSettings())
    assert not model.uses_cross_encoder
    assert settings == ModelSettings(intra_num_hidden_layers=1, decoder_config=CONFIG)


@pytest.mark.parametrize(
    "change",
    [
        {"clip.visual.conv1.weight": torch.zeros(2**13, 0, 32, 32)},
        {"clip.token_embedding.weight": torch.zeros(0, 2**16)},
        {"clip.text_projection": torch.zeros(0, 2**20)},
        {"clip.visual.positional_embedding": torch.zeros(0, 64)},
        {"clip.visual.transformer.resblocks.999999999.ln_1.weight": torch.zeros(64)},
        {f"clip.transformer.resblocks.{'9' * 5000}.ln_1.weight": torch.zeros(64)},
    ],
)
def test_weights_that_claim_sizes_they_do_not_have_take_no_memory(change):
    before = peak_memory()
    weights = {
        key: value
        for key, value in {**tiny_weights(), **change}.items()
        if not key.removeprefix("clip.").startswith(PAIR_PREFIXES)
    }
    with pytest.raises(ValueError, match="size|do not fit"):
        CLIP4IDC.from_weights(weights, "caption", intra_layers=1)
    assert peak_memory() - before < MAX_EXTRA_BYTES

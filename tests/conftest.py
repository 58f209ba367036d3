"""Shared fixtures: golden files, tiny models, tiny drawn datasets, and where the real data is."""

import json
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from dataloaders.coco_files import coco_ground_truth
from dataloaders.datasets import open_dataset
from modules.clip4idc import CLIP4IDC
from modules.model.bert import load_decoder_config
from modules.model.clip import CLIP
from modules.model.clip_sizes import ClipSizes
from modules.weights.model_info import MODEL_INFO_FILE, write_model_info
from system.json_files import write_json

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared" / "data"

TINY = {
    "embed_dim": 64,
    "image_resolution": 64,
    "vision_layers": 2,
    "vision_width": 64,
    "vision_patch_size": 32,
    "context_length": 77,
    "vocab_size": 49408,
    "transformer_width": 64,
    "transformer_layers": 2,
}
SIZES = {"train": 8, "val": 3, "test": 5}  # pairs of the drawn datasets
COLORS = {
    "red": (40, 40, 200),
    "green": (40, 160, 40),
    "blue": (200, 60, 40),
    "yellow": (40, 220, 230),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Tiny models gain nothing from more, and threads that wait for a busy core cost its time."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _leave_allocator_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run in the tests' own process leaves the memory allocator as it is.

    The setting would outlast the run, and the tests would grow by gigabytes.
    """
    monkeypatch.setattr("system.runtime.keep_freed_memory", lambda: None)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(
    tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> Iterator[None]:
    """Nothing that tests find out about images or download stays in the user's cache.

    Only METEOR's table, which takes ten seconds to prepare, is shared by sessions of pytest.
    """
    folder = tmp_path_factory.getbasetemp() / "cache"
    meteor = folder / "clip4idc" / "meteor"
    meteor.parent.mkdir(parents=True)
    meteor.symlink_to(pytestconfig.cache.mkdir("meteor"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield


@pytest.fixture
def real_data() -> Path:
    """The real annotations and scenes beside the project; the test skips where they are absent."""
    if not REAL.is_dir():
        pytest.skip(f"no real data at {REAL}")
    return REAL


@pytest.fixture(scope="session")
def tiny_sizes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSON of sizes for --pretrained_clip_name."""
    path = tmp_path_factory.mktemp("sizes") / "tiny.json"
    path.write_text(json.dumps(TINY))
    return path


def tiny_weights(seed: int = 0, **changes: int) -> dict[str, torch.Tensor]:
    """Random CLIP weights, with `clip.` before OpenAI's names and the layers that pairs need.

    The vocabulary has 50 words (SOT 48, EOT 49), unless `changes` has another vocab_size.
    """
    torch.manual_seed(seed)
    sizes = ClipSizes(**{**TINY, "vocab_size": 50, **changes})
    return {f"clip.{key}": value for key, value in CLIP(sizes, 1, "2d").state_dict().items()}


@pytest.fixture
def tiny_captioner() -> CLIP4IDC:
    """A two-layer captioner with a vocabulary of 50, in evaluation mode."""
    model = CLIP4IDC.from_weights(tiny_weights(), "caption", intra_layers=1)
    spread_weights(model)
    return model.eval()


@pytest.fixture(scope="session")
def captioner_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny captioner with CLIP's vocabulary, saved as a folder: captions of 8 random words."""
    config = load_decoder_config("decoder-base").with_layers(1)
    weights = tiny_weights(vocab_size=49408)
    model = CLIP4IDC.from_weights(weights, "caption", 1, decoder_config=config)
    spread_weights(model)
    folder = tmp_path_factory.mktemp("captioner")
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    write_model_info(folder / MODEL_INFO_FILE, model.info(max_words=8))
    return folder


def lower_case(texts, context):
    return {key: [text.lower() for text in sentences] for key, sentences in texts.items()}


@torch.no_grad()
def spread_weights(model: CLIP4IDC) -> None:
    """Make a random captioner's logits differ by image and by word, so that decoding has choices.

    As they are drawn, its weights are so small that the logits are flat.
    """
    model.clip.token_embedding.weight.mul_(10)
    for layer in (*model.decoder.encoder.layer, *model.decoder.decoder.layer):
        for parameter in layer.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)


def draw_pair(folder: Path, names: list[str], color: str | None, seed: int) -> None:
    """Gray pictures of 80×60. All but the first show a colored square; none does for `None`."""
    noise = np.random.default_rng(seed).integers(100, 130, (60, 80, 3), dtype=np.uint8)
    for number, name in enumerate(names):
        image = noise.copy()
        if number and color:
            image[15:45, 20:60] = COLORS[color]
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), image)


def color_of(number: int) -> str:
    """The color of a drawn pair's square."""
    return list(COLORS)[number % len(COLORS)]


def make_spot(root: Path, sizes: dict[str, int]) -> Path:
    """Spot-the-Diff's layout, reformatted, with colored squares; ground truth in root/gt."""
    references = {}
    number = 0
    for split, size in sizes.items():
        entries = []
        for _ in range(size):
            color = color_of(number)
            draw_pair(root / "images_test", [f"{number}.png", f"{number}_2.png"], color, number)
            sentences = [f"a {color} square has appeared", f"there is a {color} box now"]
            entries.append({"img_id": str(number), "sentences": sentences})
            if split == "test":
                references[f"{number}.png"] = sentences
            number += 1
        write_json(root / f"{split}.json", entries)
        write_json(root / f"reformat_{split}.json", entries)
    truth = coco_ground_truth(references.items())
    write_json(root / "gt" / "spot_total_change_captions_reformat.json", truth)
    return root


def make_clevr(root: Path, sizes: dict[str, int]) -> Path:
    """CLEVR-Change's layout with colored squares; ground truth in root/gt. Returns root."""
    change = {}
    no_change = {}
    splits = {}
    names = []
    for split, size in sizes.items():
        splits[split] = list(range(len(names), len(names) + size))
        for number in splits[split]:
            name = f"{number:06d}.png"
            names.append(name)
            color = color_of(number)
            before = f"CLEVR_default_{name}"
            pair = [f"images/{before}", f"sc_images/CLEVR_semantic_{name}"]
            draw_pair(root, pair, color, number)
            draw_pair(root, [f"nsc_images/CLEVR_nonsemantic_{name}"], None, number)
            change[before] = [f"a {color} square has appeared", f"someone added a {color} square"]
            no_change[before] = ["no change was made", "nothing has changed"]
    write_json(root / "change_captions.json", change)
    write_json(root / "no_change_captions.json", no_change)
    write_json(root / "splits.json", splits)
    write_json(root / "type_mapping.json", {"add": names, "drop": []})
    truth = coco_ground_truth(open_dataset("clevr", root).ground_truth("test"))
    write_json(root / "gt" / "clevr_total_change_captions_reformat.json", truth)
    return root


@pytest.fixture(scope="module")
def clevr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`make_clevr` in SIZES; tests that change something copy it."""
    return make_clevr(tmp_path_factory.mktemp("clevr"), SIZES)


@pytest.fixture(scope="module")
def spot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`make_spot` in SIZES; tests that change something copy it."""
    return make_spot(tmp_path_factory.mktemp("spot"), SIZES)

"""Weights that a model starts from: what a name means, which file gives which tensor, sizes."""

import json
from pathlib import Path

import pytest
import torch

from modules.clip4idc import CLIP4IDC
from modules.model.clip import CLIP
from modules.model.clip_sizes import ClipSizes
from modules.weights.fitting import resize_to_resolution
from modules.weights.remote import WEIGHT_FILES
from modules.weights.sources import find_weights, load_weights, random_clip, read_sizes
from tests.conftest import ROOT, TINY, tiny_weights


def test_random_weights_are_initialized_as_openais():
    width, layers, text_width = 256, 4, 128
    changes = {"vision_width": width, "vision_layers": layers, "transformer_width": text_width}
    torch.manual_seed(0)
    weights = random_clip(ClipSizes(**{**TINY, **changes}))
    expected = {
        "visual.transformer.resblocks.0.attn.in_proj_weight": width**-0.5,
        "visual.transformer.resblocks.3.mlp.c_proj.weight": width**-0.5 * (2 * layers) ** -0.5,
        "visual.transformer.resblocks.1.mlp.c_fc.weight": (2 * width) ** -0.5,
        "visual.proj": width**-0.5,
        "token_embedding.weight": 0.02,
        "positional_embedding": 0.01,
        "text_projection": text_width**-0.5,
    }
    for name, std in expected.items():
        assert weights[name].std().item() == pytest.approx(std, rel=0.05), name
    assert "visual.bef_embedding" not in weights
    assert weights["logit_scale"].item() == pytest.approx(2.6593, abs=1e-3)


def test_sizes_come_from_shapes():
    sizes = ClipSizes(**TINY)
    assert ClipSizes.from_weights(CLIP(sizes, 0, "2d").state_dict()) == sizes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"embed_dim": 64}', "missing"),
        ("[1]", "expected an object"),
        ("{", "not JSON"),
        (json.dumps({**TINY, "vision_width": 65}), "multiple of 64"),
        (json.dumps({**TINY, "vision_layers": 0}), "at least 1"),
        (json.dumps({**TINY, "extra": 1}), "extra"),
    ],
)
def test_wrong_sizes_are_refused(content, message, tmp_path):
    (tmp_path / "sizes.json").write_text(content)
    with pytest.raises(ValueError, match=rf"sizes\.json.*{message}"):
        read_sizes(tmp_path / "sizes.json")


def test_the_clip_file_is_not_read_where_init_model_has_all(tmp_path):
    torch.save(tiny_weights(), tmp_path / "adapted.bin")
    loaded = load_weights(str(tmp_path / "adapted.bin"), str(tmp_path / "does-not-exist.pt"))
    assert "clip.logit_scale" in loaded.tensors


def test_tensors_that_init_model_lacks_come_from_clip(tmp_path):
    ours = tiny_weights(0)
    theirs = tiny_weights(1)
    part = {key: value for key, value in ours.items() if key.startswith("clip.visual.")}
    torch.save(part, tmp_path / "part.bin")
    openai_names = {key.removeprefix("clip."): value for key, value in theirs.items()}
    torch.save(openai_names, tmp_path / "clip.pt")
    init_model, clip = str(tmp_path / "part.bin"), str(tmp_path / "clip.pt")
    tensors = load_weights(init_model, clip, quick_gelu=True).tensors
    assert torch.equal(tensors["clip.visual.proj"], ours["clip.visual.proj"])
    assert torch.equal(tensors["clip.text_projection"], theirs["clip.text_projection"])


@pytest.mark.parametrize(
    "name", ["ViT-Z-99", "nowhere.bin", "pretrained/pytorch_model.bin.30", "a/b/c"]
)
def test_unknown_names_say_what_was_tried(name):
    expected = rf"no weights {name}: tried .*ckpts.*ViT-B/32, ViT-B/16"
    with pytest.raises(FileNotFoundError, match=expected):
        find_weights(name)


def test_a_folder_stands_for_the_weights_in_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="is a folder without model.safetensors or"):
        find_weights(str(tmp_path))
    for name in reversed(WEIGHT_FILES):
        (tmp_path / name).write_bytes(b"x")
        assert find_weights(str(tmp_path)).name == name
    assert find_weights("demo") == ROOT / "ckpts" / "demo" / "model.safetensors"


def test_a_folder_without_weights_hides_none_in_ckpts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert find_weights("demo") == ROOT / "ckpts" / "demo" / "model.safetensors"
    (tmp_path / "demo" / "model.safetensors").write_bytes(b"x")
    assert find_weights("demo") == Path("demo/model.safetensors")


@pytest.mark.parametrize("resolution", [32, 96, 128])
def test_positions_are_resized_over_the_grid_of_each_image(resolution):
    weights = tiny_weights(image_resolution=64)
    row = torch.linspace(0, 1, 2)[:, None].expand(2, 64)
    rising = torch.stack([row, row + 2]).flatten(0, 1)  # along both axes; its mean is 1.5
    weights["clip.visual.positional_embedding"][1:] = rising
    resized = resize_to_resolution(weights, resolution)
    side = resolution // 32
    single = resized["clip.visual.positional_embedding"]
    assert single.shape == (1 + side**2, 64)
    assert torch.equal(single[0], weights["clip.visual.positional_embedding"][0])
    grid = single[1:].unflatten(0, (side, side))
    assert (grid[1:] > grid[:-1]).all()
    assert (grid[:, 1:] > grid[:, :-1]).all()
    torch.testing.assert_close(grid.mean(), torch.tensor(1.5), atol=0.05, rtol=0)


@pytest.mark.parametrize("resolution", [32, 96])
def test_both_halves_of_a_pairs_positions_are_resized(resolution):
    weights = tiny_weights(image_resolution=64)
    resized = resize_to_resolution(weights, resolution)
    num_tokens = 1 + (resolution // 32) ** 2
    name = "clip.visual.joint_positional_embedding"
    assert resized[name].shape == (2 * num_tokens, 64)
    for half, old in zip(resized[name].chunk(2), weights[name].chunk(2), strict=True):
        assert torch.equal(half[0], old[0])
    model = CLIP4IDC.from_weights(resized, "retrieval", 1)
    pairs = torch.randn(2, 2, 3, resolution, resolution)
    assert model.encode_pairs(pairs).tokens.shape == (2, 2 * num_tokens, 64)


def test_their_own_resolution_leaves_weights_as_they_are():
    weights = tiny_weights(image_resolution=64)
    resized = resize_to_resolution(weights, 64)
    assert all(torch.equal(resized[key], value) for key, value in weights.items())


def test_a_resolution_that_patches_do_not_fill_is_refused():
    expected = "image_resolution 80 is not a multiple of vision_patch_size 32"
    with pytest.raises(ValueError, match=expected):
        resize_to_resolution(tiny_weights(), 80)


def test_a_published_checkpoint_loads(tmp_path, tiny_captioner):
    """Released names, CLIP's matrices in float16, a plain pickle."""
    state = tiny_captioner.state_dict()
    for key, value in state.items():
        if key.startswith("clip.") and value.ndim >= 2 and "embedding" not in key:
            state[key] = value.half()
    path = tmp_path / "pytorch_model.bin.spot"
    torch.save(state, path)
    tensors = load_weights(str(path), "ViT-B/32").tensors
    model = CLIP4IDC.from_weights(tensors, "caption", 1).eval()
    images = torch.randn(2, 2, 3, 64, 64)
    ours = model.encode_pairs(images).tokens
    expected = tiny_captioner.encode_pairs(images).tokens
    torch.testing.assert_close(ours, expected, atol=0.03, rtol=0.03)

"""CLIPs of other programs: their files give the features that their code gives, or are refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from modules.clip4idc import CLIP4IDC
from modules.model.backbone import strip_prefix
from modules.model.clip_sizes import ClipSizes
from modules.weights.configs import huggingface_config, huggingface_problems, open_clip_problems
from modules.weights.huggingface_names import from_huggingface, to_huggingface
from modules.weights.key_names import layout_of, to_released, to_released_float32
from modules.weights.sources import load_weights, read_released
from tests.conftest import TINY, tiny_weights

VOCABULARY = 50
CHANGES = {"vision_width": 128, "vision_layers": 3, "image_resolution": 96}
SIZES = ClipSizes(**{**TINY, **CHANGES, "vocab_size": VOCABULARY})
VIT_B_32 = ClipSizes(512, 224, 12, 768, 32, 77, 49408, 512, 12)
OPEN_CLIP_CONFIG = {
    "model_cfg": {
        "embed_dim": 64,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 96, "layers": 3, "width": 128, "patch_size": 32},
        "text_cfg": {
            "context_length": 77,
            "vocab_size": VOCABULARY,
            "width": 64,
            "heads": 1,
            "layers": 2,
        },
    }
}


def openai_weights() -> dict[str, Tensor]:
    """OpenAI's names, sizes as in SIZES, biases that are not 0."""
    weights = strip_prefix(tiny_weights(**CHANGES), "clip")
    for_pairs = ("bef_", "aft_", "joint_", "ln_mid")
    return {
        key: torch.randn_like(value) * 0.1 if key.endswith("bias") else value
        for key, value in weights.items()
        if not any(name in key for name in for_pairs)
    }


def huggingface_weights() -> dict[str, Tensor]:
    return to_huggingface({f"clip.{key}": value for key, value in openai_weights().items()})


def save_safetensors(weights: dict[str, Tensor], path: Path) -> None:
    save_file({key: value.contiguous() for key, value in weights.items()}, path)


def text_features(weights, ids):
    return CLIP4IDC.from_weights(weights, "retrieval", intra_layers=0).encode_text(ids).pooled


def image_features(weights, images):
    """CLIP's features of single images: no block sees a pair."""
    visual = CLIP4IDC.from_weights(weights, "retrieval", intra_layers=3).clip.visual
    class_token = visual.encode_images(images[:, None])[:, 0, 0]
    return (visual.ln_post(class_token) @ visual.proj).detach()


def text_ids() -> Tensor:
    """Four sentences (4, 9) that end at different places."""
    words = torch.randint(1, VOCABULARY - 2, (4, 9), generator=torch.Generator().manual_seed(1))
    words[:, 0] = VOCABULARY - 2
    words[torch.arange(4), torch.tensor([3, 8, 5, 7])] = VOCABULARY - 1
    return words


def noise_images() -> Tensor:
    """(3, 3, 96, 96)."""
    return torch.randn(3, 3, 96, 96, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("ending", ["model.safetensors", "pytorch_model.bin"])
def test_hugging_face_folders_give_what_transformers_gives(tmp_path, ending):
    transformers = pytest.importorskip("transformers")
    ids = text_ids()
    images = noise_images()
    torch.manual_seed(3)
    config = transformers.CLIPConfig.from_dict(huggingface_config(SIZES))
    theirs = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))  # so that no bias is 0 and no norm 1
    theirs.save_pretrained(tmp_path)
    if ending == "pytorch_model.bin":
        torch.save(theirs.state_dict(), tmp_path / ending)
        (tmp_path / "model.safetensors").unlink()
    weights = load_weights(None, str(tmp_path)).tensors
    with torch.no_grad():
        text = theirs.text_model(ids, attention_mask=torch.ones_like(ids)).pooler_output
        expected_text = theirs.text_projection(text)
        expected_image = theirs.visual_projection(theirs.vision_model(images).pooler_output)
    close(text_features(weights, ids), expected_text)
    close(image_features(weights, images), expected_image)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours.detach(), theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("linear_patch", ["2d", "3d"])
def test_every_tensor_of_a_captioner_survives_hugging_faces_names(linear_patch):
    expected = CLIP4IDC.from_weights(tiny_weights(), "caption", 1, linear_patch).state_dict()
    there = to_huggingface(expected)
    assert layout_of(there) == "huggingface"
    assert not any(key.startswith("clip.") for key in there)
    back = from_huggingface(there)
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[key], expected[key]) for key in expected)


def test_hugging_face_files_need_a_config_or_quick_gelu(tmp_path):
    path = tmp_path / "model.safetensors"
    save_safetensors(huggingface_weights(), path)
    expected = "does not say which activation .* config.json .*--quick_gelu"
    with pytest.raises(ValueError, match=expected):
        read_released(path)
    names = {f"clip.{key}" for key in openai_weights()}
    assert read_released(path, quick_gelu=True).keys() == names
    (tmp_path / "config.json").write_text(json.dumps(huggingface_config(SIZES)))
    assert read_released(path).keys() == names


@pytest.mark.parametrize(
    ("part", "value", "problem"),
    [
        ("text_config", {"hidden_act": "gelu"}, "text_config.hidden_act is 'gelu'"),
        (
            "vision_config",
            {"num_attention_heads": 16},
            "vision_config.num_attention_heads is 16, expected 2",
        ),
        ("model_type", "siglip", "model_type is 'siglip'"),
        ("vision_config", 3, "vision_config is not an object"),
    ],
)
def test_hugging_face_configs_of_other_models_are_refused(part, value, problem, tmp_path):
    path = tmp_path / "model.safetensors"
    save_safetensors(huggingface_weights(), path)
    config = huggingface_config(SIZES)
    config[part] = {**config[part], **value} if isinstance(value, dict) else value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=problem):
        read_released(path)


def test_what_a_hugging_face_config_leaves_out_has_its_default():
    base = ClipSizes(**{**TINY, "transformer_width": 512, "vision_width": 768})
    assert huggingface_problems({}, base) == []
    assert huggingface_problems({}, SIZES) == [
        "text_config.num_attention_heads is 8, expected 1",
        "vision_config.num_attention_heads is 12, expected 2",
    ]


def test_hugging_face_names_that_are_missing_or_unknown_are_refused():
    weights = huggingface_weights()
    key = "vision_model.encoder.layers.1.self_attn.k_proj.weight"
    with pytest.raises(ValueError, match="vision_model.head.probe is unexpected"):
        from_huggingface(weights | {"vision_model.head.probe": torch.zeros(1)})
    for value in (torch.zeros(3, 3), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="differ in shape"):
            from_huggingface(weights | {key: value})
    del weights[key]
    with pytest.raises(ValueError, match=f"{key} is missing"):
        from_huggingface(weights)


def test_position_numbers_of_older_hugging_face_files_are_ignored():
    weights = huggingface_weights()
    weights["text_model.embeddings.position_ids"] = torch.arange(77)
    assert from_huggingface(weights).keys() == {f"clip.{name}" for name in openai_weights()}


@pytest.mark.parametrize("custom_text", [False, True])
def test_open_clips_state_dicts_give_what_open_clip_gives(tmp_path, custom_text):
    from open_clip.model import CLIP, CustomTextCLIP

    ids = text_ids()
    images = noise_images()
    torch.manual_seed(4)
    kind = CustomTextCLIP if custom_text else CLIP
    theirs = kind(**OPEN_CLIP_CONFIG["model_cfg"]).eval()
    state = {f"module.{key}": value for key, value in theirs.state_dict().items()}
    path = tmp_path / "model.pt"
    torch.save({"epoch": 3, "state_dict": state}, path)
    expected = "does not say which activation .* open_clip_config.json .*--quick_gelu"
    with pytest.raises(ValueError, match=expected):
        load_weights(None, str(path))
    (tmp_path / "open_clip_config.json").write_text(json.dumps(OPEN_CLIP_CONFIG))
    weights = load_weights(None, str(path)).tensors
    padded = torch.nn.functional.pad(ids, (0, 77 - ids.shape[1]))
    with torch.no_grad():
        close(text_features(weights, ids), theirs.encode_text(padded))
        close(image_features(weights, images), theirs.encode_image(images))


@pytest.mark.parametrize(
    ("part", "change", "problem"),
    [
        ("", {"quick_gelu": False}, "quick_gelu is not true"),
        ("", {"vision_cfg": None}, "lacks vision_cfg"),
        ("vision_cfg", {"head_width": 80}, "vision_cfg.head_width is 80, expected 64"),
        (
            "vision_cfg",
            {"timm_model_name": "convnext"},
            "vision_cfg.timm_model_name is not known here",
        ),
        ("text_cfg", {"heads": 12}, "text_cfg.heads is 12, expected 1"),
        ("text_cfg", {"pool_type": "last"}, "text_cfg.pool_type is 'last'"),
    ],
)
def test_open_clips_other_models_are_refused(part, change, problem):
    model = json.loads(json.dumps(OPEN_CLIP_CONFIG["model_cfg"]))
    changed = model[part] if part else model
    changed.update(change)
    for config in (model, {"model_cfg": model}):
        assert any(problem in found for found in open_clip_problems(config, SIZES))


def test_open_clips_own_model_fits_with_the_usual_normalization_only():
    assert open_clip_problems(OPEN_CLIP_CONFIG, SIZES) == []
    preprocessing = {"mean": [0.5] * 3, "std": [0.26862954, 0.26130258, 0.27577711]}
    config = OPEN_CLIP_CONFIG | {"preprocess_cfg": preprocessing}
    assert open_clip_problems(config, SIZES) == [
        "preprocess_cfg.mean is [0.5, 0.5, 0.5], expected [0.48145466, 0.4578275, 0.40821073]"
    ]


def test_the_config_of_open_clips_quick_models_is_known():
    import open_clip

    quick = open_clip.get_model_config("ViT-B-32-quickgelu")
    assert open_clip_problems(quick, VIT_B_32) == []
    exact = open_clip.get_model_config("ViT-B-32")
    problem = "quick_gelu is not true: the exact GELU cannot be built here"
    assert open_clip_problems(exact, VIT_B_32) == [problem]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "RN50.pt",
            {"visual.layer1.0.conv1.weight": torch.zeros(3), "visual.conv1.weight": torch.zeros(1)},
            "RN50.pt: .*ResNet",
        ),
        (
            "other.bin",
            {"encoder.weight": torch.zeros(3)},
            r"other.bin: no registered backbone \(clip\) takes .* called encoder.weight",
        ),
        (
            "training_state.bin.3",
            {"model": {"x": torch.zeros(1)}, "optimizer": {}, "scaler": {}},
            "is a training state, for --resume_model",
        ),
    ],
)
def test_resnets_and_strangers_are_refused_by_name(name, content, message, tmp_path):
    torch.save(content, tmp_path / name)
    with pytest.raises(ValueError, match=message):
        load_weights(None, str(tmp_path / name))


def test_layouts_are_recognized_by_names():
    released = tiny_weights()
    openai = strip_prefix(released, "clip")
    assert layout_of(released) == "released"
    assert layout_of(openai) == "openai"
    assert layout_of({"decoder.x": 0}) == "released"
    assert layout_of({"x": 0}) == "other"
    assert to_released(openai, "openai").keys() == to_released_float32(released).keys()

"""Other programs' CLIPs: the same features from their files as from their own code, and refusals of what would not be the same."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from modules.clip4idc import CLIP4IDC
from modules.model.backbone import tensors_below
from modules.model.clip_sizes import ClipSizes
from modules.weights.configs import huggingface_config, huggingface_problems, open_clip_problems
from modules.weights.huggingface_names import from_huggingface, to_huggingface
from modules.weights.key_names import (
    layout_of,
    released_names,
    to_released,
)
from modules.weights.sources import load_weights, read_released
from preprocess import convert_weights
from tests.conftest import TINY, tiny_weights

VOCABULARY = 50
SIZES = ClipSizes(
    **{
        **TINY,
        "vocab_size": VOCABULARY,
        "vision_width": 128,
        "vision_layers": 3,
        "image_resolution": 96,
    }
)


def plain_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """OpenAI's names, in SIZES, widths that differ; biases that are not 0."""
    torch.manual_seed(seed)
    weights = tensors_below(
        tiny_weights(seed, vision_width=128, vision_layers=3, image_resolution=96), "clip"
    )
    return {
        key: torch.randn_like(value) * 0.1 if key.endswith("bias") else value
        for key, value in weights.items()
        if not any(name in key for name in ("bef_", "aft_", "joint_", "ln_mid"))
    }


def text_features(weights, ids):
    return CLIP4IDC.from_weights(weights, "retrieval", intra_layers=0).encode_text(ids).pooled


def image_features(weights, images):
    """CLIP's own of single images: the tower with all blocks alone, its join undone."""
    model = CLIP4IDC.from_weights(weights, "retrieval", intra_layers=3)
    tower = model.clip.visual
    return (tower.ln_post(tower.encode_images(images[:, None])[:, 0, 0]) @ tower.proj).detach()


@pytest.fixture
def ids():
    words = torch.randint(1, VOCABULARY - 2, (4, 9), generator=torch.Generator().manual_seed(1))
    words[:, 0] = VOCABULARY - 2
    words[torch.arange(4), torch.tensor([3, 8, 5, 7])] = VOCABULARY - 1
    return words


@pytest.fixture
def images():
    return torch.randn(3, 3, 96, 96, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("ending", ["model.safetensors", "pytorch_model.bin"])
def test_hugging_face_folders_give_what_transformers_gives(tmp_path, ids, images, ending):
    transformers = pytest.importorskip("transformers")
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
        text = theirs.text_projection(
            theirs.text_model(ids, attention_mask=torch.ones_like(ids)).pooler_output
        )
        image = theirs.visual_projection(theirs.vision_model(images).pooler_output)
    torch.testing.assert_close(text_features(weights, ids).detach(), text, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(image_features(weights, images), image, atol=1e-5, rtol=1e-4)


def test_transformers_reads_what_is_converted_to_its_layout(tmp_path, ids):
    transformers = pytest.importorskip("transformers")
    torch.save(
        plain_weights()
        | {
            "input_resolution": torch.tensor(96),
            "context_length": torch.tensor(77),
            "vocab_size": torch.tensor(VOCABULARY),
        },
        tmp_path / "clip.pt",
    )
    assert convert_weights.main([str(tmp_path / "clip.pt"), str(tmp_path / "hf")]) == 0
    theirs = transformers.CLIPModel.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        text = theirs.text_projection(
            theirs.text_model(ids, attention_mask=torch.ones_like(ids)).pooler_output
        )
    torch.testing.assert_close(
        text_features(plain_weights(), ids).detach(), text, atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("linear_patch", ["2d", "3d"])
def test_every_tensor_of_a_captioner_survives_hugging_faces_names(linear_patch):
    expected = CLIP4IDC.from_weights(tiny_weights(), "caption", 1, linear_patch).state_dict()
    there = to_huggingface(expected)
    assert layout_of(there) == "huggingface"
    assert not any(key.startswith("clip.") for key in there)
    back = from_huggingface(there)
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[key], expected[key]) for key in expected)


def test_hugging_face_files_without_a_config_or_with_another_activation_are_refused(tmp_path):
    save_file(
        {
            key: value.contiguous()
            for key, value in to_huggingface(
                {f"clip.{k}": v for k, v in plain_weights().items()}
            ).items()
        },
        tmp_path / "model.safetensors",
    )
    with pytest.raises(
        ValueError, match="does not say which activation .* config.json .*--quick_gelu"
    ):
        read_released(tmp_path / "model.safetensors")
    assert read_released(tmp_path / "model.safetensors", quick_gelu=True).keys() == {
        f"clip.{key}" for key in plain_weights()
    }
    for change, words in (
        ({"text_config": {"hidden_act": "gelu"}}, "text_config.hidden_act is 'gelu'"),
        (
            {"vision_config": {"num_attention_heads": 16}},
            "vision_config.num_attention_heads is 16, expected 2",
        ),
        ({"model_type": "siglip"}, "model_type is 'siglip'"),
        ({"vision_config": 3}, "vision_config is no object"),
    ):
        config = huggingface_config(SIZES)
        for name, value in change.items():
            config[name] = {**config[name], **value} if isinstance(value, dict) else value
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=words):
            read_released(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(huggingface_config(SIZES)))
    assert read_released(tmp_path / "model.safetensors")


def test_what_a_hugging_face_config_leaves_out_has_its_default():
    base = ClipSizes(**{**TINY, "transformer_width": 512, "vision_width": 768})
    assert huggingface_problems({}, base) == []
    assert huggingface_problems({}, SIZES) == [
        "text_config.num_attention_heads is 8, expected 1",
        "vision_config.num_attention_heads is 12, expected 2",
    ]


def test_hugging_face_names_that_are_missing_or_unknown_are_told():
    there = to_huggingface({f"clip.{k}": v for k, v in plain_weights().items()})
    key = "vision_model.encoder.layers.1.self_attn.k_proj.weight"
    with pytest.raises(ValueError, match=f"{key} is missing"):
        from_huggingface({name: value for name, value in there.items() if name != key})
    with pytest.raises(ValueError, match="vision_model.head.probe is unexpected"):
        from_huggingface(there | {"vision_model.head.probe": torch.zeros(1)})
    assert from_huggingface(
        there | {"text_model.embeddings.position_ids": torch.arange(77)}
    ).keys() == {f"clip.{name}" for name in plain_weights()}


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


@pytest.mark.parametrize("custom_text", [False, True])
def test_open_clips_state_dicts_give_what_open_clip_gives(tmp_path, ids, images, custom_text):
    from open_clip.model import CLIP, CustomTextCLIP

    torch.manual_seed(4)
    theirs = (CustomTextCLIP if custom_text else CLIP)(**OPEN_CLIP_CONFIG["model_cfg"]).eval()
    torch.save(
        {
            "epoch": 3,
            "state_dict": {f"module.{key}": value for key, value in theirs.state_dict().items()},
        },
        tmp_path / "model.pt",
    )
    with pytest.raises(
        ValueError, match=r"does not say which activation .* open_clip_config.json .*--quick_gelu"
    ):
        load_weights(None, str(tmp_path / "model.pt"))
    (tmp_path / "open_clip_config.json").write_text(json.dumps(OPEN_CLIP_CONFIG))
    weights = load_weights(None, str(tmp_path / "model.pt")).tensors
    with torch.no_grad():
        padded = torch.nn.functional.pad(ids, (0, 77 - ids.shape[1]))
        torch.testing.assert_close(
            text_features(weights, ids), theirs.encode_text(padded), atol=1e-5, rtol=1e-4
        )
        torch.testing.assert_close(
            image_features(weights, images), theirs.encode_image(images), atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize(
    ("part", "change", "words"),
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
def test_open_clips_other_models_are_refused(part, change, words):
    model = json.loads(json.dumps(OPEN_CLIP_CONFIG["model_cfg"]))
    (model[part] if part else model).update(change)
    for config in (model, {"model_cfg": model}):
        assert any(words in problem for problem in open_clip_problems(config, SIZES)), words
    assert open_clip_problems(OPEN_CLIP_CONFIG, SIZES) == []
    pictures = {"mean": [0.5] * 3, "std": [0.26862954, 0.26130258, 0.27577711]}
    assert open_clip_problems(OPEN_CLIP_CONFIG | {"preprocess_cfg": pictures}, SIZES) == [
        "preprocess_cfg.mean is [0.5, 0.5, 0.5], expected [0.48145466, 0.4578275, 0.40821073]"
    ]


def test_the_config_of_open_clips_quick_models_is_known():
    import open_clip

    config = open_clip.get_model_config("ViT-B-32-quickgelu")
    assert open_clip_problems(config, ClipSizes(512, 224, 12, 768, 32, 77, 49408, 512, 12)) == []
    assert open_clip_problems(
        open_clip.get_model_config("ViT-B-32"), ClipSizes(512, 224, 12, 768, 32, 77, 49408, 512, 12)
    ) == ["quick_gelu is not true: the exact GELU is not built here"]


def test_resnets_and_strangers_are_refused_by_name(tmp_path):
    torch.save(
        {"visual.layer1.0.conv1.weight": torch.zeros(3), "visual.conv1.weight": torch.zeros(1)},
        tmp_path / "RN50.pt",
    )
    torch.save({"encoder.weight": torch.zeros(3)}, tmp_path / "other.bin")
    torch.save({"model": {"x": torch.zeros(1)}, "optimizer": {}}, tmp_path / "training_state.bin.3")
    for name, words in (
        ("RN50.pt", "RN50.pt: .*ResNet"),
        ("other.bin", "other.bin: no registered backbone \\(clip\\) takes"),
        ("training_state.bin.3", "is a training state, for --resume_model"),
    ):
        with pytest.raises(ValueError, match=words):
            load_weights(None, str(tmp_path / name))


def test_conversion_keeps_every_bit_and_the_card(tmp_path, capsys):
    state = {
        key: value.half()
        if key.startswith("clip.") and value.ndim >= 2 and "embedding" not in key
        else value
        for key, value in CLIP4IDC.from_weights(tiny_weights(), "caption", 1).state_dict().items()
    }
    torch.save(state, tmp_path / "pytorch_model.bin.spot")
    card = {"intra_num_hidden_layers": 1, "linear_patch": "2d", "head_width": 64, "max_words": 12}
    (tmp_path / "model.json").write_text(json.dumps(card))
    steps = [
        tmp_path / "pytorch_model.bin.spot",
        tmp_path / "a" / "spot.safetensors",
        tmp_path / "b",
        tmp_path / "c" / "spot.bin",
    ]
    for source, target in zip(steps, steps[1:], strict=False):
        assert convert_weights.main([str(source), str(target)]) == 0
    back = read_released(steps[-1])
    assert back.keys() == state.keys()
    assert all(
        torch.equal(back[key], state[key]) and back[key].dtype == state[key].dtype for key in state
    )
    assert load_file(steps[1])["clip.visual.proj"].dtype == torch.float16
    assert json.loads((tmp_path / "c" / "spot.bin.json").read_text()) == card
    capsys.readouterr()
    assert convert_weights.main(["--inspect", str(steps[-1])]) == 0
    said = capsys.readouterr().out
    for words in (
        "saved by torch",
        "CLIP4IDC's",
        "captioner",
        "2d",
        "float16",
        "intra_num_hidden_layers 1",
        "vision_width 64",
        "fits       yes",
    ):
        assert words in said, words


def test_inspect_lists_what_is_missing_and_left_over(tmp_path, capsys):
    weights = tiny_weights()
    del weights["clip.visual.ln_post.bias"], weights["clip.ln_final.weight"]
    save_file(
        {key: value.contiguous() for key, value in weights.items()} | {"clip.more": torch.zeros(2)},
        tmp_path / "x.safetensors",
    )
    assert convert_weights.main(["--inspect", str(tmp_path / "x.safetensors")]) == 0
    said = capsys.readouterr().out
    for words in (
        "safetensors",
        "adapted backbone",
        "info       none",
        "clip.visual.ln_post.bias is missing",
        "clip.ln_final.weight is missing",
        "clip.more is unexpected",
    ):
        assert words in said, words


def test_conversions_that_cannot_be_are_one_line(tmp_path, capsys):
    save_file(
        {key: value.contiguous() for key, value in tiny_weights().items()},
        tmp_path / "x.safetensors",
    )
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "model.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes())
    (tmp_path / "carded.bin.json").write_text("{}")
    there = str(tmp_path / "x.safetensors")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for words in (
        [str(tmp_path / "none"), str(tmp_path / "out.bin")],
        [there, there],
        [there, str(tmp_path / "file")],
        [there],
        [],
        [there, ""],
        [there, "--inspect", "x"],
        [there, str(tmp_path / "full")],
        [str(tmp_path / "full"), str(tmp_path / "full")],
        [there, str(tmp_path / "carded.bin")],
        [there, str(tmp_path / "file" / "y.bin")],
    ):
        with pytest.raises(SystemExit) as caught:
            convert_weights.main(words)
        assert caught.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"clip.visual.transformer.resblocks.0.foo.weight": torch.zeros(2)},
            "resblocks.0.foo.weight has no name in Hugging Face's layout",
        ),
        (
            {"clip.visual.transformer.resblocks.0.attn.in_proj_bias": torch.tensor(1.0)},
            "is not q, k and v together",
        ),
    ],
)
def test_tensors_that_hugging_faces_layout_has_no_place_for_are_told(
    change, words, tmp_path, capsys
):
    save_file(
        {key: value.contiguous() for key, value in (tiny_weights() | change).items()},
        tmp_path / "x.safetensors",
    )
    with pytest.raises(SystemExit) as caught:
        convert_weights.main([str(tmp_path / "x.safetensors"), str(tmp_path / "hf")])
    assert caught.value.code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()
    key = "vision_model.encoder.layers.1.self_attn.k_proj.weight"
    there = to_huggingface(tiny_weights())
    for value in (torch.zeros(3, 3), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="differ in shape"):
            from_huggingface(there | {key: value})


def test_inspect_tells_of_an_activation_that_is_not_built(tmp_path, capsys):
    save_file(
        {key: value.contiguous() for key, value in to_huggingface(tiny_weights()).items()},
        tmp_path / "model.safetensors",
    )
    assert convert_weights.main(["--inspect", str(tmp_path)]) == 0
    assert "activation not the one built here, or unknown" in capsys.readouterr().out


def test_layouts_are_told_apart():
    ours = tiny_weights()
    assert layout_of(ours) == "released"
    assert layout_of(tensors_below(ours, "clip")) == "openai"
    assert layout_of({"decoder.x": 0}) == "released"
    assert layout_of({"x": 0}) == "other"
    assert to_released(tensors_below(ours, "clip"), "openai").keys() == released_names(ours).keys()

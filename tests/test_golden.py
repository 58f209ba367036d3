"""Numeric parity with the published code, whose results are in tests/golden."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks import golden
from benchmarks.golden import CASES, GOLDEN
from dataloaders.images import load_image, normalize
from modules.clip4idc import CLIP4IDC
from modules.cross import CrossEncoder
from modules.model.backbone import strip_prefix
from modules.model.clip_sizes import ClipSizes
from modules.retrieval import retrieval_metrics
from modules.tokenizer import tokenize_caption

CPU = torch.device("cpu")


@pytest.mark.parametrize(("patch", "task"), CASES)
def test_outputs(patch, task):
    model = golden.build_model(patch, task)
    expected = golden.load_golden(patch, CPU)
    assert torch.equal(model.encode_text(expected["in.text_ids"]).mask, expected["in.text_mask"])
    differences = golden.largest_differences(model, expected)
    assert len(differences) == (6 if task == "caption" else 5)
    for name, difference in differences.items():
        assert difference <= golden.TOLERANCES[name], name


@pytest.mark.parametrize("patch", ["2d", "3d"])
def test_greedy_captions(patch):
    model = golden.build_model(patch, "caption")
    expected = golden.load_golden(patch, CPU)
    captions = [golden.cut_at_end(row) for row in expected["caption.greedy_ids"].tolist()]
    lengths = [len(caption) for caption in captions]
    assert min(lengths) < max(lengths), "the golden rows should end at different places"
    assert golden.write_captions(model, expected) == captions


@pytest.mark.parametrize(("patch", "task"), CASES)
def test_training_trajectory(patch, task):
    model = golden.build_model(patch, task).train()
    tensors = golden.load_golden(patch, CPU)
    expected = golden.load_training(patch, task)
    optimizer = golden.build_optimizer(model, expected)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [sorted(names[p] for p in group["params"]) for group in optimizer.param_groups]
    assert sorted(groups) == sorted(expected["groups"])
    found = golden.train(model, tensors, optimizer)
    for name, norm in found.first_grad_norms.items():
        wanted = expected["first_step_grad_norm_by_param"].get(name, 0.0)
        assert norm == pytest.approx(wanted, rel=2e-3, abs=1e-4), name
    assert found.losses == pytest.approx(expected["losses"], rel=golden.TRAINING_TOLERANCE)
    assert found.grad_norms == pytest.approx(expected["grad_norms"], rel=golden.TRAINING_TOLERANCE)
    for parameter, name in names.items():
        wanted = expected["param_norm_after_4"][name]
        assert parameter.norm().item() == pytest.approx(wanted, rel=2e-3, abs=2e-5), name
    for key in (key for key in tensors if key.startswith(f"{task}.after4.")):
        parameter = model.get_parameter(key.removeprefix(f"{task}.after4.")).detach()
        torch.testing.assert_close(parameter, tensors[key], atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", ["retrieval_2d", "retrieval_3d", "caption_2d", "caption_3d"])
def test_every_key_of_vit_b_32(case):
    task, patch = case.split("_")
    expected = json.loads((GOLDEN / "state_dict_keys.json").read_text())[case]
    weights = {key: torch.zeros(shape) for key, shape in expected.items()}
    sizes = ClipSizes.from_weights(strip_prefix(weights, "clip"))
    assert sizes == ClipSizes(512, 224, 12, 768, 32, 77, 49408, 512, 12)
    model = CLIP4IDC.from_weights(weights, task, linear_patch=patch)
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == expected


@pytest.mark.parametrize("max_words", [20, 32])
def test_text_arrays(max_words):
    texts = json.loads((GOLDEN / "data" / "text.json").read_text())
    for caption, expected in zip(texts["captions"], texts[f"max_words_{max_words}"], strict=True):
        arrays = tokenize_caption(caption, max_words)
        assert {name: arrays[name].tolist() for name in expected} == expected, caption


@pytest.mark.parametrize("name", sorted(path.name for path in (GOLDEN / "data").glob("*.png")))
def test_images(name):
    expected = load_file(GOLDEN / "data" / "images_expected.safetensors")[name]
    image = load_image(GOLDEN / "data" / name)
    assert image.dtype == torch.uint8
    assert image.shape == (3, 224, 224)
    std = torch.tensor((0.26862954, 0.26130258, 0.27577711))[:, None, None]
    assert ((normalize(image) - expected) * std * 255).abs().max() <= 2 + 1e-3


@pytest.mark.parametrize(
    "case",
    json.loads((GOLDEN / "data" / "retrieval_metrics.json").read_text()).items(),
    ids=lambda c: c[0],
)
def test_retrieval_metrics(case):
    _, expected = case
    similarity = torch.tensor(expected["similarity"])
    ours = retrieval_metrics(similarity, expected["sentences_per_pair"])
    for way in ("text_to_pair", "pair_to_text"):
        assert ours[way] == pytest.approx(expected[way], rel=1e-5)


def test_cross_encoder():
    tensors = load_file(GOLDEN / "cross.safetensors")
    config = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "max_position_embeddings": 150,
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
    }
    weights = {
        k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")
    }
    encoder = CrossEncoder.from_weights(weights, config).eval()
    with torch.no_grad():
        out = encoder(tensors["in.text_tokens"], tensors["in.pair_tokens"], tensors["in.text_mask"])
    valid = torch.cat([tensors["in.text_mask"].bool(), torch.ones(3, 100, dtype=torch.bool)], dim=1)
    torch.testing.assert_close(out.tokens[valid], tensors["out.tokens"][valid], atol=1e-3, rtol=0)
    torch.testing.assert_close(out.pooled, tensors["out.pooled"], atol=1e-3, rtol=0)


def test_normalize_is_the_published_formula():
    image = torch.arange(3 * 4, dtype=torch.uint8).view(3, 2, 2)
    mean = np.reshape((0.48145466, 0.4578275, 0.40821073), (3, 1, 1))
    std = np.reshape((0.26862954, 0.26130258, 0.27577711), (3, 1, 1))
    expected = (image.numpy() / 255 - mean) / std
    np.testing.assert_allclose(normalize(image).numpy(), expected, atol=1e-6)

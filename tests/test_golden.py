"""Numeric parity with the published code, whose results are in tests/golden."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dataloaders.images import load_image, normalize
from modules.clip4idc import CLIP4IDC
from modules.cross import CrossEncoder
from modules.generation.greedy import greedy_search
from modules.losses import caption_loss, contrastive_loss
from modules.model.backbone import strip_prefix
from modules.model.clip_sizes import ClipSizes
from modules.optimization import BertAdam, parameter_groups
from modules.retrieval import retrieval_metrics
from modules.tokenizer import tokenize_caption
from tests.conftest import GOLDEN

CASES = [(patch, task) for patch in ("2d", "3d") for task in ("caption", "retrieval")]
EOT = 599


def build(patch: str, task: str) -> CLIP4IDC:
    weights = load_file(GOLDEN / f"weights_{patch}.safetensors")
    return CLIP4IDC.from_weights(
        weights,
        task,
        intra_layers=2,
        linear_patch=patch,
        decoder_config=GOLDEN / "decoder_config.json",
    ).eval()


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours, theirs.float(), atol=tolerance, rtol=0)


@pytest.mark.parametrize(("patch", "task"), CASES)
def test_features_and_similarity(patch, task):
    model = build(patch, task)
    golden = load_file(GOLDEN / f"expected_{patch}.safetensors")
    with torch.no_grad():
        pair = model.encode_pairs(normalize(golden["in.images_uint8"]))
        text = model.encode_text(golden["in.text_ids"])
        close(pair.tokens, golden[f"{task}.visual_hidden"], 1e-4)
        close(pair.pooled, golden[f"{task}.visual_pooled"], 1e-4)
        close(text.pooled, golden[f"{task}.text_pooled"], 1e-4)
        words = golden["in.text_mask"].bool()
        close(text.tokens[words], golden[f"{task}.text_hidden"][words], 1e-4)
        assert torch.equal(text.mask, golden["in.text_mask"])
        close(model.similarity(text.pooled, pair.pooled), golden[f"{task}.sim_text_by_pair"], 1e-3)


@pytest.mark.parametrize("patch", ["2d", "3d"])
def test_caption_logits_and_greedy_ids(patch):
    model = build(patch, "caption")
    golden = load_file(GOLDEN / f"expected_{patch}.safetensors")
    with torch.no_grad():
        tokens = model.encode_pairs(normalize(golden["in.images_uint8"])).tokens
        logits = model.caption_logits(
            tokens, golden["in.caption_input_ids"], golden["in.caption_mask"]
        )
    keep = golden["in.caption_mask"].bool()
    close(logits[keep], golden["caption.logits"][keep], 1e-3)
    reference = golden["caption.greedy_ids"].tolist()
    ends = [row.index(EOT) + 1 if EOT in row else len(row) for row in reference]
    assert min(ends) < max(ends), "the golden rows should end at different places"
    captions = greedy_search(model, tokens, max_words=32).tolist()
    for ours, theirs, end in zip(captions, reference, ends, strict=True):
        assert ours[:end] == theirs[:end]
        assert not any(ours[end:])


@pytest.mark.parametrize(("patch", "task"), CASES)
def test_training_trajectory(patch, task):
    model = build(patch, task).train()
    golden = load_file(GOLDEN / f"expected_{patch}.safetensors")
    expected = json.loads((GOLDEN / f"training_{patch}.json").read_text())[task]
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(
        model, lr=expected["lr"], coef_lr=expected["coef_lr"], weight_decay=expected["weight_decay"]
    )
    assert sorted(sorted(names[p] for p in g["params"]) for g in groups) == sorted(
        expected["groups"]
    )
    optimizer = BertAdam(
        groups,
        lr=expected["lr"],
        warmup=expected["warmup"],
        t_total=expected["t_total"],
        schedule=expected["schedule"].removeprefix("warmup_"),
        betas=(expected["b1"], expected["b2"]),
        eps=expected["eps"],
    )
    images = normalize(golden["in.images_uint8"])
    losses = []
    norms = []
    for step in range(4):
        pair = model.encode_pairs(images)
        if task == "caption":
            logits = model.caption_logits(
                pair.tokens, golden["in.caption_input_ids"], golden["in.caption_mask"]
            )
            loss = caption_loss(logits, golden["in.caption_target_ids"])
        else:
            loss = contrastive_loss(
                model.similarity(model.encode_text(golden["in.text_ids"]).pooled, pair.pooled)
            )
        loss.backward()
        if step == 0:
            for parameter, name in names.items():
                norm = 0.0 if parameter.grad is None else parameter.grad.norm().item()
                wanted = expected["first_step_grad_norm_by_param"].get(name, 0.0)
                assert norm == pytest.approx(wanted, rel=2e-3, abs=1e-4), name
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == pytest.approx(expected["losses"], rel=2e-3)
    assert norms == pytest.approx(expected["grad_norms"], rel=2e-3)
    for parameter, name in names.items():
        assert parameter.norm().item() == pytest.approx(
            expected["param_norm_after_4"][name], rel=2e-3, abs=2e-5
        ), name
    for key in (key for key in golden if key.startswith(f"{task}.after4.")):
        close(model.get_parameter(key.removeprefix(f"{task}.after4.")).detach(), golden[key], 1e-4)


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
    golden = json.loads((GOLDEN / "data" / "text.json").read_text())
    for caption, expected in zip(golden["captions"], golden[f"max_words_{max_words}"], strict=True):
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
    _, golden = case
    ours = retrieval_metrics(torch.tensor(golden["similarity"]), golden["sentences_per_pair"])
    for way in ("text_to_pair", "pair_to_text"):
        assert ours[way] == pytest.approx(golden[way], rel=1e-5)


def test_cross_encoder():
    golden = load_file(GOLDEN / "cross.safetensors")
    config = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "max_position_embeddings": 150,
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
    }
    weights = {k.removeprefix("weights."): v for k, v in golden.items() if k.startswith("weights.")}
    encoder = CrossEncoder.from_weights(weights, config).eval()
    with torch.no_grad():
        out = encoder(golden["in.text_tokens"], golden["in.pair_tokens"], golden["in.text_mask"])
    valid = torch.cat([golden["in.text_mask"].bool(), torch.ones(3, 100, dtype=torch.bool)], dim=1)
    close(out.tokens[valid], golden["out.tokens"][valid], 1e-3)
    close(out.pooled, golden["out.pooled"], 1e-3)


def test_normalize_is_the_published_formula():
    image = torch.arange(3 * 4, dtype=torch.uint8).view(3, 2, 2)
    mean = np.reshape((0.48145466, 0.4578275, 0.40821073), (3, 1, 1))
    std = np.reshape((0.26862954, 0.26130258, 0.27577711), (3, 1, 1))
    expected = (image.numpy() / 255 - mean) / std
    np.testing.assert_allclose(normalize(image).numpy(), expected, atol=1e-6)

"""The model: weights in and out, what is refused, and equivalences between its paths."""

import itertools
import weakref

import pytest
import torch

from dataloaders.pairs import ImagePair
from modules.clip4idc import CLIP4IDC
from modules.evaluation.retrieval import compute_similarity
from modules.losses import caption_loss
from modules.model.backbone import has_all_pretrained_tensors
from modules.model.bert import load_cross_config
from modules.model.clip_vision import embed_patches_3d
from modules.tokenizer import tokenize_caption
from system.runtime import Runtime
from tests.conftest import tiny_weights


def without_pair_tensors(weights: dict) -> dict:
    """The weights of a CLIP that has seen no pairs."""
    names = ("bef_embedding", "aft_embedding", "joint_positional_embedding", "ln_mid")
    return {key: value for key, value in weights.items() if not any(n in key for n in names)}


def test_openai_names_and_archive_extras_load_like_released_names():
    weights = tiny_weights()
    openai = {key.removeprefix("clip."): value for key, value in weights.items()}
    openai["input_resolution"] = torch.tensor(64)
    openai["context_length"] = torch.tensor(77)
    openai["vocab_size"] = torch.tensor(50)
    loaded = CLIP4IDC.from_weights(openai, "retrieval", intra_layers=1).state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[key], weights[key]) for key in weights)


def test_float16_is_widened_and_saved_as_float32():
    half = {key: value.half() for key, value in tiny_weights().items()}
    model = CLIP4IDC.from_weights(half, "retrieval", intra_layers=1)
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("patch", ["2d", "3d"])
def test_a_plain_clip_gets_what_pairs_need(patch):
    model = CLIP4IDC.from_weights(
        without_pair_tensors(tiny_weights()), "caption", intra_layers=1, linear_patch=patch
    )
    visual = model.clip.visual
    assert torch.equal(visual.ln_mid.weight, torch.ones(64))
    assert 0.5 < visual.bef_embedding.std() * 64**0.5 < 1.6
    if patch == "3d":
        assert torch.equal(visual.conv2.weight[:, :, 1], visual.conv1.weight)
        assert visual.conv2.weight[:, :, [0, 2]].abs().sum() == 0


def test_inflated_3d_patches_see_each_image_as_2d_ones_do():
    images = torch.randn(2, 2, 3, 64, 64)
    flat = CLIP4IDC.from_weights(tiny_weights(), "retrieval", 1, "2d").eval()
    deep = CLIP4IDC.from_weights(tiny_weights(), "retrieval", 1, "3d").eval()
    expected = flat.encode_pairs(images).tokens
    torch.testing.assert_close(deep.encode_pairs(images).tokens, expected, atol=1e-5, rtol=1e-5)


def test_3d_patches_are_the_convolution_over_frames_with_gradients_in_bf16():
    weights = {**tiny_weights(), "clip.visual.conv2.weight": torch.randn(64, 3, 3, 32, 32) / 50}
    visual = CLIP4IDC.from_weights(weights, "retrieval", 1, "3d").clip.visual
    pairs = torch.randn(32, 2, 3, 64, 64)
    convolved = visual.conv2(pairs.transpose(1, 2))  # (32, D, 2, grid, grid)
    expected = convolved.permute(0, 2, 3, 4, 1).flatten(2, 3).flatten(0, 1)
    gradients = {}
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            patches = embed_patches_3d(pairs, visual.conv2.weight)
        torch.testing.assert_close(patches.float(), expected, atol=tolerance, rtol=0.02)
        loss = patches.float().square().sum()
        (gradients[dtype],) = torch.autograd.grad(loss, visual.conv2.weight)
    exact = gradients[torch.float32]
    assert (gradients[torch.bfloat16] - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("clip.ln_final.weight"), "clip.ln_final.weight is missing"),
        (lambda w: w.pop("clip.visual.bef_embedding"), "clip.visual.bef_embedding is missing"),
        (lambda w: w.update({"clip.stray": torch.ones(1)}), "clip.stray is unexpected"),
        (
            lambda w: w.update({"clip.visual.proj": torch.ones(3, 3)}),
            "clip.visual.proj has shape|clip",
        ),
        (
            lambda w: w.update({"clip.visual.conv2.weight": torch.ones(64, 3, 3, 32, 32)}),
            "linear_patch 3d",
        ),
        (lambda w: w.update({"clip.visual.layer1.0.conv1.weight": torch.ones(1)}), "ResNet"),
        (lambda w: w.pop("clip.token_embedding.weight"), "token_embedding.weight is missing"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(change, message):
    weights = tiny_weights()
    change(weights)
    with pytest.raises(ValueError, match=message):
        CLIP4IDC.from_weights(weights, "retrieval", intra_layers=1)


def test_part_of_a_captioner_is_refused_but_tied_tensors_may_be_absent(tiny_captioner):
    weights = tiny_captioner.state_dict()
    tied = list(tiny_captioner.tied_keys)
    assert len(tied) == 3
    without = {key: value for key, value in weights.items() if key not in tied}
    again = CLIP4IDC.from_weights(without, "caption", intra_layers=1)
    assert all(torch.equal(value, weights[key]) for key, value in again.state_dict().items())
    with pytest.raises(ValueError, match="CLIP4IDC ties the two"):
        CLIP4IDC.from_weights({**weights, tied[0]: weights[tied[0]] + 1}, "caption", intra_layers=1)
    key = "decoder.decoder.layer.0.enc_attn.att.key.bias"
    del without[key]
    with pytest.raises(ValueError, match=f"{key} is missing"):
        CLIP4IDC.from_weights(without, "caption", intra_layers=1)


def test_a_retrieval_model_ignores_the_captioner_and_says_so(tiny_captioner, caplog):
    model = CLIP4IDC.from_weights(tiny_captioner.state_dict(), "retrieval", intra_layers=1)
    assert not [key for key in model.state_dict() if key.startswith("decoder.")]
    assert "decoder.*: not used" in caplog.text


def test_tied_embeddings_are_one_tensor(tiny_captioner):
    words = tiny_captioner.clip.token_embedding.weight
    assert tiny_captioner.decoder.predictions.decoder.weight is words
    assert tiny_captioner.decoder.embeddings.word_embeddings.weight is words
    assert len([p for p in tiny_captioner.parameters() if p is words]) == 1


@pytest.mark.parametrize("absent", [False, True])
def test_a_loaded_model_learns_and_leaves_its_weights_dictionary_alone(tiny_captioner, absent):
    given = {
        key: value.clone()
        for key, value in tiny_captioner.state_dict().items()
        if not (absent and key.startswith("decoder."))
    }
    weights = {key: value.clone() for key, value in given.items()}
    model = CLIP4IDC.from_weights(weights, "caption", intra_layers=1)
    assert all(
        parameter.requires_grad and parameter.device.type == "cpu"
        for parameter in model.parameters()
    )
    assert len(list(model.parameters())) == len(list(tiny_captioner.parameters())), "ties are kept"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(weights[key], value) for key, value in given.items())
    assert torch.equal(
        model.decoder.predictions.decoder.weight, given["clip.token_embedding.weight"] + 1
    )


def test_intra_layers_out_of_range():
    with pytest.raises(ValueError, match="0 to 2"):
        CLIP4IDC.from_weights(tiny_weights(), "retrieval", intra_layers=9)


def test_a_whole_backbone_is_recognized(tiny_captioner):
    weights = tiny_captioner.state_dict()
    assert has_all_pretrained_tensors(weights)
    assert has_all_pretrained_tensors(without_pair_tensors(weights))
    assert not has_all_pretrained_tensors(
        {k: v for k, v in weights.items() if k != "clip.logit_scale"}
    )
    assert not has_all_pretrained_tensors({})


@pytest.mark.parametrize("patch", ["2d", "3d"])
@pytest.mark.parametrize("intra", [0, 1, 2])
def test_one_before_image_for_two_pairs_equals_two_pairs(patch, intra):
    model = CLIP4IDC.from_weights(tiny_weights(), "retrieval", intra, patch).eval()
    images = torch.randn(3, 3, 3, 64, 64)
    together = model.encode_against_first(images)
    first = model.encode_pairs(images[:, [0, 1]])
    second = model.encode_pairs(images[:, [0, 2]])
    torch.testing.assert_close(together.tokens, torch.cat([first.tokens, second.tokens]))
    torch.testing.assert_close(together.pooled, torch.cat([first.pooled, second.pooled]))


@pytest.mark.parametrize("shape", [(2, 3, 3, 64, 64), (2, 1, 3, 64, 64), (2, 2, 3, 32, 64)])
def test_a_pair_is_exactly_two_images(tiny_captioner, shape):
    """With 2d patches a third image would be ignored."""
    with pytest.raises(ValueError, match=r"expected \(pairs, 2, 3, 64, 64\)"):
        tiny_captioner.encode_pairs(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(2, 1, 3, 64, 64), (2, 3, 64, 64)])
def test_images_against_the_first_are_two_or_more(tiny_captioner, shape):
    with pytest.raises(ValueError, match=r"expected \(pairs, 2 or more, 3, 64, 64\)"):
        tiny_captioner.encode_against_first(torch.zeros(shape))


def test_a_batch_equals_its_rows(tiny_captioner):
    images = torch.randn(4, 2, 3, 64, 64)
    batch = tiny_captioner.encode_pairs(images).tokens
    rows = [tiny_captioner.encode_pairs(pair[None]).tokens for pair in images]
    torch.testing.assert_close(batch, torch.cat(rows), atol=1e-5, rtol=1e-4)


def test_padding_changes_nothing_before_it(tiny_captioner):
    tokens = tiny_captioner.encode_pairs(torch.randn(1, 2, 3, 64, 64)).tokens
    ids = torch.tensor([[48, 3, 4, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    short = tiny_captioner.caption_logits(tokens, ids[:, :3], mask[:, :3])
    padded = tiny_captioner.caption_logits(tokens, ids, mask)
    torch.testing.assert_close(padded[:, :3], short, atol=1e-5, rtol=1e-5)


def test_the_loss_without_logits_is_the_loss_of_the_logits(tiny_captioner):
    tokens = tiny_captioner.encode_pairs(torch.randn(2, 2, 3, 64, 64)).tokens
    ids = torch.tensor([[48, 3, 4], [48, 5, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    target = torch.tensor([[3, 4, 49], [5, 49, 0]])
    expected = caption_loss(tiny_captioner.caption_logits(tokens, ids, mask), target)
    weights = torch.full((2, 3), 1 / 5)
    loss = tiny_captioner.weighted_caption_loss(tokens, ids, mask, target, weights)
    torch.testing.assert_close(loss, expected)


def test_other_patch_sizes_have_their_own_positions():
    weights = tiny_weights(vision_patch_size=16)
    model = CLIP4IDC.from_weights(weights, "retrieval", intra_layers=1)
    assert model.encode_pairs(torch.randn(1, 2, 3, 64, 64)).tokens.shape == (1, 2 * 17, 64)
    features = model.encode_pairs(torch.randn(1, 2, 3, 64, 64))
    torch.testing.assert_close(features.pooled, features.tokens[:, [0, 17]].mean(dim=1))


CROSS = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "max_position_embeddings": 20,
}


def tight_model(weights: dict) -> CLIP4IDC:
    return CLIP4IDC.from_weights(weights, "retrieval", 1, sim_header="tight", cross_config=CROSS)


def test_tight_similarity_is_the_cross_encoder_on_every_combination():
    model = tight_model(tiny_weights()).eval()
    text = model.encode_text(torch.randint(1, 48, (3, 6)))
    pair = model.encode_pairs(torch.randn(2, 2, 3, 64, 64))
    with torch.no_grad():
        similarity = model.score_pairs(text, pair)
        for row, column in itertools.product(range(3), range(2)):
            words = text.tokens[row : row + 1]
            mask = text.mask[row : row + 1]
            pooled = model.cross(words, pair.tokens[column : column + 1], mask).pooled
            expected = model.similarity_dense(pooled).item()
            assert similarity[row, column].item() == pytest.approx(expected, abs=1e-5)
    again = tight_model(model.state_dict())
    assert torch.equal(again.similarity_dense.weight, model.similarity_dense.weight)


def test_a_loose_model_ignores_the_cross_encoder_and_part_of_one_is_refused(caplog):
    weights = tight_model(tiny_weights()).state_dict()
    loose = CLIP4IDC.from_weights(weights, "retrieval", 1)
    assert not loose.uses_cross_encoder
    assert "cross.*: not used" in caplog.text
    del weights["similarity_dense.weight"]
    with pytest.raises(ValueError, match=r"similarity_dense.weight is missing"):
        tight_model(weights)


def test_a_cross_encoder_of_one_token_type_is_refused():
    with pytest.raises(ValueError, match="type_vocab_size 1, expected at least 2"):
        load_cross_config({**CROSS, "type_vocab_size": 1})


def test_too_long_for_the_cross_encoder():
    model = tight_model(tiny_weights())
    text = model.encode_text(torch.randint(1, 48, (1, 15)))
    pair = model.encode_pairs(torch.randn(1, 2, 3, 64, 64))
    with pytest.raises(ValueError, match="20 positions"):
        model.score_pairs(text, pair)


def test_autocast_keeps_float32_weights_and_close_numbers(tiny_captioner):
    images = torch.randn(2, 2, 3, 64, 64)
    exact = tiny_captioner.encode_pairs(images).tokens
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pair = tiny_captioner.encode_pairs(images)
        text = tiny_captioner.encode_text(torch.randint(1, 48, (2, 5)))
        similarity = tiny_captioner.similarity(text.pooled, pair.pooled)
    assert similarity.dtype == torch.float32
    assert (pair.tokens.float() - exact).abs().mean() < 0.05 * exact.abs().mean()
    assert {p.dtype for p in tiny_captioner.parameters()} == {torch.float32}


def test_loose_retrieval_lets_go_of_each_batchs_tokens(monkeypatch):
    """Only one vector of a pair is compared: the tokens of a split would fill a GPU's memory."""
    torch.manual_seed(0)
    model = CLIP4IDC.from_weights(tiny_weights(vocab_size=49408), "retrieval", 1).eval()
    images = torch.randint(0, 256, (4, 2, 3, 64, 64), dtype=torch.uint8)
    pairs = [ImagePair(str(n), "", "", (f"a cube {n} moved", "it moved")) for n in range(4)]
    texts = [caption for pair in pairs for caption in pair.captions]
    ids = [torch.from_numpy(tokenize_caption(text, 12)["retrieval_text_ids"]) for text in texts]
    with torch.no_grad():
        text = model.encode_text(torch.stack(ids))
        expected = model.score_pairs(text, model.encode_pairs(model.normalize_images(images)))
    encode = model.encode_pairs
    earlier = []

    def encode_pairs(batch):
        assert all(tokens() is None for tokens in earlier[:-1])
        features = encode(batch)
        earlier.append(weakref.ref(features.tokens))
        return features

    monkeypatch.setattr(model, "encode_pairs", encode_pairs)
    batches = [{"images": pair} for pair in images.split(1)]
    found = compute_similarity(model, pairs, batches, 12, Runtime())
    assert len(earlier) == 4
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)

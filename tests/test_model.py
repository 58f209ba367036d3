"""The model: weights in and out, what is refused, and equivalences between its paths."""

import pytest
import torch

from modules.clip4idc import CLIP4IDC
from modules.losses import caption_loss
from modules.model.backbone import holds_backbone
from tests.conftest import tiny_weights


def pair_keys_gone(weights: dict) -> dict:
    gone = (
        "bef_embedding",
        "aft_embedding",
        "joint_positional_embedding",
        "ln_mid.weight",
        "ln_mid.bias",
    )
    return {key: value for key, value in weights.items() if not key.endswith(gone)}


def test_openai_names_and_archive_extras_load_like_released_names():
    weights = tiny_weights()
    bare = {key.removeprefix("clip."): value for key, value in weights.items()}
    bare["input_resolution"] = torch.tensor(64)
    bare["context_length"], bare["vocab_size"] = torch.tensor(77), torch.tensor(50)
    loaded = CLIP4IDC.from_weights(bare, "retrieval", intra_layers=1).state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[key], weights[key]) for key in weights)


def test_float16_is_widened_and_saved_as_float32():
    half = {key: value.half() for key, value in tiny_weights().items()}
    model = CLIP4IDC.from_weights(half, "retrieval", intra_layers=1)
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("patch", ["2d", "3d"])
def test_a_plain_clip_gets_what_pairs_need(patch):
    model = CLIP4IDC.from_weights(
        pair_keys_gone(tiny_weights()), "caption", intra_layers=1, linear_patch=patch
    )
    visual = model.clip.visual
    assert torch.equal(visual.ln_mid.weight, torch.ones(64))
    assert 0.5 < visual.bef_embedding.std() * 64**0.5 < 1.6
    if patch == "3d":
        assert torch.equal(visual.conv2.weight[:, :, 1], visual.conv1.weight)
        assert visual.conv2.weight[:, :, [0, 2]].abs().sum() == 0


def test_inflated_3d_patches_see_each_image_as_2d_ones_do():
    images = torch.randn(2, 2, 3, 64, 64)
    weights = tiny_weights()
    flat, deep = (
        CLIP4IDC.from_weights(weights, "retrieval", 1, patch).eval() for patch in ("2d", "3d")
    )
    torch.testing.assert_close(
        flat.encode_pairs(images).tokens, deep.encode_pairs(images).tokens, atol=1e-5, rtol=1e-5
    )


def test_3d_patches_are_the_convolution_over_frames_with_gradients_in_bf16():
    weights = {**tiny_weights(), "clip.visual.conv2.weight": torch.randn(64, 3, 3, 32, 32) / 50}
    visual = CLIP4IDC.from_weights(weights, "retrieval", 1, "3d").clip.visual
    pairs, gradients = torch.randn(32, 2, 3, 64, 64), {}
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            patches = visual._patches_3d(pairs)
        patches.float().square().sum().backward()
        gradients[dtype], visual.conv2.weight.grad = visual.conv2.weight.grad, None
        expected = (
            visual.conv2(pairs.transpose(1, 2)).permute(0, 2, 3, 4, 1).flatten(2, 3).flatten(0, 1)
        )
        torch.testing.assert_close(
            patches.float(), expected, atol=1e-4 if dtype == torch.float32 else 0.1, rtol=0.02
        )
    error = (gradients[torch.bfloat16] - gradients[torch.float32]).norm() / gradients[
        torch.float32
    ].norm()
    assert error < 0.02


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


def test_a_part_of_the_captioner_is_refused_and_the_tied_keys_may_be_absent(tiny_captioner):
    weights = tiny_captioner.state_dict()
    tied = [
        key
        for key in weights
        if key.endswith(
            ("word_embeddings.weight", "position_embeddings.weight", "predictions.decoder.weight")
        )
    ]
    assert len(tied) == 3
    without = {key: value for key, value in weights.items() if key not in tied}
    again = CLIP4IDC.from_weights(without, "caption", intra_layers=1)
    assert all(torch.equal(value, weights[key]) for key, value in again.state_dict().items())
    with pytest.raises(ValueError, match="CLIP4IDC ties the two"):
        CLIP4IDC.from_weights({**weights, tied[0]: weights[tied[0]] + 1}, "caption", intra_layers=1)
    del without["decoder.decoder.layer.0.enc_attn.att.key.bias"]
    with pytest.raises(
        ValueError, match=r"decoder.decoder.layer.0.enc_attn.att.key.bias is missing"
    ):
        CLIP4IDC.from_weights(without, "caption", intra_layers=1)


def test_a_retrieval_model_sets_the_captioner_aside_and_says_so(tiny_captioner, caplog):
    model = CLIP4IDC.from_weights(tiny_captioner.state_dict(), "retrieval", intra_layers=1)
    assert not [key for key in model.state_dict() if key.startswith("decoder.")]
    assert "decoder.*: not used" in caplog.text


def test_tied_embeddings_are_one_tensor(tiny_captioner):
    words = tiny_captioner.clip.token_embedding.weight
    assert tiny_captioner.decoder.predictions.decoder.weight is words
    assert tiny_captioner.decoder.embeddings.word_embeddings.weight is words
    assert len([p for p in tiny_captioner.parameters() if p is words]) == 1


@pytest.mark.parametrize("absent", [False, True])
def test_a_loaded_model_learns_and_leaves_the_weights_it_came_from_alone(tiny_captioner, absent):
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


def test_holds_all_of_clip(tiny_captioner):
    weights = tiny_captioner.state_dict()
    assert holds_backbone(weights)
    assert holds_backbone(pair_keys_gone(weights))
    assert not holds_backbone({k: v for k, v in weights.items() if k != "clip.logit_scale"})
    assert not holds_backbone({})


@pytest.mark.parametrize("patch", ["2d", "3d"])
@pytest.mark.parametrize("intra", [0, 1, 2])
def test_one_before_image_for_two_pairs_equals_two_pairs(patch, intra):
    model = CLIP4IDC.from_weights(tiny_weights(), "retrieval", intra, patch).eval()
    scenes = torch.randn(3, 3, 3, 64, 64)
    together = model.encode_against_first(scenes)
    apart = [model.encode_pairs(scenes[:, [0, other]]) for other in (1, 2)]
    torch.testing.assert_close(together.tokens, torch.cat([pair.tokens for pair in apart]))
    torch.testing.assert_close(together.pooled, torch.cat([pair.pooled for pair in apart]))


def test_a_batch_equals_its_rows(tiny_captioner):
    images = torch.randn(4, 2, 3, 64, 64)
    batch = tiny_captioner.encode_pairs(images).tokens
    torch.testing.assert_close(
        batch,
        torch.cat([tiny_captioner.encode_pairs(i[None]).tokens for i in images]),
        atol=1e-5,
        rtol=1e-4,
    )


def test_padding_changes_nothing_before_it(tiny_captioner):
    tokens = tiny_captioner.encode_pairs(torch.randn(1, 2, 3, 64, 64)).tokens
    ids = torch.tensor([[48, 3, 4, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    short = tiny_captioner.caption_logits(tokens, ids[:, :3], mask[:, :3])
    torch.testing.assert_close(
        tiny_captioner.caption_logits(tokens, ids, mask)[:, :3], short, atol=1e-5, rtol=1e-5
    )


def test_the_loss_without_logits_is_the_loss_of_the_logits(tiny_captioner):
    tokens = tiny_captioner.encode_pairs(torch.randn(2, 2, 3, 64, 64)).tokens
    ids, mask, target = (
        torch.tensor([[48, 3, 4], [48, 5, 0]]),
        torch.tensor([[1, 1, 1], [1, 1, 0]]),
        torch.tensor([[3, 4, 49], [5, 49, 0]]),
    )
    expected = caption_loss(tiny_captioner.caption_logits(tokens, ids, mask), target)
    torch.testing.assert_close(
        tiny_captioner.caption_loss(tokens, ids, mask, target, torch.full((2, 3), 1 / 5)), expected
    )


def test_other_patch_sizes_have_their_own_positions():
    weights = tiny_weights(vision_patch_size=16)
    model = CLIP4IDC.from_weights(weights, "retrieval", intra_layers=1)
    assert model.encode_pairs(torch.randn(1, 2, 3, 64, 64)).tokens.shape == (1, 2 * 17, 64)
    before, after = torch.randn(2, 1, 1, 3, 64, 64)
    features = model.encode_pairs(torch.cat([before, after], dim=1))
    torch.testing.assert_close(features.pooled, features.tokens[:, [0, 17]].mean(dim=1))


CROSS = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "max_position_embeddings": 20,
}


def test_tight_similarity_is_the_cross_encoder_on_every_combination():
    model = CLIP4IDC.from_weights(
        tiny_weights(), "retrieval", 1, sim_header="tight", cross_config=CROSS
    ).eval()
    text, pair = (
        model.encode_text(torch.randint(1, 48, (3, 6))),
        model.encode_pairs(torch.randn(2, 2, 3, 64, 64)),
    )
    with torch.no_grad():
        similarity = model.score_pairs(text, pair)
        for t in range(3):
            for p in range(2):
                pooled = model.cross(
                    text.tokens[t : t + 1], pair.tokens[p : p + 1], text.mask[t : t + 1]
                ).pooled
                assert similarity[t, p].item() == pytest.approx(
                    model.similarity_dense(pooled).item(), abs=1e-5
                )
    again = CLIP4IDC.from_weights(
        model.state_dict(), "retrieval", 1, sim_header="tight", cross_config=CROSS
    )
    assert torch.equal(again.similarity_dense.weight, model.similarity_dense.weight)


def test_a_loose_model_sets_the_cross_encoder_aside_and_a_part_of_it_is_refused(caplog):
    weights = CLIP4IDC.from_weights(
        tiny_weights(), "retrieval", 1, sim_header="tight", cross_config=CROSS
    ).state_dict()
    loose = CLIP4IDC.from_weights(weights, "retrieval", 1)
    assert not hasattr(loose, "cross")
    assert "cross.*: not used" in caplog.text
    del weights["similarity_dense.weight"]
    with pytest.raises(ValueError, match=r"similarity_dense.weight is missing"):
        CLIP4IDC.from_weights(weights, "retrieval", 1, sim_header="tight", cross_config=CROSS)


def test_too_long_for_the_cross_encoder():
    model = CLIP4IDC.from_weights(
        tiny_weights(), "retrieval", 1, sim_header="tight", cross_config=CROSS
    )
    text, pair = (
        model.encode_text(torch.randint(1, 48, (1, 15))),
        model.encode_pairs(torch.randn(1, 2, 3, 64, 64)),
    )
    with pytest.raises(ValueError, match="20 positions"):
        model.score_pairs(text, pair)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_autocast_keeps_float32_weights_and_close_numbers(tiny_captioner, dtype):
    images = torch.randn(2, 2, 3, 64, 64)
    exact = tiny_captioner.encode_pairs(images).tokens
    with torch.autocast("cpu", dtype=dtype):
        rough = tiny_captioner.encode_pairs(images).tokens
        text = tiny_captioner.encode_text(torch.randint(1, 48, (2, 5)))
        similarity = tiny_captioner.similarity(
            text.pooled, tiny_captioner.encode_pairs(images).pooled
        )
    assert similarity.dtype == torch.float32
    assert (rough.float() - exact).abs().mean() < 0.05 * exact.abs().mean()
    assert {p.dtype for p in tiny_captioner.parameters()} == {torch.float32}

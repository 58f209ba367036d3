"""BertAdam against a plain loop, schedules, freezing by name, groups."""

import copy
import math

import pytest
import torch

from modules.clip4idc import CLIP4IDC
from modules.losses import caption_loss, contrastive_loss
from modules.optimization import SCHEDULES, BertAdam, parameter_groups
from modules.training.freezing import freeze, freeze_unused
from tests.conftest import tiny_weights


def plain_bert_adam(values, gradients, steps, lr, warmup, t_total, betas, eps, decay):
    m, v, x = torch.zeros_like(values), torch.zeros_like(values), values.clone()
    for step in range(steps):
        g = gradients[step] * min(1.0, 1.0 / (gradients[step].norm().item() + 1e-6))
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        share = step / t_total
        rate = lr * (share / warmup if share < warmup else 0.5 * (1 + math.cos(math.pi * share)))
        x = x - rate * (m / (v.sqrt() + eps) + decay * x)
    return x


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: state["param_groups"][0].update(schedule="evil"),
        lambda state: state["param_groups"][0].pop("schedule"),
        lambda state: state["param_groups"][0].update(lr="1"),
        lambda state: state["param_groups"][0].update(lr=math.nan),
        lambda state: state["param_groups"][0].update(betas=(0.9,) * 2 + ("x",)),
        lambda state: state["state"][0].update(step="1"),
        lambda state: state["state"][0].update(step=-1),
        lambda state: state["state"][0].pop("moment"),
        lambda state: state["state"][0].update(moment=torch.zeros(3, 5, 7)),
        lambda state: state["state"][0].update(square=1.0),
        lambda state: state["state"][0].update(more=1),
    ],
)
def test_a_state_of_another_optimizer_is_refused(spoil):
    def optimizer():
        parameter = torch.nn.Parameter(torch.ones(2, 2))
        parameter.grad = torch.ones(2, 2)
        return BertAdam([{"params": [parameter]}], lr=0.1)

    trained = optimizer()
    trained.step()
    optimizer().load_state_dict(trained.state_dict())
    state = copy.deepcopy(trained.state_dict())
    spoil(state)
    with pytest.raises(ValueError, match="the saved optimizer"):
        optimizer().load_state_dict(state)


def test_bert_adam_equals_a_plain_loop_and_leaves_parameters_without_gradient():
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(4, 3))
    idle = torch.nn.Parameter(torch.ones(2))
    start = parameter.detach().clone()
    gradients = [torch.randn(4, 3) * scale for scale in (0.01, 5.0, 1.0, 0.3, 2.0)]
    optimizer = BertAdam(
        [{"params": [parameter, idle]}],
        lr=0.1,
        warmup=0.2,
        t_total=10,
        schedule="cosine",
        betas=(0.9, 0.98),
        weight_decay=0.2,
    )
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    expected = plain_bert_adam(start, gradients, 5, 0.1, 0.2, 10, (0.9, 0.98), 1e-6, 0.2)
    torch.testing.assert_close(parameter.detach(), expected)
    assert torch.equal(idle.detach(), torch.ones(2))


def test_with_bias_correction_and_no_clip_of_its_own_it_is_adamw():
    torch.manual_seed(2)
    start = torch.randn(4, 3)
    gradients = [torch.randn(4, 3) * scale for scale in (0.01, 5.0, 1.0)]
    ours = torch.nn.Parameter(start.clone())
    theirs = torch.nn.Parameter(start.clone())
    common = {"lr": 0.1, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.2}
    optimizers = [
        (ours, BertAdam([ours], **common, max_grad_norm=0, bias_correction=True)),
        (theirs, torch.optim.AdamW([theirs], **common)),
    ]
    for parameter, optimizer in optimizers:
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


def test_the_common_clip_comes_before_each_parameters_own():
    """As clip_grad_norm_ over all, then BertAdam alone.

    One group has no limit of its own, and one gradient is zero.
    """
    torch.manual_seed(1)
    start = [torch.randn(3, 2), torch.randn(5), torch.randn(4)]
    gradients = [torch.randn(3, 2) * 4, torch.randn(5) * 30, torch.zeros(4)]
    outcomes = []
    for common in (0.7, None):
        parameters = [torch.nn.Parameter(values.clone()) for values in start]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        if common is None:
            torch.nn.utils.clip_grad_norm_(parameters, 0.7)
        groups = [
            {"params": parameters[:1], "max_grad_norm": 0.05},
            {"params": parameters[1:], "max_grad_norm": 0},
        ]
        BertAdam(groups, lr=0.1, eps=1.0, max_global_norm=common).step()
        outcomes.append([*(p.detach() for p in parameters), *(p.grad for p in parameters)])
    torch.testing.assert_close(outcomes[0], outcomes[1])
    assert outcomes[0][3].norm() == pytest.approx(0.05, rel=1e-4)
    assert not torch.equal(outcomes[0][1], start[1])


def test_the_first_step_under_warmup_moves_nothing():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = BertAdam([parameter], lr=1.0, warmup=0.1, t_total=10)
    parameter.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(parameter.detach(), torch.ones(3))
    optimizer.step()
    assert not torch.equal(parameter.detach(), torch.ones(3))


@pytest.mark.parametrize(
    ("name", "x", "expected"),
    [
        ("cosine", 0.05, 0.5),
        ("cosine", 0.5, 0.5),
        ("cosine", 1.0, 0.0),
        ("linear", 0.05, 0.5),
        ("linear", 0.55, 0.5),
        ("linear", 1.2, 0.0),
        ("constant", 0.05, 0.5),
        ("constant", 0.7, 1.0),
    ],
)
def test_schedules(name, x, expected):
    assert SCHEDULES[name](x, 0.1) == pytest.approx(expected)


def test_no_warmup_starts_at_the_full_rate():
    assert SCHEDULES["linear"](0.0, -1) == pytest.approx(
        0.5
    )  # (x-1)/(w-1) with w = -1, as published
    assert SCHEDULES["cosine"](0.0, -1) == 1.0


def test_wrong_settings_are_refused():
    for wrong in ({"lr": -1}, {"schedule": "step"}, {"warmup": 1.5}, {"betas": (0.9, 1.0)}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            BertAdam([torch.nn.Parameter(torch.ones(1))], **{"lr": 0.1, **wrong})


FROZEN_AT_1 = {
    "clip.positional_embedding",
    "clip.token_embedding.weight",
    "clip.visual.class_embedding",
    "clip.visual.positional_embedding",
    "clip.visual.conv1.weight",
    "clip.visual.ln_pre.weight",
    "clip.visual.ln_pre.bias",
}


@pytest.mark.parametrize("patch", ["2d", "3d"])
def test_freezing_by_name(patch):
    model = CLIP4IDC.from_weights(tiny_weights(), "caption", 1, patch)
    freeze(model, 1)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    blocks = {name for name, _ in model.named_parameters() if ".resblocks.0." in name}
    assert frozen == FROZEN_AT_1 | blocks
    freeze(model, 1, train_token_embedding=True)
    assert model.clip.token_embedding.weight.requires_grad


def test_freeze_nothing_and_out_of_range():
    model = CLIP4IDC.from_weights(tiny_weights(), "retrieval", 1)
    freeze(model, -1)
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="freeze_layer_num is 3"):
        freeze(model, 3)


@pytest.mark.parametrize("patch", ["2d", "3d"])
@pytest.mark.parametrize("task", ["caption", "retrieval"])
def test_what_is_left_to_learn_all_gets_a_gradient(task, patch):
    model = CLIP4IDC.from_weights(tiny_weights(), task, 1, patch)
    freeze(model, -1)
    freeze_unused(model)
    pairs = model.encode_pairs(torch.randn(2, 2, 3, 64, 64))
    ids = torch.tensor([[48, 3, 49], [48, 5, 49]])
    if task == "caption":
        loss = caption_loss(model.caption_logits(pairs.tokens, ids, torch.ones_like(ids)), ids)
    else:
        loss = contrastive_loss(model.similarity(model.encode_text(ids).pooled, pairs.pooled))
    loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_groups_hold_every_learning_parameter_once():
    model = CLIP4IDC.from_weights(tiny_weights(), "caption", 1)
    freeze(model, 0)
    grouped = [id(p) for group in parameter_groups(model, 1.0, 0.1, 0.2) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)

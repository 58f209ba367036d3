"""Attention by plain products against SDPA, quick GELU against its formula, and stochastic depth."""

import pytest
import torch
import torch.nn.functional as F

from modules.model import layers
from modules.model.layers import FeedForward, attend


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_plain_products_equal_sdpa(monkeypatch, causal, masked):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 7, 8, requires_grad=True) for _ in range(3))
    mask = (
        torch.where(torch.rand(2, 1, 7, 7) < 0.3, layers.MASK_VALUE, 0.0)
        if masked and not causal
        else None
    )
    outcomes = []
    for few in (200, 0):
        monkeypatch.setattr(layers, "SDPA_MIN_KEYS", few)
        out = attend(q, k, v, mask, causal)
        outcomes.append((out.detach(), *torch.autograd.grad(out.square().sum(), (q, k, v))))
    torch.testing.assert_close(outcomes[0], outcomes[1], atol=1e-5, rtol=1e-5)


def test_dropout_of_attention_keeps_the_mean(monkeypatch):
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 50, 8), torch.ones(1, 1, 50, 8)
    many = [q.expand(1, 2000, 1, 8), k.expand(1, 2000, 50, 8), v.expand(1, 2000, 50, 8)]
    for few in (200, 0):
        monkeypatch.setattr(layers, "SDPA_MIN_KEYS", few)
        sums = attend(*many, dropout=0.1)[..., ::8]
        assert sums.std() > 0.01, "nothing was dropped"
        assert sums.mean().item() == pytest.approx(1.0, abs=0.02)


def test_feed_forward_is_two_linears_around_quick_gelu():
    torch.manual_seed(0)
    mlp, x = FeedForward(8), torch.randn(2, 5, 8, requires_grad=True)

    def plain(x):
        hidden = F.linear(x, mlp.c_fc.weight, mlp.c_fc.bias)
        return F.linear(hidden * torch.sigmoid(1.702 * hidden), mlp.c_proj.weight, mlp.c_proj.bias)

    outcomes = []
    for function in (mlp, plain):
        out = function(x)
        outcomes.append(
            (out.detach(), *torch.autograd.grad(out.square().sum(), (x, *mlp.parameters())))
        )
    torch.testing.assert_close(outcomes[0], outcomes[1], atol=1e-6, rtol=1e-5)

"""Attention by plain products against SDPA, and quick GELU against its formula."""

import pytest
import torch
import torch.nn.functional as F

from modules.model import layers
from modules.model.layers import FeedForward, FusedAttention, attend, record_attention


@pytest.mark.parametrize(("causal", "masked"), [(False, False), (False, True), (True, False)])
def test_plain_products_equal_sdpa(monkeypatch, causal, masked):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 7, 8, requires_grad=True) for _ in range(3))
    mask = None
    if masked:
        mask = torch.where(torch.rand(2, 1, 7, 7) < 0.3, layers.MASK_VALUE, 0.0)
    outcomes = []
    for min_keys in (200, 0):
        monkeypatch.setattr(layers, "MAX_PRODUCT_KEYS", min_keys)
        out = attend(q, k, v, mask, causal)
        outcomes.append((out.detach(), *torch.autograd.grad(out.square().sum(), (q, k, v))))
    torch.testing.assert_close(outcomes[0], outcomes[1], atol=1e-5, rtol=1e-5)


def test_a_mask_is_not_dropped_silently_by_causal_attention():
    q = torch.randn(1, 1, 3, 4)
    with pytest.raises(ValueError, match="causal or has a mask"):
        attend(q, q, q, mask=torch.zeros(1, 1, 1, 3), causal=True)


def test_dropout_of_attention_keeps_the_mean(monkeypatch):
    torch.manual_seed(0)
    q = torch.randn(1, 1, 1, 8).expand(1, 2000, 1, 8)
    k = torch.randn(1, 1, 50, 8).expand(1, 2000, 50, 8)
    v = torch.ones(1, 2000, 50, 8)
    for min_keys in (200, 0):
        monkeypatch.setattr(layers, "MAX_PRODUCT_KEYS", min_keys)
        sums = attend(q, k, v, dropout=0.1)[..., ::8]
        assert sums.std() > 0.01, "nothing was dropped"
        assert sums.mean().item() == pytest.approx(1.0, abs=0.02)


def test_feed_forward_is_two_linears_around_quick_gelu():
    torch.manual_seed(0)
    mlp = FeedForward(8)
    x = torch.randn(2, 5, 8, requires_grad=True)

    def plain(x):
        hidden = F.linear(x, mlp.c_fc.weight, mlp.c_fc.bias)
        return F.linear(hidden * torch.sigmoid(1.702 * hidden), mlp.c_proj.weight, mlp.c_proj.bias)

    outcomes = []
    for function in (mlp, plain):
        out = function(x)
        gradients = torch.autograd.grad(out.square().sum(), (x, *mlp.parameters()))
        outcomes.append((out.detach(), *gradients))
    torch.testing.assert_close(outcomes[0], outcomes[1], atol=1e-6, rtol=1e-5)


def test_attention_is_recorded_inside_the_block_only():
    attention = FusedAttention(8, num_heads=2)
    torch.nn.init.normal_(attention.in_proj_weight)
    x = torch.randn(3, 5, 8)
    with record_attention([attention]) as (calls,):
        recorded = attention(x, causal=True)
    assert torch.equal(recorded, attention(x, causal=True))
    (weights,) = calls
    assert weights.shape == (3, 2, 5, 5)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(3, 2, 5))
    assert weights.triu(1).abs().max() == 0, "causal"

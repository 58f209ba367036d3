"""Self-critical training: its gradient by hand, and that it raises what it is to raise."""

import pytest
import torch

from dataloaders.images import normalize
from modules.training.objectives import self_critical
from modules.training.objectives.self_critical import SAMPLES_PER_PAIR, SelfCritical
from tests.conftest import TINY

PAIRS, WORDS = 3, 6


@pytest.fixture
def batch():
    torch.manual_seed(1)
    side = TINY["image_resolution"]
    return {
        "images": torch.randint(0, 256, (PAIRS, 3, 3, side, side), dtype=torch.uint8),
        "index": torch.arange(PAIRS),
    }


NAMES = [[f"{n}.png", f"{n}_n.png"] for n in range(PAIRS)]


def test_gradient_is_that_of_rewards_above_the_others(tiny_captioner, batch, monkeypatch):
    captions = torch.randint(1, 48, (2 * PAIRS, SAMPLES_PER_PAIR, WORDS))
    captions[:, 1, 3], captions[:, 1, 4:] = 49, 0
    monkeypatch.setattr(self_critical, "sample", lambda model, tokens, draws: captions)
    rewards, asked = torch.rand(2 * PAIRS, SAMPLES_PER_PAIR), []

    def reward(keys, sentences):
        asked.extend(keys)
        return rewards.flatten().tolist()

    loss = SelfCritical(tiny_captioner, reward, NAMES, WORDS)(batch)
    loss.backward()
    assert loss.item() == pytest.approx(-rewards.mean().item(), abs=1e-6)
    assert asked[::SAMPLES_PER_PAIR] == ["0.png", "1.png", "2.png", "0_n.png", "1_n.png", "2_n.png"]
    assert len(asked) == 2 * PAIRS * SAMPLES_PER_PAIR
    got = tiny_captioner.clip.token_embedding.weight.grad.clone()
    tiny_captioner.zero_grad()
    tokens = tiny_captioner.encode_against_first(normalize(batch["images"])).tokens
    total = 0
    for pair in range(2 * PAIRS):
        for n in range(SAMPLES_PER_PAIR):
            target = captions[pair, n][captions[pair, n] != 0][None]
            ids = torch.cat([torch.tensor([[48]]), target[:, :-1]], dim=1)
            log_probs = tiny_captioner.caption_logits(
                tokens[pair : pair + 1], ids, torch.ones_like(ids)
            ).log_softmax(-1)
            others = (rewards[pair].sum() - rewards[pair, n]) / (SAMPLES_PER_PAIR - 1)
            total = (
                total + (rewards[pair, n] - others) * log_probs.gather(-1, target[..., None]).sum()
            )
    (-total / rewards.numel()).backward()
    assert torch.allclose(got, tiny_captioner.clip.token_embedding.weight.grad, atol=1e-6)
    assert got.abs().max() > 1e-4


def test_steps_raise_the_reward(tiny_captioner, batch):
    """The reward is given to short sentences."""
    step = SelfCritical(
        tiny_captioner, lambda keys, sentences: [-float(len(s)) for s in sentences], NAMES, WORDS
    )
    optimizer = torch.optim.Adam(tiny_captioner.parameters(), lr=1e-2)
    torch.manual_seed(0)
    losses = []
    for _ in range(30):
        loss = step(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])

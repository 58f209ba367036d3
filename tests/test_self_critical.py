"""Self-critical training: its gradient computed by hand, and that it raises the reward."""

import pytest
import torch

from dataloaders.pairs import ImagePair
from modules.training.objectives import TrainingData, self_critical
from modules.training.objectives.self_critical import SAMPLES_PER_PAIR, SelfCritical
from tests.conftest import TINY

NUM_PAIRS = 3
MAX_WORDS = 6
SOT = 48  # of `tiny_captioner`'s vocabulary
EOT = 49
PAIRS = [
    ImagePair(f"{n}.png", "", "", ("a box",), distractor="d", distractor_captions=("no box",))
    for n in range(NUM_PAIRS)
]


@pytest.fixture
def batch():
    torch.manual_seed(1)
    side = TINY["image_resolution"]
    images = torch.randint(0, 256, (NUM_PAIRS, 3, 3, side, side), dtype=torch.uint8)
    return {"images": images, "index": torch.arange(NUM_PAIRS)}


@pytest.fixture
def objective(tiny_captioner):
    return SelfCritical(tiny_captioner, TrainingData(PAIRS, MAX_WORDS))


def test_gradient_is_that_of_rewards_above_the_others(
    objective, tiny_captioner, batch, monkeypatch
):
    captions = torch.randint(1, SOT, (2 * NUM_PAIRS, SAMPLES_PER_PAIR, MAX_WORDS))
    captions[:, 1, 3] = EOT
    captions[:, 1, 4:] = 0
    captions[:, 2, 1] = 0  # a token like any other, before EOT
    rewards = torch.rand(2 * NUM_PAIRS, SAMPLES_PER_PAIR)
    asked = []

    def reward(caption_ids, sentences):
        asked.extend(caption_ids)
        return rewards.flatten().tolist()

    monkeypatch.setattr(self_critical, "sample", lambda model, tokens, uniforms: captions)
    objective.reward = reward
    loss = objective(batch)
    loss.backward()
    assert loss.item() == pytest.approx(-rewards.mean().item(), abs=1e-6)
    changes = [f"{n}.png" for n in range(NUM_PAIRS)]
    distractors = [f"{n}.png_n" for n in range(NUM_PAIRS)]
    assert asked == [one for one in changes + distractors for _ in range(SAMPLES_PER_PAIR)]
    found = tiny_captioner.clip.token_embedding.weight.grad.clone()
    tiny_captioner.zero_grad()
    loss_by_hand(tiny_captioner, batch, captions, rewards).backward()
    expected = tiny_captioner.clip.token_embedding.weight.grad
    assert torch.allclose(found, expected, atol=1e-6)
    assert found.abs().max() > 1e-4


def loss_by_hand(model, batch, captions, rewards) -> torch.Tensor:
    """One caption after another, its likelihood weighted by its reward above the others'."""
    tokens = model.encode_against_first(model.normalize_images(batch["images"])).tokens
    total = 0
    for pair in range(len(captions)):
        for number in range(SAMPLES_PER_PAIR):
            row = captions[pair, number]
            ended = (row == EOT).nonzero().flatten().tolist()
            target = row[None, : ended[0] + 1 if ended else None]
            ids = torch.cat([torch.tensor([[SOT]]), target[:, :-1]], dim=1)
            logits = model.caption_logits(tokens[pair : pair + 1], ids, torch.ones_like(ids))
            likelihood = logits.log_softmax(-1).gather(-1, target[..., None]).sum()
            others = (rewards[pair].sum() - rewards[pair, number]) / (SAMPLES_PER_PAIR - 1)
            total = total + (rewards[pair, number] - others) * likelihood
    return -total / rewards.numel()


def test_steps_raise_the_reward(objective, tiny_captioner, batch):
    """The reward is given to short sentences."""
    objective.reward = lambda _, sentences: [-float(len(one)) for one in sentences]
    optimizer = torch.optim.Adam(tiny_captioner.parameters(), lr=1e-2)
    torch.manual_seed(0)
    losses = []
    for _ in range(30):
        loss = objective(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_rewards_are_cider_d_against_the_training_captions_of_a_pair(objective):
    """A sentence of three words, its end included, has no 4-grams: at best it scores 7.5 of 10."""
    own = objective.reward(["0.png", "0.png_n"], ["a box (end)", "no box (end)"])
    assert own == pytest.approx([7.5, 7.5])
    [of_the_other, foreign] = objective.reward(["0.png", "0.png"], ["no box (end)", "trees"])
    assert 0 <= of_the_other < 7.5
    assert foreign == 0

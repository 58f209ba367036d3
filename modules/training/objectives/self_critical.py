"""Self-critical training: sampled captions are rewarded by their CIDEr-D (Rennie et al. 2017)."""

import torch
from torch import Tensor

from dataloaders.samples import CaptionSamples
from modules.clip4idc import CLIP4IDC
from modules.generation.sampling import sample
from modules.generation.steps import shift_for_teacher_forcing
from modules.metrics.cider_d import CiderReward, reward_tokens
from modules.tokenizer import decode
from modules.training.objectives import Objective, TrainingData
from modules.training.objectives.cross_entropy import CrossEntropy

SAMPLES_PER_PAIR = 5


class SelfCritical(Objective):
    """Images (B, 1+K, 3, R, R) uint8 and `index` (B,) → minus the mean reward.

    SAMPLES_PER_PAIR captions of each pair are sampled. The gradient raises the probability of each
    in proportion to its advantage: its CIDEr-D minus the mean of the pair's other captions (Luo
    2020).
    """

    task = "caption"
    samples = CaptionSamples
    recipe = CrossEntropy.recipe
    needs_captioner = True

    def __init__(self, model: CLIP4IDC, data: TrainingData) -> None:
        super().__init__(model, data)
        self.max_words = data.max_words
        self.caption_ids = [pair.caption_ids for pair in data.pairs]
        references = {}
        for pair in data.pairs:
            references.update(pair.captions_by_id)
        self.reward = CiderReward(references, data.num_workers)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        tokens = self.model.encode_against_first(
            self.model.normalize_images(batch["images"])
        ).tokens
        rows = self._sample(tokens.detach()).flatten(0, 1)
        rewards = self._rewards(batch["index"].tolist(), rows)
        weights = _advantages(rewards) / rewards.numel()
        previous, mask = shift_for_teacher_forcing(rows, self.model.sot, self.model.eot)
        weighted_loss = self.model.weighted_caption_loss(
            tokens, previous, mask, rows, weights.view(-1, 1).expand_as(rows)
        )
        # Its value is minus the mean reward, its gradient that of the weighted likelihood.
        return weighted_loss - weighted_loss.detach() - rewards.mean()

    @torch.no_grad()
    def _sample(self, tokens: Tensor) -> Tensor:
        """Captions (pairs, SAMPLES_PER_PAIR, L) as the model writes them without dropout."""
        was_training = self.model.training
        self.model.eval()
        shape = len(tokens), SAMPLES_PER_PAIR, self.max_words
        captions = sample(self.model, tokens, torch.rand(shape, device=tokens.device))
        self.model.train(was_training)
        return captions

    def _rewards(self, indices: list[int], rows: Tensor) -> Tensor:
        """Sampled token ids (pairs·SAMPLES_PER_PAIR, L) → CIDEr-D (pairs, SAMPLES_PER_PAIR).

        `indices` are the batch's positions in the training pairs. The pairs are first all their
        changes, then all their distractors.
        """
        captions_per_index = len(rows) // (len(indices) * SAMPLES_PER_PAIR)
        keys = []
        for position in range(captions_per_index):
            for index in indices:
                caption_id = self.caption_ids[index][position]
                keys += [caption_id] * SAMPLES_PER_PAIR
        eot = self.model.eot
        sentences = [reward_tokens(decode(ids), ended=eot in ids) for ids in rows.tolist()]
        rewards = torch.tensor(self.reward(keys, sentences), device=rows.device)
        return rewards.view(-1, SAMPLES_PER_PAIR)


def _advantages(rewards: Tensor) -> Tensor:
    """(pairs, SAMPLES_PER_PAIR): each reward minus the mean of its pair's others."""
    above_mean = rewards - rewards.mean(dim=1, keepdim=True)
    return above_mean * SAMPLES_PER_PAIR / (SAMPLES_PER_PAIR - 1)

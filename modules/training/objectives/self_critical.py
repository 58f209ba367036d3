"""TODO."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dataloaders.images import normalize
from modules.clip4idc import CLIP4IDC
from modules.generation.sampling import sample
from modules.losses import IGNORED_ID
from modules.metrics.cider_d import CiderReward, words_only
from modules.tokenizer import decode

SAMPLES_PER_PAIR = 5  # captions of each pair that self-critical training compares


class SelfCritical(nn.Module):
    """Stage 2 on CIDEr itself: images (B, 2|3, 3, H, W) uint8 and `scene` (B,) → minus the mean reward, with the gradient that
    raises it.

    Of each pair DRAWN captions are drawn; each gets likelier by as much as its CIDEr-D lies above the mean of the others of its
    pair (Rennie et al. 2017; the mean of the others as in Luo 2020). `names`: the caption ids of each scene, one for each pair.
    """

    def __init__(
        self, model: CLIP4IDC, reward: CiderReward, names: Sequence[Sequence[str]], max_words: int
    ) -> None:
        super().__init__()
        self.model, self.reward, self.names, self.max_words = model, reward, names, max_words

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        tokens = self.model.encode_against_first(normalize(batch["images"])).tokens
        target = self._draw(tokens.detach())  # (pairs, DRAWN, L)
        scenes = batch["scene"].tolist()
        keys = [
            self.names[scene][kind]
            for kind in range(len(tokens) // len(scenes))
            for scene in scenes
            for _ in range(SAMPLES_PER_PAIR)
        ]
        rows = target.flatten(0, 1)
        sot, eot = self.model.vocab_size - 2, self.model.vocab_size - 1
        sentences = [words_only(decode(row), ended=eot in row) for row in rows.tolist()]
        rewards = torch.tensor(self.reward(keys, sentences), device=tokens.device).view(
            -1, SAMPLES_PER_PAIR
        )
        above_others = (
            (rewards - rewards.mean(dim=1, keepdim=True))
            * SAMPLES_PER_PAIR
            / (SAMPLES_PER_PAIR - 1)
        )
        weights = (above_others / rewards.numel()).view(-1, 1).expand_as(rows)
        ids = torch.cat([torch.full_like(rows[:, :1], sot), rows[:, :-1]], dim=1)
        mask = (rows != IGNORED_ID).long()  # a word's place is known by its target
        raised = self.model.caption_loss(tokens, ids, mask, rows, weights)
        return raised - raised.detach() - rewards.mean()

    @torch.no_grad()
    def _draw(self, tokens: Tensor) -> Tensor:
        """Captions (pairs, DRAWN, L) as the model writes them without dropout."""
        training = self.model.training
        self.model.eval()
        drawn = sample(
            self.model,
            tokens,
            torch.rand(len(tokens), SAMPLES_PER_PAIR, self.max_words, device=tokens.device),
        )
        self.model.train(training)
        return drawn

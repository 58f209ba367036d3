"""What differs between the two stages in training: samples, batch → loss, and the optimizer's settings (SPEC §5)."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dataloaders.images import normalize
from dataloaders.pairs import AdaptationSamples, FinetuningSamples
from modules.cider import CiderReward, simple_tokens
from modules.clip import Features
from modules.clip4idc import CLIP4IDC
from modules.generation import sample
from modules.losses import IGNORED, contrastive_loss
from modules.tokenizer import decode

OPTIMIZER = {
    "retrieval": {"schedule": "cosine", "betas": (0.9, 0.98), "eps": 1e-6},
    "caption": {"schedule": "linear", "betas": (0.9, 0.999), "eps": 1e-6},
}
WEIGHT_DECAY = {"retrieval": 0.2, "caption": 0.01}
SAMPLES = {"retrieval": AdaptationSamples, "caption": FinetuningSamples}
PATIENCE = {
    "retrieval": None,
    "caption": 11,
}  # epochs in a row without a better score, after which training stops
DRAWN = 5  # captions of each pair that self-critical training compares


class _GatherRows(torch.autograd.Function):
    """Rows of all processes in rank order; backward hands each process the sum of the gradients for its own rows.

    With every process computing the same loss on what is gathered, and DistributedDataParallel averaging, the outcome is the
    gradient of one process on the global batch.
    """

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        ctx.num_rows = len(rows)
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient[dist.get_rank() * ctx.num_rows :][: ctx.num_rows]


def gather_rows(rows: Tensor) -> Tensor:
    """(n, …) rows of each process → (n·processes, …), with gradients."""
    return _GatherRows.apply(rows) if dist.is_initialized() else rows


class AdaptationStep(nn.Module):
    """Stage 1: images (B, 2, 3, H, W) uint8 and text_ids (B, L) → contrastive loss over the global batch."""

    def __init__(self, model: CLIP4IDC) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        pair = self.model.encode_pairs(normalize(batch["images"]))
        text = self.model.encode_text(batch["text_ids"])
        tokens = (
            gather_rows(pair.tokens) if hasattr(self.model, "cross") else pair.tokens
        )  # the cosine alone does without
        everyone = Features(tokens, gather_rows(pair.pooled))
        return contrastive_loss(gather_rows(self.model.compare(text, everyone)))


class FinetuningStep(nn.Module):
    """Stage 2: images (B, 2|3, 3, H, W) uint8 and caption arrays (B, 1|2, L) → token cross-entropy.

    With a distractor the losses of the two pairs are added, each a mean over its own tokens of all processes.
    """

    def __init__(self, model: CLIP4IDC) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        pairs = self.model.encode_against_first(normalize(batch["images"]))
        ids, mask, target = (
            batch[f"caption_{name}"].transpose(
                0, 1
            )  # (1|2, B, L): all change captions, then all distractors'
            for name in ("input_ids", "mask", "target_ids")
        )
        counts = (
            (target != IGNORED).sum(dim=(1, 2)).float()
        )  # tokens of each kind, of all processes
        scale = 1
        if dist.is_initialized():
            dist.all_reduce(counts)
            scale = dist.get_world_size()  # undone by DistributedDataParallel's mean
        weights = (scale / counts.clamp(min=1))[:, None, None].expand_as(target)
        return self.model.caption_loss(
            pairs.tokens, *(part.flatten(0, 1) for part in (ids, mask, target, weights))
        )


class SelfCriticalStep(nn.Module):
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
            for _ in range(DRAWN)
        ]
        rows = target.flatten(0, 1)
        sot, eot = self.model.vocab_size - 2, self.model.vocab_size - 1
        sentences = [simple_tokens(decode(row), ended=eot in row) for row in rows.tolist()]
        rewards = torch.tensor(self.reward(keys, sentences), device=tokens.device).view(-1, DRAWN)
        above_others = (rewards - rewards.mean(dim=1, keepdim=True)) * DRAWN / (DRAWN - 1)
        weights = (above_others / rewards.numel()).view(-1, 1).expand_as(rows)
        ids = torch.cat([torch.full_like(rows[:, :1], sot), rows[:, :-1]], dim=1)
        mask = (rows != IGNORED).long()  # a word's place is known by its target
        raised = self.model.caption_loss(tokens, ids, mask, rows, weights)
        return raised - raised.detach() - rewards.mean()

    @torch.no_grad()
    def _draw(self, tokens: Tensor) -> Tensor:
        """Captions (pairs, DRAWN, L) as the model writes them without dropout."""
        training = self.model.training
        self.model.eval()
        drawn = sample(
            self.model, tokens, torch.rand(len(tokens), DRAWN, self.max_words, device=tokens.device)
        )
        self.model.train(training)
        return drawn

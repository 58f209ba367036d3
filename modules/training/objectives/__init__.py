"""What a training minimises: batch → loss, and the samples and optimizer settings that go with it.

A new objective is a subclass of `Objective` and one line in `modules/registries.py`.
"""

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from dataloaders.pairs import ImagePair
from dataloaders.samples import PairSamples
from modules.clip4idc import CLIP4IDC


class Recipe(NamedTuple):
    """The optimizer's settings that belong to an objective (docs/reference.md, Optimization)."""

    schedule: str
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    # Epochs in a row without a better score, after which training stops; None: it never does.
    patience: int | None


class TrainingData(NamedTuple):
    """What an objective may want to know beside the batches."""

    pairs: Sequence[ImagePair]
    max_words: int
    num_workers: int = 0


class Objective(nn.Module):
    """Batch → scalar loss. With several processes the gradient is that of the whole batch.

    It is wrapped in DistributedDataParallel, which averages gradients over the processes: what an
    objective sums over all of them it multiplies by their number, as `CrossEntropy` does.
    """

    task: ClassVar[str]  # "retrieval" or "caption": the model that it trains
    samples: ClassVar[type[PairSamples]]
    recipe: ClassVar[Recipe]
    needs_captioner: ClassVar[bool] = False  # whether the captioner must have been trained before

    def __init__(self, model: CLIP4IDC, data: TrainingData) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """The tensors that `samples` gave, B of each, on the model's device → loss ()."""
        raise NotImplementedError

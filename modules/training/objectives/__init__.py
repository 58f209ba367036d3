"""What training minimizes: batch → loss, with its samples and optimizer settings.

A new objective is a subclass of `Objective` and one line in `modules/registries.py`.
"""

from abc import ABC, abstractmethod
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
    # Without --patience, training ends after this many epochs in a row without a better score, once
    # an epoch has scored. None: never.
    patience: int | None


class TrainingData(NamedTuple):
    """What an objective may need besides the batches."""

    pairs: Sequence[ImagePair]
    max_words: int
    num_workers: int = 0


class Objective(nn.Module, ABC):
    """Batch → scalar loss. With several processes the gradient is that of the whole batch.

    It is wrapped in DistributedDataParallel, which averages gradients over the processes. So an
    objective that sums over processes must multiply by the number of processes, as `CrossEntropy`
    does.
    """

    task: ClassVar[str]  # "retrieval" or "caption": the model that it trains
    samples: ClassVar[type[PairSamples]]
    recipe: ClassVar[Recipe]
    needs_captioner: ClassVar[bool] = False  # whether it starts from a trained captioner
    fewest_pairs: ClassVar[int] = 1  # of a batch, on all processes, from which it can learn

    def __init__(self, model: CLIP4IDC, data: TrainingData) -> None:
        super().__init__()
        self.model = model

    @abstractmethod
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """A batch (the tensors from `samples`, on the model's device) → scalar loss."""

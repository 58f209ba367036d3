"""The models that have a name: what each one knows, where it is, and how well it does.

A new model is one more entry of `MODELS`. `--init_model`, `Predictor.load` and `clip4idc models`
then know its name. Importing this file needs no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from system.registry import Registry

BUNDLED = "demo"  # the model that comes with the code


@dataclass(frozen=True)
class KnownModel:
    """A model of the table.

    `location` is a path below ckpts/, a URL, or owner/name@revision on the Hugging Face hub.
    `get_it` is the command that downloads a model below ckpts/ which does not come with the code.
    `scores` are named as in metrics.json, and `scores_from` says on what and by whom they were
    measured. `settings` stand in for a missing model.json. None as `sha256`: nobody has told it.
    """

    location: str
    stage: str
    knows: str
    trained_on: str
    licence: str
    scores: Mapping[str, float] = field(default_factory=dict)
    scores_from: str = ""
    caution: str = ""
    sha256: str | None = None
    get_it: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def limits(self) -> str:
        """A sentence that says which pictures the model understands."""
        ending = f"; {self.caution}" if self.caution else ""
        return f"It knows only {self.knows}{ending}."


CAPTIONER = "captioner"
ADAPTED = "adapted CLIP"

MODELS = Registry(
    "model",
    {
        BUNDLED: KnownModel(
            location="demo/model.safetensors",
            stage=CAPTIONER,
            knows=(
                "drawn scenes like CLEVR's, in which one simple solid appears, disappears, moves, "
                "or changes its color or material"
            ),
            caution="expect nonsense on photographs",
            trained_on="50,000 drawn scenes",
            licence="MIT",
            sha256="da5ff1871b417c7aaf893afdc7c63f99bfa3dfb626924361c2d20e40314d3020",
            scores={"CIDEr": 1.531},
            scores_from="2,000 drawn scenes that it was not trained on",
        ),
    },
    package=__package__,
    group="clip4idc.models",
    members=("location", "stage", "limits", "trained_on", "licence"),
)

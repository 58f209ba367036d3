"""The models that have a name: what each one knows, where it is, and how well it does.

A new model is one more entry of `MODELS`. `--init_model`, `Predictor.load` and `clip4idc models`
then know its name. Importing this file needs no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from system.places import list_ckpts_folders
from system.registry import Registry

BUNDLED = "demo"  # the model that comes with the code
CKPTS = "ckpts/"  # what a location begins with that is a path
CAPTIONER = "captioner"
ADAPTED = "adapted CLIP"


@dataclass(frozen=True)
class KnownModel:
    """A model of the table.

    `location` is a path that begins with ckpts/, a URL, or owner/name@revision on the Hugging Face
    hub. `get_it` is the command that brings a model below ckpts/. `scores` are named as in
    metrics.json; `scores_from` says on what and by whom they were measured. `sha256` is that of the
    file of weights, None if its authors do not publish it. `settings` stand in for a missing
    model.json.
    """

    location: str
    stage: str
    knows: str
    trained_on: str
    license: str
    scores: Mapping[str, float]
    scores_from: str
    caution: str = ""
    sha256: str | None = None
    get_it: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_in_ckpts(self) -> bool:
        """Whether its file is below ckpts/: it comes with the code, or a command downloads it."""
        return self.location.startswith(CKPTS)

    def find_here(self) -> Path | None:
        """Its file below ckpts/, if it is there."""
        name = self.location.removeprefix(CKPTS)
        paths = [folder / name for folder in list_ckpts_folders()]
        return next((path for path in paths if path.is_file()), None)

    @property
    def limits(self) -> str:
        """A sentence that says which pictures the model understands."""
        ending = f"; {self.caution}" if self.caution else ""
        return f"It knows only {self.knows}{ending}."


STREETS = "frames of fixed surveillance cameras, mostly of streets and parking lots"
SOLIDS = "rendered scenes of CLEVR's solids"
AUTHORS_README = "the authors' README, not measured here"
AUTHORS_LICENSE = "MIT for their code; none stated for the weights"
GET_CAPTIONERS = "python -m clip4idc download trained"
GET_ADAPTED = "python -m clip4idc download pretrained"
# The options of the published commands that shapes do not tell.
PUBLISHED_SETTINGS = {"intra_num_hidden_layers": 9, "linear_patch": "2d", "max_words": 32}

MODELS = Registry(
    "model",
    {
        BUNDLED: KnownModel(
            location="ckpts/demo/model.safetensors",
            stage=CAPTIONER,
            knows=(
                "drawn scenes like CLEVR's, in which one simple solid appears, disappears, moves, "
                "or changes its color or material"
            ),
            caution="expect nonsense on photographs",
            trained_on="50,000 drawn scenes",
            license="MIT",
            scores={"CIDEr": 1.531},
            scores_from="2,000 drawn scenes that it was not trained on",
            get_it="git checkout ckpts/demo",
            sha256="da5ff1871b417c7aaf893afdc7c63f99bfa3dfb626924361c2d20e40314d3020",
        ),
        "authors-spot": KnownModel(
            location="ckpts/trained/pytorch_model.bin.spot",
            stage=CAPTIONER,
            knows=STREETS,
            trained_on="Spot-the-Diff",
            license=AUTHORS_LICENSE,
            scores={"Bleu_4": 0.1160, "METEOR": 0.1419, "ROUGE_L": 0.3502, "CIDEr": 0.4735},
            scores_from=AUTHORS_README,
            get_it=GET_CAPTIONERS,
            settings=PUBLISHED_SETTINGS,
        ),
        "authors-clevr": KnownModel(
            location="ckpts/trained/pytorch_model.bin.clevr",
            stage=CAPTIONER,
            knows=SOLIDS,
            trained_on="CLEVR-Change",
            license=AUTHORS_LICENSE,
            scores={"Bleu_4": 0.5687, "METEOR": 0.3840, "ROUGE_L": 0.7643, "CIDEr": 1.5075},
            scores_from=AUTHORS_README,
            get_it=GET_CAPTIONERS,
            settings=PUBLISHED_SETTINGS,
        ),
        "authors-spot-adapted": KnownModel(
            location="ckpts/pretrained/pytorch_model.bin.spot",
            stage=ADAPTED,
            knows=STREETS,
            trained_on="Spot-the-Diff",
            license=AUTHORS_LICENSE,
            scores={},
            scores_from="",
            get_it=GET_ADAPTED,
            settings=PUBLISHED_SETTINGS,
        ),
        "authors-clevr-adapted": KnownModel(
            location="ckpts/pretrained/pytorch_model.bin.clevr",
            stage=ADAPTED,
            knows=SOLIDS,
            trained_on="CLEVR-Change",
            license=AUTHORS_LICENSE,
            scores={"text_to_pair_R1": 26.8, "text_to_pair_R5": 58.7, "text_to_pair_R10": 70.0},
            scores_from=AUTHORS_README,
            get_it=GET_ADAPTED,
            settings=PUBLISHED_SETTINGS,
        ),
    },
    package=__package__,
    group="clip4idc.models",
    members=("location", "stage", "limits", "trained_on", "license", "scores", "sha256"),
)


def find_name(path: Path) -> str | None:
    """The name of the model below ckpts/ whose file this is; None for any other file.

    Installed packages have no models below ckpts/, so theirs are not looked at.
    """
    for name, model in MODELS.targets.items():
        here = model.find_here() if model.is_in_ckpts else None
        if here is not None and path.exists() and here.samefile(path):
            return name
    return None

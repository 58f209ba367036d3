"""A model as a small folder to share: float16 weights, model.json, a README. Its way to the hub."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelHubMixin
from torch import Tensor

from modules.weights.hub import explain_hub_error
from modules.weights.model_card import CardFacts, check_datasets, check_license, make_card
from modules.weights.model_info import MODEL_INFO_FILE, write_model_info
from modules.weights.tensor_files import write_safetensors
from system.files import atomic_write, refuse_existing

WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True)
class Publication:
    """What its publisher says of a model. Raises ValueError for an impossible license or dataset.

    `trained_on` and `license` are those of model.json where they are "".
    """

    name: str = ""
    trained_on: str = ""
    license: str = ""
    datasets: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.license:
            check_license(self.license)
        check_datasets(self.datasets)


def pack_weights(
    state: Mapping[str, Tensor], tied_keys: Collection[str], source: str
) -> dict[str, Tensor]:
    """A model's tensors in float16, tied ones once.

    Raises ValueError, which names `source`, for values that float16 cannot hold.
    """
    weights = {
        key: value.half().contiguous() for key, value in state.items() if key not in tied_keys
    }
    for key, value in weights.items():
        if not value.isfinite().all():
            raise ValueError(f"{source}: {key} has values that float16 cannot hold")
    return weights


def write_model_folder(
    folder: Path,
    task: str,
    weights: Mapping[str, Tensor],
    info: Mapping[str, Any],
    publication: Publication,
    scores: Mapping[str, Any],
) -> None:
    """Write model.safetensors, model.json and README.md.

    `info` is the content of model.json so far, `scores` that of a metrics.json ({}: there is none).
    Raises ValueError, before anything is written, for a folder that holds anything, or if nothing
    says what the model was trained on.
    """
    refuse_existing(folder)
    info = _complete_info(info, publication)
    facts = CardFacts(
        name=publication.name or folder.resolve().name,
        task=task,
        parameters=sum(weight.numel() for weight in weights.values()),
        info=info,
        scores=scores,
        datasets=publication.datasets,
    )
    card = make_card(facts)
    write_safetensors(folder / WEIGHTS_FILE, weights)
    write_model_info(folder / MODEL_INFO_FILE, info)
    with atomic_write(folder / "README.md") as temporary:
        temporary.write_text(card, encoding="utf-8")


def _complete_info(info: Mapping[str, Any], publication: Publication) -> dict[str, Any]:
    """What model.json says, with what the publication adds."""
    trained_on = (publication.trained_on or info.get("trained_on") or "").strip()
    if not trained_on:
        raise ValueError("trained_on is missing: say what the model was trained on")
    added = {"trained_on": trained_on}
    if publication.license:
        added["license"] = publication.license
    return {**info, **added}


class _SharedFolder(ModelHubMixin):
    """What the hub's own way to push a model asks for: something that writes a folder."""

    def __init__(self, write: Callable[[Path], None]) -> None:
        self._write = write

    def _save_pretrained(self, save_directory: Path) -> None:
        self._write(save_directory)


def push_model(
    repo_id: str,
    task: str,
    weights: Mapping[str, Tensor],
    info: Mapping[str, Any],
    publication: Publication,
    scores: Mapping[str, Any],
    **hub_options: Any,
) -> str:
    """Upload the files of `write_model_folder` to owner/name on the hub; returns the commit's URL.

    `hub_options` are those of huggingface_hub.ModelHubMixin.push_to_hub. Raises ValueError as
    `write_model_folder` does, and OSError if the hub refuses or cannot be reached.
    """
    named = replace(publication, name=publication.name or repo_id)
    _complete_info(info, named)  # what is missing is told before anything is created on the hub

    def write(folder: Path) -> None:
        write_model_folder(folder, task, weights, info, named, scores)

    try:
        return _SharedFolder(write).push_to_hub(repo_id, **hub_options)
    except (ValueError, TypeError):
        raise
    except Exception as error:  # which errors it raises differs from version to version
        reason = explain_hub_error(error)
        raise OSError(f"{repo_id} could not be pushed to the Hugging Face hub: {reason}") from None

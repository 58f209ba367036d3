"""`from_pretrained`, `save_pretrained` and `push_to_hub`, as Python users know them from the hub.

model_folder.py does the work. It is imported only when a model is saved, because `huggingface_hub`,
with which it begins, takes half a second.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor

from modules.weights.hub import HubAccess
from system.json_files import read_json


@dataclass(frozen=True)
class Origin:
    """Where a model's weights come from: their name, and what model.json says of them."""

    name: str = ""
    info: Mapping[str, Any] = field(default_factory=dict)


class _Model(Protocol):
    """What is shared: a CLIP4IDC."""

    task: str
    tied_keys: Mapping[str, str]

    def state_dict(self) -> Mapping[str, Tensor]: ...

    def info(self, max_words: int) -> dict[str, Any]: ...


Self = TypeVar("Self", bound="Shareable")


class Shareable:
    """The hub's methods, for a class that has `model`, `max_words`, `origin` and `load`."""

    model: _Model
    max_words: int
    origin: Origin

    @classmethod
    def from_pretrained(
        cls: type[Self],
        name: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        **load_options: Any,
    ) -> Self:
        """`load`, with the hub's own options for a model that is there, as owner/name.

        `revision` is a branch, a tag or a commit. `token` opens private models; without it, that of
        `hf auth login` does. Raises ValueError or OSError as `load` does.
        """
        return cls.load(
            f"{name}@{revision}" if revision else name,
            cache_dir=None if cache_dir is None else str(cache_dir),
            hub=HubAccess(token, force_download, local_files_only),
            **load_options,
        )

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        trained_on: str = "",
        license: str = "",
        datasets: Sequence[str] = (),
        metrics: str | Path | None = None,
        name: str = "",
    ) -> None:
        """Write the model into a folder: float16 weights, model.json, and a README for the hub.

        `trained_on` says in words what the model was trained on; it may be left out where its
        model.json says so. `license` is the hub's name of one, such as mit, and `datasets` are the
        hub's names. `metrics` is the metrics.json of an evaluation of these weights, whose scores
        the README then shows. `name` is its heading (default: the folder's name). Raises ValueError
        for what is missing or wrong, and for a folder that holds anything.
        """
        from modules.weights.model_folder import write_model_folder

        described = self._describe(trained_on, license, datasets, metrics, name)
        write_model_folder(Path(folder), *described)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        trained_on: str = "",
        license: str = "",
        datasets: Sequence[str] = (),
        metrics: str | Path | None = None,
        name: str = "",
        **hub_options: Any,
    ) -> str:
        """Upload what `save_pretrained` writes to owner/name on the hub; returns the commit's URL.

        `hub_options` are private, token, branch, create_pr and commit_message, as in
        huggingface_hub. Raises ValueError as `save_pretrained` does, and OSError if the hub refuses
        or cannot be reached.
        """
        from modules.weights.model_folder import push_model

        described = self._describe(trained_on, license, datasets, metrics, name)
        return push_model(repo_id, *described, **hub_options)

    def _describe(
        self,
        trained_on: str,
        license: str,
        datasets: Sequence[str],
        metrics: str | Path | None,
        name: str,
    ) -> tuple[Any, ...]:
        """What model_folder.py asks for: task, weights, info, publication, scores."""
        from modules.weights.model_folder import Publication, pack_weights

        publication = Publication(name, trained_on, license, datasets)
        weights = pack_weights(self.model.state_dict(), self.model.tied_keys, self.origin.name)
        info = {**self.origin.info, **self.model.info(self.max_words)}
        scores = read_json(Path(metrics), dict) if metrics else {}
        return self.model.task, weights, info, publication, scores

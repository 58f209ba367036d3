"""Models on the Hugging Face hub: by owner/name, with the hub's own cache and access tokens."""

import logging
import re
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from modules.weights.remote import SIDECAR_FILES, WEIGHT_FILES
from modules.weights.tensor_files import INDEX_ENDING
from system.escaping import summarize_error
from system.files import choose_cache_folder
from system.places import list_ckpts_folders

# What helps against the errors of huggingface_hub, by the names of their classes, which differ
# from version to version; the first that fits.
ADVICE = {
    "GatedRepoError": "ask its owner for access, on its page; then log in with hf auth login",
    "RepositoryNotFoundError": (
        "the hub has no such model, or it is private: log in with hf auth login, or set HF_TOKEN"
    ),
    "RevisionNotFoundError": "it has no such revision",
    "LocalTokenNotFoundError": "log in with hf auth login, or set HF_TOKEN",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE forbids downloads, and it is not in the hub's cache",
    "ConnectError": "the hub cannot be reached; check the network, proxy and HF_ENDPOINT",
}
STATUS_ADVICE = {
    401: "log in with hf auth login, or set HF_TOKEN",
    403: "your token has no right to do this",
}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HubAccess:
    """How to download from the hub; the fields are those of huggingface_hub's functions."""

    token: str | bool | None = None
    force_download: bool = False
    local_files_only: bool = False


def may_be_on_hub(name: str) -> bool:
    """Whether a name has the form owner/name[@revision].

    Not if it contains .bin, or if the folder that it would be in exists here.
    """
    looks_like_repository = re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", name) is not None
    places = (Path(), *list_ckpts_folders())
    is_folder_here = any((place / name).parent.is_dir() for place in places)
    return looks_like_repository and ".bin" not in name and not is_folder_here


def fetch_from_hub(name: str, cache_dir: str | None, access: HubAccess = HubAccess()) -> Path:
    """The folder of a model on the Hugging Face hub: its weights and what describes them.

    Without a connection, what was downloaded earlier is used. Raises OSError if the hub has no such
    model.
    """
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs each attempt
    cache = cache_dir and choose_cache_folder(cache_dir) / "hub"
    reason = "it was not downloaded earlier, and local_files_only is set"
    if not access.local_files_only:
        try:
            return _download(name, cache, access)
        except Exception as error:  # which errors it raises differs from version to version
            reason = explain_hub_error(error)
    cached = None if access.force_download else _find_in_cache(name, cache)
    if cached is None:
        places = " and ".join(map(str, list_ckpts_folders()))
        raise OSError(
            f"{name} is not a path here or in {places}, and it could not be downloaded from the "
            f"Hugging Face hub: {reason}"
        )
    if not access.local_files_only:
        log.warning("%s: using what was downloaded earlier, since %s", name, reason)
    return cached


def _download(name: str, cache: Path | str | None, access: HubAccess) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    repository, _, revision = name.partition("@")
    found = HfApi(token=access.token).model_info(repository, revision=revision or None)
    folder = snapshot_download(
        repository,
        revision=revision or None,
        cache_dir=cache,
        allow_patterns=_choose_files([file.rfilename for file in found.siblings]),
        token=access.token,
        force_download=access.force_download,
    )
    return Path(folder)


def _find_in_cache(name: str, cache: Path | str | None) -> Path | None:
    """The folder of a model that was downloaded earlier."""
    from huggingface_hub import try_to_load_from_cache

    repository, _, revision = name.partition("@")
    for file in WEIGHT_FILES:
        path = try_to_load_from_cache(repository, file, cache_dir=cache, revision=revision or None)
        if isinstance(path, str):  # it has another value for a file that the model does not have
            return Path(path).parent
    return None


def explain_hub_error(error: Exception) -> str:
    """What was wrong and what helps, in one line."""
    names = [kind.__name__ for kind in type(error).__mro__]
    advice = next((text for name, text in ADVICE.items() if name in names), None)
    if advice is None:
        response = getattr(error, "response", None)
        advice = STATUS_ADVICE.get(getattr(response, "status_code", None))
    summary = summarize_error(error)
    return f"{advice} ({summary})" if advice else summary


def _choose_files(present: Collection[str]) -> list[str]:
    """The first file of weights in a repository, with its parts, and the files that describe it."""
    weights = [file for file in WEIGHT_FILES if file in present][:1]
    parts: list[str] = []
    if weights and weights[0].endswith(INDEX_ENDING):
        stem, _, ending = weights[0].removesuffix(INDEX_ENDING).rpartition(".")
        parts = [file for file in present if re.fullmatch(rf"{stem}-\d+-of-\d+\.{ending}", file)]
    sidecars = [file for file in SIDECAR_FILES if file in present]
    return [*weights, *parts, *sidecars]

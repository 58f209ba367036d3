"""TODO."""

import logging
import re
from contextlib import suppress
from pathlib import Path

from modules.weights.configs import HUGGING_FACE_CONFIG, OPEN_CLIP_CONFIG
from modules.weights.model_info import MODEL_INFO_FILE
from modules.weights.tensor_files import read_weights
from system.download import HtmlInsteadOfFile, cache_path, fetch
from system.files import cache_folder, error_line, sha256_of
from system.json_files import read_json
from system.urls import Address

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[2]
# What a folder in the place of a file means: ours, a run's, open_clip's; Hugging Face's have the names of the first and fourth.
WEIGHT_FILES = (
    "model.safetensors",
    "pytorch_model.bin.best",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)


SIDECAR_FILES = (
    MODEL_INFO_FILE,
    HUGGING_FACE_CONFIG,
    OPEN_CLIP_CONFIG,
)  # what may stand beside weights and says what they are


OPENAI = "https://openaipublic.azureedge.net/clip/models"


CLIP_SHA256 = {
    "ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    "ViT-L/14@336px": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
}


def openai_clip(name: str, cache_dir: str | None) -> Path:
    """One of OpenAI's CLIPs: in modules/, in ckpts/, in the cache, else downloaded."""
    file, sha256 = openai_file_name(name), CLIP_SHA256[name]
    for path in (ROOT / "modules" / file, ROOT / "ckpts" / file):
        if path.is_file():
            if sha256_of(path) != sha256:
                log.warning(
                    "%s is not the %s that OpenAI published: its SHA-256 is another", path, name
                )
            return path
    return download_openai_clip(name, cache_folder(cache_dir), ROOT / "modules")


def download_openai_clip(name: str, folder: Path, place: Path) -> Path:
    """One of OpenAI's CLIPs, downloaded into a folder. ValueError for a name that is not theirs; OSError where it cannot be had,
    which tells to put it into `place`."""
    if name not in CLIP_SHA256:
        raise ValueError(f"no CLIP of OpenAI's is called {name}: they are {', '.join(CLIP_SHA256)}")
    file, sha256 = openai_file_name(name), CLIP_SHA256[name]
    url = f"{OPENAI}/{sha256}/{file}"
    try:
        return fetch(url, folder / file, sha256)
    except OSError as error:
        raise OSError(
            f"{name} is not here and cannot be downloaded ({error_line(error)}): put {url} (SHA-256 {sha256}) into {place}"
        ) from None


def openai_file_name(name: str) -> str:
    return name.replace("/", "-").replace("@", "-") + ".pt"


def from_url(url: Address, cache_dir: str | None) -> Path:
    """The file at an address, kept in the cache, and beside it what says what it is."""
    folder, shelf, name = cache_path(url, cache_dir)
    target = shelf / name

    def look(part: Path) -> None:
        read_weights(part)
        if url != folder.joined(name):  # signed addresses have no neighbours
            return
        for beside in (f"{name}.json", *SIDECAR_FILES):
            with suppress(
                FileNotFoundError, PermissionError, HtmlInsteadOfFile
            ):  # which all mean that there is none
                fetch(
                    folder.joined(beside),
                    shelf / beside,
                    check=lambda part: read_json(part, dict) and None,
                )

    if target.is_file():
        log.info("%s was brought before; remove it to bring it anew", target)
    return fetch(url, target, check=look)


def may_be_on_hub(name: str) -> bool:
    """Whether it is written like owner/name[@revision], and its first part is no folder here."""
    return (
        re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.-]+)?", name) is not None
        and ".bin" not in name
        and not any((place / name).parent.is_dir() for place in (Path(), ROOT / "ckpts"))
    )


def from_hub(name: str, cache_dir: str | None) -> Path:
    """A model's folder from the Hugging Face hub: its weights, and what says what they are."""
    from huggingface_hub import HfApi, snapshot_download

    repository, _, revision = name.partition("@")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells each of its attempts
    where = {
        "repo_id": repository,
        "revision": revision or None,
        "cache_dir": cache_dir and cache_folder(cache_dir) / "hub",
    }
    try:
        there = HfApi().list_repo_files(repository, revision=revision or None)
        wanted = [file for file in WEIGHT_FILES if file in there][:1] + [
            file for file in SIDECAR_FILES if file in there
        ]
        return Path(snapshot_download(**where, allow_patterns=wanted))
    except (
        Exception
    ) as error:  # its HTTP library, and with that the errors, is another from version to version
        with suppress(Exception):
            return Path(snapshot_download(**where, local_files_only=True))
        raise OSError(
            f"{name} is neither a path here or in {ROOT / 'ckpts'} nor to be had from the Hugging Face hub: "
            f"{error_line(error)}"
        ) from None

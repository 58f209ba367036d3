"""Downloads of weights: OpenAI's CLIPs by name, files at a URL. hub.py has the Hugging Face hub."""

import logging
from contextlib import suppress
from pathlib import Path

from modules.weights.configs import HUGGING_FACE_CONFIG, OPEN_CLIP_CONFIG
from modules.weights.model_info import MODEL_INFO_FILE
from modules.weights.tensor_files import read_weights
from system.download import HtmlInsteadOfFile, fetch, locate_in_cache
from system.escaping import summarize_error
from system.files import choose_cache_folder, compute_sha256
from system.json_files import read_json
from system.places import choose_downloads_folder, list_ckpts_folders
from system.urls import Location

log = logging.getLogger(__name__)

# Which file a folder's name means, the first that is there. The first and the fourth are names of
# Hugging Face's too, the second is a run's, the third and the fifth are open_clip's.
WEIGHT_FILES = (
    "model.safetensors",
    "pytorch_model.bin.best",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
    # The lists of weights in several files.
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)
# Files next to weights that describe them.
SIDECAR_FILES = (MODEL_INFO_FILE, HUGGING_FACE_CONFIG, OPEN_CLIP_CONFIG)
OPENAI = "https://openaipublic.azureedge.net/clip/models"
CLIP_SHA256 = {
    "ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    "ViT-L/14@336px": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
}


def find_openai_clip(name: str, cache_dir: str | None) -> Path:
    """The file of one of OpenAI's CLIPs: from modules/, ckpts/ or the cache, else downloaded."""
    file = openai_file_name(name)
    modules = choose_downloads_folder() / "modules"
    for folder in (modules, *list_ckpts_folders()):
        path = folder / file
        if path.is_file():
            _warn_of_other_content(path, name)
            return path
    return download_openai_clip(name, choose_cache_folder(cache_dir), modules)


def _warn_of_other_content(path: Path, name: str) -> None:
    if compute_sha256(path) != CLIP_SHA256[name]:
        log.warning("%s is not the %s that OpenAI published: its SHA-256 differs", path, name)


def download_openai_clip(name: str, folder: Path, manual_folder: Path) -> Path:
    """Download one of OpenAI's CLIPs into a folder.

    Raises ValueError for a name that OpenAI does not have, and OSError if the download fails; its
    message says to put the file into `manual_folder` by hand.
    """
    if name not in CLIP_SHA256:
        raise ValueError(f"OpenAI has no CLIP called {name}: it has {', '.join(CLIP_SHA256)}")
    file = openai_file_name(name)
    sha256 = CLIP_SHA256[name]
    url = f"{OPENAI}/{sha256}/{file}"
    try:
        return fetch(url, folder / file, sha256)
    except OSError as error:
        raise OSError(
            f"{name} is not here and cannot be downloaded ({summarize_error(error)}): "
            "start from the small model that ships with CLIP4IDC (--init_model demo), or put "
            f"{url} (SHA-256 {sha256}) into {manual_folder}"
        ) from None


def openai_file_name(name: str) -> str:
    """`ViT-B/32` → `ViT-B-32.pt`."""
    return name.replace("/", "-").replace("@", "-") + ".pt"


def fetch_from_url(url: Location, cache_dir: str | None, sha256: str | None = None) -> Path:
    """The file at a URL, downloaded into the cache together with the files that describe it.

    Raises OSError if it cannot be downloaded or has another checksum than `sha256`, or ValueError
    if it is not a file of weights.
    """
    _, cached_folder, name = locate_in_cache(url, cache_dir)
    target = cached_folder / name

    def check(part: Path) -> None:
        read_weights(part)
        _download_sidecars(url, cache_dir)

    if target.is_file():
        log.info("using %s, downloaded earlier; delete it to download it again", target)
    return fetch(url, target, sha256, check)


def _download_sidecars(url: Location, cache_dir: str | None) -> None:
    """Download the files next to weights at a URL that describe them."""
    folder, cached_folder, name = locate_in_cache(url, cache_dir)
    if url != folder.joined(name):  # a signed URL opens this one file only
        return
    for beside in (f"{name}.json", *SIDECAR_FILES):
        # These three errors mean that there is no such file.
        with suppress(FileNotFoundError, PermissionError, HtmlInsteadOfFile):
            fetch(folder.joined(beside), cached_folder / beside, check=_check_json)


def _check_json(path: Path) -> None:
    read_json(path, dict)

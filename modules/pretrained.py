"""Where weights come from: CLIP's names, files, URLs (SPEC §2, Weights). How they are read: weight_files.py."""

import hashlib
import logging
from pathlib import Path
from urllib.parse import urlparse

from torch import Tensor
from tqdm import tqdm

from modules.clip import CLIP, ClipSizes
from modules.clip4idc import PAIR_KEYS, holds_all_of_clip, released_names
from modules.files import BLOCK, cache_folder, file_sha256, read_json, short, written_at_once
from modules.weight_files import read_weights

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
OPENAI = "https://openaipublic.azureedge.net/clip/models"
CLIP_SHA256 = {
    "ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    "ViT-L/14@336px": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
}

IN_FOLDERS = ("model.safetensors", "pytorch_model.bin.best")  # what a folder in the place of a file means


def load_weights(init_model: str | None, clip_name: str, cache_dir: str | None = None) -> dict[str, Tensor]:
    """Tensors under the released names: init_model's, else the CLIP's. CLIP is not touched where init_model holds all of it.

    Raises ValueError or OSError with what to do for anything that cannot be found or read.
    """
    weights = read_weights(find_checkpoint(init_model, cache_dir)) if init_model else {}
    weights = released_names(weights) if weights else {}
    if holds_all_of_clip(weights):
        return weights
    return {**released_names(_load_clip(clip_name, cache_dir)), **weights}


def find_checkpoint(name: str, cache_dir: str | None = None) -> Path:
    """A checkpoint as given, below ckpts/, or behind a URL; of a folder its model or its run's best weights."""
    if urlparse(name).scheme in ("https", "http", "s3"):
        return fetch(name, cache_dir)
    tried = [Path(name), ROOT / "ckpts" / name]
    for path in tried:
        found = [path] if path.is_file() else [path / file for file in IN_FOLDERS if (path / file).is_file()]
        if found:
            log.info("weights from %s", found[0])
            return found[0]
        if path.is_dir():
            raise FileNotFoundError(f"{path} is a folder without {' or '.join(IN_FOLDERS)}: name the file of weights")
    raise FileNotFoundError(f"no checkpoint {name}: tried {' and '.join(map(str, tried))}")


def _load_clip(name: str, cache_dir: str | None) -> dict[str, Tensor]:
    if name.endswith(".json"):
        log.info("CLIP of random weights in the sizes of %s", name)
        return random_clip(name)
    path = _find_clip(name, cache_dir)
    log.info("CLIP from %s", path)
    return read_weights(path)


def _find_clip(name: str, cache_dir: str | None) -> Path:
    if urlparse(name).scheme in ("https", "http", "s3"):
        return fetch(name, cache_dir)
    if name not in CLIP_SHA256:
        if Path(name).is_file():
            return Path(name)
        raise FileNotFoundError(f"unknown CLIP {name!r}: neither a file nor one of {', '.join(CLIP_SHA256)}")
    file = name.replace("/", "-").replace("@", "-") + ".pt"
    for folder in (ROOT / "modules", ROOT / "ckpts", cache_folder(cache_dir)):
        if (folder / file).is_file():
            return folder / file
    url = f"{OPENAI}/{CLIP_SHA256[name]}/{file}"
    try:
        return fetch(url, cache_dir, sha256=CLIP_SHA256[name])
    except OSError as error:
        raise OSError(f"{name} is not here and cannot be downloaded ({short(error)}): put {url} (SHA-256 {CLIP_SHA256[name]}) "
                      f"into {ROOT / 'modules'}") from None


def random_clip(path: str | Path) -> dict[str, Tensor]:
    """Random weights, initialised as OpenAI's, of the sizes in a JSON file; OpenAI's names."""
    state = CLIP(read_sizes(path), intra_layers=0, linear_patch="2d").state_dict()
    return {key: value for key, value in state.items() if key.removeprefix("visual.") not in PAIR_KEYS}


def read_sizes(path: str | Path) -> ClipSizes:
    """The sizes of a CLIP in a JSON file. Raises ValueError for others than exactly these."""
    values = read_json(path, dict)
    try:
        return ClipSizes(**values)
    except TypeError as error:
        raise ValueError(f"{path}: {short(error).removeprefix('ClipSizes.__init__() ')}; expected exactly the sizes "
                         f"{', '.join(ClipSizes.__dataclass_fields__)}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def fetch(url: str, cache_dir: str | None = None, sha256: str | None = None) -> Path:
    """Download https://… or s3://bucket/key into the cache, once; checked by SHA-256 where one is known."""
    name = Path(urlparse(url).path).name or "weights"
    target = cache_folder(cache_dir) / (name if sha256 else f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{name}")
    if target.is_file():
        return target
    log.info("downloading %s to %s", url, target)
    with written_at_once(target) as temporary:
        (_fetch_s3 if url.startswith("s3:") else _fetch_https)(url, temporary)
        if sha256 and file_sha256(temporary) != sha256:
            raise OSError(f"{url} does not have the SHA-256 {sha256}: the download is damaged, try again")
    return target


def _fetch_https(url: str, target: Path) -> None:
    import requests

    with requests.get(url, stream=True, timeout=30) as answer:
        answer.raise_for_status()
        size = int(answer.headers.get("content-length", 0))
        with open(target, "wb") as file, tqdm(total=size or None, unit="B", unit_scale=True, disable=None) as bar:
            for block in answer.iter_content(BLOCK):
                bar.update(file.write(block))
    if size and target.stat().st_size != size:
        raise OSError(f"{url} broke off after {target.stat().st_size} of {size} bytes: try again")


def _fetch_s3(url: str, target: Path) -> None:
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    place = urlparse(url)
    try:
        boto3.client("s3").download_file(place.netloc, place.path.lstrip("/"), str(target))
    except (BotoCoreError, ClientError) as error:
        raise OSError(f"cannot get {url}: {short(error)}") from None

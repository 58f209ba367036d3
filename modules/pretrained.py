"""Where weights come from, and how they are read without running code: CLIP's names, files, URLs (SPEC §2, Weights)."""

import hashlib
import io
import json
import logging
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import Tensor
from tqdm import tqdm

from modules.clip import CLIP, ClipSizes
from modules.clip4idc import PAIR_KEYS, holds_all_of_clip, released_names
from modules.files import BLOCK, cache_folder, file_sha256, read_json, written_at_once

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
        raise OSError(f"{name} is not here and cannot be downloaded ({_short(error)}): put {url} (SHA-256 {CLIP_SHA256[name]}) "
                      f"into {ROOT / 'modules'}") from None


def random_clip(path: str | Path) -> dict[str, Tensor]:
    """Random weights, initialised as OpenAI's, of the sizes in a JSON file; OpenAI's names."""
    values = read_json(path, dict)
    try:
        sizes = ClipSizes(**values)
    except TypeError as error:
        raise ValueError(f"{path}: {str(error).removeprefix('ClipSizes.__init__() ')}; expected exactly the sizes "
                         f"{', '.join(ClipSizes.__dataclass_fields__)}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    state = CLIP(sizes, intra_layers=0, linear_patch="2d").state_dict()
    return {key: value for key, value in state.items() if key.removeprefix("visual.") not in PAIR_KEYS}


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a state-dict pickle, a safetensors file or an OpenAI TorchScript archive; no code of the file runs."""
    path = Path(path)
    try:
        weights = _reader_of(path)(path)
    except (pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile, KeyError, AttributeError, TypeError,
            ImportError, IndexError, json.JSONDecodeError) as error:
        raise ValueError(f"cannot read weights from {path}: {_short(error)}") from None
    if isinstance(weights, dict) and isinstance(weights.get("state_dict"), dict):
        weights = weights["state_dict"]
    if not (isinstance(weights, dict) and weights and all(isinstance(v, Tensor) for v in weights.values())):
        raise ValueError(f"{path} holds no state dict of tensors")
    return weights


def _reader_of(path: Path) -> Callable[[Path], Any]:
    with open(path, "rb") as file:
        head = file.read(64)
    if not head:
        raise ValueError(f"{path} is empty")
    if head.lstrip()[:1] == b"<":
        raise ValueError(f"{path} is a web page, no weights: the download was refused; get the file again")
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        return _read_safetensors
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                return _read_torchscript
    return lambda file: torch.load(file, map_location="cpu", weights_only=True)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"cannot read weights from {path}: {_short(error)}") from None


class _Storage:
    """Stands for torch's storage classes while an archive is read."""

    dtypes = {"HalfStorage": torch.float16, "FloatStorage": torch.float32, "DoubleStorage": torch.float64,
              "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32, "BoolStorage": torch.bool}


class _ScriptedModule:
    """Stands for any scripted class while an archive is read: keeps its attributes, has none of its code."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


class _ArchiveUnpickler(pickle.Unpickler):
    """Rebuilds the tensors of a TorchScript archive; knows no class that could run anything."""

    def __init__(self, file: io.BytesIO, archive: zipfile.ZipFile, prefix: str) -> None:
        super().__init__(file)
        self.archive, self.prefix = archive, prefix

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return type(name, (_ScriptedModule,), {})
        if module == "torch" and name in _Storage.dtypes:
            return _Storage.dtypes[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._rebuild
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch.jit._pickle" and name.startswith("build_"):
            return list
        raise pickle.UnpicklingError(f"{module}.{name} does not belong into weights")

    def persistent_load(self, pid: tuple) -> Tensor:
        _, dtype, key, _, _ = pid
        return torch.frombuffer(bytearray(self.archive.read(f"{self.prefix}/data/{key}")), dtype=dtype)

    @staticmethod
    def _rebuild(storage: Tensor, offset: int, size: tuple, stride: tuple, *_: Any) -> Tensor:
        return torch.as_strided(storage, size, stride, offset).clone()


def _read_torchscript(path: Path) -> dict[str, Tensor]:
    with zipfile.ZipFile(path) as archive:
        data = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        model = _ArchiveUnpickler(io.BytesIO(archive.read(data)), archive, data.removesuffix("/data.pkl")).load()
    return dict(_tensors_below(model, ""))


def _tensors_below(module: _ScriptedModule, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, _ScriptedModule):
            yield from _tensors_below(value, f"{prefix}{name}.")


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
        raise OSError(f"cannot get {url}: {_short(error)}") from None


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."

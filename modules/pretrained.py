"""Where weights come from (SPEC §2, Weights): paths, addresses, OpenAI's names, the Hugging Face hub.

How they are brought: fetching.py; how files are read: weight_files.py; what others call their tensors: layouts.py.
"""

import logging
import re
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from modules.card import CARD, read_card
from modules.clip import CLIP, ClipSizes
from modules.clip4idc import PAIR_KEYS, clip_part, holds_all_of_clip, released_names, resized_for
from modules.fetching import WebPage, fetch, shelf_of
from modules.files import cache_folder, file_sha256, read_json, short
from modules.layouts import (
    EXTRAS,
    huggingface_problems,
    layout_of,
    open_clip_problems,
    to_released,
    without_wrapping,
)
from modules.urls import Address
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
# What a folder in the place of a file means: ours, a run's, open_clip's; Hugging Face's have the names of the first and fourth.
IN_FOLDERS = (
    "model.safetensors",
    "pytorch_model.bin.best",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)
HUGGING_FACE_CONFIG, OPEN_CLIP_CONFIG = "config.json", "open_clip_config.json"
BESIDE = (
    CARD,
    HUGGING_FACE_CONFIG,
    OPEN_CLIP_CONFIG,
)  # what may stand beside weights and says what they are


class Loaded(NamedTuple):
    """Tensors under the released names, float32; the card beside them ({}: none) and where it belongs."""

    tensors: dict[str, Tensor]
    card: dict[str, Any]
    origin: str


def load_weights(
    init_model: Address | str | None,
    clip_name: Address | str,
    cache_dir: str | None = None,
    image_resolution: int | None = None,
    quick_gelu: bool = False,
) -> Loaded:
    """init_model's tensors, and those of CLIP that it lacks. CLIP is not touched where init_model holds all of it.

    With image_resolution the position embeddings are resized for images of that side. `quick_gelu` vouches for files that do not
    say their activation. Raises ValueError or OSError with what to do for anything that cannot be found, read or used.
    """
    tensors: dict[str, Tensor] = {}
    card, origin = {}, str(Address.of(clip_name))
    if init_model:
        path = find_weights(init_model, cache_dir)
        log.info("weights from %s", path)
        tensors, card, origin = (
            released_names(read_released(path, quick_gelu)),
            read_card(path),
            str(path),
        )
    if not holds_all_of_clip(tensors):
        tensors = {**_load_clip(clip_name, cache_dir, quick_gelu), **tensors}
    return Loaded(
        tensors if image_resolution is None else resized_for(tensors, image_resolution),
        card,
        origin,
    )


def read_released(path: Path, quick_gelu: bool = False) -> dict[str, Tensor]:
    """A file's tensors under the released names, of their own types, from any layout.

    Raises ValueError where they are no CLIP's, or where nothing says that their activation is the quick GELU.
    """
    weights = without_wrapping(read_weights(path))
    layout = layout_of(weights)
    if layout == "other":
        raise ValueError(
            f"{path} holds no weights of a CLIP or CLIP4IDC: its tensors are called {', '.join(list(weights)[:3])} …"
        )
    try:
        released = to_released(weights, layout)
    except ValueError as error:
        raise ValueError(f"{path} is laid out like Hugging Face's CLIPModel, but {error}") from None
    if not (layout == "released" or quick_gelu or all(name in weights for name in EXTRAS)):
        _check_config(path, layout, released)
    return released


def _check_config(path: Path, layout: str, weights: dict[str, Tensor]) -> None:
    """ValueError unless a config beside the file says that these are weights for the model that is built here."""
    try:
        sizes = ClipSizes.from_weights(clip_part(weights))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    name, problems_of = {
        "huggingface": (HUGGING_FACE_CONFIG, huggingface_problems),
        "plain": (OPEN_CLIP_CONFIG, open_clip_problems),
    }[layout]
    config = path.parent / name
    if not config.is_file():
        raise ValueError(
            f"{path} does not say which activation it was trained with, nor does a {name} beside it, and with the "
            "wrong one a CLIP sees badly: give --quick_gelu if it is OpenAI's or another of the quick GELU"
        )
    problems = problems_of(read_json(config, dict), sizes)
    if problems:
        raise ValueError(f"{path} does not fit: {config}: {'; '.join(problems)}")


def find_weights(source: Address | str, cache_dir: str | None = None) -> Path:
    """The file that a name means: a path, the same below ckpts/, a folder of either; an address; one of OpenAI's names; owner/name
    on the Hugging Face hub (`@revision` may follow). Raises OSError where there is none."""
    source = Address.of(source)
    name = source.reveal()
    if source.is_remote:
        return _from_address(source, cache_dir)
    if name in CLIP_SHA256:
        return _openais(name, cache_dir)
    tried = [Path(name), ROOT / "ckpts" / name]
    for path in tried:
        if path.is_file():
            return path
        if path.is_dir():
            return _in_folder(path)
    if _may_be_on_hub(name):
        return _in_folder(_from_hub(name, cache_dir))
    places = f"{source} as it is and in {ROOT / 'ckpts'}"
    raise FileNotFoundError(
        f"no weights {source}: tried {places}, and OpenAI's names {', '.join(CLIP_SHA256)}"
    )


def _in_folder(folder: Path) -> Path:
    found = [folder / file for file in IN_FOLDERS if (folder / file).is_file()]
    if not found:
        raise FileNotFoundError(
            f"{folder} is a folder without {' or '.join(IN_FOLDERS)}: name the file of weights"
        )
    return found[0]


def _load_clip(source: Address | str, cache_dir: str | None, quick_gelu: bool) -> dict[str, Tensor]:
    source = Address.of(source)
    name = source.reveal()
    if name.endswith(".json"):
        log.info("CLIP of random weights in the sizes of %s", name)
        return released_names(random_clip(name))
    path = find_weights(source, cache_dir)
    log.info("CLIP from %s", path)
    return released_names(read_released(path, quick_gelu or name in CLIP_SHA256))


def _openais(name: str, cache_dir: str | None) -> Path:
    """One of OpenAI's CLIPs: in modules/, in ckpts/, in the cache, else downloaded."""
    file, sha256 = _openais_file(name), CLIP_SHA256[name]
    for path in (ROOT / "modules" / file, ROOT / "ckpts" / file):
        if path.is_file():
            if file_sha256(path) != sha256:
                log.warning(
                    "%s is not the %s that OpenAI published: its SHA-256 is another", path, name
                )
            return path
    return fetch_openais(name, cache_folder(cache_dir), ROOT / "modules")


def fetch_openais(name: str, folder: Path, place: Path) -> Path:
    """One of OpenAI's CLIPs, downloaded into a folder. ValueError for a name that is not theirs; OSError where it cannot be had,
    which tells to put it into `place`."""
    if name not in CLIP_SHA256:
        raise ValueError(f"no CLIP of OpenAI's is called {name}: they are {', '.join(CLIP_SHA256)}")
    file, sha256 = _openais_file(name), CLIP_SHA256[name]
    url = f"{OPENAI}/{sha256}/{file}"
    try:
        return fetch(url, folder / file, sha256)
    except OSError as error:
        raise OSError(
            f"{name} is not here and cannot be downloaded ({short(error)}): put {url} (SHA-256 {sha256}) into {place}"
        ) from None


def _openais_file(name: str) -> str:
    return name.replace("/", "-").replace("@", "-") + ".pt"


def _from_address(url: Address, cache_dir: str | None) -> Path:
    """The file at an address, kept in the cache, and beside it what says what it is."""
    folder, shelf, name = shelf_of(url, cache_dir)
    target = shelf / name

    def look(part: Path) -> None:
        read_weights(part)
        if url != folder.joined(name):  # signed addresses have no neighbours
            return
        for beside in (f"{name}.json", *BESIDE):
            with suppress(
                FileNotFoundError, PermissionError, WebPage
            ):  # which all mean that there is none
                fetch(
                    folder.joined(beside),
                    shelf / beside,
                    check=lambda part: read_json(part, dict) and None,
                )

    if target.is_file():
        log.info("%s was brought before; remove it to bring it anew", target)
    return fetch(url, target, check=look)


def _may_be_on_hub(name: str) -> bool:
    """Whether it is written like owner/name[@revision], and its first part is no folder here."""
    return (
        re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.-]+)?", name) is not None
        and ".bin" not in name
        and not any((place / name).parent.is_dir() for place in (Path(), ROOT / "ckpts"))
    )


def _from_hub(name: str, cache_dir: str | None) -> Path:
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
        wanted = [file for file in IN_FOLDERS if file in there][:1] + [
            file for file in BESIDE if file in there
        ]
        return Path(snapshot_download(**where, allow_patterns=wanted))
    except (
        Exception
    ) as error:  # its HTTP library, and with that the errors, is another from version to version
        with suppress(Exception):
            return Path(snapshot_download(**where, local_files_only=True))
        raise OSError(
            f"{name} is neither a path here or in {ROOT / 'ckpts'} nor to be had from the Hugging Face hub: "
            f"{short(error)}"
        ) from None


def random_clip(path: str | Path) -> dict[str, Tensor]:
    """Random weights, initialised as OpenAI's, of the sizes in a JSON file; OpenAI's names."""
    state = CLIP(read_sizes(path), intra_layers=0, linear_patch="2d").state_dict()
    return {
        key: value for key, value in state.items() if key.removeprefix("visual.") not in PAIR_KEYS
    }


def read_sizes(path: str | Path) -> ClipSizes:
    """The sizes of a CLIP in a JSON file. Raises ValueError for others than exactly these."""
    values = read_json(path, dict)
    try:
        return ClipSizes(**values)
    except TypeError as error:
        raise ValueError(
            f"{path}: {short(error).removeprefix('ClipSizes.__init__() ')}; expected exactly the sizes "
            f"{', '.join(ClipSizes.__dataclass_fields__)}"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None

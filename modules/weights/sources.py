"""Where weights come from (SPEC §2, Weights): paths, addresses, OpenAI's names, the Hugging Face hub.

How they are brought: fetching.py; how files are read: weight_files.py; what others call their tensors: layouts.py.
"""

import logging
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from modules.model.clip import CLIP, PAIR_KEYS, ClipSizes
from modules.weights.configs import (
    HUGGING_FACE_CONFIG,
    OPEN_CLIP_CONFIG,
    huggingface_problems,
    open_clip_problems,
)
from modules.weights.fitting import resize_positions
from modules.weights.key_names import (
    ARCHIVE_EXTRAS,
    clip_tensors,
    has_full_clip,
    layout_of,
    released_names,
    strip_wrappers,
    to_released,
)
from modules.weights.model_info import read_model_info
from modules.weights.remote import (
    CLIP_SHA256,
    ROOT,
    WEIGHT_FILES,
    from_hub,
    from_url,
    may_be_on_hub,
    openai_clip,
)
from modules.weights.tensor_files import read_weights
from system.files import error_line
from system.json_files import read_json
from system.urls import Address

log = logging.getLogger(__name__)


class LoadedWeights(NamedTuple):
    """Tensors under the released names, float32; the card beside them ({}: none) and where it belongs."""

    tensors: dict[str, Tensor]
    info: dict[str, Any]
    origin: str


def load_weights(
    init_model: Address | str | None,
    clip_name: Address | str,
    cache_dir: str | None = None,
    image_resolution: int | None = None,
    quick_gelu: bool = False,
) -> LoadedWeights:
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
            read_model_info(path),
            str(path),
        )
    if not has_full_clip(tensors):
        tensors = {**_load_clip(clip_name, cache_dir, quick_gelu), **tensors}
    return LoadedWeights(
        tensors if image_resolution is None else resize_positions(tensors, image_resolution),
        card,
        origin,
    )


def read_released(path: Path, quick_gelu: bool = False) -> dict[str, Tensor]:
    """A file's tensors under the released names, of their own types, from any layout.

    Raises ValueError where they are no CLIP's, or where nothing says that their activation is the quick GELU.
    """
    weights = strip_wrappers(read_weights(path))
    layout = layout_of(weights)
    if layout == "other":
        raise ValueError(
            f"{path} holds no weights of a CLIP or CLIP4IDC: its tensors are called {', '.join(list(weights)[:3])} …"
        )
    try:
        released = to_released(weights, layout)
    except ValueError as error:
        raise ValueError(f"{path} is laid out like Hugging Face's CLIPModel, but {error}") from None
    if not (layout == "released" or quick_gelu or all(name in weights for name in ARCHIVE_EXTRAS)):
        _check_config(path, layout, released)
    return released


def _check_config(path: Path, layout: str, weights: dict[str, Tensor]) -> None:
    """ValueError unless a config beside the file says that these are weights for the model that is built here."""
    try:
        sizes = ClipSizes.from_weights(clip_tensors(weights))
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
        return from_url(source, cache_dir)
    if name in CLIP_SHA256:
        return openai_clip(name, cache_dir)
    tried = [Path(name), ROOT / "ckpts" / name]
    for path in tried:
        if path.is_file():
            return path
        if path.is_dir():
            return _in_folder(path)
    if may_be_on_hub(name):
        return _in_folder(from_hub(name, cache_dir))
    places = f"{source} as it is and in {ROOT / 'ckpts'}"
    raise FileNotFoundError(
        f"no weights {source}: tried {places}, and OpenAI's names {', '.join(CLIP_SHA256)}"
    )


def _in_folder(folder: Path) -> Path:
    found = [folder / file for file in WEIGHT_FILES if (folder / file).is_file()]
    if not found:
        raise FileNotFoundError(
            f"{folder} is a folder without {' or '.join(WEIGHT_FILES)}: name the file of weights"
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
            f"{path}: {error_line(error).removeprefix('ClipSizes.__init__() ')}; expected exactly the sizes "
            f"{', '.join(ClipSizes.__dataclass_fields__)}"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None

"""Where weights come from: files, folders, URLs, OpenAI's names, the Hugging Face hub.

Downloads are in remote.py, reading files in tensor_files.py, tensor names in key_names.py.
See docs/reference.md, Weights.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from modules.model.backbone import (
    has_all_pretrained_tensors,
    key_prefixes,
    no_backbone_message,
    strip_prefix,
)
from modules.model.clip import CLIP
from modules.model.clip_sizes import ClipSizes
from modules.weights.configs import CONFIG_CHECKS
from modules.weights.fitting import resize_to_resolution
from modules.weights.hub import HubAccess, fetch_from_hub, may_be_on_hub
from modules.weights.key_names import (
    ARCHIVE_EXTRAS,
    LAYOUTS,
    layout_of,
    strip_wrappers,
    to_released,
    to_released_float32,
)
from modules.weights.known_models import MODELS, find_name
from modules.weights.model_info import check_model_info, describe_start, read_model_info
from modules.weights.remote import (
    CLIP_SHA256,
    WEIGHT_FILES,
    fetch_from_url,
    find_openai_clip,
)
from modules.weights.tensor_files import read_weights
from system.escaping import summarize_error
from system.files import compute_sha256
from system.json_files import read_json
from system.places import choose_downloads_folder, list_ckpts_folders
from system.suggestions import suggest
from system.urls import Location

log = logging.getLogger(__name__)


class LoadedWeights(NamedTuple):
    """Tensors under the released names in float32, and what model.json says ({}: there is none).

    `named_source` is the weights' path, or what named a CLIP, for messages. `started_from` is what
    a model that is trained from here on says of its start.
    """

    tensors: dict[str, Tensor]
    info: dict[str, Any]
    named_source: str
    started_from: str = ""


def load_weights(
    init_model: Location | str | None,
    clip_name: Location | str,
    cache_dir: str | None = None,
    image_resolution: int | None = None,
    quick_gelu: bool = False,
    hub: HubAccess = HubAccess(),
) -> LoadedWeights:
    """The tensors of init_model, and those of CLIP where init_model lacks a whole backbone.

    With `image_resolution` they are resized for images of that side, in pixels. `quick_gelu` says
    that files without a config are of a CLIP with the quick GELU. `hub` is how init_model is
    downloaded from the Hugging Face hub, if it is there. Raises ValueError or OSError for
    anything that cannot be found, read or used; the message says what to do.
    """
    loaded = LoadedWeights({}, {}, str(Location.of(clip_name)))
    starts = []
    if init_model:
        loaded = _load_init_model(init_model, cache_dir, quick_gelu, hub)
        starts.append(loaded.started_from)
    tensors = loaded.tensors
    if not has_all_pretrained_tensors(tensors):
        filled = {**_load_clip(clip_name, cache_dir, quick_gelu), **tensors}
        _tell_about_filling(tensors, filled, loaded.named_source, clip_name)
        tensors = filled
        starts.append(_name_clip(Location.of(clip_name)))
    if image_resolution is not None:
        tensors = resize_to_resolution(tensors, image_resolution)
    return loaded._replace(tensors=tensors, started_from=" and ".join(starts))


def _tell_about_filling(
    own: Mapping[str, Tensor],
    filled: Mapping[str, Tensor],
    source: str,
    clip_name: Location | str,
) -> None:
    """Warn if a part of a backbone is completed from another one, as with one of several files."""
    added = [name for name in filled if name not in own]
    if added and any(name.startswith(key_prefixes()) for name in own):
        log.warning(
            "%s has only part of its backbone: %d tensors, such as %s, come from %s; if the "
            "weights are in several files, name their index",
            source,
            len(added),
            added[0],
            clip_name,
        )


def _load_init_model(
    source: Location | str, cache_dir: str | None, quick_gelu: bool, hub: HubAccess
) -> LoadedWeights:
    path = find_weights(source, cache_dir, hub)
    log.info("weights from %s", path)
    tensors = to_released_float32(read_released(path, quick_gelu))
    _require_finite(tensors, path)
    source = Location.of(source)
    info = read_model_info(path)
    if not info and is_known_model(source.reveal()):
        info = check_model_info(dict(MODELS[source.reveal()].settings), str(source))
    start = describe_start(name_weights(source, path), info)
    return LoadedWeights(tensors, info, str(path), start)


def name_weights(source: Location, path: Path) -> str:
    """A name of weights for other people: it has no folders of this machine.

    It is the name in the table of models, the address, owner/name on the hub, or the last two
    parts of the path.
    """
    known = find_name(path)
    if known:
        return known
    is_elsewhere = source.is_remote or not any(p.exists() for p in _list_places(source.reveal()))
    return str(source) if is_elsewhere else "/".join(path.absolute().parts[-2:])


def _name_clip(source: Location) -> str:
    name = source.reveal()
    if name in CLIP_SHA256:
        return f"OpenAI's CLIP {name}"
    if name.endswith(".json"):
        return f"random weights of the sizes in {Path(name).name}"
    return name_weights(source, Path(name))


def _require_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    broken = find_not_finite(tensors)
    if broken:
        raise ValueError(
            f"{path}: {broken[0]} has values that are not finite (NaN or infinite): its training "
            "diverged, or the file was damaged; take the weights of an earlier epoch"
        )


def find_not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of tensors with a NaN or an infinite value."""
    return [name for name, value in tensors.items() if not value.isfinite().all()]


def read_released(path: Path, quick_gelu: bool = False) -> dict[str, Tensor]:
    """A file's tensors under the released names, in their own types, from any layout.

    Raises ValueError if no backbone knows them, or if nothing says that their activation is the
    quick GELU.
    """
    weights = strip_wrappers(read_weights(path))
    released = rename_to_released(weights, path)
    if not quick_gelu:
        check_activation(weights, released, path)
    return released


def rename_to_released(weights: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The weights of a file under the released names.

    Raises ValueError naming the file if no backbone knows them.
    """
    layout = layout_of(weights)
    if layout == "other":
        raise ValueError(f"{path}: {no_backbone_message(weights)}")
    try:
        return to_released(weights, layout)
    except ValueError as error:
        raise ValueError(f"{path} has {LAYOUTS[layout].owner} names, but {error}") from None


def check_activation(
    weights: Mapping[str, Tensor], released: Mapping[str, Tensor], path: Path
) -> None:
    """Raises ValueError unless something says that a file's weights use the quick GELU.

    That is their layout, or a config next to the file. `released` are the same weights under the
    released names.
    """
    layout = layout_of(weights)
    is_archive = all(name in weights for name in ARCHIVE_EXTRAS)
    if layout != "released" and not is_archive:
        _check_config(path, layout, released)


def _check_config(path: Path, layout: str, weights: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless a config next to the file describes a model that is built here."""
    try:
        sizes = ClipSizes.from_weights(strip_prefix(weights, CLIP.key_prefix))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    name, find_problems = CONFIG_CHECKS[layout]
    config = path.parent / name
    if not config.is_file():
        raise ValueError(
            f"{path} does not say which activation it was trained with, there is no {name} next to "
            "it, and with the wrong one CLIP's features are poor: pass --quick_gelu if the weights "
            "are OpenAI's or were trained with the quick GELU"
        )
    problems = find_problems(read_json(config, dict), sizes)
    if problems:
        raise ValueError(f"{path} does not fit: {config}: {'; '.join(problems)}")


def find_weights(
    source: Location | str, cache_dir: str | None = None, hub: HubAccess = HubAccess()
) -> Path:
    """The file that a name means. Raises OSError if there is none.

    The name is a URL; one of OpenAI's names; a path, the same below ckpts/, or a folder in either
    place; a name in the table of models; or owner/name on the Hugging Face hub, where `@revision`
    may follow. The first of these that fits is taken.
    """
    source = Location.of(source)
    name = source.reveal()
    if source.is_remote:
        return fetch_from_url(source, cache_dir)
    if name in CLIP_SHA256:
        return find_openai_clip(name, cache_dir)
    if is_known_model(name):
        return _find_known_model(name, cache_dir, hub)
    paths = _list_places(name)
    if may_be_on_hub(name) and not any(path.exists() for path in paths):
        paths = [fetch_from_hub(name, cache_dir, hub)]
    for path in paths:
        file = _find_weights_at(path)
        if file is not None:
            return file
    for path in paths:
        if path.is_dir():
            files = " or ".join(WEIGHT_FILES)
            raise FileNotFoundError(f"{path} is a folder without {files}: name the file of weights")
    raise FileNotFoundError(_no_weights_message(source))


def _list_places(name: str) -> list[Path]:
    """Where a path may be: as it is given, then below ckpts/."""
    return [Path(name), *(folder / name for folder in list_ckpts_folders())]


def is_known_model(name: str) -> bool:
    """Whether a name is one of the table of models, and not that of a file or folder here."""
    return name in MODELS and not any(path.exists() for path in _list_places(name))


def _find_known_model(name: str, cache_dir: str | None, hub: HubAccess) -> Path:
    """The weights of a model of the table, downloaded if need be, with the right checksum."""
    model = MODELS[name]
    if model.is_in_ckpts:
        path = model.find_here()
        if path is None:
            raise FileNotFoundError(
                f"the model {name} is not here yet, no file "
                f"{choose_downloads_folder() / model.location}: get it with {model.get_it}"
            )
    elif Location(model.location).is_remote:
        return fetch_from_url(Location(model.location), cache_dir, model.sha256)
    else:
        folder = fetch_from_hub(model.location, cache_dir, hub)
        path = _find_weights_at(folder)
        if path is None:
            raise FileNotFoundError(f"{name}: {model.location} on the hub has no file of weights")
    if model.sha256 and compute_sha256(path) != model.sha256:
        raise OSError(
            f"{path} is not the file of the model {name}, whose SHA-256 is {model.sha256}: "
            "delete it and get it again, or give its path instead of the name"
        )
    return path


def _no_weights_message(source: Location) -> str:
    places = " and ".join(map(str, list_ckpts_folders()))
    hint = suggest(source.reveal(), [*MODELS, *CLIP_SHA256])
    return (
        f"no weights {source}: tried {source} as it is and in {places}, the names that "
        f"clip4idc models lists, and OpenAI's names {', '.join(CLIP_SHA256)}{hint}"
    )


def _find_weights_at(path: Path) -> Path | None:
    """The path itself if it is a file, or the file of weights in that folder, if there is one."""
    files = [path, *(path / name for name in WEIGHT_FILES)]
    return next((file for file in files if file.is_file()), None)


def _load_clip(
    source: Location | str, cache_dir: str | None, quick_gelu: bool
) -> dict[str, Tensor]:
    """The tensors of --pretrained_clip_name: a source of weights, or a .json of sizes."""
    source = Location.of(source)
    name = source.reveal()
    if name.endswith(".json"):
        log.info("CLIP with random weights in the sizes of %s", name)
        return to_released_float32(random_clip(read_sizes(name)))
    path = find_weights(source, cache_dir)
    log.info("CLIP from %s", path)
    tensors = to_released_float32(read_released(path, quick_gelu or name in CLIP_SHA256))
    _require_finite(tensors, path)
    return tensors


def random_clip(sizes: ClipSizes) -> dict[str, Tensor]:
    """Random weights under OpenAI's names, initialized like OpenAI's."""
    clip = CLIP(sizes, intra_layers=0, linear_patch="2d")
    state = clip.state_dict()
    return {name: state[name] for name in clip.pretrained_names()}


def read_sizes(path: str | Path) -> ClipSizes:
    """The sizes of a CLIP in a JSON file. Raises ValueError unless it has exactly these."""
    values = read_json(path, dict)
    try:
        return ClipSizes(**values)
    except TypeError as error:
        reason = summarize_error(error).removeprefix("ClipSizes.__init__() ")
        expected = ", ".join(ClipSizes.__dataclass_fields__)
        raise ValueError(f"{path}: {reason}; expected exactly the sizes {expected}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None

"""A user's pairs without captions: two files, one folder, two folders, or a table."""

import logging
from collections.abc import Sequence
from pathlib import Path

from dataloaders.datasets.pair_table import read_id, read_images, read_rows
from dataloaders.datasets.spot_the_diff import AFTER_ENDING
from dataloaders.file_names import refuse_address
from dataloaders.pairs import ImagePair, find_repeated, require_images
from dataloaders.picture_files import HEIF_ENDINGS, NO_HEIF, picture_endings
from system.escaping import has_control_characters, name_as_text
from system.file_names import fold_name, normalize_name

log = logging.getLogger(__name__)

MAX_NAMES = 5  # of passed-over files in a warning


def find_pairs(before: str | None, after: str | None, table: str | None) -> list[ImagePair]:
    """The pairs of two files, of one folder, of two folders, or of a table.

    One folder holds x.png and x_2.png, as in Spot-the-Diff. In two folders the images of a pair
    have the same name, apart from the extension. Raises FileNotFoundError or ValueError, in one
    line, if there are no pairs, an image has no counterpart or no file, or ids repeat.
    """
    source = table or before
    if table:
        pairs = _read_table(Path(table))
    elif before and after:
        pairs = _pair_two_paths(Path(before), Path(after))
    elif before and Path(before).is_dir():
        pairs = _pair_within_folder(Path(before))
    elif before and Path(before).is_file():
        raise ValueError(f"{before} is one image: give a second one, which shows the scene later")
    else:
        raise FileNotFoundError(f"no image or folder {before}")
    _check_pairs(pairs, source)
    return pairs


def _check_pairs(pairs: list[ImagePair], source: str) -> None:
    if not pairs:
        raise ValueError(f"{source} holds no pairs")
    repeated = find_repeated(pair.id for pair in pairs)
    if repeated is not None:
        raise ValueError(f"{source}: the id {repeated} occurs twice")
    for pair in pairs:
        if has_control_characters(
            f"{pair.id}{name_as_text(pair.before)}{name_as_text(pair.after)}"
        ):
            raise ValueError(
                f"{source}: the pair {pair.id!r} has a line break or another control character in "
                "its id or paths"
            )
        is_only_pair = source == pair.before  # its name needs no telling
        where = "one of the two images" if is_only_pair else f"pair {pair.id}, {source}"
        require_images(pair.image_paths, where)


def _read_table(path: Path) -> list[ImagePair]:
    pairs: dict[tuple[str, ...], ImagePair] = {}
    for line, row in read_rows(path):
        before, after = read_images(path, line, row)
        pair_id = read_id(path, line, row)
        pair = ImagePair(pair_id or str(len(pairs)), str(before), str(after))
        # In a table for training a pair has a row for each of its sentences.
        key = (pair.id, pair.before, pair.after) if pair_id else (str(line),)
        pairs.setdefault(key, pair)
    return list(pairs.values())


def _pair_two_paths(before: Path, after: Path) -> list[ImagePair]:
    if before.is_dir() and after.is_dir():
        return _match(_list_images(before), _list_images(after), f"{before} and {after}")
    if not before.is_dir() and not after.is_dir():
        return [ImagePair(_name_pair(before), str(before), str(after))]
    for path in (before, after):
        if not path.exists():
            refuse_address(path)
            raise FileNotFoundError(f"no file or folder {path}")
    raise ValueError(f"--before and --after must both be files or both folders: {before}, {after}")


def _pair_within_folder(folder: Path) -> list[ImagePair]:
    images = _list_images(folder)
    afters = {}
    for name, path in images.items():
        pair_id = name.removesuffix(AFTER_ENDING)
        if pair_id != name and pair_id in images:
            afters[pair_id] = path
    if not afters:
        raise ValueError(
            f"{folder} holds no pairs named x.png and x{AFTER_ENDING}.png; to pair two folders, "
            "also give --after"
        )
    names_after = {pair_id + AFTER_ENDING for pair_id in afters}
    befores = {name: path for name, path in images.items() if name not in names_after}
    return _match(befores, afters, f"{folder}")


def _match(befores: dict[str, Path], afters: dict[str, Path], folders: str) -> list[ImagePair]:
    """The pairs of images of the same name. Raises ValueError for an image without another one."""
    unpaired = sorted(befores.keys() ^ afters.keys())
    if unpaired:
        more = f", and {len(unpaired) - 1} more" if len(unpaired) > 1 else ""
        first = unpaired[0]
        twins = [name for name in unpaired[1:] if fold_name(name) == fold_name(first)]
        hint = f" ({twins[0]} differs from it only in capital letters)" if twins else ""
        raise ValueError(f"{first} has no counterpart in {folders}{hint}{more}")
    return [ImagePair(name, str(path), str(afters[name])) for name, path in befores.items()]


def _list_images(folder: Path) -> dict[str, Path]:
    """Name without extension → image file, sorted. Raises ValueError for two of one name.

    A warning names the other files, apart from hidden ones. Raises ValueError if there are only
    pictures that cannot be read here.
    """
    images: dict[str, Path] = {}
    others: list[str] = []
    for path in sorted(folder.iterdir()):
        if not path.is_file() or _is_hidden(path):
            continue
        if path.suffix.lower() not in picture_endings():
            others.append(path.name)
            continue
        name = _name_pair(path)
        if name in images:
            raise ValueError(
                f"{images[name]} and {path.name} have the same name, apart from the extension: "
                "which one belongs to the pair?"
            )
        images[name] = path
    _tell_about_others(folder, others, is_alone=not images)
    return images


def _name_pair(image: Path) -> str:
    """The name of a file without its extension, as an id: names that look the same are equal."""
    return normalize_name(name_as_text(image.stem))


def _is_hidden(path: Path) -> bool:
    """Whether a file is one that systems leave beside others, such as macOS's ._x.png."""
    return path.name.startswith(".")


def _tell_about_others(folder: Path, names: Sequence[str], is_alone: bool) -> None:
    """Warn of files that are passed over; HEIC pictures alone are an error."""
    if not names:
        return
    phone_pictures = [name for name in names if Path(name).suffix.lower() in HEIF_ENDINGS]
    if phone_pictures and is_alone:
        raise ValueError(f"{folder}: {phone_pictures[0]}: {NO_HEIF}")
    advice = f"; {NO_HEIF}" if phone_pictures else ""
    shown = ", ".join(names[:MAX_NAMES])
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    log.warning("%s: passed over, as no pictures: %s%s%s", folder, shown, more, advice)

"""Pictures by the names that people and tables give them."""

import os
import re
from functools import lru_cache
from pathlib import Path

from system.file_names import fold_name, normalize_name
from system.urls import scrub

ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+):/+", re.IGNORECASE)
MAX_LISTED_FOLDERS = 64  # kept in memory


def find_file(path: Path) -> Path:
    """The file that a table means: of this name, or of one that looks the same.

    Backslashes may stand for slashes. Returns the path as it is if there is no such file.
    """
    if os.path.lexists(path):
        return path
    for candidate in dict.fromkeys((path, Path(str(path).replace("\\", "/")))):
        found = Path(candidate.anchor)
        for part in candidate.parts[len(found.parts) :]:
            found = _find_below(found, part)
        if os.path.lexists(found):
            return found
    return path


def _find_below(folder: Path, name: str) -> Path:
    direct = folder / name
    if os.path.lexists(direct) or name.isascii():
        return direct
    return folder / _list_names(folder).get(normalize_name(name), name)


def _list_names(folder: Path) -> dict[str, str]:
    try:
        return _list_unchanged(folder, folder.stat().st_mtime_ns)
    except OSError:
        return {}


@lru_cache(maxsize=MAX_LISTED_FOLDERS)
def _list_unchanged(folder: Path, _changed: int) -> dict[str, str]:
    """Normalized name → name in a folder, read again once the folder has changed."""
    return {normalize_name(name): name for name in os.listdir(folder)}


def require_file(path: str | Path, source: str) -> None:
    """Raise FileNotFoundError, which names `source`, for no file; ValueError for an address."""
    if os.path.isfile(path):
        return
    refuse_address(path)
    twin = _find_twin(Path(path))
    hint = f"; {twin} differs from it only in capital letters" if twin else ""
    raise FileNotFoundError(f"no image {path} ({source}){hint}")


def _find_twin(path: Path) -> str | None:
    for name in _list_names(path.parent).values():
        if fold_name(name) == fold_name(path.name):
            return name
    return None


def refuse_address(path: str | Path) -> None:
    """Raise ValueError for the address of a picture: nothing is fetched."""
    found = ADDRESS.match(str(path))
    if found:
        address = f"{found.group(1)}://{str(path)[found.end() :]}"
        raise ValueError(
            f"{scrub(address)} is an address, expected the path of a file: download it first"
        )

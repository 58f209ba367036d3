"""Names of files as other systems see them: which look the same, which they cannot have."""

import re
import unicodedata
from collections.abc import Iterable

# Names of devices, whatever their ending; characters; and ends that Windows drops.
WINDOWS_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
WINDOWS_REFUSED = re.compile(r'[<>:"|?*\\]|[. ]$')


def normalize_name(name: str) -> str:
    """What names have in common that look the same.

    Macs write é as two letters (Unicode's form NFD), other systems as one (NFC).
    """
    return unicodedata.normalize("NFC", name)


def fold_name(name: str) -> str:
    """What names have in common that are the same to Windows and Macs: capitals do not count."""
    return normalize_name(normalize_name(name).casefold())


def find_unportable(paths: Iterable[str]) -> list[str]:
    """Of relative paths with slashes, those that Windows cannot have beside the ones before them.

    It reserves some names and characters, and takes names that differ in capitals for one.
    """
    seen: dict[str, str] = {}
    found = []
    for path in paths:
        twin = seen.setdefault(fold_name(path), path)
        names = [name for name in path.split("/") if name not in (".", "..")]
        if twin != path or any(map(_is_refused_by_windows, names)):
            found.append(path)
    return found


def _is_refused_by_windows(name: str) -> bool:
    return bool(WINDOWS_DEVICES.fullmatch(name) or WINDOWS_REFUSED.search(name))

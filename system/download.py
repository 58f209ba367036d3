"""Files from https:// and s3://: brought once, gone on with where they broke off, checked, told by a bar.

A download grows as `<name>.part` beside its place, with a note of which version of the file the server had, and takes its name
when it is whole and its checksum, where one is known, is right.
"""

import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock
from tqdm import tqdm

from system.escaping import one_line
from system.files import cache_folder, sha256_of
from system.json_files import read_json, write_json
from system.transports import Interrupted, RestartNeeded, open_url
from system.urls import Address, is_html

log = logging.getLogger(__name__)

MAX_ATTEMPTS, FIRST_DELAY = (
    3,
    1.0,
)  # in a row that bring nothing; seconds before the second, twice as many before each further one


class HtmlInsteadOfFile(OSError):
    """What servers send in the place of what they do not give."""


def cache_path(url: Address | str, cache_dir: str | None) -> tuple[Address, Path, str]:
    """An address' folder, the folder in the cache where all that comes from it lies side by side,
    and the file's name."""
    folder, name, query = Address.of(url).split()
    shelf = _hash_text(f"{folder.reveal()}?{query}")[:12]
    return folder, cache_folder(cache_dir) / shelf, name or "weights"


def fetch(
    url: Address | str,
    target: Path,
    sha256: str | None = None,
    check: Callable[[Path], None] | None = None,
) -> Path:
    """`target`, downloaded unless it is there and has the checksum, where one is known; one process at a time does it.

    `check` looks at the whole file before it takes its name; a ValueError of its refuses the file. Raises FileNotFoundError or
    PermissionError where the server says so, WebPage for one in the file's place, OSError for all else: a wrong checksum, a
    connection that breaks off (the part is kept, and the next call goes on from it).
    """
    if _is_complete(target, sha256):
        return target
    url = Address.of(url)
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{target.name}.lock")):
        if not _is_complete(target, sha256):
            if target.is_file():
                log.warning("%s does not have the SHA-256 %s: it is brought anew", target, sha256)
            _download_and_check(url, target, sha256, check)
    return target


def _is_complete(target: Path, sha256: str | None) -> bool:
    return target.is_file() and (sha256 is None or sha256_of(target) == sha256)


def _download_and_check(
    url: Address, target: Path, sha256: str | None, check: Callable[[Path], None] | None
) -> None:
    part, note = (target.with_name(target.name + ending) for ending in (".part", ".part.json"))
    log.info("downloading %s to %s", url, target)
    try:
        _download(url, part, note, sha256 is not None)
    except OSError:
        if not _size(part):
            part.unlink(missing_ok=True)
        raise
    try:
        if not _size(part):
            raise ValueError("the file there is empty")
        if sha256 and sha256_of(part) != sha256:
            raise ValueError(
                f"it does not have the SHA-256 {sha256}: damaged on the way, or another file; try again"
            )
        if check:
            check(part)
    except ValueError as error:
        part.unlink()
        note.unlink(missing_ok=True)
        raise OSError(f"{url}: {str(error).replace(str(part), 'the file there')}") from None
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    part.replace(target)
    note.unlink(missing_ok=True)


def _download(url: Address, part: Path, note: Path, checked: bool) -> None:
    """Bring the part to its whole length, in as many attempts as bring something."""
    failures, most = 0, _size(part)
    while True:
        try:
            return _resume(url, part, note, checked)
        except Interrupted as error:
            if isinstance(error, RestartNeeded):
                part.unlink(missing_ok=True)
            failures = 0 if _size(part) > most else failures + 1
            most = max(most, _size(part))
            if failures == MAX_ATTEMPTS:
                kept = (
                    f"; {_size(part)} bytes are kept, and the same command goes on from there"
                    if _size(part)
                    else ""
                )
                raise OSError(f"cannot get {url}: {error}{kept}") from None
            time.sleep(FIRST_DELAY * 2 ** max(failures - 1, 0))


def _resume(url: Address, part: Path, note: Path, checked: bool) -> None:
    """Write what is missing of the part. A part of which nobody knows the version counts only if a checksum will be looked at."""
    start = _size(part)
    version = _read_version(note, url) if start else None
    if start and version is None and not checked:
        start = 0
    with open_url(url, start, version) as answer:
        if (
            answer.size is not None
            and shutil.disk_usage(part.parent).free < answer.size - answer.start
        ):
            raise OSError(
                f"no room for {url} in {part.parent}: it takes {(answer.size - answer.start) / 1e9:.3f} GB more"
            )
        write_json(note, {"address": _hash_text(url.reveal()), "version": answer.version})
        label = one_line(part.stem)
        with (
            open(part, "ab" if answer.start else "wb") as file,
            tqdm(
                total=answer.size,
                initial=answer.start,
                unit="B",
                unit_scale=True,
                desc=label,
                disable=None,
            ) as bar,
        ):
            for block in answer.blocks:
                if file.tell() == 0 and is_html(block):
                    raise HtmlInsteadOfFile(
                        f"{url} answers with a web page in the file's place: open it in a browser to see why"
                    )
                bar.update(file.write(block))
    if answer.size is not None and _size(part) != answer.size:
        raise (Interrupted if _size(part) < answer.size else RestartNeeded)(
            f"{_size(part)} of {answer.size} bytes came"
        )


def _size(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0


def _read_version(note: Path, url: Address) -> str | None:
    try:
        found = read_json(note, dict)
    except (ValueError, OSError):
        return None
    version = found.get("version")
    return (
        version
        if found.get("address") == _hash_text(url.reveal()) and isinstance(version, str)
        else None
    )


def _hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

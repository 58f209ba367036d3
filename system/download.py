"""Downloads from https:// and s3://: resumed, checked, locked, and with a progress bar.

A download grows as `<name>.part` next to its place. A sidecar, `<name>.part.json`, says which
version of the file the server had. The file takes its name when it is complete and has the right
checksum, if one is known.
"""

import hashlib
import logging
import time
from collections.abc import Callable
from pathlib import Path

from system.escaping import to_one_line
from system.files import check_free_space, choose_cache_folder, compute_sha256, is_html, sync
from system.json_files import read_json, write_json
from system.locks import hold_lock
from system.progress import show_progress
from system.transports import Interrupted, Response, RestartNeeded, open_url
from system.urls import Location

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 3  # in a row that bring no new bytes
FIRST_DELAY = 1.0  # seconds before the second attempt; doubled before each further one


class HtmlInsteadOfFile(OSError):
    """An HTML page where a file was expected, such as a login or quota page."""


def locate_in_cache(url: Location | str, cache_dir: str | None) -> tuple[Location, Path, str]:
    """Split a URL into its folder, the local cache folder for it, and the file's name.

    The cache folder depends on the URL's folder and query.
    """
    folder, name, query = Location.of(url).split()
    key = _hash_text(f"{folder.reveal()}?{query}")[:12]
    return folder, choose_cache_folder(cache_dir) / key, name or "file"


def fetch(
    url: Location | str,
    target: Path,
    sha256: str | None = None,
    check: Callable[[Path], None] | None = None,
) -> Path:
    """Download a file to `target`, unless it is there already with the right checksum.

    `check` is called with the complete file before it takes its name, and raises ValueError to
    refuse it. Raises FileNotFoundError or PermissionError if the server says so, HtmlInsteadOfFile,
    DiskFull, another OSError for a wrong checksum and the like, and ValueError for an s3 URL
    without bucket or key. After a broken connection, the bytes received so far are kept and the
    next call goes on from there.
    """
    if _is_complete(target, sha256):
        return target
    url = Location.of(url)
    target.parent.mkdir(parents=True, exist_ok=True)
    with hold_lock(target.with_name(f".{target.name}.lock")):
        if not _is_complete(target, sha256):  # another process may have downloaded it meanwhile
            if target.is_file():
                log.warning(
                    "%s does not have the SHA-256 %s: it is downloaded again", target, sha256
                )
            _download_and_check(url, target, sha256, check)
    return target


def _is_complete(target: Path, sha256: str | None) -> bool:
    return target.is_file() and (sha256 is None or compute_sha256(target) == sha256)


def _download_and_check(
    url: Location, target: Path, sha256: str | None, check: Callable[[Path], None] | None
) -> None:
    partial = target.with_name(f"{target.name}.part")
    sidecar = target.with_name(f"{target.name}.part.json")
    log.info("downloading %s to %s", url, target)
    try:
        _download(url, partial, sidecar, has_checksum=sha256 is not None)
    except OSError:
        if not _size(partial):
            partial.unlink(missing_ok=True)
        raise
    try:
        _check_content(partial, sha256, check)
    except ValueError as error:
        partial.unlink()
        sidecar.unlink(missing_ok=True)
        reason = str(error).replace(str(partial), "the file there")
        raise OSError(f"{url}: {reason}") from None
    with open(partial, "r+b") as file:
        sync(file)
    partial.replace(target)
    sidecar.unlink(missing_ok=True)


def _check_content(partial: Path, sha256: str | None, check: Callable[[Path], None] | None) -> None:
    """Raise ValueError for a complete download that is not the expected file."""
    if not _size(partial):
        raise ValueError("the file there is empty")
    if sha256 and compute_sha256(partial) != sha256:
        raise ValueError(
            f"SHA-256 mismatch (expected {sha256}): the download is corrupt or the file there has "
            "changed; try again"
        )
    if check:
        check(partial)


def _download(url: Location, partial: Path, sidecar: Path, has_checksum: bool) -> None:
    """Download the rest of the partial file.

    Gives up after MAX_ATTEMPTS in a row that bring no new bytes.
    """
    failures = 0
    largest = _size(partial)
    while True:
        try:
            return _attempt_download(url, partial, sidecar, has_checksum)
        except Interrupted as error:
            if isinstance(error, RestartNeeded):
                partial.unlink(missing_ok=True)
            size = _size(partial)
            failures = 0 if size > largest else failures + 1
            largest = max(largest, size)
            if failures == MAX_ATTEMPTS:
                raise OSError(f"cannot get {url}: {error}{_describe_kept(size)}") from None
            time.sleep(FIRST_DELAY * 2 ** max(failures - 1, 0))


def _describe_kept(size: int) -> str:
    return f"; {size} bytes are kept, and the same command continues from there" if size else ""


def _attempt_download(url: Location, partial: Path, sidecar: Path, has_checksum: bool) -> None:
    """Try once to download the rest of the partial file.

    A partial file of unknown version is used only if a checksum will tell whether the rest belongs
    to it.
    """
    start = _size(partial)
    version = _read_saved_version(sidecar, url) if start else None
    if start and version is None and not has_checksum:
        start = 0
    with open_url(url, start, version) as response:
        if response.size is not None:
            needed = response.size - response.start
            check_free_space(partial.parent, needed, f"no room for {url} in {partial.parent}")
        # The key is "address" so that partial downloads of earlier versions can be resumed.
        write_json(sidecar, {"address": _hash_text(url.reveal()), "version": response.version})
        _write_blocks(url, partial, response)
        expected = response.size
    size = _size(partial)
    if expected is not None and size != expected:
        error_class = Interrupted if size < expected else RestartNeeded
        raise error_class(f"{size} of {expected} bytes were received")


def _write_blocks(url: Location, partial: Path, response: Response) -> None:
    """Append to the partial file, or replace it if the server sends the whole file."""
    mode = "ab" if response.start else "wb"
    bar = show_progress(
        what=to_one_line(partial.stem),
        total=response.size,
        initial=response.start,
        unit="B",
        unit_scale=True,
    )
    with bar, open(partial, mode) as file:
        for block in response.blocks:
            if file.tell() == 0 and is_html(block):
                raise HtmlInsteadOfFile(
                    f"{url} answers with a web page instead of the file: open it in a browser to "
                    "see why"
                )
            bar.update(file.write(block))


def _size(partial: Path) -> int:
    return partial.stat().st_size if partial.is_file() else 0


def _read_saved_version(sidecar: Path, url: Location) -> str | None:
    """The version of the partial file, if its sidecar can be read and is about the same URL."""
    try:
        found = read_json(sidecar, dict)
    except (ValueError, OSError):
        return None
    version = found.get("version")
    is_same_url = found.get("address") == _hash_text(url.reveal())
    return version if is_same_url and isinstance(version, str) else None


def _hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

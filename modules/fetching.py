"""Files from https:// and s3://: brought once, gone on with where they broke off, checked, told by a bar.

A download grows as `<name>.part` beside its place, with a note of which version of the file the server had, and takes its name
when it is whole and its checksum, where one is known, is right.
"""

import hashlib
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from tqdm import tqdm

from modules.escaping import one_line
from modules.files import cache_folder, file_sha256, read_json, short, write_json
from modules.urls import Address, is_web_page, scrub

log = logging.getLogger(__name__)

BLOCK = 1 << 16  # bytes taken at once: what a broken connection loses at most
ATTEMPTS, PAUSE = (
    3,
    1.0,
)  # in a row that bring nothing; seconds before the second, twice as many before each further one
TIMEOUT = 30  # seconds without a byte
BUSY = (408, 425, 429, 500, 502, 503, 504)  # what a server answers that may answer otherwise soon


class WebPage(OSError):
    """What servers send in the place of what they do not give."""


class _Broken(Exception):
    """It may go on at another attempt, from the byte where it stopped."""


class _Stale(_Broken):
    """It may go on, but from the beginning: the server has another version than the part that is here."""


@dataclass(frozen=True)
class _Answer:
    """What a server sends: the file from byte `start` on."""

    start: int
    size: int | None  # of the whole file
    version: str | None
    blocks: Iterator[bytes]


def shelf_of(url: Address | str, cache_dir: str | None) -> tuple[Address, Path, str]:
    """An address' folder, the folder in the cache where all that comes from it lies side by side,
    and the file's name."""
    folder, name, query = Address.of(url).split()
    shelf = _digest(f"{folder.reveal()}?{query}")[:12]
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
    if _is_there(target, sha256):
        return target
    url = Address.of(url)
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{target.name}.lock")):
        if not _is_there(target, sha256):
            if target.is_file():
                log.warning("%s does not have the SHA-256 %s: it is brought anew", target, sha256)
            _bring(url, target, sha256, check)
    return target


def _is_there(target: Path, sha256: str | None) -> bool:
    return target.is_file() and (sha256 is None or file_sha256(target) == sha256)


def _bring(
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
        if sha256 and file_sha256(part) != sha256:
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
            return _continue(url, part, note, checked)
        except _Broken as error:
            if isinstance(error, _Stale):
                part.unlink(missing_ok=True)
            failures = 0 if _size(part) > most else failures + 1
            most = max(most, _size(part))
            if failures == ATTEMPTS:
                kept = (
                    f"; {_size(part)} bytes are kept, and the same command goes on from there"
                    if _size(part)
                    else ""
                )
                raise OSError(f"cannot get {url}: {error}{kept}") from None
            time.sleep(PAUSE * 2 ** max(failures - 1, 0))


def _continue(url: Address, part: Path, note: Path, checked: bool) -> None:
    """Write what is missing of the part. A part of which nobody knows the version counts only if a checksum will be looked at."""
    start = _size(part)
    version = _noted_version(note, url) if start else None
    if start and version is None and not checked:
        start = 0
    with _open(url, start, version) as answer:
        if (
            answer.size is not None
            and shutil.disk_usage(part.parent).free < answer.size - answer.start
        ):
            raise OSError(
                f"no room for {url} in {part.parent}: it takes {(answer.size - answer.start) / 1e9:.3f} GB more"
            )
        write_json(note, {"address": _digest(url.reveal()), "version": answer.version})
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
                if file.tell() == 0 and is_web_page(block):
                    raise WebPage(
                        f"{url} answers with a web page in the file's place: open it in a browser to see why"
                    )
                bar.update(file.write(block))
    if answer.size is not None and _size(part) != answer.size:
        raise (_Broken if _size(part) < answer.size else _Stale)(
            f"{_size(part)} of {answer.size} bytes came"
        )


def _size(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0


def _noted_version(note: Path, url: Address) -> str | None:
    try:
        found = read_json(note, dict)
    except (ValueError, OSError):
        return None
    version = found.get("version")
    return (
        version
        if found.get("address") == _digest(url.reveal()) and isinstance(version, str)
        else None
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _open(url: Address, start: int, version: str | None) -> AbstractContextManager[_Answer]:
    return (_open_s3 if url.is_s3 else _open_http)(url, start, version)


@contextmanager
def _open_http(url: Address, start: int, version: str | None) -> Iterator[_Answer]:
    import requests

    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    headers |= {"If-Range": version} if start and version else {}
    try:
        with requests.get(url.reveal(), headers=headers, stream=True, timeout=TIMEOUT) as answer:
            yield _read_answer(url, start, answer)
    except requests.exceptions.SSLError as error:
        raise OSError(f"cannot get {url}: {_reason(error)}") from None
    except (
        requests.ConnectionError,
        requests.Timeout,
        requests.exceptions.ChunkedEncodingError,
    ) as error:
        raise _Broken(_reason(error)) from None
    except (
        requests.RequestException,
        ValueError,
    ) as error:  # ValueError: where a redirect leads is no address
        raise OSError(f"cannot get {url}: {_reason(error)}") from None


def _read_answer(url: Address, start: int, answer) -> _Answer:
    """The head of an answer to `requests.get`. What is refused is raised as `fetch` tells it."""
    code, head = answer.status_code, answer.headers
    sent = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", head.get("Content-Range", ""))
    size = int(sent.group(2)) if sent and sent.group(2) != "*" else None
    tag = head.get("ETag", "")
    version = tag if tag and not tag.startswith("W/") else head.get("Last-Modified")
    if code == 416 and start and size == start:  # the part is whole already
        return _Answer(start, size, version, iter(()))
    if code == 416:
        raise _Stale("the file there has become shorter")
    if code in BUSY:
        raise _Broken(f"the server answers {code} {answer.reason}")
    if code >= 400:
        kind = {
            401: PermissionError,
            403: PermissionError,
            404: FileNotFoundError,
            410: FileNotFoundError,
        }.get(code, OSError)
        raise kind(f"cannot get {url}: the server answers {code} {answer.reason}")
    if code == 206 and not (sent and sent.group(1) and int(sent.group(1)) == start):
        raise _Stale("the server sends another part than was asked for")
    if code != 206:
        start, size = (
            0,
            int(head["Content-Length"]) if head.get("Content-Length", "").isdigit() else None,
        )
    if (
        head.get("Content-Encoding", "identity") != "identity"
    ):  # though not asked for: lengths and places are of other bytes
        size = version = None
    return _Answer(start, size, version, answer.iter_content(BLOCK))


@contextmanager
def _open_s3(url: Address, start: int, version: str | None) -> Iterator[_Answer]:
    import boto3
    from botocore import exceptions
    from botocore.config import Config

    bucket, _, key = url.reveal()[len("s3://") :].partition("/")
    if not (bucket and key):
        raise ValueError(f"{url}: expected s3://bucket/key")
    asked = {"Bucket": bucket, "Key": key}
    asked |= (
        ({"Range": f"bytes={start}-"} | ({"IfMatch": version} if version else {})) if start else {}
    )
    try:
        once = Config(
            connect_timeout=TIMEOUT, read_timeout=TIMEOUT, retries={"total_max_attempts": 1}
        )
        client = boto3.Session().client("s3", config=once)
        answer = client.get_object(**asked)
        with closing(answer["Body"]) as body:
            if start and not answer.get("ContentRange", "").startswith(f"bytes {start}-"):
                raise _Stale("the server sends another part than was asked for")
            yield _Answer(
                start, start + answer["ContentLength"], answer.get("ETag"), body.iter_chunks(BLOCK)
            )
    except (
        exceptions.NoCredentialsError,
        exceptions.PartialCredentialsError,
        exceptions.CredentialRetrievalError,
        exceptions.ProfileNotFound,
    ) as error:
        raise OSError(
            f"cannot get {url}: {short(error).rstrip('.')}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
            "AWS_PROFILE"
        ) from None
    except exceptions.ClientError as error:
        code, status = (
            error.response["Error"]["Code"],
            error.response["ResponseMetadata"]["HTTPStatusCode"],
        )
        if status in (412, 416):
            raise _Stale("the file there has become another") from None
        if status in BUSY:
            raise _Broken(f"S3 answers {code}") from None
        raise {403: PermissionError, 404: FileNotFoundError}.get(status, OSError)(
            f"cannot get {url}: S3 answers {code}"
        ) from None
    except (
        exceptions.HTTPClientError,
        exceptions.IncompleteReadError,
    ) as error:  # connections refused, broken, timed out
        raise _Broken(_reason(error)) from None
    except (exceptions.BotoCoreError, ValueError) as error:  # ValueError: an endpoint that is none
        raise OSError(f"cannot get {url}: {short(error)}") from None


def _reason(error: Exception) -> str:
    """What went wrong, in words that hold no address: libraries put theirs, with all that is secret in it, into most of theirs."""
    text = str(error)
    if "IncompleteRead" in text:
        return "the connection breaks off"
    if "timed out" in text or "imeout" in type(error).__name__:
        return f"no answer within {TIMEOUT} seconds"
    found = re.search(r"\[Errno -?\d+\] ([^'\")]+)", text) or re.search(
        r"(certificate verify failed[^('\"]*)", text
    )
    return scrub(found.group(1)).rstrip(": ") if found else type(error).__name__

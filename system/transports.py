"""One attempt to read a file over http(s) or s3, from its beginning or from some byte on."""

import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from typing import Any

from system.escaping import summarize_error
from system.urls import Location, scrub

NETWORK_BYTES = 1 << 16  # bytes read at once: what a broken connection loses at most
TIMEOUT = 30  # seconds without a byte

# Server errors that may be gone at the next attempt.
RETRY_STATUS = (408, 425, 429, 500, 502, 503, 504)

# The exception for a status; any other is an OSError.
STATUS_ERRORS: Mapping[int, type[OSError]] = {
    401: PermissionError,
    403: PermissionError,
    404: FileNotFoundError,
    410: FileNotFoundError,
}

CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)")


class Interrupted(Exception):
    """The transfer stopped. Another attempt may continue it from the byte that it reached."""


class RestartNeeded(Interrupted):
    """The partial file is of another version: start over."""


@dataclass(frozen=True)
class Response:
    """What a server sends: the file from byte `start` on. `size` is that of the whole file."""

    start: int
    size: int | None
    version: str | None
    blocks: Iterator[bytes]


def open_url(url: Location, start: int, version: str | None) -> AbstractContextManager[Response]:
    """Open a remote file for reading from byte `start` on.

    The response may start at 0 instead, as if the file is no longer of `version`. Raises
    Interrupted or RestartNeeded if another attempt may succeed; else FileNotFoundError,
    PermissionError or OSError naming the URL, or ValueError for an s3 URL without bucket or key.
    """
    opener = _open_s3 if url.is_s3 else _open_http
    return opener(url, start, version)


@contextmanager
def _open_http(url: Location, start: int, version: str | None) -> Iterator[Response]:
    import requests

    headers = {"Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    if start and version:
        headers["If-Range"] = version
    try:
        with requests.get(url.reveal(), headers=headers, stream=True, timeout=TIMEOUT) as response:
            yield _read_head(url, start, response)
    except requests.exceptions.SSLError as error:
        raise _cannot_get(url, error) from None
    except (
        requests.ConnectionError,
        requests.Timeout,
        requests.exceptions.ChunkedEncodingError,
    ) as error:
        raise Interrupted(_describe_network_error(error)) from None
    # ValueError: a redirect leads to something that is not a URL.
    except (requests.RequestException, ValueError) as error:
        raise _cannot_get(url, error) from None


def _cannot_get(url: Location, error: Exception) -> OSError:
    return OSError(f"cannot get {url}: {_describe_network_error(error)}")


def _read_head(url: Location, start: int, response: Any) -> Response:
    """What the head of a response of `requests` says. Raises as `open_url` does."""
    status = response.status_code
    headers = response.headers
    first, size = _parse_content_range(headers.get("Content-Range", ""))
    version = _version_of_response(headers)
    if status == 416 and start and size == start:  # the partial file is complete already
        return Response(start, size, version, iter(()))
    _check_status(url, status, response.reason)
    if status == 206 and first != start:
        raise RestartNeeded("the server sent another part than requested")
    if status != 206:
        length = headers.get("Content-Length", "")
        start = 0
        size = int(length) if length.isdigit() else None
    if headers.get("Content-Encoding", "identity") != "identity":
        # Compressed although not requested: lengths and offsets are those of other bytes.
        size = None
        version = None
    return Response(start, size, version, response.iter_content(NETWORK_BYTES))


def _parse_content_range(text: str) -> tuple[int | None, int | None]:
    """The first byte that is sent and the size of the whole file; None for what is not said."""
    found = CONTENT_RANGE.fullmatch(text)
    if not found:
        return None, None
    first, size = found.groups()
    return _parse_number(first), _parse_number(size)


def _parse_number(text: str | None) -> int | None:
    return int(text) if text and text != "*" else None


def _version_of_response(headers: Mapping[str, str]) -> str | None:
    """What identifies the version of a file: a strong ETag, else the time of its last change."""
    tag = headers.get("ETag", "")
    if tag and not tag.startswith("W/"):
        return tag
    return headers.get("Last-Modified")


def _check_status(url: Location, status: int, reason: str) -> None:
    if status == 416:
        raise RestartNeeded("the file on the server has become shorter")
    if status in RETRY_STATUS:
        raise Interrupted(f"the server answered {status} {reason}")
    if status >= 400:
        error_class = STATUS_ERRORS.get(status, OSError)
        raise error_class(f"cannot get {url}: the server answered {status} {reason}")


@contextmanager
def _open_s3(url: Location, start: int, version: str | None) -> Iterator[Response]:
    from botocore import exceptions

    bucket, _, key = url.reveal()[len("s3://") :].partition("/")
    if not (bucket and key):
        raise ValueError(f"{url}: expected s3://bucket/key")
    request = {"Bucket": bucket, "Key": key}
    if start:
        request["Range"] = f"bytes={start}-"
    if start and version:
        request["IfMatch"] = version
    try:
        response = _make_s3_client().get_object(**request)
        with closing(response["Body"]) as body:
            if start and not response.get("ContentRange", "").startswith(f"bytes {start}-"):
                raise RestartNeeded("the server sent another part than requested")
            size = start + response["ContentLength"]
            yield Response(start, size, response.get("ETag"), body.iter_chunks(NETWORK_BYTES))
    except (
        exceptions.NoCredentialsError,
        exceptions.PartialCredentialsError,
        exceptions.CredentialRetrievalError,
        exceptions.ProfileNotFound,
    ) as error:
        reason = summarize_error(error).rstrip(".")
        raise OSError(
            f"cannot get {url}: {reason}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
            "AWS_PROFILE"
        ) from None
    except exceptions.ClientError as error:
        raise _s3_error(url, error.response) from None
    # Connections that are refused, break off or time out.
    except (exceptions.HTTPClientError, exceptions.IncompleteReadError) as error:
        raise Interrupted(_describe_network_error(error)) from None
    # ValueError: the endpoint in the environment is not a URL.
    except (exceptions.BotoCoreError, ValueError) as error:
        raise OSError(f"cannot get {url}: {summarize_error(error)}") from None


def _make_s3_client() -> Any:
    """A client that makes a single attempt: the caller repeats it."""
    import boto3
    from botocore.config import Config

    retries = {"total_max_attempts": 1}
    config = Config(connect_timeout=TIMEOUT, read_timeout=TIMEOUT, retries=retries)
    return boto3.Session().client("s3", config=config)


def _s3_error(url: Location, response: Mapping[str, Any]) -> Exception:
    """The error to raise for a response in which S3 refuses a request."""
    code = response["Error"]["Code"]
    status = response["ResponseMetadata"]["HTTPStatusCode"]
    if status in (412, 416):
        return RestartNeeded("the file on the server has changed")
    if status in RETRY_STATUS:
        return Interrupted(f"S3 answered {code}")
    error_class = STATUS_ERRORS.get(status, OSError)
    return error_class(f"cannot get {url}: S3 answered {code}")


def _describe_network_error(error: Exception) -> str:
    """What went wrong, without URLs: messages of libraries hold whole URLs, secrets included."""
    text = str(error)
    if "IncompleteRead" in text:
        return "the connection broke off"
    if "timed out" in text or "imeout" in type(error).__name__:
        return f"no answer within {TIMEOUT} seconds"
    system_error = re.search(r"\[Errno -?\d+\] ([^'\")]+)", text)
    bad_certificate = re.search(r"(certificate verify failed[^('\"]*)", text)
    found = system_error or bad_certificate
    return scrub(found.group(1)).rstrip(": ") if found else type(error).__name__

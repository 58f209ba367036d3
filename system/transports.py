"""TODO."""

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass

from system.files import error_line
from system.urls import Address, scrub

BLOCK = 1 << 16  # bytes taken at once: what a broken connection loses at most


TIMEOUT = 30  # seconds without a byte


RETRY_STATUS = (
    408,
    425,
    429,
    500,
    502,
    503,
    504,
)  # what a server answers that may answer otherwise soon


class Interrupted(Exception):
    """It may go on at another attempt, from the byte where it stopped."""


class RestartNeeded(Interrupted):
    """It may go on, but from the beginning: the server has another version than the part that is here."""


@dataclass(frozen=True)
class Response:
    """What a server sends: the file from byte `start` on."""

    start: int
    size: int | None  # of the whole file
    version: str | None
    blocks: Iterator[bytes]


def open_url(url: Address, start: int, version: str | None) -> AbstractContextManager[Response]:
    return (_open_s3 if url.is_s3 else _open_http)(url, start, version)


@contextmanager
def _open_http(url: Address, start: int, version: str | None) -> Iterator[Response]:
    import requests

    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    headers |= {"If-Range": version} if start and version else {}
    try:
        with requests.get(url.reveal(), headers=headers, stream=True, timeout=TIMEOUT) as answer:
            yield _read_response(url, start, answer)
    except requests.exceptions.SSLError as error:
        raise OSError(f"cannot get {url}: {_describe_network_error(error)}") from None
    except (
        requests.ConnectionError,
        requests.Timeout,
        requests.exceptions.ChunkedEncodingError,
    ) as error:
        raise Interrupted(_describe_network_error(error)) from None
    except (
        requests.RequestException,
        ValueError,
    ) as error:  # ValueError: where a redirect leads is no address
        raise OSError(f"cannot get {url}: {_describe_network_error(error)}") from None


def _read_response(url: Address, start: int, answer) -> Response:
    """The head of an answer to `requests.get`. What is refused is raised as `fetch` tells it."""
    code, head = answer.status_code, answer.headers
    sent = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", head.get("Content-Range", ""))
    size = int(sent.group(2)) if sent and sent.group(2) != "*" else None
    tag = head.get("ETag", "")
    version = tag if tag and not tag.startswith("W/") else head.get("Last-Modified")
    if code == 416 and start and size == start:  # the part is whole already
        return Response(start, size, version, iter(()))
    if code == 416:
        raise RestartNeeded("the file there has become shorter")
    if code in RETRY_STATUS:
        raise Interrupted(f"the server answers {code} {answer.reason}")
    if code >= 400:
        kind = {
            401: PermissionError,
            403: PermissionError,
            404: FileNotFoundError,
            410: FileNotFoundError,
        }.get(code, OSError)
        raise kind(f"cannot get {url}: the server answers {code} {answer.reason}")
    if code == 206 and not (sent and sent.group(1) and int(sent.group(1)) == start):
        raise RestartNeeded("the server sends another part than was asked for")
    if code != 206:
        start, size = (
            0,
            int(head["Content-Length"]) if head.get("Content-Length", "").isdigit() else None,
        )
    if (
        head.get("Content-Encoding", "identity") != "identity"
    ):  # though not asked for: lengths and places are of other bytes
        size = version = None
    return Response(start, size, version, answer.iter_content(BLOCK))


@contextmanager
def _open_s3(url: Address, start: int, version: str | None) -> Iterator[Response]:
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
                raise RestartNeeded("the server sends another part than was asked for")
            yield Response(
                start, start + answer["ContentLength"], answer.get("ETag"), body.iter_chunks(BLOCK)
            )
    except (
        exceptions.NoCredentialsError,
        exceptions.PartialCredentialsError,
        exceptions.CredentialRetrievalError,
        exceptions.ProfileNotFound,
    ) as error:
        raise OSError(
            f"cannot get {url}: {error_line(error).rstrip('.')}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
            "AWS_PROFILE"
        ) from None
    except exceptions.ClientError as error:
        code, status = (
            error.response["Error"]["Code"],
            error.response["ResponseMetadata"]["HTTPStatusCode"],
        )
        if status in (412, 416):
            raise RestartNeeded("the file there has become another") from None
        if status in RETRY_STATUS:
            raise Interrupted(f"S3 answers {code}") from None
        raise {403: PermissionError, 404: FileNotFoundError}.get(status, OSError)(
            f"cannot get {url}: S3 answers {code}"
        ) from None
    except (
        exceptions.HTTPClientError,
        exceptions.IncompleteReadError,
    ) as error:  # connections refused, broken, timed out
        raise Interrupted(_describe_network_error(error)) from None
    except (exceptions.BotoCoreError, ValueError) as error:  # ValueError: an endpoint that is none
        raise OSError(f"cannot get {url}: {error_line(error)}") from None


def _describe_network_error(error: Exception) -> str:
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

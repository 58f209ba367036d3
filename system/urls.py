"""Addresses that may hold secrets: a type that never prints them, and a filter for all output."""

import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import unquote

HIDDEN = "***"


SHORTEST_PASSWORD = 4  # shorter ones are not looked for in text: they stand in too many words


SHORTEST_TOKEN = 8  # the same for values of the environment and of queries


SCHEMES = ("https", "http", "s3", "ftp", "ftps", "sftp", "ssh", "gs", "hf", "file")


# Slashes after a colon make a scheme, known or mistyped; so does a known name with a colon alone.
# One letter alone is a Windows drive.
SCHEME = re.compile(rf"[A-Za-z][\w+.-]+:/+|(?:{'|'.join(SCHEMES)}):|//+", re.IGNORECASE)


QUERY = re.compile(r"\?[^\s=&/]+=")


# What begins a query, a fragment or a parameter, full-width and percent-encoded spellings included.
TAIL = re.compile(r"[?#&;？＃]|%3f|%23", re.IGNORECASE)


AT = re.compile(r"[@＠]|%40", re.IGNORECASE)


NAMES_OF_SECRETS = re.compile(
    r"(?:TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|API_?KEY|ACCESS_KEY(?:_ID)?|SECRET_KEY"
    r"|(?:^|_)(?:PASS|PAT|AUTH))$"
)


NAMES_OF_ADDRESSES = re.compile(r"PROXY|ENDPOINT|UR[LI]|HOST|SERVER|DSN")


WORD = re.compile(r"[^\s\"'“”‘’<>]+")


_known: set[str] = set()  # what Addresses of this process hold that nobody may read


def is_html(head: bytes) -> bool:
    """Whether a file that begins so is HTML, such as a login page in place of the file."""
    page = rb"(\xef\xbb\xbf)?\s*<(!doctype|html|head|body|\?xml|!--)"
    return re.match(page, head, re.IGNORECASE) is not None


@dataclass(frozen=True, repr=False)
class Address:
    """A path, name or URL that a user gave for weights, and that may contain secrets.

    Text made from it, by str(), an f-string or a log line, leaves the secrets out. `reveal` gives
    the whole name, for opening it and nothing else. It is not a str, so that it cannot be written
    by mistake.
    """

    _given: str

    def __post_init__(self) -> None:
        if not _is_there(self._given):
            for secret in _secrets_in(self._given):
                _known.update(_spellings(secret))

    def reveal(self) -> str:
        """The whole name, secrets included."""
        return self._given

    def __str__(self) -> str:
        return redact(self._given)

    def __repr__(self) -> str:
        return f"Address({str(self)!r})"

    def __format__(self, how: str) -> str:
        return format(str(self), how)

    @classmethod
    def of(cls, name: object) -> "Address":
        """The name as an Address, which it may be already."""
        return name if isinstance(name, cls) else cls(str(name))

    @property
    def is_remote(self) -> bool:
        """Whether it is fetched, from https://, http:// or s3://."""
        return self._given.lower().startswith(("https://", "http://", "s3://"))

    @property
    def is_s3(self) -> bool:
        """Whether it is s3://bucket/key."""
        return self._given.lower().startswith("s3://")

    def split(self) -> tuple["Address", str, str]:
        """The folder that it lies in, the name there, and what follows that: query, fragment. In s3://
        a ? may stand in a folder's name."""
        place, tail = self._given, ""
        if not self.is_s3:
            ends = [at for at in map(self._given.find, "?#") if at >= 0]
            end = min(ends, default=len(self._given))
            place, tail = self._given[:end], self._given[end:]
        scheme, _, rest = place.partition("://")
        folder, slash, name = rest.rpartition("/")
        if not slash:
            return Address(place), "", tail
        plain = TAIL.split(name)[0]
        return Address(f"{scheme}://{folder}"), AT.split(plain)[-1], name[len(plain) :] + tail

    def joined(self, name: str) -> "Address":
        """What lies in this folder under a name."""
        return Address(f"{self._given}/{name}")


def redact(name: str) -> str:
    """A name as others may read it: of an address, also a mistyped one, neither what stands before
    its last @, nor its query, nor its fragment. Other names stay as they are."""
    if not _may_hold_secrets(name) or _is_there(name):
        return name
    scheme, rest = _split_scheme(name)
    tail = TAIL.search(rest)
    end = tail.start() if tail else len(rest)
    ats = [found.span() for found in AT.finditer(rest)]
    if ats and ats[-1][0] > end:
        # A password with a question mark, or a query with an @: nobody can tell, so show neither.
        return f"{scheme}{HIDDEN}"
    rest = rest[ats[-1][1] if ats else 0 : end]
    host, slash, path = rest.partition("/")
    return f"{scheme}{HIDDEN if scheme and _is_no_host(host) else host}{slash}{path}"


def _split_scheme(name: str) -> tuple[str, str]:
    found = SCHEME.match(name)
    scheme = found.group() if found else ""
    return scheme, name[len(scheme) :]


def _is_no_host(text: str) -> bool:
    """Whether text in the place of host:port has no port behind its colon, as where a password's @
    is missing."""
    host, colon, port = text.rpartition(":")
    return bool(colon) and not text.startswith("[") and not (port.isdigit() or not port)


def _is_there(name: str) -> bool:
    """Whether a name is a file's or a folder's here."""
    try:
        return os.path.exists(name)
    except ValueError:  # a NUL in it
        return False


def _may_hold_secrets(name: str) -> bool:
    """Whether it is written like an address. owner/name@revision and ViT-L/14@336px are not."""
    if sys.platform == "win32" and re.match(r"[A-Za-z]:[\\/]", name):
        return False
    scheme, rest = _split_scheme(name)
    if scheme and (AT.search(rest) or TAIL.search(rest) or _is_no_host(rest.partition("/")[0])):
        return True
    if QUERY.search(name):
        return True
    at = AT.search(name)
    return at is not None and ("/" not in name[: at.start()] or ":" in name[: at.start()])


def _secrets_in(name: str) -> Iterator[str]:
    """The parts of an address to hide in all text: its password and whatever is long enough to be a
    token (all before the last @, query values, fragment)."""
    if not _may_hold_secrets(name):
        return
    scheme, rest = _split_scheme(name)
    ats = [found.start() for found in AT.finditer(rest)]
    before = rest[: ats[-1]] if ats else ""
    password = before.partition(":")[2]
    if scheme and not ats and _is_no_host(rest.partition("/")[0]):
        password = rest.partition("/")[0].partition(":")[2]
    tails = TAIL.split(rest)[1:]
    values = [value for tail in tails for value in (tail, tail.partition("=")[2])]
    tokens = (before, *values, *map(unquote, values), name.partition("?")[2])
    yield from (value for value in (password, unquote(password)) if len(value) >= SHORTEST_PASSWORD)
    yield from (value for value in tokens if len(value) >= SHORTEST_TOKEN)


def _spellings(secret: str) -> set[str]:
    """A secret as it is, with its blanks made one, and with its control characters as escapes."""
    return {secret, " ".join(secret.split()), secret.encode("unicode_escape").decode("ascii")}


def _environment_secrets() -> Iterator[str]:
    """Tokens and keys in the environment, and the passwords in its URLs (proxies, AWS endpoint)."""
    for name, value in os.environ.items():
        if NAMES_OF_SECRETS.search(name.upper()) and len(value) >= SHORTEST_TOKEN:
            yield value
        elif NAMES_OF_ADDRESSES.search(name.upper()):
            yield from _secrets_in(value)


def scrub(text: str) -> str:
    """Remove secrets from text on its way to a terminal, a log or a file.

    Known secrets become ***; whatever looks like an address is shown as `redact` shows it.
    """
    secrets = sorted({*_known, *_environment_secrets()}, key=len, reverse=True)
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    return WORD.sub(lambda word: _redact_within(word.group()), text)


def _redact_within(word: str) -> str:
    """A word of a text, the address in it redacted; what stands before its scheme stays."""
    found = SCHEME.search(word)
    if found and not _is_there(word) and _may_hold_secrets(word[found.start() :]):
        return word[: found.start()] + redact(word[found.start() :])
    if "@" not in word and "?" not in word:
        return word
    if QUERY.search(word) or re.search(r"\w:[^@]*[^@:]@\w", word):
        return redact(word)
    return word

"""Addresses that may hold secrets: a type that never prints them, and a last look at every line that goes out."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import parse_qsl, unquote

HIDDEN = "***"
SHORTEST_PASSWORD = 4  # shorter ones are not looked for in text: they stand in too many words
SHORTEST_TOKEN = 8  # the same for values of the environment and of queries
SCHEMES = ("https", "http", "s3", "ftp", "ftps", "sftp", "ssh", "gs", "hf", "file")
# Slashes after a colon make a scheme, known or mistyped; so does a known name with a colon alone.
# One letter alone is a Windows drive.
SCHEME = re.compile(rf"[A-Za-z][\w+.-]+:/+|(?:{'|'.join(SCHEMES)}):|//+", re.IGNORECASE)
QUERY = re.compile(r"\?[^\s=&/]+=")
NAMES_OF_SECRETS = re.compile(
    r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS|ACCESS_KEY|SECRET_KEY|API_KEY|ACCESS_KEY_ID)$"
)
WORD = re.compile(r"[^\s\"'“”‘’<>]+")

_known: set[str] = set()  # what Addresses of this process hold that nobody may read


def is_address(name: str) -> bool:
    """Whether a name is https://…, http://… or s3://…, which can be fetched."""
    return name.lower().startswith(("https://", "http://", "s3://"))


def is_s3(name: str) -> bool:
    """Whether an address is s3://bucket/key."""
    return name.lower().startswith("s3://")


def is_web_page(head: bytes) -> bool:
    """Whether a file that begins so is what servers send in the place of what they do not give."""
    page = rb"(\xef\xbb\xbf)?\s*<(!doctype|html|head|body|\?xml|!--)"
    return re.match(page, head, re.IGNORECASE) is not None


@dataclass(frozen=True, repr=False)
class Address:
    """A name that a user gave for weights: a path, a name or an address, in which secrets may stand.

    Text made of it, by str(), an f-string or a log line, lacks them. `reveal` gives all of it: for
    opening what it names, and for nothing else. It is no str, so that it is not written by mistake.
    """

    _given: str

    def __post_init__(self) -> None:
        _known.update(_secrets_in(self._given))

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
        return is_address(self._given)

    @property
    def is_s3(self) -> bool:
        """Whether it is s3://bucket/key."""
        return is_s3(self._given)

    def split(self) -> tuple["Address", str, str]:
        """The folder that it lies in, the name there, and the query. In s3:// a ? may stand in a
        folder's name."""
        place, query = self._given, ""
        if not self.is_s3:
            place, _, query = self._given.partition("?")
        scheme, _, rest = place.partition("://")
        folder, slash, name = rest.rpartition("/")
        if not slash:
            return Address(place), "", query
        if self.is_s3:
            name, _, query = name.partition("?")
        return Address(f"{scheme}://{folder}"), name.rpartition("@")[2], query

    def joined(self, name: str) -> "Address":
        """What lies in this folder under a name."""
        return Address(f"{self._given}/{name}")


def redact(name: str) -> str:
    """A name as others may read it: of an address, also a mistyped one, neither what stands before
    its last @, nor its query, nor its fragment. Other names stay as they are."""
    if not _may_hold_secrets(name) or os.path.exists(name):
        return name
    found = SCHEME.match(name)
    scheme = found.group() if found else ""
    rest = name[len(scheme) :]
    end = min((place for place in map(rest.find, "?#") if place >= 0), default=len(rest))
    at = rest.rfind("@")
    if at > end:  # a password with a question mark, or a query with an @: who can tell?
        return f"{scheme}{HIDDEN}"
    return scheme + rest[at + 1 : end]


def _may_hold_secrets(name: str) -> bool:
    """Whether it is written like an address. owner/name@revision and ViT-L/14@336px are not."""
    if not set("@?#") & set(name) or re.match(r"[A-Za-z]:[\\/]", name):  # a Windows drive
        return False
    if SCHEME.match(name) or QUERY.search(name):
        return True
    return "@" in name.partition("/")[0] or re.search(r":[^@]*@", name) is not None


def _secrets_in(name: str) -> Iterator[str]:
    """The parts of an address that are looked for in all text: the password, and what is long enough
    to be a token: all before the last @, the query and its values."""
    if not _may_hold_secrets(name):
        return
    found = SCHEME.match(name)
    before = name[found.end() if found else 0 :].rpartition("@")[0]
    password = before.partition(":")[2]
    query = name.partition("?")[2]
    tokens = (before, query, *(value for _, value in parse_qsl(query)))
    yield from (value for value in (password, unquote(password)) if len(value) >= SHORTEST_PASSWORD)
    yield from (value for value in tokens if len(value) >= SHORTEST_TOKEN)


def _environment_secrets() -> Iterator[str]:
    """Tokens and keys that the environment holds, and the passwords in its addresses (proxies, AWS)."""
    for name, value in os.environ.items():
        if NAMES_OF_SECRETS.search(name.upper()) and len(value) >= SHORTEST_TOKEN:
            yield value
        elif "@" in value and ("://" in value or name.lower().endswith("_proxy")):
            yield from _secrets_in(value)


def scrub(text: str) -> str:
    """A text for a terminal, a log or a file, all secrets that are known taken out, and all that stands
    in it like an address shown as `redact` does. The last step of every way out."""
    secrets = sorted({*_known, *_environment_secrets()}, key=len, reverse=True)
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    return WORD.sub(lambda word: _redact_within(word.group()), text)


def _redact_within(word: str) -> str:
    """A word of a text, the address in it redacted; what stands before its scheme stays."""
    if "@" not in word and "?" not in word:
        return word
    found = SCHEME.search(word)
    if found and ("@" in word[found.end() :] or QUERY.search(word)):
        return word[: found.start()] + redact(word[found.start() :])
    if QUERY.search(word) or re.search(r"\w:[^@]*[^@:]@\w", word):
        return redact(word)
    return word

"""Paths, names and URLs that may hold secrets: a type that hides them, a filter for all output."""

import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import unquote

HIDDEN = "***"

# Shorter secrets are not searched for: they occur inside too many ordinary words.
MIN_PASSWORD_LENGTH = 4
MIN_TOKEN_LENGTH = 8

SCHEMES = ("https", "http", "s3", "ftp", "ftps", "sftp", "ssh", "gs", "hf", "file")

# Any word before a colon and slashes is a scheme, known or mistyped; so is a known name before a
# colon alone. A single letter is a Windows drive.
SCHEME = re.compile(rf"[A-Za-z][\w+.-]+:/+|(?:{'|'.join(SCHEMES)}):|//+", re.IGNORECASE)

QUERY = re.compile(r"\?[^\s=&/]+=")

# What begins a query, a fragment or a parameter; also full-width and percent-encoded.
TAIL = re.compile(r"[?#&;？＃]|%3f|%23", re.IGNORECASE)
AT = re.compile(r"[@＠]|%40", re.IGNORECASE)

# A user, a colon and a password before an @, in a word of a text.
CREDENTIALS = re.compile(r"\w:[^@]*[^@:]@\w")

SECRET_VARIABLES = re.compile(
    r"(?:TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?"
    r"|API_?KEY|ACCESS_KEY(?:_ID)?|SECRET_KEY"
    r"|(?:^|_)(?:PASS|PAT|AUTH))$"
)
URL_VARIABLES = re.compile(r"PROXY|ENDPOINT|UR[LI]|HOST|SERVER|DSN")

WORD = re.compile(r"[^\s\"'“”‘’<>]+")

# Secrets of all names that this process was given.
_known_secrets: set[str] = set()


@dataclass(frozen=True, repr=False)
class Location:
    """A path, a name or a URL that a user gave, and that may contain secrets.

    Text made from it by str(), an f-string or a log line leaves the secrets out. `reveal` returns
    the whole name, for opening it and nothing else. It is not a str, so that it cannot be written
    by mistake.
    """

    _given: str

    def __post_init__(self) -> None:
        remember_secrets(self._given)

    def reveal(self) -> str:
        """The whole name, secrets included."""
        return self._given

    def __str__(self) -> str:
        return redact(self._given)

    def __repr__(self) -> str:
        return f"Location({str(self)!r})"

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)

    @classmethod
    def of(cls, name: object) -> "Location":
        """The name as a Location, unless it is one already."""
        return name if isinstance(name, cls) else cls(str(name))

    @property
    def is_remote(self) -> bool:
        """Whether it is a URL that is downloaded: https://, http:// or s3://."""
        return self._given.lower().startswith(("https://", "http://", "s3://"))

    @property
    def is_s3(self) -> bool:
        """Whether it is s3://bucket/key."""
        return self._given.lower().startswith("s3://")

    def split(self) -> tuple["Location", str, str]:
        """The folder, the name in it, and what follows the name: query and fragment.

        In s3://, a folder's name may contain a question mark.
        """
        path = self._given
        tail = ""
        if not self.is_s3:
            positions = map(self._given.find, "?#")
            end = min((position for position in positions if position >= 0), default=None)
            if end is not None:
                path = self._given[:end]
                tail = self._given[end:]
        scheme, _, rest = path.partition("://")
        folder, slash, name = rest.rpartition("/")
        if not slash:
            return Location(path), "", tail
        plain = TAIL.split(name)[0]
        return Location(f"{scheme}://{folder}"), AT.split(plain)[-1], name[len(plain) :] + tail

    def joined(self, name: str) -> "Location":
        """The location of a file in this folder."""
        return Location(f"{self._given}/{name}")


def remember_secrets(name: str) -> None:
    """From now on, hide the secrets in a name that may be a URL: `scrub` removes them."""
    if not _exists(name):
        for secret in _find_secrets(name):
            _known_secrets.update(_list_spellings(secret))


def redact(name: str) -> str:
    """The name without secrets; a name that is not a URL stays as it is.

    A URL, even a mistyped one, loses its user, password, query and fragment.
    """
    if not _may_hold_secrets(name) or _exists(name):
        return name
    scheme, rest = _split_scheme(name)
    tail = TAIL.search(rest)
    end = tail.start() if tail else len(rest)
    at_signs = list(AT.finditer(rest))
    start = 0
    if at_signs:
        start = at_signs[-1].end()
        if at_signs[-1].start() > end:
            # A password with a question mark, or a query with an @: nobody can tell, so hide both.
            return f"{scheme}{HIDDEN}"
    host, slash, path = rest[start:end].partition("/")
    if scheme and _has_bad_port(host):
        host = HIDDEN
    return f"{scheme}{host}{slash}{path}"


def _split_scheme(name: str) -> tuple[str, str]:
    found = SCHEME.match(name)
    scheme = found.group() if found else ""
    return scheme, name[len(scheme) :]


def _has_bad_port(host: str) -> bool:
    """Whether what follows the colon is not a port, as in user:password without its @host."""
    is_ipv6 = host.startswith("[")
    _, _, port = host.rpartition(":")
    return ":" in host and not is_ipv6 and port != "" and not port.isdigit()


def _exists(name: str) -> bool:
    """Whether there is a file or a folder of this name on this machine."""
    try:
        return os.path.exists(name)
    except ValueError:  # a NUL in the name
        return False


def _may_hold_secrets(name: str) -> bool:
    """Whether it is written like a URL. owner/name@revision and ViT-L/14@336px are not."""
    if sys.platform == "win32" and re.match(r"[A-Za-z]:[\\/]", name):
        return False
    scheme, rest = _split_scheme(name)
    host = rest.partition("/")[0]
    if scheme and (AT.search(rest) or TAIL.search(rest) or _has_bad_port(host)):
        return True
    if QUERY.search(name):
        return True
    at_sign = AT.search(name)
    if at_sign is None:
        return False
    user = name[: at_sign.start()]
    return "/" not in user or ":" in user


def _find_secrets(name: str) -> Iterator[str]:
    """The parts of a URL to hide in all text: its password, and what is long enough for a token.

    Tokens can be everything before the last @, the values of the query, and the fragment.
    """
    if not _may_hold_secrets(name):
        return
    scheme, rest = _split_scheme(name)
    at_signs = list(AT.finditer(rest))
    user = rest[: at_signs[-1].start()] if at_signs else ""
    password = user.partition(":")[2]
    host = rest.partition("/")[0]
    if scheme and not at_signs and _has_bad_port(host):
        password = host.partition(":")[2]
    for value in (password, unquote(password)):
        if len(value) >= MIN_PASSWORD_LENGTH:
            yield value
    tokens = [user, name.partition("?")[2]]
    for tail in TAIL.split(rest)[1:]:
        value = tail.partition("=")[2]
        tokens += [tail, value, unquote(tail), unquote(value)]
    for token in tokens:
        if len(token) >= MIN_TOKEN_LENGTH:
            yield token


def _list_spellings(secret: str) -> set[str]:
    """A secret as it is, with single spaces, and with its control characters escaped."""
    return {secret, " ".join(secret.split()), secret.encode("unicode_escape").decode("ascii")}


def _find_environment_secrets() -> Iterator[str]:
    """Tokens and keys in the environment, and the passwords in its URLs (proxies, AWS endpoint)."""
    for name, value in os.environ.items():
        if SECRET_VARIABLES.search(name.upper()) and len(value) >= MIN_TOKEN_LENGTH:
            yield value
        elif URL_VARIABLES.search(name.upper()):
            yield from _find_secrets(value)


def scrub(text: str) -> str:
    """Remove secrets from text on its way to a terminal, a log or a file.

    Known secrets become ***, and whatever looks like a URL is shown as by `redact`.
    """
    secrets = sorted({*_known_secrets, *_find_environment_secrets()}, key=len, reverse=True)
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    return WORD.sub(lambda word: _redact_within(word.group()), text)


def _redact_within(word: str) -> str:
    """A word of a text with the URL in it redacted. What comes before its scheme stays."""
    found = SCHEME.search(word)
    if found and not _exists(word):
        url = word[found.start() :]
        if _may_hold_secrets(url):
            return word[: found.start()] + redact(url)
    if "@" not in word and "?" not in word:
        return word
    if QUERY.search(word) or CREDENTIALS.search(word):
        return redact(word)
    return word

"""Names of our modules in the wheel, where all of them are below `clip4idc`. Used by setup.py.

`rename_modules` works on Python's own tokens. It changes import statements, and names of modules in
strings: registry targets, logger names, examples in docstrings. Comments stay as they are. A name
that is put together from pieces cannot be followed: it raises UnhandledName, which ends the build.
"""

import io
import re
import tokenize
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, takewhile
from tokenize import TokenInfo

PACKAGE = "clip4idc"

BEFORE_STATEMENTS = frozenset(
    {
        tokenize.NEWLINE,
        tokenize.NL,
        tokenize.COMMENT,
        tokenize.INDENT,
        tokenize.DEDENT,
    }
)
# From Python 3.12 on, an f-string is several tokens.
STRINGS = frozenset({tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)})
TAKE_MODULES = frozenset(
    {"import_module", "__import__", "find_spec", "run_module", "getLogger", "files"}
)

Place = tuple[int, int]  # a line, from 1, and a column, from 0


class UnhandledName(ValueError):
    """A name of ours where it cannot be renamed."""


class OurNames:
    """The names at the top of the checkout, such as "modules", and how they look in strings.

    `is_module` says whether a dotted name, such as "modules.losses", is a module of ours.
    """

    def __init__(self, names: Sequence[str], is_module: Callable[[str], bool]) -> None:
        self.names = frozenset(names)
        self.is_module = is_module
        ours = rf"(?<![\w./-])(?:{'|'.join(names)})"
        self.dotted = re.compile(rf"{ours}\.[A-Za-z_]\w*")
        self.imported = re.compile(rf"(?<=from ){ours}(?= import )")
        self.target = re.compile(rf"(?<=['\"]){ours}(?=(?:\.\w+)*:[A-Za-z_]\w*['\"])")
        self.piece = re.compile(rf"(?:\w*['\"]+)?{ours}\.(?:['\"{{%]|$)")

    def find(self, text: str) -> set[int]:
        """Where names of our modules begin in a string."""
        found = {match.start() for match in self.dotted.finditer(text) if self.is_module(match[0])}
        found |= {match.start() for match in self.imported.finditer(text)}
        found |= {match.start() for match in self.target.finditer(text)}
        return found


def rename_modules(source: str, file: str, ours: OurNames) -> str:
    """A file's source with `clip4idc.` before the names of our modules.

    Raises UnhandledName, which names `file` and the line.
    """
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    line_starts = [0, *accumulate(map(len, source.splitlines(keepends=True)))]

    def offset(place: Place) -> int:
        return line_starts[place[0] - 1] + place[1]

    insertions: list[tuple[int, str]] = []
    for number, token in enumerate(tokens):
        try:
            if token.type in STRINGS:
                start = offset(token.start)
                text = source[start : offset(token.end)]
                _refuse_part_of_name(text, tokens[max(0, number - 2) : number], ours)
                insertions += [(start + at, f"{PACKAGE}.") for at in ours.find(text)]
            elif _begins_statement(tokens, number):
                for place, text in _rename_import(tokens[number:], ours):
                    insertions.append((offset(place), text))
        except UnhandledName as error:
            raise UnhandledName(f"{file}:{token.start[0]}: {error}") from None
    for position, text in sorted(insertions, reverse=True):
        source = source[:position] + text + source[position:]
    return source


def _begins_statement(tokens: Sequence[TokenInfo], number: int) -> bool:
    if number == 0:
        return True
    before = tokens[number - 1]
    return before.type in BEFORE_STATEMENTS or before.string in (":", ";")


def _rename_import(tokens: Sequence[TokenInfo], ours: OurNames) -> Iterator[tuple[Place, str]]:
    """What to insert, and where, if the statement that begins here imports a module of ours."""
    if tokens[0].string == "from" and tokens[1].string in ours.names:
        yield tokens[1].start, f"{PACKAGE}."
    if tokens[0].string != "import":
        return
    statement = takewhile(lambda token: token.type in (tokenize.NAME, tokenize.OP), tokens[1:])
    words = [token.string for token in takewhile(lambda token: token.string != ";", statement)]
    if not ours.names.intersection(words):
        return
    if "," in words:
        raise UnhandledName("import our modules one by one, so that they can be renamed")
    if "." not in words:
        yield tokens[0].start, f"from {PACKAGE} "
    elif "as" in words:
        yield tokens[1].start, f"{PACKAGE}."
    else:
        raise UnhandledName(f"import {''.join(words)} with `from` or `as`, so that it keeps a name")


def _refuse_part_of_name(text: str, before: Sequence[TokenInfo], ours: OurNames) -> None:
    """Raise UnhandledName for a string that is only a part of a module's name."""
    call = "".join(token.string for token in before)
    names_package = text.strip("rbuRBU'\"") in ours.names
    is_argument = call.endswith("(") and call.rstrip("(") in TAKE_MODULES
    if ours.piece.match(text) or (names_package and is_argument):
        raise UnhandledName(f"{text} is only a part of a module's name: write the whole name")

"""Whether captions of CLEVR-Change's kind say what really changed: seen or not, its type, the object's looks, the new value.

    python gt/eval_utils.py changes --changed_object data/changed_object.json --results hyp_ep_eval.json [--by size]

Word overlap (BLEU, CIDEr) is one thing, being right another: here a caption is parsed and held against what was drawn.
"""

import argparse
import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dataloaders.clevr_vocabulary import (
    ATTRIBUTES,
    CHANGE_PHRASES,
    COLORS,
    MATERIALS,
    SHAPES,
    SIZES,
    SYNONYMS,
)
from system.command import OneLineParser, run_command
from system.escaping import show
from system.json_files import read_json, write_json

VALUE_OF_WORD = {word: value for value, words in SYNONYMS.items() for word in words}


ATTRIBUTE_VALUES = {
    "size": tuple(SIZES),
    "color": tuple(COLORS),
    "material": MATERIALS,
    "shape": SHAPES,
}


PHRASES = sorted(
    {
        (phrase.replace("{}", "").strip(), kind)
        for kind, phrases in CHANGE_PHRASES.items()
        for phrase in phrases
    },
    key=lambda pair: -len(pair[0]),
)


NO_CHANGE, NO_CHANGE_PATTERN = (
    "none",
    re.compile(
        r"\b(?:no change|no difference|nothing|same as before|remains the same|identical)\b"
    ),
)


Z_95 = 1.96  # of 95 per cent


@dataclass(frozen=True)
class ParsedCaption:
    """What a caption says: the change's type (NONE: nothing changed; None: neither), the object's looks as far as named, its new
    value."""

    type: str | None
    cross_attention: Mapping[str, str]
    value: str | None


def parse_caption(caption: str) -> ParsedCaption:
    """Read a sentence of CLEVR-Change's grammar (preprocess/scenes/sentences.py)."""
    found = [
        (match, kind) for phrase, kind in PHRASES if (match := re.search(rf"\b{phrase}\b", caption))
    ]
    if not found:
        return ParsedCaption(NO_CHANGE if NO_CHANGE_PATTERN.search(caption) else None, {}, None)
    match, kind = found[0]
    subject = (
        caption[match.end() :] if match.group().startswith("someone") else caption[: match.start()]
    )
    looks, value = _values(subject.split(" that ")[0]), None
    if kind in ("color", "material"):  # the same verbs: what it became tells them apart
        new = _values(caption[match.end() :])
        kind = next(iter(new), "color")
        value = new.get(kind)
    return ParsedCaption(kind, looks, value)


def _values(words: str) -> dict[str, str]:
    """The first value that is named of each attribute."""
    meant = [VALUE_OF_WORD.get(word, word) for word in words.split()]
    named = {
        name: next((word for word in meant if word in ATTRIBUTE_VALUES[name]), None)
        for name in ATTRIBUTES
    }
    return {name: value for name, value in named.items() if value}


def judge_captions(
    captions: Mapping[str, str], changed: Mapping[str, Mapping[str, str]]
) -> dict[str, list[bool]]:
    """For each question the answers, right or wrong, of the captions that it is asked of. Ids that end in `_n` are distractors.

    What a caption leaves out counts as wrong. ValueError for a change that `changed` does not tell.
    """
    rows: dict[str, list[bool]] = {}
    for key, caption in captions.items():
        said = parse_caption(caption)
        if key.endswith("_n"):
            rows.setdefault("no change recognised", []).append(said.type == NO_CHANGE)
            continue
        if key not in changed:
            raise ValueError(f"what changed in {key} is not told")
        true = changed[key]
        kind = _type_of(true)
        new = true.get(f"new_{kind}")
        answers = {
            "change recognised": said.type in CHANGE_PHRASES,
            "type": said.type == kind,
            f"type: {kind}": said.type == kind,
        }
        answers |= {name: said.cross_attention.get(name) == true[name] for name in ATTRIBUTES}
        answers["color and shape"] = answers["color"] and answers["shape"]
        if new:
            answers[f"new {kind}"] = said.type == kind and said.value == new
        for name, right in answers.items():
            rows.setdefault(name, []).append(right)
    return rows


def judge_by_attribute(
    look: str, captions: Mapping[str, str], changed: Mapping[str, Mapping[str, str]]
) -> dict[str, list[bool]]:
    """As `judge`, the scenes told apart by a look of what changes in them: questions are named as in "small: type"."""
    rows = {}
    for value in ATTRIBUTE_VALUES[look]:
        of_value = {
            key: caption
            for key, caption in captions.items()
            if changed.get(key.removesuffix("_n"), {}).get(look) == value
        }
        rows |= {
            f"{value}: {question}": answers
            for question, answers in judge_captions(of_value, changed).items()
        }
    return rows


def _type_of(true: Mapping[str, str]) -> str:
    """The type, where it is not told by a new value's name."""
    return true.get("type") or next(
        name.removeprefix("new_") for name in true if name.startswith("new_")
    )


def read_changes(path: Path) -> dict[str, dict[str, str]]:
    """What changed, by image name. Raises ValueError for another schema."""
    changed = read_json(path, dict)
    for name, true in changed.items():
        if not (
            isinstance(true, dict)
            and all(true.get(look) in ATTRIBUTE_VALUES[look] for look in ATTRIBUTES)
            and (
                true["type"] in tuple(CHANGE_PHRASES)
                if "type" in true
                else any(key.startswith("new_") for key in true)
            )
        ):
            raise ValueError(
                f"{path}: {name} is {reprlib.repr(true)}, expected size, color, material, shape, and "
                "type or a new value"
            )
    return changed


def accuracy(answers: Sequence[bool]) -> dict[str, float]:
    """Share of right answers, their number, and Wilson's 95 % interval."""
    count, mean = len(answers), sum(answers) / len(answers)
    middle = (mean + Z_95**2 / (2 * count)) / (1 + Z_95**2 / count)
    half = (
        Z_95
        / (1 + Z_95**2 / count)
        * math.sqrt(mean * (1 - mean) / count + Z_95**2 / (4 * count**2))
    )
    return {
        "share": mean,
        "count": count,
        "low": max(middle - half, 0.0),
        "high": min(middle + half, 1.0),
    }


def format_accuracy(shares: Mapping[str, Mapping[str, float]]) -> str:
    """Rows in per cent."""
    width = max(map(len, shares))
    return "\n".join(
        f"{name:<{width}}  {100 * row['share']:5.1f}  [{100 * row['low']:5.1f}, {100 * row['high']:5.1f}]  "
        f"of {row['count']}"
        for name, row in shares.items()
    )


def main(argv: list[str]) -> int:
    """Command line; see --help."""
    parser = OneLineParser(
        prog="eval_utils.py changes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--changed_object",
        type=Path,
        required=True,
        help="what changed, by image name: type, size, color, "
        "material, shape, new_color or new_material",
    )
    parser.add_argument(
        "--results", type=Path, required=True, help="captions, [{image_id, caption}]"
    )
    parser.add_argument(
        "--by", choices=ATTRIBUTE_VALUES, help="tell scenes apart by this look of what changes"
    )
    parser.add_argument("--output", type=Path, help="also write the shares as JSON")
    args = parser.parse_args(argv)

    def job() -> None:
        from dataloaders.coco_files import read_results

        changed = read_changes(args.changed_object)
        captions = read_results(args.results)
        rows = judge_captions(captions, changed) | (
            judge_by_attribute(args.by, captions, changed) if args.by else {}
        )
        shares = {name: accuracy(answers) for name, answers in sorted(rows.items())}
        if args.output:
            write_json(args.output, shares)
        show(format_accuracy(shares))

    return run_command(parser.prog, job)

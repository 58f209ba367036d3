"""Whether captions of CLEVR-Change's kind are right about what changed.

    python gt/eval_utils.py changes --changed_object data/changed_object.json \\
        --results hyp_ep_eval.json [--by size]

Scores such as BLEU and CIDEr count words in common. Here each caption is parsed, and compared with
what was drawn: whether anything changed, the type of change, the object's attributes and new value.
"""

import argparse
import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dataloaders.clevr_vocabulary import (
    ATTRIBUTE_VALUES,
    ATTRIBUTES,
    CHANGE_PHRASES,
    CHANGE_TYPES,
    SYNONYMS,
)
from dataloaders.coco_files import read_results
from dataloaders.pairs import is_distractor, pair_id_of
from system.command import OneLineParser, run_command
from system.escaping import show
from system.json_files import read_json, write_json

NO_CHANGE = "none"  # the type of a caption that says that nothing changed
NO_CHANGE_PATTERN = re.compile(
    r"\b(?:no change|no difference|nothing|same as before|remains the same|identical)\b"
)
VALUE_OF_WORD = {word: value for value, words in SYNONYMS.items() for word in words}
OBJECT_FOLLOWS_VERB = "someone"  # begins the phrases that name the object after the verb
Z_95 = 1.96  # of a 95 % interval

Truth = Mapping[str, str]
"""What changed in a pair: type, attribute → value, and new_color or new_material."""


def _phrases() -> list[tuple[str, str]]:
    """(words of a change, its type), the longest first."""
    found = set()
    for kind, templates in CHANGE_PHRASES.items():
        for template in templates:
            found.add((template.replace("{}", "").strip(), kind))
    return sorted(found, key=lambda phrase: -len(phrase[0]))


PHRASES = _phrases()


@dataclass(frozen=True)
class ParsedCaption:
    """What a caption says."""

    type: str | None
    """The type of change; NO_CHANGE; None where it says neither."""
    attributes: Mapping[str, str]
    """Of the object that changed, as far as they are named."""
    new_value: str | None
    """The new color or material."""


def parse_caption(caption: str) -> ParsedCaption:
    """Read a sentence of CLEVR-Change's grammar (preprocess/scenes/sentences.py)."""
    match, kind = _find_phrase(caption)
    if match is None:
        says_none = NO_CHANGE_PATTERN.search(caption) is not None
        return ParsedCaption(NO_CHANGE if says_none else None, {}, None)
    before, after = caption[: match.start()], caption[match.end() :]
    subject = after if match.group().startswith(OBJECT_FOLLOWS_VERB) else before
    attributes = _named_values(subject.split(" that ")[0])
    if kind not in ("color", "material"):
        return ParsedCaption(kind, attributes, None)
    # Both have the same verbs: the new value tells them apart.
    named = _named_values(after)
    kind = "material" if "material" in named and "color" not in named else "color"
    return ParsedCaption(kind, attributes, named.get(kind))


def _find_phrase(caption: str) -> tuple[re.Match | None, str | None]:
    for phrase, kind in PHRASES:
        match = re.search(rf"\b{phrase}\b", caption)
        if match:
            return match, kind
    return None, None


def _named_values(text: str) -> dict[str, str]:
    """Attribute → the first of its values that is named."""
    values = [VALUE_OF_WORD.get(word, word) for word in text.split()]
    named = {}
    for attribute in ATTRIBUTES:
        for value in values:
            if value in ATTRIBUTE_VALUES[attribute]:
                named.setdefault(attribute, value)
    return named


def check_captions(
    captions: Mapping[str, str], changed: Mapping[str, Truth]
) -> dict[str, list[bool]]:
    """Question → whether each caption that it is asked of is right.

    What a caption leaves out counts as wrong. Captions of distractors, whose ids end in `_n`, are
    only asked whether nothing changed. Raises ValueError for a change that `changed` does not have.
    """
    rows: dict[str, list[bool]] = {}
    for caption_id, caption in captions.items():
        said = parse_caption(caption)
        if caption_id in changed:
            answers = _check_change(said, changed[caption_id])
        elif is_distractor(caption_id, changed):
            answers = {"no change recognised": said.type == NO_CHANGE}
        else:
            raise ValueError(f"{caption_id} is missing from the file of changes")
        for question, is_right in answers.items():
            rows.setdefault(question, []).append(is_right)
    return rows


def _check_change(said: ParsedCaption, truth: Truth) -> dict[str, bool]:
    kind = _type_of(truth)
    is_type = said.type == kind
    answers = {
        "change recognised": said.type in CHANGE_TYPES,
        "type": is_type,
        f"type: {kind}": is_type,
    }
    for attribute in ATTRIBUTES:
        answers[attribute] = said.attributes.get(attribute) == truth[attribute]
    answers["color and shape"] = answers["color"] and answers["shape"]
    new_value = truth.get(f"new_{kind}")
    if new_value:
        answers[f"new {kind}"] = is_type and said.new_value == new_value
    return answers


def _type_of(truth: Truth) -> str:
    """The type of change, which the name of the new value tells where it is not given."""
    if truth.get("type"):
        return truth["type"]
    new_values = [name.removeprefix("new_") for name in truth if name.startswith("new_")]
    return new_values[0]


def check_by_attribute(
    attribute: str, captions: Mapping[str, str], changed: Mapping[str, Truth]
) -> dict[str, list[bool]]:
    """As `check_captions`, for each value of an attribute of what changes: "small: type"."""
    rows = {}
    for value in ATTRIBUTE_VALUES[attribute]:
        chosen = {}
        for caption_id, caption in captions.items():
            pair_id = caption_id if caption_id in changed else pair_id_of(caption_id)
            if changed.get(pair_id, {}).get(attribute) == value:
                chosen[caption_id] = caption
        for question, answers in check_captions(chosen, changed).items():
            rows[f"{value}: {question}"] = answers
    return rows


def read_changes(path: Path) -> dict[str, dict[str, str]]:
    """Image name → what changed. Raises ValueError for another schema."""
    changed = read_json(path, dict)
    for name, truth in changed.items():
        if not _is_truth(truth):
            raise ValueError(
                f"{path}: {name} is {reprlib.repr(truth)}, expected size, color, material, shape, "
                "and type or a new value"
            )
    return changed


def _is_truth(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    if any(value.get(name) not in ATTRIBUTE_VALUES[name] for name in ATTRIBUTES):
        return False
    if "type" in value:
        return value["type"] in CHANGE_TYPES
    return any(name.startswith("new_") for name in value)


def accuracy(answers: Sequence[bool]) -> dict[str, float]:
    """The share of right answers, their number, and Wilson's 95 % interval."""
    count, share = len(answers), sum(answers) / len(answers)
    scale = 1 + Z_95**2 / count
    middle = (share + Z_95**2 / (2 * count)) / scale
    variance = share * (1 - share) / count + Z_95**2 / (4 * count**2)
    half = Z_95 / scale * math.sqrt(variance)
    low, high = max(middle - half, 0.0), min(middle + half, 1.0)
    return {"share": share, "count": count, "low": low, "high": high}


def format_accuracy(shares: Mapping[str, Mapping[str, float]]) -> str:
    """A line for each question, in per cent."""
    width = max(map(len, shares))
    lines = []
    for name, row in shares.items():
        percent = f"{100 * row['share']:5.1f}"
        interval = f"[{100 * row['low']:5.1f}, {100 * row['high']:5.1f}]"
        lines.append(f"{name:<{width}}  {percent}  {interval}  of {row['count']}")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Command line; see --help."""
    parser = _build_parser()
    args = parser.parse_args(argv)

    def job() -> None:
        changed = read_changes(args.changed_object)
        captions = read_results(args.results)
        rows = check_captions(captions, changed)
        if args.by:
            rows |= check_by_attribute(args.by, captions, changed)
        shares = {name: accuracy(answers) for name, answers in sorted(rows.items())}
        if args.output:
            write_json(args.output, shares)
        show(format_accuracy(shares))

    return run_command(parser.prog, job)


def _build_parser() -> OneLineParser:
    parser = OneLineParser(
        prog="eval_utils.py changes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--changed_object",
        type=Path,
        required=True,
        help="what changed, by image name: type, size, color, material, shape, new_color or "
        "new_material",
    )
    parser.add_argument(
        "--results", type=Path, required=True, help="captions, [{image_id, caption}]"
    )
    parser.add_argument(
        "--by",
        choices=ATTRIBUTE_VALUES,
        help="also for each value of this attribute of what changes",
    )
    parser.add_argument("--output", type=Path, help="also write the shares as JSON")
    return parser

"""Whether captions of scenes like CLEVR-Change's are right about what changed.

    python gt/eval_utils.py changes --changed_object data/changed_object.json \\
        --results hyp_ep_eval.json [--by size]

Scores such as BLEU and CIDEr count words in common. Here each caption is parsed, and compared with
what was drawn: whether anything changed, the type of change, the object's attributes and new value.
"""

import argparse
import math
import re
import reprlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from system.requirements import report_missing

    report_missing()

from dataloaders.clevr_vocabulary import (
    ATTRIBUTE_VALUES,
    ATTRIBUTES,
    CHANGE_PHRASES,
    CHANGE_TYPES,
    SYNONYMS,
)
from dataloaders.coco_files import read_results
from dataloaders.pairs import is_distractor, pair_id_of
from system.command import run_command
from system.escaping import show
from system.files import refuse_overwriting
from system.json_files import read_json, write_json
from system.parser import OneLineParser

NO_CHANGE = "none"  # the type of a caption that says that nothing changed
# Wider than the sentences that are drawn: captioners also mix them.
NO_CHANGE_PATTERN = re.compile(
    r"\b(?:no change|no difference|nothing|same as before|remains the same|identical)\b"
)
VALUE_OF_WORD = {word: value for value, words in SYNONYMS.items() for word in words}
OBJECT_FOLLOWS_VERB = "someone"  # begins the phrases that name the object after the verb
Z_95 = 1.96  # half the width of a 95% interval, in standard deviations

Truth = Mapping[str, str]
"""What changed in a pair: type, attribute → value, and new_color or new_material."""


def _list_phrases() -> list[tuple[str, str]]:
    """(words of a change, its type), the longest first."""
    found = set()
    for change_type, templates in CHANGE_PHRASES.items():
        for template in templates:
            found.add((template.replace("{}", "").strip(), change_type))
    return sorted(found, key=lambda phrase: -len(phrase[0]))


PHRASES = _list_phrases()


@dataclass(frozen=True)
class ParsedCaption:
    """What a caption says."""

    type: str | None
    """The type of change, or NO_CHANGE; None if it says neither."""
    attributes: Mapping[str, str]
    """Of the object that changed, as far as they are named."""
    new_value: str | None
    """The new color or material."""


def parse_caption(caption: str) -> ParsedCaption:
    """Read a sentence of CLEVR-Change's grammar (preprocess/scenes/sentences.py)."""
    match, change_type = _find_phrase(caption)
    if match is None:
        says_none = NO_CHANGE_PATTERN.search(caption) is not None
        return ParsedCaption(NO_CHANGE if says_none else None, {}, None)
    before = caption[: match.start()]
    after = caption[match.end() :]
    subject = after if match.group().startswith(OBJECT_FOLLOWS_VERB) else before
    attributes = _find_values(subject.split(" that ")[0])
    if change_type not in ("color", "material"):
        return ParsedCaption(change_type, attributes, None)
    # Both have the same verbs: the new value tells them apart.
    named = _find_values(after)
    change_type = "material" if "material" in named and "color" not in named else "color"
    return ParsedCaption(change_type, attributes, named.get(change_type))


def _find_phrase(caption: str) -> tuple[re.Match | None, str | None]:
    for phrase, change_type in PHRASES:
        match = re.search(rf"\b{phrase}\b", caption)
        if match:
            return match, change_type
    return None, None


def _find_values(text: str) -> dict[str, str]:
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
    """Question → one bool per caption to which it applies.

    What a caption leaves out counts as wrong. For captions of distractors, whose ids end in `_n`,
    the only question is whether nothing changed. Raises ValueError for an id of which `changed`
    says nothing.
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
    change_type = _find_type(truth)
    is_type = said.type == change_type
    answers = {
        "change recognised": said.type in CHANGE_TYPES,
        "type": is_type,
        f"type: {change_type}": is_type,
    }
    for attribute in ATTRIBUTES:
        answers[attribute] = said.attributes.get(attribute) == truth[attribute]
    answers["color and shape"] = answers["color"] and answers["shape"]
    new_value = truth.get(f"new_{change_type}")
    if new_value:
        answers[f"new {change_type}"] = is_type and said.new_value == new_value
    return answers


def _find_type(truth: Truth) -> str:
    """The type of change; if it is not given, it follows from the name of the new value."""
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
    count = len(answers)
    share = sum(answers) / count
    scale = 1 + Z_95**2 / count
    middle = (share + Z_95**2 / (2 * count)) / scale
    variance = share * (1 - share) / count + Z_95**2 / (4 * count**2)
    half = Z_95 / scale * math.sqrt(variance)
    low = max(middle - half, 0.0)
    high = min(middle + half, 1.0)
    return {"share": share, "count": count, "low": low, "high": high}


def format_accuracy(shares: Mapping[str, Mapping[str, float]]) -> str:
    """One line per question, in percent."""
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
        refuse_overwriting(args.output, [args.changed_object, args.results])
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

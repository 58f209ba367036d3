"""Scores of result files, ours or another system's: all captions, subsets, intervals, comparisons.

    python gt/eval_utils.py score --gt gt/spot_total_change_captions_reformat.json \\
        --results hyp_ep_eval.json --bootstrap 1000
"""

import argparse
import math
import sys
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from system.requirements import report_missing

    report_missing()

import numpy as np

from dataloaders.coco_files import read_ground_truth, read_results
from dataloaders.datasets import DATASETS
from dataloaders.datasets.clevr_change import read_type_mapping
from dataloaders.pairs import ALL_PAIRS, CHANGES, DISTRACTORS, is_distractor
from modules.metrics.bootstrap import LEVEL, bootstrap, interval, p_value
from modules.metrics.metric import ScoringContext
from modules.metrics.scorer import CaptionScorer, GroupRows
from modules.registries import PROTOCOLS
from modules.report.tables import MISSING, format_score
from system.command import run_command
from system.escaping import escape_latex, show, to_one_line
from system.files import refuse_overwriting
from system.flags import MAX_SEED, bounded
from system.json_files import to_json, write_json
from system.parser import OneLineParser

MIN_DRAWS = 100
MAX_DRAWS = 10**6
FEW_CAPTIONS = 30  # below which a bootstrap's intervals say little
WIDTH = 16  # of a column of scores

REFERENCE_MODES = {
    "each": "every sentence of a pair is a reference",
    "joined": "the sentences of a pair are joined into one reference",
}
LATEX_HEADINGS = {
    "Bleu_1": "B-1",
    "Bleu_2": "B-2",
    "Bleu_3": "B-3",
    "Bleu_4": "B-4",
    "METEOR": "M",
    "ROUGE_L": "R",
    "CIDEr": "C",
}  # other scores have their names

Scores = Mapping[str, float]
Intervals = dict[str, tuple[float, float]]


@dataclass
class SystemReport:
    """One system's scores. Each is by group, then by name of the score."""

    scores: dict[str, dict[str, float]]
    intervals: dict[str, Intervals] = field(default_factory=dict)
    against_first: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    """interval and p of the difference from the first system."""


@dataclass
class ScoreReport:
    """Everything that is printed or written."""

    gt: str
    references: str
    ids: dict[str, int]
    """How many captions a group has."""
    systems: dict[str, SystemReport]
    bootstrap: dict[str, Any] | None = None
    """Its draws, seed and level."""

    @property
    def names(self) -> list[str]:
        """The names of the scores, in order."""
        first = next(iter(self.systems.values()))
        return list(next(iter(first.scores.values())))


def score_files(args: argparse.Namespace) -> ScoreReport:
    """Score the files of the command line. Raises ValueError if they do not fit together."""
    protocol = PROTOCOLS[args.protocol]
    protocol.prepare()
    systems = read_systems(args.results)
    ids = list(next(iter(systems.values())))
    ground_truth = read_ground_truth(args.gt)
    references = choose_references(ground_truth, args.gt, ids, args.references == "joined")
    subsets = choose_subsets(ids, ground_truth, args.type_mapping)
    scorer = CaptionScorer(references, protocol, _context_of(args.datatype))
    groups = {}
    reports = {}
    for name, tokens in zip(systems, scorer.tokenize(*systems.values()), strict=True):
        scored = scorer.score_tokens(tokens)
        groups[name] = scored.groups(subsets)
        reports[name] = SystemReport(scored.scores(subsets))
    report = ScoreReport(
        gt=str(args.gt),
        references=REFERENCE_MODES[args.references],
        ids={ALL_PAIRS: len(ids)} | {name: len(members) for name, members in subsets.items()},
        systems=reports,
    )
    if args.bootstrap:
        add_confidence_intervals(report, groups, args.bootstrap, args.seed)
    return report


def _context_of(datatype: str | None) -> ScoringContext:
    """What metrics may need to know about a dataset that is not in its files."""
    if datatype is None:
        return ScoringContext()
    dataset = DATASETS[datatype]
    return ScoringContext(
        no_change_phrases=dataset.no_change_phrases, vocabulary=dataset.vocabulary
    )


def read_systems(paths: Sequence[Path]) -> dict[str, dict[str, str]]:
    """File name → caption id → caption, in the first file's order.

    Raises ValueError for files with different ids.
    """
    first = read_results(paths[0])
    systems = {str(paths[0]): first}
    for path in paths[1:]:
        captions = read_results(path)
        different = sorted(captions.keys() ^ first.keys())
        if different:
            raise ValueError(f"{path} captions other ids than {paths[0]}: {different[0]}")
        systems[str(path)] = {key: captions[key] for key in first}
    return systems


def choose_references(
    ground_truth: Mapping[str, list[str]], gt: Path, ids: Sequence[str], joined: bool
) -> dict[str, list[str]]:
    """The sentences of these ids, as they are or joined into one; says if others are left out.

    Raises ValueError for an id that has none.
    """
    unknown = [key for key in ids if key not in ground_truth]
    if unknown:
        raise ValueError(f"{unknown[0]} is captioned, but {gt} has no sentences for it")
    if len(ids) < len(ground_truth):
        counts = f"{len(ids)} of the {len(ground_truth)} ids of {to_one_line(gt)}"
        show(f"{counts} have captions and are scored", file=sys.stderr)
    if joined:
        return {key: [" ".join(ground_truth[key])] for key in ids}
    return {key: ground_truth[key] for key in ids}


def choose_subsets(
    ids: Sequence[str], known_ids: Container[str], type_mapping: Path | None
) -> dict[str, list[str]]:
    """Changes and distractors, if `known_ids` have any, and the types of a type_mapping.json.

    Subsets that have none of the ids are left out. Raises ValueError if all types are.
    """
    subsets: dict[str, list[str]] = {}
    distractors = [key for key in ids if is_distractor(key, known_ids)]
    if distractors:
        subsets[CHANGES] = [key for key in ids if not is_distractor(key, known_ids)]
        subsets[DISTRACTORS] = distractors
    if type_mapping:
        subsets |= _choose_types(ids, type_mapping)
    return {name: members for name, members in subsets.items() if members}


def _choose_types(ids: Sequence[str], type_mapping: Path) -> dict[str, list[str]]:
    types = {}
    for name, members in read_type_mapping(type_mapping).items():
        chosen = set(members)
        types[name] = [key for key in ids if key in chosen]
    if not any(types.values()):
        raise ValueError(f"{type_mapping} names none of the captioned ids")
    return types


def add_confidence_intervals(
    report: ScoreReport,
    groups: Mapping[str, Mapping[str, GroupRows]],
    draws: int,
    seed: int,
) -> None:
    """Add intervals of each score, and of the differences of all systems from the first.

    groups: system → group → rows.
    """
    report.bootstrap = {"draws": draws, "seed": seed, "level": LEVEL / 100}
    for group in report.ids:
        drawn = bootstrap([groups[name][group] for name in report.systems], draws, seed)
        for system, values in zip(report.systems.values(), drawn, strict=True):
            system.intervals[group] = {name: interval(values[name]) for name in report.names}
            if values is not drawn[0]:
                system.against_first[group] = _compare(values, drawn[0])


def _compare(
    values: Mapping[str, np.ndarray], first: Mapping[str, np.ndarray]
) -> dict[str, dict[str, Any]]:
    """Score name → interval and p of the difference; both arguments have arrays (draws,)."""
    compared = {}
    for name in values:
        difference = values[name] - first[name]
        compared[name] = {"interval": interval(difference), "p": p_value(difference)}
    return compared


def as_json(report: ScoreReport) -> dict[str, Any]:
    """The report as it is written to files: what was not computed is left out."""
    values = asdict(report)
    for system in values["systems"].values():
        for name in ("intervals", "against_first"):
            if not system[name]:
                del system[name]
    if report.bootstrap is None:
        del values["bootstrap"]
    return values


def format_report(report: ScoreReport) -> str:
    """Aligned text: one line per system and group, then the differences from the first system.

    A line of intervals stands below each line of scores.
    """
    lines = [f"{report.ids[ALL_PAIRS]} captions; {report.references}"]
    for name, system in report.systems.items():
        lines += ["", to_one_line(name), _format_row(report, "", report.names)]
        lines += _format_scores(report, system)
        lines += _format_differences(report, system)
    few = [to_one_line(group) for group, count in report.ids.items() if count < FEW_CAPTIONS]
    if few and report.bootstrap:
        problem = f"fewer than {FEW_CAPTIONS} captions, so their intervals say little"
        lines += ["", f"These groups have {problem}: {', '.join(few)}"]
    return "\n".join(lines)


def _format_scores(report: ScoreReport, system: SystemReport) -> Iterator[str]:
    for group, scores in system.scores.items():
        yield _format_row(report, to_one_line(group), map(format_score, scores.values()))
        if group in system.intervals:
            intervals = system.intervals[group].values()
            yield _format_row(report, "", map(_format_interval, intervals))


def _format_differences(report: ScoreReport, system: SystemReport) -> Iterator[str]:
    first = to_one_line(next(iter(report.systems)))
    for group, compared in system.against_first.items():
        yield f"{to_one_line(group)}: difference from {first}, {LEVEL}% interval and p"
        intervals = [_format_interval(values["interval"]) for values in compared.values()]
        yield _format_row(report, "", intervals)
        p_values = [f"p {format_score(values['p'], 3)}" for values in compared.values()]
        yield _format_row(report, "", p_values)


def _format_row(report: ScoreReport, label: str, cells: Iterable[str]) -> str:
    """A label and a cell per score, in columns that are as wide in every row."""
    label_width = max(len(to_one_line(group)) for group in report.ids)
    padded = []
    for name, cell in zip(report.names, cells, strict=True):
        padded.append(f"{cell:>{max(WIDTH, len(name) + 2)}}")
    return f"{label:<{label_width}}" + "".join(padded)


def _format_interval(bounds: Sequence[float]) -> str:
    return MISSING if math.isnan(bounds[0]) else f"[{bounds[0]:.3f}, {bounds[1]:.3f}]"


def format_latex(report: ScoreReport) -> str:
    """A booktabs table of scores times 100.

    After ± stands half the width of the interval, which need not be symmetric.
    """
    headings = [escape_latex(LATEX_HEADINGS.get(name, name)) for name in report.names]
    lines = [
        r"\begin{tabular}{ll" + "r" * len(headings) + "}",
        r"\toprule",
        " & ".join(["system", "group", *headings]) + r" \\",
        r"\midrule",
    ]
    labels = label_systems(list(report.systems))
    for label, system in zip(labels, report.systems.values(), strict=True):
        for group, scores in system.scores.items():
            intervals = system.intervals.get(group, {})
            cells = [_latex_cell(scores[key], intervals.get(key)) for key in report.names]
            lines.append(" & ".join([escape_latex(label), escape_latex(group), *cells]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])


def label_systems(paths: Sequence[str]) -> list[str]:
    """A short name per result file: its name without extension and, to tell the files apart, the
    folders that it takes. Runs call all of their files alike."""
    parts = [Path(path).with_suffix("").parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(names[-count:]) for names in parts]
        if len(set(labels)) == len(labels):
            return labels
    return list(paths)


def _latex_cell(score: float, bounds: Sequence[float] | None) -> str:
    text = format_score(100 * score, 1)
    if bounds is None or math.isnan(bounds[0]):
        return text
    return rf"{text} {{\scriptsize $\pm${50 * (bounds[1] - bounds[0]):.1f}}}"


FORMATS = {
    "table": format_report,
    "json": lambda report: to_json(as_json(report), indent=2),
    "latex": format_latex,
}


def main(argv: list[str]) -> int:
    """Command line; see --help."""
    parser = _build_parser()
    args = parser.parse_args(argv)
    if 0 < args.bootstrap < MIN_DRAWS:
        parser.error(f"--bootstrap is {args.bootstrap}, expected 0 (none) or at least {MIN_DRAWS}")

    def job() -> None:
        refuse_overwriting(args.output, [args.gt, args.type_mapping, *args.results])
        report = score_files(args)
        if args.output:
            write_json(args.output, as_json(report))
        show(FORMATS[args.format](report))

    return run_command(parser.prog, job)


def _build_parser() -> OneLineParser:
    parser = OneLineParser(
        prog="eval_utils.py score",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    ways = "; ".join(f"{name}: {text}" for name, text in REFERENCE_MODES.items())
    parser.add_argument(
        "--gt", type=Path, required=True, help="ground truth in COCO's format, by eval_utils.py"
    )
    parser.add_argument(
        "--results",
        type=Path,
        required=True,
        nargs="+",
        help="result files; all are compared with the first",
    )
    parser.add_argument(
        "--type_mapping",
        type=Path,
        help="type_mapping.json, CLEVR-Change's or a run's own: scores by type of change",
    )
    parser.add_argument(
        "--references", choices=REFERENCE_MODES, default="each", help=f"{ways} (default: each)"
    )
    parser.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        metavar="NAME",
        default="coco",
        help="how captions are tokenized and by which metrics they are scored: %(choices)s "
        "(default: coco)",
    )
    parser.add_argument(
        "--datatype",
        choices=DATASETS,
        metavar="NAME",
        help="dataset of the captions, for metrics that need its words: %(choices)s",
    )
    parser.add_argument(
        "--bootstrap",
        type=bounded(int, 0, MAX_DRAWS),
        default=0,
        help=f"draws for {LEVEL}%% intervals and paired comparisons, such as 1000",
    )
    parser.add_argument(
        "--seed",
        type=bounded(int, 0, MAX_SEED),
        default=0,
        help="seed of the draws (default: 0)",
    )
    parser.add_argument(
        "--format", choices=FORMATS, default="table", help="what is printed (default: table)"
    )
    parser.add_argument("--output", type=Path, help="also write everything as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Scores of result files, ours or another system's: overall, by change type, with intervals, one against another.

python gt/eval_utils.py score --gt gt/spot_total_change_captions_reformat.json --results hyp_ep_eval.json --bootstrap 1000
"""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from dataloaders.datasets.clevr_change import read_type_mapping
from modules.report.tables import MISSING, format_score
from system.command import OneLineParser, run_command
from system.escaping import latex_text, one_line, show
from system.json_files import to_json, write_json

MIN_DRAWS, FEW_PAIRS = 100, 30


FORMATS = ("table", "json", "latex")


REFERENCES = {
    "each": "every sentence of a pair is a reference",
    "joined": "the sentences of a pair are joined to one reference",
}


HEADINGS = {
    "Bleu_1": "B-1",
    "Bleu_2": "B-2",
    "Bleu_3": "B-3",
    "Bleu_4": "B-4",
    "METEOR": "M",
    "ROUGE_L": "R",
    "CIDEr": "C",
}


def score_files(args: argparse.Namespace) -> dict:
    """Everything that is printed, as one object. The files' captions must be of the same ids, all of them in the ground truth."""
    from dataloaders.coco_files import read_ground_truth, read_results
    from modules.metrics.ptb import tokenize
    from modules.metrics.scorer import CaptionScorer
    from system.java import ensure_java

    ensure_java()
    systems = {str(path): read_results(path) for path in args.results}
    first = next(iter(systems.values()))
    for name, captions in list(systems.items())[1:]:
        if captions.keys() != first.keys():
            raise ValueError(
                f"{name} captions other ids than {args.results[0]}: {sorted(captions.keys() ^ first.keys())[0]}"
            )
    truth = read_ground_truth(args.gt)
    unknown = [key for key in first if key not in truth]
    if unknown:
        raise ValueError(f"{args.results[0]} captions {unknown[0]}, which {args.gt} does not hold")
    if len(first) < len(truth):
        show(
            f"{len(first)} of the {len(truth)} ids of {one_line(args.gt)} are captioned and scored",
            file=sys.stderr,
        )
    truth = {key: truth[key] for key in first}
    if args.references == "joined":
        truth = {key: [" ".join(sentences)] for key, sentences in truth.items()}
    subsets = read_subsets(args.type_mapping, list(first))
    references = CaptionScorer(truth)
    tokens = {
        name: {
            key: texts[0]
            for key, texts in tokenize({key: [captions[key]] for key in first}).items()
        }
        for name, captions in systems.items()
    }
    report = {
        "gt": str(args.gt),
        "references": REFERENCES[args.references],
        "ids": {"all": len(first), **{name: len(ids) for name, ids in subsets.items()}},
        "systems": {
            name: {"scores": references.score_tokens(captions, subsets)}
            for name, captions in tokens.items()
        },
    }
    if args.bootstrap:
        add_confidence_intervals(
            report, references, tokens, {"all": list(first), **subsets}, args.bootstrap, args.seed
        )
    return report


def read_subsets(type_mapping: Path | None, ids: Sequence[str]) -> dict[str, list[str]]:
    """CLEVR-Change's changes and distractors (ids that end in `_n`), and the types of a type_mapping.json; none empty."""
    distractors = [key for key in ids if key.endswith("_n")]
    subsets = (
        {"change": [key for key in ids if not key.endswith("_n")], "distractor": distractors}
        if distractors
        else {}
    )
    if type_mapping:
        for name, members in read_type_mapping(type_mapping).items():
            wanted = set(members)
            subsets[name] = [key for key in ids if key in wanted]
        if not any(subsets[name] for name in subsets if name not in ("change", "distractor")):
            raise ValueError(f"{type_mapping} names none of the captioned ids")
    return {name: members for name, members in subsets.items() if members}


def add_confidence_intervals(
    report: dict,
    references,
    tokens: Mapping[str, Mapping[str, str]],
    groups: Mapping[str, Sequence[str]],
    draws: int,
    seed: int,
) -> None:
    """95 % intervals of each score, and of the differences of all systems to the first."""
    from modules.metrics.bootstrap import Statistics, bootstrap, interval, p_value

    report["bootstrap"] = {"draws": draws, "seed": seed, "level": 0.95}
    for system in report["systems"].values():
        system["intervals"] = {}
    for group, ids in groups.items():
        statistics = [
            Statistics.of(references, {key: captions[key] for key in ids})
            for captions in tokens.values()
        ]
        drawn = bootstrap(statistics, draws, seed)
        for system, scores in zip(report["systems"].values(), drawn, strict=True):
            system["intervals"][group] = {name: interval(values) for name, values in scores.items()}
            if scores is not drawn[0]:
                differences = {name: values - drawn[0][name] for name, values in scores.items()}
                system.setdefault("against_first", {})[group] = {
                    name: {"interval": interval(values), "p": p_value(values)}
                    for name, values in differences.items()
                }


def format_report(report: dict) -> str:
    """Aligned text: a line for each system and group, its intervals below, then the differences to the first system."""
    lines = [f"{report['ids']['all']} pairs; {report['references']}"]
    width = max(len(one_line(name)) for name in report["ids"])
    for system, values in report["systems"].items():
        lines += ["", one_line(system), " " * width + "".join(f"{name:>16}" for name in HEADINGS)]
        for group, scores in values["scores"].items():
            lines.append(
                f"{one_line(group):<{width}}"
                + "".join(f"{format_score(scores[name]):>16}" for name in HEADINGS)
            )
            if "intervals" in values:
                lines.append(
                    " " * width
                    + "".join(
                        f"{_format_interval(values['intervals'][group][name]):>16}"
                        for name in HEADINGS
                    )
                )
        for group, found in values.get("against_first", {}).items():
            first = one_line(next(iter(report["systems"])))
            lines.append(f"{one_line(group)}: difference to {first}, 95 % interval and p")
            lines.append(
                " " * width
                + "".join(f"{_format_interval(found[name]['interval']):>16}" for name in HEADINGS)
            )
            lines.append(
                " " * width
                + "".join(f"{'p ' + format_score(found[name]['p'], 3):>16}" for name in HEADINGS)
            )
    few = [name for name, count in report["ids"].items() if count < FEW_PAIRS]
    if few and "bootstrap" in report:
        lines += [
            "",
            f"fewer than {FEW_PAIRS} pairs, whose intervals say little: {', '.join(map(one_line, few))}",
        ]
    return "\n".join(lines)


def _format_interval(bounds: Sequence[float]) -> str:
    return MISSING if math.isnan(bounds[0]) else f"[{bounds[0]:.3f}, {bounds[1]:.3f}]"


def format_latex(report: dict) -> str:
    """A booktabs table, scores times 100, after ± half the width of the interval, which need not be symmetric."""
    lines = [
        r"\begin{tabular}{ll" + "r" * len(HEADINGS) + "}",
        r"\toprule",
        " & ".join(["system", "pairs", *HEADINGS.values()]) + r" \\",
        r"\midrule",
    ]
    for system, values in report["systems"].items():
        for group, scores in values["scores"].items():
            cells = []
            for name in HEADINGS:
                low, high = (
                    values["intervals"][group][name]
                    if "intervals" in values
                    else (math.nan, math.nan)
                )
                spread = (
                    "" if math.isnan(low) else rf" {{\scriptsize $\pm${50 * (high - low):.1f}}}"
                )
                cells.append(f"{format_score(100 * scores[name], 1)}{spread}")
            lines.append(
                " & ".join([latex_text(Path(system).stem), latex_text(group), *cells]) + r" \\"
            )
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])


def main(argv: list[str]) -> int:
    """Command line; see --help."""
    parser = OneLineParser(
        prog="eval_utils.py score",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--gt",
        type=Path,
        required=True,
        help="ground truth in COCO's form, as eval_utils.py makes it",
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
        help="type_mapping.json, CLEVR-Change's or a run's own: scores by change type",
    )
    parser.add_argument(
        "--references",
        choices=REFERENCES,
        default="each",
        help="; ".join(f"{name}: {text}" for name, text in REFERENCES.items()) + " (default: each)",
    )
    parser.add_argument(
        "--bootstrap",
        type=int,
        default=0,
        help="draws for 95 %% intervals and paired comparisons, such as 1000",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws (default: 0)")
    parser.add_argument(
        "--format", choices=FORMATS, default="table", help="what is printed (default: table)"
    )
    parser.add_argument("--output", type=Path, help="also write all of it as JSON")
    args = parser.parse_args(argv)
    if args.seed < 0 or 0 < args.bootstrap < MIN_DRAWS or args.bootstrap < 0:
        parser.error(
            f"--bootstrap is expected to be 0 (none) or at least {MIN_DRAWS}, --seed at least 0"
        )

    def job() -> None:
        report = score_files(args)
        if args.output:
            write_json(args.output, report)
        formats = {
            "table": format_report,
            "json": lambda found: to_json(found, indent=2),
            "latex": format_latex,
        }
        show(formats[args.format](report))

    return run_command(parser.prog, job)

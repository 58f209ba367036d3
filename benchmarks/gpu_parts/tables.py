"""The rows of benchmarks/gpu.py as tables in Markdown, with the aims beside the figures."""

from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]
Aims = list[tuple[str, str, bool]]  # the aim, what was found, whether it is met

MIN_SHARE = 0.45  # of the bf16 matrix rate, with --compile, from a batch of
MIN_SHARE_BATCH = 128
MIN_GREEDY = 8000  # pairs a second at a batch of
GREEDY_BATCH = 1024
MIN_WORKERS = 16  # with which the loader, with a cache, is never the limit

TITLES = {
    "training step": "Training",
    "captioning": "Captioning",
    "loader": "Reading data",
}
COLUMNS = {
    "training step": {
        "stage": "stage",
        "precision": "precision",
        "compiled": "--compile",
        "batch": "batch",
        "pairs_per_second": "pairs/s",
        "share_of_matrix_rate": "of the matrix rate",
        "peak_gb": "peak GB",
        "first_seconds": "first run, s",
    },
    "captioning": {
        "method": "method",
        "batch": "batch",
        "pairs_per_second": "pairs/s",
        "words_per_second": "words/s",
        "share_of_matrix_rate": "of the matrix rate",
        "peak_gb": "peak GB",
    },
    "loader": {
        "stage": "stage",
        "images": "images from",
        "workers": "workers",
        "pairs_per_second": "pairs/s",
    },
}
SHARES = {"share_of_matrix_rate"}
HIDDEN_FACTS = {"part", "what", "device"}  # of the device's row
HIDDEN = {"part", "what", "ok"}  # of a check's row


def format_tables(rows: Sequence[Row]) -> str:
    """All tables: device, aims, speed, checks, and what failed."""
    parts = [_describe_device(rows), _format_aims(rows)]
    for what, title in TITLES.items():
        chosen = _select(rows, what)
        if chosen:
            parts.append(f"**{title}**\n\n{_table(chosen, COLUMNS[what])}")
    parts += [_describe_start(rows), _describe_demo(rows), _format_checks(rows)]
    parts.append(_format_failures(rows))
    return "\n\n".join(part for part in parts if part) + "\n"


def _select(rows: Iterable[Row], what: str, **fields: Any) -> list[Row]:
    """The rows of a kind that did not fail and have these values."""
    wanted = {"what": what, **fields}
    return [
        row
        for row in rows
        if "failed" not in row and all(row.get(name) == value for name, value in wanted.items())
    ]


def _table(rows: Sequence[Row], columns: dict[str, str]) -> str:
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [_format_value(name, row.get(name)) for name in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _format_value(name: str, value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name in SHARES:
        return f"{100 * value:.1f} %"
    if isinstance(value, float):
        return f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _describe_device(rows: Sequence[Row]) -> str:
    lines = []
    for row in _select(rows, "device"):
        facts = [f"{name} {value}" for name, value in row.items() if name not in HIDDEN_FACTS]
        lines.append(f"{row['device']}: {', '.join(facts)}.")
    rates = [f"{row['precision']} {row['tflops']}" for row in _select(rows, "matrix product")]
    if rates:
        lines.append(f"Its matrix products, TFLOP/s: {', '.join(rates)}.")
    return "\n".join(lines)


def _format_aims(rows: Sequence[Row]) -> str:
    aims = [*_share_aims(rows), *_greedy_aims(rows), *_loader_aims(rows)]
    lines = ["| aim | found | |", "|---|---|---|"]
    lines += [f"| {aim} | {found} | {'met' if met else 'missed'} |" for aim, found, met in aims]
    return "\n".join(lines) if aims else ""


def _share_aims(rows: Sequence[Row]) -> Aims:
    found: Aims = []
    for row in _select(rows, "training step", precision="bf16", compiled=True):
        share = row["share_of_matrix_rate"]
        if row["batch"] >= MIN_SHARE_BATCH:
            aim = (
                f"{row['stage']}, batch {row['batch']}, --compile: {MIN_SHARE:.0%} of the bf16 rate"
            )
            found.append((aim, f"{100 * share:.1f} %", share >= MIN_SHARE))
    return found


def _greedy_aims(rows: Sequence[Row]) -> Aims:
    aim = f"greedy, batch {GREEDY_BATCH:,}: {MIN_GREEDY:,} pairs/s"
    chosen = _select(rows, "captioning", method="greedy", batch=GREEDY_BATCH)
    rates = [row["pairs_per_second"] for row in chosen]
    return [(aim, f"{rate:,.0f}", rate >= MIN_GREEDY) for rate in rates]


def _loader_aims(rows: Sequence[Row]) -> Aims:
    found: Aims = []
    for row in _select(rows, "loader", images="cache"):
        steps = _select(rows, "training step", stage=row["stage"], precision="bf16")
        if row["workers"] < MIN_WORKERS or not steps:
            continue
        eaten = max(step["pairs_per_second"] for step in steps)
        rate = row["pairs_per_second"]
        aim = f"{row['stage']}: {MIN_WORKERS} workers and a cache give what the step eats"
        found.append((aim, f"{rate:,.0f} of {eaten:,.0f} pairs/s", rate >= eaten))
    return found


def _describe_start(rows: Sequence[Row]) -> str:
    texts = [f"{row['seconds']} s" for row in _select(rows, "start of a training")]
    return f"From the command to the first step: {texts[0]}." if texts else ""


def _describe_demo(rows: Sequence[Row]) -> str:
    for row in _select(rows, "demo training"):
        return (
            f"Demo: both stages in {row['seconds']} s, after {row['drawing']} s of drawing; "
            f"CIDEr-D {row['cider_d']}, last loss {row['last_loss']}."
        )
    return ""


def _format_checks(rows: Sequence[Row]) -> str:
    checks = [row for row in rows if "ok" in row]
    if not checks:
        return ""
    lines = ["| check | | |", "|---|---|---|"]
    for row in checks:
        facts = [f"{name} {_short(value)}" for name, value in row.items() if name not in HIDDEN]
        lines.append(f"| {row['what']} | {', '.join(facts)} | {'ok' if row['ok'] else 'wrong'} |")
    return "**Checks**\n\n" + "\n".join(lines)


def _short(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)


def _format_failures(rows: Sequence[Row]) -> str:
    failed = [row for row in rows if "failed" in row]
    if not failed:
        return ""
    lines = []
    for row in failed:
        names = [str(value) for name, value in row.items() if name not in ("failed", "part")]
        which = f" ({', '.join(names)})" if names else ""
        lines.append(f"- {row['part']}{which}: {row['failed']}")
    return "**Failed**\n\n" + "\n".join(lines)

"""--do_predict: a user's pairs to captions, onto the terminal or into a file that a broken run continues."""

import csv
import io
import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dataloaders.own_pairs import OwnPair, list_pairs
from modules.bert_config import load_decoder_config
from modules.escaping import one_line, printable, show, spreadsheet_text
from modules.files import file_sha256, parse_json, read_json, write_json
from modules.options import Options
from modules.predictor import DEMO, Caption, Decoding, Predictor
from modules.pretrained import find_weights
from modules.runtime import Runtime, open_runtime
from modules.visualization import draw_explanation

log = logging.getLogger(__name__)

COLUMNS = ("id", "caption", "score", "before", "after")
AT_ONCE, EXPLAINED_AT_ONCE = 32, 8  # pairs in a batch; fewer where all attention is kept
Captioned = tuple[OwnPair, list[Caption]]


def predict(options: Options) -> None:
    """Caption the pairs that the options name. All are known to have their files before anything is computed or written."""
    wanted, source = options.predict, options.model
    with open_runtime(options) as runtime:
        pairs = list_pairs(wanted.before, wanted.after, wanted.pairs)
        decoding = Decoding(
            options.caption.beam_size,
            options.caption.length_penalty,
            wanted.num_captions,
            wanted.temperature,
            wanted.top_p,
            options.run.seed,
        )
        path = Path(wanted.predictions) if wanted.predictions else None
        done, kept_bytes = _finished(path, pairs, decoding.num_captions) if path else (0, 0)
        if wanted.save_attention:
            Path(wanted.save_attention).mkdir(parents=True, exist_ok=True)
        config = load_decoder_config(source.decoder_model).with_layers(
            source.decoder_num_hidden_layers
        )
        predictor = Predictor.load(
            source.init_model,
            runtime.device,
            runtime.precision,
            source.intra_num_hidden_layers,
            source.linear_patch,
            config,
            options.data.max_words,
            source.pretrained_clip_name,
            source.cache_dir,
            source.image_resolution,
            source.quick_gelu,
        )
        origin = _origin(options, decoding) if path else {}
        if done:
            _check_origin(path, origin)
        rounds = _rounds(predictor, pairs, done, decoding, wanted.save_attention, runtime)
        if path:
            _into_file(rounds, path, done, kept_bytes, origin, runtime)
        else:
            _onto_terminal(rounds, alone=not wanted.pairs and Path(wanted.before).is_file())
        if wanted.save_attention:
            log.warning(
                "where the model looked: %d pair(s) in %s", len(pairs) - done, wanted.save_attention
            )


def _rounds(
    predictor: Predictor,
    pairs: Sequence[OwnPair],
    done: int,
    decoding: Decoding,
    attention_folder: str | None,
    runtime: Runtime,
) -> Iterator[list[Captioned]]:
    """The pairs from number `done` on, in their order. In each round every process captions a batch, and all get all of them."""
    step = (EXPLAINED_AT_ONCE if attention_folder else AT_ONCE) * runtime.world_size
    for start in runtime.progress(range(done, len(pairs), step), "captions"):
        numbers = range(start, min(start + step, len(pairs)))
        own = numbers[runtime.rank :: runtime.world_size]
        merged: list = [None] * len(numbers)
        for rank, share in enumerate(
            runtime.gather_objects(_caption(predictor, pairs, own, decoding, attention_folder))
        ):
            merged[rank :: runtime.world_size] = share
        yield list(zip(pairs[start : numbers.stop], merged, strict=True))


def _caption(
    predictor: Predictor,
    pairs: Sequence[OwnPair],
    numbers: Sequence[int],
    decoding: Decoding,
    attention_folder: str | None,
) -> list[list[Caption]]:
    """The captions of the pairs with these numbers, and where a folder is given, a picture of each caption's attention in it."""
    images = [(pairs[n].before, pairs[n].after) for n in numbers]
    if not attention_folder:
        return predictor.captions(images, decoding, numbers)
    explained = predictor.explanations(images, decoding, numbers)
    for number, explanations in zip(numbers, explained, strict=True):
        pair = pairs[number]
        for place, explanation in enumerate(explanations):
            path = Path(
                attention_folder, picture_name(number, pair.id, place if decoding.draws else None)
            )
            draw_explanation(path, pair.before, pair.after, explanation)
    return [[explanation.caption for explanation in explanations] for explanations in explained]


def picture_name(number: int, identity: str, place: int | None = None) -> str:
    """The name of a file for a pair's attention, or for that of one of its captions: 80 bytes of its id, made plain."""
    plain = re.sub(r"[^\w.]+", "_", identity).encode()[:80].decode(errors="ignore")
    return "-".join([f"{number:05d}", plain, *([] if place is None else [str(place)])]) + ".png"


def _onto_terminal(rounds: Iterator[list[Captioned]], alone: bool) -> None:
    """One pair: its sentences, a line each. Several: CSV."""
    if not alone:
        print(_csv_lines([COLUMNS]), end="")
    for captioned in rounds:
        if alone:
            show("\n".join(one_line(caption.text) for caption in captioned[0][1]), flush=True)
        else:
            text = _lines(captioned, ".csv")
            print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)


def _into_file(
    rounds: Iterator[list[Captioned]],
    path: Path,
    done: int,
    kept_bytes: int,
    origin: dict[str, Any],
    runtime: Runtime,
) -> None:
    """Append each round and sync it; what stood behind the last whole pair goes first. Beside a new file stands its origin."""
    if done:
        log.warning("%s holds %d pairs already: going on behind them", path, done)
    for number, captioned in enumerate(rounds):
        if not runtime.is_main:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if number == 0 and not done:
            write_json(_beside(path), origin)
        with open(path, "ab") as file:
            if number == 0:
                file.truncate(kept_bytes)
                if path.suffix == ".csv" and not kept_bytes:
                    file.write(_csv_lines([COLUMNS]).encode())
            file.write(_lines(captioned, path.suffix).encode())
            file.flush()
            os.fsync(file.fileno())


def _origin(options: Options, decoding: Decoding) -> dict[str, Any]:
    """What results depend on beside the images."""
    source = options.model
    return {
        "checkpoint_sha256": file_sha256(find_weights(source.init_model or DEMO, source.cache_dir)),
        "max_words": options.data.max_words,
        "decoder_model": source.decoder_model,
        "linear_patch": source.linear_patch,
        "intra_num_hidden_layers": source.intra_num_hidden_layers,
        "image_resolution": source.image_resolution,
        **vars(decoding),
    }


def _check_origin(path: Path, origin: dict[str, Any]) -> None:
    """ValueError where the results in the file come from something else, by what stands beside them."""
    if not _beside(path).is_file():
        raise FileNotFoundError(
            f"{path} has no {_beside(path).name} beside it, which tells what made it: give --predictions "
            "another file, or remove this one"
        )
    before = read_json(_beside(path), dict)
    differing = [
        f"{name} {before.get(name)}" for name, value in origin.items() if before.get(name) != value
    ]
    if differing:
        raise ValueError(
            f"{path} was made with {', '.join(differing)} ({_beside(path)}): give --predictions another file, or "
            "remove this one"
        )


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.origin.json")


def _lines(captioned: Sequence[Captioned], kind: str) -> str:
    """CSV with a row for each caption, or JSON with a line for each pair."""
    if kind == ".csv":
        return _csv_lines(
            [_row(pair, caption) for pair, captions in captioned for caption in captions]
        )
    return "".join(
        json.dumps(
            {
                "id": pair.id,
                "before": str(pair.before),
                "after": str(pair.after),
                "captions": [
                    {"caption": caption.text, "score": round(caption.score, 4)}
                    for caption in captions
                ],
            },
            ensure_ascii=False,
        )
        + "\n"
        for pair, captions in captioned
    )


def _row(pair: OwnPair, caption: Caption) -> tuple[str, ...]:
    """What a spreadsheet may open: texts of others are no formulas there."""
    before, after = (spreadsheet_text(str(path)) for path in (pair.before, pair.after))
    text = spreadsheet_text(one_line(caption.text))
    return spreadsheet_text(pair.id), text, f"{caption.score:.4f}", before, after


def _csv_lines(rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _finished(path: Path, pairs: Sequence[OwnPair], num_captions: int) -> tuple[int, int]:
    """How many pairs a file of an earlier run holds whole, and how many bytes they take; ValueError where it is another's."""
    if not path.is_file():
        return 0, 0
    lines = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    head, per_pair = (1, num_captions) if path.suffix == ".csv" else (0, 1)
    other = ValueError(
        f"{path} holds other results than these pairs': give --predictions another file, or remove this one"
    )
    try:
        if lines[:head] != [_csv_lines([COLUMNS]).encode()][: len(lines[:head])]:
            raise other
        if head:
            found = [row[0] for row in csv.reader(line.decode() for line in lines[head:])]
            expected = [spreadsheet_text(pair.id) for pair in pairs]
        else:
            found = [parse_json(line.decode())["id"] for line in lines]
            expected = [pair.id for pair in pairs]
    except (ValueError, KeyError, TypeError, IndexError, csv.Error):
        raise other from None
    if len(found) > len(pairs) * per_pair or any(
        expected[n // per_pair] != one for n, one in enumerate(found)
    ):
        raise other
    done = len(found) // per_pair
    return done, sum(map(len, lines[: head + done * per_pair])) if done else 0

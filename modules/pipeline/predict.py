"""--do_predict: a user's pairs to captions, onto the terminal or into a file that a broken run continues."""

import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dataloaders.find_pairs import find_pairs
from dataloaders.pairs import ImagePair
from modules.model.bert import load_decoder_config
from modules.model.explanation import Caption
from modules.options import Options
from modules.options.decoding import Decoding
from modules.pipeline.results import (
    Captioned,
    append_captions,
    check_settings,
    print_captions,
    read_finished,
)
from modules.pipeline.start import start_runtime
from modules.predictor import DEMO, Predictor
from modules.report.pictures import draw_explanation
from modules.weights.sources import find_weights
from system.files import sha256_of
from system.runtime import Runtime

log = logging.getLogger(__name__)

MAX_BATCH, EXPLAIN_BATCH_SIZE = 32, 8  # pairs in a batch; fewer where all attention is kept


def predict(options: Options) -> None:
    """Caption the pairs that the options name. All are known to have their files before anything is computed or written."""
    wanted, source = options.predict, options.model
    with start_runtime(options) as runtime:
        pairs = find_pairs(wanted.before, wanted.after, wanted.pairs)
        decoding = options.decoding
        path = Path(wanted.predictions) if wanted.predictions else None
        done, kept_bytes = read_finished(path, pairs, decoding.num_captions) if path else (0, 0)
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
        origin = settings_fingerprint(options, decoding) if path else {}
        if done:
            check_settings(path, origin)
        rounds = caption_batches(predictor, pairs, done, decoding, wanted.save_attention, runtime)
        if path:
            append_captions(rounds, path, done, kept_bytes, origin, runtime)
        else:
            print_captions(rounds, alone=not wanted.pairs and Path(wanted.before).is_file())
        if wanted.save_attention:
            log.warning(
                "where the model looked: %d pair(s) in %s", len(pairs) - done, wanted.save_attention
            )


def caption_batches(
    predictor: Predictor,
    pairs: Sequence[ImagePair],
    done: int,
    decoding: Decoding,
    attention_folder: str | None,
    runtime: Runtime,
) -> Iterator[list[Captioned]]:
    """The pairs from number `done` on, in their order. In each round every process captions a batch, and all get all of them."""
    step = (EXPLAIN_BATCH_SIZE if attention_folder else MAX_BATCH) * runtime.world_size
    for start in runtime.progress(range(done, len(pairs), step), "captions"):
        numbers = range(start, min(start + step, len(pairs)))
        own = runtime.own_share(numbers)
        captions = runtime.merge_shares(_caption(predictor, pairs, own, decoding, attention_folder))
        yield list(zip(pairs[start : numbers.stop], captions, strict=True))


def _caption(
    predictor: Predictor,
    pairs: Sequence[ImagePair],
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
                attention_folder,
                picture_name(number, pair.id, place if decoding.method() == "sampling" else None),
            )
            draw_explanation(path, pair.before, pair.after, explanation)
    return [[explanation.caption for explanation in explanations] for explanations in explained]


def picture_name(number: int, identity: str, place: int | None = None) -> str:
    """The name of a file for a pair's attention, or for that of one of its captions: 80 bytes of its id, made plain."""
    plain = re.sub(r"[^\w.]+", "_", identity).encode()[:80].decode(errors="ignore")
    return "-".join([f"{number:05d}", plain, *([] if place is None else [str(place)])]) + ".png"


def settings_fingerprint(options: Options, decoding: Decoding) -> dict[str, Any]:
    """What results depend on beside the images."""
    source = options.model
    return {
        "checkpoint_sha256": sha256_of(find_weights(source.init_model or DEMO, source.cache_dir)),
        "max_words": options.data.max_words,
        "decoder_model": source.decoder_model,
        "linear_patch": source.linear_patch,
        "intra_num_hidden_layers": source.intra_num_hidden_layers,
        "image_resolution": source.image_resolution,
        **decoding.values(),
    }

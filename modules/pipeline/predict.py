"""--do_predict: captions for a user's own pairs."""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from dataloaders.pairs import ImagePair
from dataloaders.user_pairs import find_pairs
from modules.model.bert import load_decoder_config
from modules.model.explanation import Caption, Explanation
from modules.options import Options
from modules.options.decoding import Decoding
from modules.pipeline.results import (
    CaptionedPair,
    FinishedPairs,
    append_captions,
    check_settings,
    print_captions,
    read_finished,
)
from modules.pipeline.start import start_runtime
from modules.predictor import DEMO, Predictor
from modules.report.pictures import draw_explanation
from modules.weights.sources import find_weights
from modules.weights.tensor_files import hash_weights
from system.run_folder import reserve_file
from system.runtime import Runtime

log = logging.getLogger(__name__)

BATCH_SIZE = 32  # pairs
EXPLAIN_BATCH_SIZE = 8  # pairs, when all attention weights are kept
MAX_ID_BYTES = 80  # of a pair's id in the name of a picture


def predict(options: Options) -> None:
    """Caption the pairs that the options name.

    All their images are known to exist before anything is computed or written.
    """
    inputs = options.predict
    decoding = options.decoding
    folder = Path(inputs.save_attention) if inputs.save_attention else None
    path = Path(inputs.predictions) if inputs.predictions else None
    with (
        start_runtime(options) as runtime,
        reserve_file(path, runtime) if path else nullcontext(),
    ):
        pairs = find_pairs(inputs.before, inputs.after, inputs.pairs)
        finished = read_finished(path, pairs, decoding.num_captions) if path else FinishedPairs()
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
        predictor = _load_predictor(options, runtime)
        batches = caption_batches(predictor, pairs, finished.num_done, decoding, folder, runtime)
        if path:
            settings = caption_settings(options, predictor)
            if finished.num_done:
                check_settings(path, settings)
            append_captions(batches, path, finished, settings, runtime)
        else:
            is_one_pair = not inputs.pairs and Path(inputs.before).is_file()
            print_captions(batches, sentences_only=is_one_pair)
        if folder:
            count = len(pairs) - finished.num_done
            # A warning, because a prediction shows no other lines.
            log.warning("attention pictures of %d pair(s) are in %s", count, folder)


def _load_predictor(options: Options, runtime: Runtime) -> Predictor:
    model = options.model
    config = load_decoder_config(model.decoder_model)
    return Predictor.load(
        model.init_model,
        runtime.device,
        runtime.precision,
        intra_layers=model.intra_num_hidden_layers,
        linear_patch=model.linear_patch,
        decoder_config=config.with_layers(model.decoder_num_hidden_layers),
        max_words=options.data.max_words,
        clip_name=model.pretrained_clip_name,
        cache_dir=model.cache_dir,
        image_resolution=model.image_resolution,
        quick_gelu=model.quick_gelu,
    )


def caption_batches(
    predictor: Predictor,
    pairs: Sequence[ImagePair],
    num_done: int,
    decoding: Decoding,
    attention_folder: Path | None,
    runtime: Runtime,
) -> Iterator[list[CaptionedPair]]:
    """The pairs after the first `num_done` with their captions, in order, a batch at a time.

    Each process captions its share of a batch, and all get all of it.
    """
    own_size = EXPLAIN_BATCH_SIZE if attention_folder else BATCH_SIZE
    size = own_size * runtime.world_size
    for start in runtime.progress_bar(range(num_done, len(pairs), size), "captions"):
        indices = range(start, min(start + size, len(pairs)))
        own_indices = runtime.own_share(indices)
        share = _caption(predictor, pairs, own_indices, decoding, attention_folder)
        captions = runtime.merge_shares(share)
        yield list(zip(pairs[start : indices.stop], captions, strict=True))


def _caption(
    predictor: Predictor,
    pairs: Sequence[ImagePair],
    indices: Sequence[int],
    decoding: Decoding,
    attention_folder: Path | None,
) -> list[list[Caption]]:
    """The captions of the pairs with these indices; with a folder, also their pictures."""
    images = [(pairs[index].before, pairs[index].after) for index in indices]
    if attention_folder is None:
        return predictor.captions(images, decoding, indices)
    numbers_captions = decoding.num_captions > 1 or decoding.method_name() == "sampling"
    explained = predictor.explanations(images, decoding, indices)
    for index, explanations in zip(indices, explained, strict=True):
        _draw_explanations(index, pairs[index], explanations, attention_folder, numbers_captions)
    return [[explanation.caption for explanation in of_pair] for of_pair in explained]


def _draw_explanations(
    index: int,
    pair: ImagePair,
    explanations: Sequence[Explanation],
    folder: Path,
    numbers_captions: bool,
) -> None:
    """Draw a picture for each caption of a pair; `numbers_captions` puts numbers in their names."""
    for number, explanation in enumerate(explanations):
        name = picture_name(index, pair.id, number if numbers_captions else None)
        draw_explanation(folder / name, pair.before, pair.after, explanation)


def picture_name(pair_index: int, pair_id: str, caption_index: int | None = None) -> str:
    """The file name of a caption's picture.

    It consists of the pair's index, the beginning of its id without special characters, and the
    caption's index among the pair's captions.
    """
    plain = re.sub(r"[^\w.]+", "_", pair_id).encode()[:MAX_ID_BYTES].decode(errors="ignore")
    pieces = [f"{pair_index:05d}", plain]
    if caption_index is not None:
        pieces.append(str(caption_index))
    return "-".join(pieces) + ".png"


def caption_settings(options: Options, predictor: Predictor) -> dict[str, Any]:
    """Everything that captions depend on, besides the images.

    "model" has the settings of the model as built, in which a model.json takes part.
    """
    model = options.model
    weights = find_weights(model.init_model or DEMO, model.cache_dir)
    return {
        "checkpoint_sha256": hash_weights(weights),
        "max_words": options.data.max_words,
        "decoder_model": model.decoder_model,
        "linear_patch": model.linear_patch,
        "intra_num_hidden_layers": model.intra_num_hidden_layers,
        "image_resolution": model.image_resolution,
        "pretrained_clip_name": str(model.pretrained_clip_name),
        "quick_gelu": model.quick_gelu,
        "precision": predictor.runtime.precision,
        "model": predictor.model.info(predictor.max_words),
        **options.decoding.settings_by_name(),
    }

"""The model that the options ask for, checked against the tokenizer and --max_words."""

from typing import NamedTuple

from modules.clip4idc import CLIP4IDC, load_model
from modules.model.bert import load_cross_config, load_decoder_config
from modules.options import Options
from modules.registries import OBJECTIVES
from modules.tokenizer import EOT, SOT, VOCAB_SIZE
from modules.weights.key_names import has_captioner
from modules.weights.model_info import ModelSettings
from modules.weights.sources import LoadedWeights, load_weights


class BuiltModel(NamedTuple):
    """A model, and what its training started from, in words for model.json."""

    model: CLIP4IDC
    started_from: str


def build_model(options: Options, resumed: LoadedWeights | None = None) -> BuiltModel:
    """The task's model: from a training state, otherwise from --init_model or CLIP's weights.

    A model.json next to the weights takes precedence over the options. Raises ValueError or OSError
    for weights that cannot be found, read or used with these options.
    """
    source = options.model
    if resumed is None:
        weights = load_weights(
            source.init_model,
            source.pretrained_clip_name,
            source.cache_dir,
            source.image_resolution,
            source.quick_gelu,
        )
    else:
        weights = resumed
    _require_captioner(options, weights)
    model, _ = load_model(weights, options.task, _read_settings(options))
    _check_vocabulary(model, options.data.max_words)
    return BuiltModel(model, weights.started_from)


def _require_captioner(options: Options, weights: LoadedWeights) -> None:
    """Raise ValueError if captions are to be evaluated or improved with weights that have no
    captioner."""
    if options.run.do_eval:
        flag = "--do_eval"
    elif OBJECTIVES[options.objective].needs_captioner:
        flag = "--scst" if options.training.scst else f"--objective {options.objective}"
    else:
        return
    if options.task == "caption" and not has_captioner(weights.tensors):
        raise ValueError(
            f"{flag} needs the weights of a captioner (decoder.*): "
            f"--init_model is {options.model.init_model}"
        )


def _read_settings(options: Options) -> ModelSettings:
    source = options.model
    decoder_config = None
    if options.task == "caption":
        config = load_decoder_config(source.decoder_model)
        decoder_config = config.with_layers(source.decoder_num_hidden_layers)
    cross_config = None
    if source.sim_header == "tight":
        config = load_cross_config(source.cross_model)
        cross_config = config.with_layers(source.cross_num_hidden_layers)
    return ModelSettings(
        source.intra_num_hidden_layers,
        source.linear_patch,
        decoder_config,
        sim_header=source.sim_header,
        cross_config=cross_config,
    )


def _check_vocabulary(model: CLIP4IDC, max_words: int) -> None:
    """Raise ValueError if the vocabulary is not the tokenizer's, or captions are too long."""
    if (model.vocab_size, model.sot, model.eot) != (VOCAB_SIZE, SOT, EOT):
        raise ValueError(
            f"this model has {model.vocab_size} token ids, of which {model.sot} starts a sentence "
            f"and {model.eot} ends it, expected the tokenizer's {VOCAB_SIZE}, {SOT} and {EOT}"
        )
    if max_words > model.context_length:
        raise ValueError(
            f"--max_words is {max_words}, expected at most {model.context_length}, "
            "this model's context length"
        )

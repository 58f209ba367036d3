"""TODO."""

import logging

from modules.clip4idc import CLIP4IDC
from modules.model.bert import load_cross_config, load_decoder_config
from modules.options import Options
from modules.tokenizer import VOCAB_SIZE
from modules.weights.model_info import apply_model_info
from modules.weights.sources import LoadedWeights, load_weights

log = logging.getLogger(__name__)


def build_model(options: Options, loaded: LoadedWeights | None = None) -> CLIP4IDC:
    """The stage's model of what a state held, else from --init_model, --pretrained_clip_name or nothing, tensor by tensor (SPEC §2,
    Weights). A card beside the weights goes before the options."""
    source = options.model
    if loaded is None:
        loaded = load_weights(
            source.init_model,
            source.pretrained_clip_name,
            source.cache_dir,
            source.image_resolution,
            source.quick_gelu,
        )
    weights = loaded.tensors
    needy = "--do_eval" if options.run.do_eval else "--scst" if options.training.scst else None
    if (
        needy
        and options.task == "caption"
        and not any(key.startswith("decoder.") for key in weights)
    ):
        raise ValueError(
            f"{needy} needs the weights of a captioner (decoder.*): --init_model is {source.init_model}"
        )
    decoder_config = cross_config = None
    settings = apply_model_info(
        {
            "intra_num_hidden_layers": source.intra_num_hidden_layers,
            "linear_patch": source.linear_patch,
        },
        loaded.info,
        loaded.origin,
    )
    if options.task == "caption":
        decoder_config = load_decoder_config(source.decoder_model).with_layers(
            source.decoder_num_hidden_layers
        )
        if "decoder_config" in loaded.info:
            asked, decoder_config = (
                decoder_config,
                load_decoder_config(loaded.info["decoder_config"]),
            )
            if asked != decoder_config:
                log.info("the captioner's config is the one beside %s", loaded.origin)
    if source.sim_header == "tight":
        cross_config = load_cross_config(source.cross_model).with_layers(
            source.cross_num_hidden_layers
        )
    model = CLIP4IDC.from_weights(
        weights, options.task, *settings.values(), decoder_config, source.sim_header, cross_config
    )
    if model.vocab_size != VOCAB_SIZE:
        raise ValueError(
            f"this CLIP has a vocabulary of {model.vocab_size}, expected CLIP's {VOCAB_SIZE}"
        )
    if options.data.max_words > model.clip.sizes.context_length:
        raise ValueError(
            f"--max_words is {options.data.max_words}, expected at most {model.clip.sizes.context_length}, this "
            "CLIP's context length"
        )
    return model

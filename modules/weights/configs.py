"""Config files of other CLIP implementations: written for our models, checked when we load theirs.

Weights alone do not show the activation, the number of heads or the images' normalization.
"""

from collections.abc import Mapping
from typing import Any

from modules.model.clip import CLIP
from modules.model.clip_sizes import ClipSizes
from modules.model.limits import HEAD_WIDTH

HUGGING_FACE_CONFIG = "config.json"
OPEN_CLIP_CONFIG = "open_clip_config.json"
ANY = object()
# What open_clip's configs may say about a model that can be built here.
OPEN_CLIP_MODEL = {
    "embed_dim": ANY,
    "vision_cfg": ANY,
    "text_cfg": ANY,
    "quick_gelu": ANY,
    "custom_text": ANY,
    "init_logit_scale": ANY,
}
OPEN_CLIP_VISION = {
    "image_size": ANY,
    "layers": ANY,
    "width": ANY,
    "patch_size": ANY,
    "mlp_ratio": ANY,
    "patch_dropout": ANY,
    "head_width": HEAD_WIDTH,
    "pool_type": "tok",
    "final_ln_after_pool": False,
    "attentional_pool": False,
    "no_ln_pre": False,
    "ls_init_value": ANY,
    "output_tokens": False,
}
OPEN_CLIP_TEXT = {
    "context_length": ANY,
    "vocab_size": ANY,
    "width": ANY,
    "heads": ANY,
    "layers": ANY,
    "mlp_ratio": ANY,
    "pool_type": "argmax",
    "no_causal_mask": False,
    "embed_cls": False,
    "proj_bias": False,
    "proj_type": "linear",
    "ls_init_value": ANY,
    "output_tokens": False,
    "pad_id": ANY,
    "eos_id": ANY,
}
# What CLIPConfig assumes if a config does not say it.
DEFAULT_HEADS = {"text_config": 8, "vision_config": 12}


def huggingface_config(sizes: ClipSizes) -> dict[str, Any]:
    """What CLIPConfig needs to build a CLIP of these sizes."""
    common = {
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": sizes.embed_dim,
    }
    text = {
        "hidden_size": sizes.transformer_width,
        "intermediate_size": 4 * sizes.transformer_width,
        "num_hidden_layers": sizes.transformer_layers,
        "num_attention_heads": sizes.transformer_width // HEAD_WIDTH,
        "max_position_embeddings": sizes.context_length,
        "vocab_size": sizes.vocab_size,
        "bos_token_id": sizes.sot,
        "eos_token_id": sizes.eot,
    }
    vision = {
        "hidden_size": sizes.vision_width,
        "intermediate_size": 4 * sizes.vision_width,
        "num_hidden_layers": sizes.vision_layers,
        "num_attention_heads": sizes.vision_width // HEAD_WIDTH,
        "image_size": sizes.image_resolution,
        "patch_size": sizes.vision_patch_size,
    }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": sizes.embed_dim,
        "text_config": common | text,
        "vision_config": common | vision,
    }


def huggingface_problems(config: Mapping[str, Any], sizes: ClipSizes) -> list[str]:
    """What in a CLIPModel's config.json asks for a model that cannot be built here.

    Missing values have CLIPConfig's defaults.
    """
    problems = []
    if config.get("model_type", "clip") != "clip":
        problems.append(f"model_type is {config['model_type']!r}, expected 'clip'")
    widths = {"text_config": sizes.transformer_width, "vision_config": sizes.vision_width}
    for name, width in widths.items():
        part = config.get(name) or {}
        if not isinstance(part, Mapping):
            problems.append(f"{name} is not an object")
            continue
        heads = part.get("num_attention_heads", DEFAULT_HEADS[name])
        found = {
            "hidden_act": (part.get("hidden_act", "quick_gelu"), "quick_gelu"),
            "layer_norm_eps": (part.get("layer_norm_eps", 1e-5), 1e-5),
            "num_attention_heads": (heads, width // HEAD_WIDTH),
        }
        problems += [
            f"{name}.{key} is {value!r}, expected {expected!r}"
            for key, (value, expected) in found.items()
            if value != expected
        ]
    return problems


def open_clip_problems(config: Mapping[str, Any], sizes: ClipSizes) -> list[str]:
    """What in an open_clip config asks for a model that cannot be built here."""
    model = config.get("model_cfg", config)
    if not isinstance(model, Mapping):
        return ["it lacks vision_cfg or text_cfg"]
    vision = model.get("vision_cfg")
    text = model.get("text_cfg")
    if not (isinstance(vision, Mapping) and isinstance(text, Mapping)):
        return ["it lacks vision_cfg or text_cfg"]
    problems = []
    if model.get("quick_gelu") is not True:
        problems.append("quick_gelu is not true: the exact GELU cannot be built here")
    problems += _differences(model, OPEN_CLIP_MODEL, "")
    problems += _differences(vision, OPEN_CLIP_VISION, "vision_cfg.")
    problems += _differences(text, OPEN_CLIP_TEXT, "text_cfg.")
    problems += _preprocessing_differences(config.get("preprocess_cfg"))
    heads = text.get("heads", 8)
    expected = sizes.transformer_width // HEAD_WIDTH
    if heads != expected:
        problems.append(f"text_cfg.heads is {heads!r}, expected {expected}")
    return problems


# Layout → the config file that must confirm the model, and the function that checks it.
CONFIG_CHECKS = {
    "huggingface": (HUGGING_FACE_CONFIG, huggingface_problems),
    "openai": (OPEN_CLIP_CONFIG, open_clip_problems),
}


def _differences(part: Mapping[str, Any], known: Mapping[str, Any], prefix: str) -> list[str]:
    problems = []
    for key, value in part.items():
        expected = known.get(key, False)  # what is not known must be off
        if expected is ANY or value in (None, expected):
            continue
        if key in known:
            problems.append(f"{prefix}{key} is {value!r}, expected {expected!r}")
        else:
            problems.append(f"{prefix}{key} is not known here")
    return problems


def _preprocessing_differences(preprocessing: Any) -> list[str]:
    if not isinstance(preprocessing, Mapping):
        return []
    problems = []
    for name, ours in (("mean", CLIP.pixel_mean), ("std", CLIP.pixel_std)):
        theirs = preprocessing.get(name)
        if theirs is not None and theirs != list(ours):
            problems.append(f"preprocess_cfg.{name} is {theirs!r}, expected {list(ours)!r}")
    return problems

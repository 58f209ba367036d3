"""TODO."""

from collections.abc import Mapping
from typing import Any

from dataloaders.images import MEAN, STD
from modules.model.clip import HEAD_WIDTH, ClipSizes

# What open_clip's configs may say and mean the model that is built here.
HUGGING_FACE_CONFIG, OPEN_CLIP_CONFIG = "config.json", "open_clip_config.json"
OPEN_CLIP = {
    "": {
        "embed_dim": None,
        "vision_cfg": None,
        "text_cfg": None,
        "quick_gelu": None,
        "custom_text": None,
        "init_logit_scale": None,
    },
    "vision_cfg": {
        "image_size": None,
        "layers": None,
        "width": None,
        "patch_size": None,
        "mlp_ratio": None,
        "patch_dropout": None,
        "head_width": HEAD_WIDTH,
        "pool_type": "tok",
        "final_ln_after_pool": False,
        "attentional_pool": False,
        "no_ln_pre": False,
        "ls_init_value": None,
        "output_tokens": False,
    },
    "text_cfg": {
        "context_length": None,
        "vocab_size": None,
        "width": None,
        "heads": None,
        "layers": None,
        "mlp_ratio": None,
        "pool_type": "argmax",
        "no_causal_mask": False,
        "embed_cls": False,
        "proj_bias": False,
        "proj_type": "linear",
        "ls_init_value": None,
        "output_tokens": False,
        "pad_id": None,
        "eos_id": None,
    },
}


def huggingface_config(sizes: ClipSizes) -> dict[str, Any]:
    """What CLIPConfig needs to build a CLIP of these sizes."""
    text, vision = sizes.transformer_width, sizes.vision_width
    common = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "projection_dim": sizes.embed_dim}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": sizes.embed_dim,
        "text_config": common
        | {
            "hidden_size": text,
            "intermediate_size": 4 * text,
            "num_hidden_layers": sizes.transformer_layers,
            "num_attention_heads": text // HEAD_WIDTH,
            "max_position_embeddings": sizes.context_length,
            "vocab_size": sizes.vocab_size,
            "bos_token_id": sizes.vocab_size - 2,
            "eos_token_id": sizes.vocab_size - 1,
        },
        "vision_config": common
        | {
            "hidden_size": vision,
            "intermediate_size": 4 * vision,
            "num_hidden_layers": sizes.vision_layers,
            "num_attention_heads": vision // HEAD_WIDTH,
            "image_size": sizes.image_resolution,
            "patch_size": sizes.vision_patch_size,
        },
    }


def huggingface_problems(config: Mapping[str, Any], sizes: ClipSizes) -> list[str]:
    """What in a CLIPModel's config.json asks for another model than is built here; what it leaves out has CLIPConfig's default."""
    problems = (
        [f"model_type is {config['model_type']!r}, expected 'clip'"]
        if config.get("model_type", "clip") != "clip"
        else []
    )
    for name, heads, width in (
        ("text_config", 8, sizes.transformer_width),
        ("vision_config", 12, sizes.vision_width),
    ):
        part = config.get(name) or {}
        if not isinstance(part, Mapping):
            problems.append(f"{name} is no object")
            continue
        expected = {
            "hidden_act": ("quick_gelu", "quick_gelu"),
            "layer_norm_eps": (1e-5, 1e-5),
            "num_attention_heads": (heads, width // HEAD_WIDTH),
        }
        problems += [
            f"{name}.{key} is {part.get(key, default)!r}, expected {value!r}"
            for key, (default, value) in expected.items()
            if part.get(key, default) != value
        ]
    return problems


def open_clip_problems(config: Mapping[str, Any], sizes: ClipSizes) -> list[str]:
    """What in an open_clip config asks for another model than is built here."""
    model, pictures = config.get("model_cfg", config), config.get("preprocess_cfg")
    if not isinstance(model, Mapping) or not all(
        isinstance(model.get(name), Mapping) for name in ("vision_cfg", "text_cfg")
    ):
        return ["it lacks vision_cfg or text_cfg"]
    problems = (
        []
        if model.get("quick_gelu") is True
        else ["quick_gelu is not true: the exact GELU is not built here"]
    )
    for name, known in OPEN_CLIP.items():
        for key, value in (model[name] if name else model).items():
            where = f"{name}.{key}" if name else key
            if key not in known and value not in (None, False):
                problems.append(f"{where} is not known here")
            elif known.get(key) is not None and value not in (None, known[key]):
                problems.append(f"{where} is {value!r}, expected {known[key]!r}")
    for name, ours in (("mean", MEAN), ("std", STD)):
        theirs = pictures.get(name) if isinstance(pictures, Mapping) else None
        if theirs is not None and theirs != list(ours):
            problems.append(f"preprocess_cfg.{name} is {theirs!r}, expected {list(ours)!r}")
    heads = model["text_cfg"].get("heads", 8)
    if heads != sizes.transformer_width // HEAD_WIDTH:
        problems.append(
            f"text_cfg.heads is {heads!r}, expected {sizes.transformer_width // HEAD_WIDTH}"
        )
    return problems

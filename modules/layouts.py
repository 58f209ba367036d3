"""The names that others give CLIP's tensors, and what their configs must say for them to fit (OpenAI's ViT with quick GELU).

Three layouts are told apart by their keys: *released* (CLIP4IDC's, `clip.…`), *plain* (OpenAI's and open_clip's, the same without
`clip.`) and *huggingface* (transformers' CLIPModel, and CLIP4IDC's own tensors beside CLIP's).
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from dataloaders.images import MEAN, STD
from modules.clip import HEAD_WIDTH, ClipSizes

EXTRAS = (
    "input_resolution",
    "context_length",
    "vocab_size",
)  # numbers that OpenAI's archives alone carry
NORMS = ("weight", "bias")
# Released name (without `clip.`) of each Hugging Face tensor outside the blocks; the last four modules are CLIP4IDC's own.
NAMES = {
    "logit_scale": "logit_scale",
    "text_projection.weight": "text_projection",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    **{f"text_model.final_layer_norm.{part}": f"ln_final.{part}" for part in NORMS},
    "visual_projection.weight": "visual.proj",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    **{f"vision_model.pre_layrnorm.{part}": f"visual.ln_pre.{part}" for part in NORMS},
    **{f"vision_model.post_layernorm.{part}": f"visual.ln_post.{part}" for part in NORMS},
    "vision_model.embeddings.pair_patch_embedding.weight": "visual.conv2.weight",
    "vision_model.embeddings.before_embedding": "visual.bef_embedding",
    "vision_model.embeddings.after_embedding": "visual.aft_embedding",
    "vision_model.embeddings.joint_position_embedding.weight": "visual.joint_positional_embedding",
    **{f"vision_model.mid_layernorm.{part}": f"visual.ln_mid.{part}" for part in NORMS},
}
IN_BLOCKS = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
FUSED = ("q_proj", "k_proj", "v_proj")  # in this order one matrix in OpenAI's
TOWERS = {"text_model.": "", "vision_model.": "visual."}
TRANSPOSED = ("text_projection", "visual.proj")  # matrices that multiply from the other side
BUFFERS = (
    "text_model.embeddings.position_ids",
    "vision_model.embeddings.position_ids",
)  # older files hold these numbers
# What open_clip's configs may say and mean the model that is built here.
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


def layout_of(keys: Iterable[str]) -> str:
    """ "released", "plain" or "huggingface"; "other" for what none of them is."""
    keys = set(keys)
    if any(key.startswith(tuple(TOWERS)) for key in keys):
        return "huggingface"
    if any(key.startswith(("clip.", "decoder.", "cross.")) for key in keys):
        return "released"
    return "plain" if any(key.startswith("visual.") for key in keys) else "other"


def without_wrapping(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without `module.`, which data parallelism puts before them all, and without open_clip's `text.`."""
    if all(key.startswith("module.") for key in weights):
        weights = {key.removeprefix("module."): value for key, value in weights.items()}
    if "text.token_embedding.weight" in weights:
        weights = {key.removeprefix("text."): value for key, value in weights.items()}
    return dict(weights)


def to_released(weights: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """Any layout → the released names. ValueError where Hugging Face's are not complete."""
    return (
        dict(weights)
        if layout == "released"
        else {"plain": from_plain, "huggingface": from_huggingface}[layout](weights)
    )


def from_plain(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenAI's names → released ones, which pass: they get `clip.`, and its archive's extras go."""
    prefix = "" if any(key.startswith("clip.") for key in weights) else "clip."
    return {
        f"{prefix}{key}": value
        for key, value in weights.items()
        if key.removeprefix("clip.") not in EXTRAS
    }


def from_huggingface(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's names → released ones, q, k and v of each block joined. ValueError where one of the three is missing."""
    released, left = {}, {key: value for key, value in weights.items() if key not in BUFFERS}
    for key in [
        key for key in left if key.endswith(tuple(f".self_attn.q_proj.{part}" for part in NORMS))
    ]:
        parts = [key.replace(".q_proj.", f".{name}.") for name in FUSED]
        absent = [part for part in parts if part not in left]
        if absent:
            raise ValueError(f"{absent[0]} is missing")
        if not all(left[part].ndim and left[part].shape == left[parts[0]].shape for part in parts):
            raise ValueError(f"{parts[0]} and its k_proj and v_proj differ in shape")
        block, _, part = key.partition(".self_attn.q_proj.")
        released[f"{_block_name(block)}.attn.in_proj_{part}"] = torch.cat(
            [left.pop(name) for name in parts]
        )
    return released | {
        _released_name(key): _turned(_released_name(key), value) for key, value in left.items()
    }


def to_huggingface(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Released names → Hugging Face's; what is not CLIP's (decoder.*) keeps its name. ValueError for what has no name there."""
    back = {f"clip.{name}": key for key, name in NAMES.items()}
    inner = {name: key for key, name in IN_BLOCKS.items()}
    renamed = {}
    for key, value in weights.items():
        block, tower, rest = _split_block(key)
        if key in back:
            renamed[back[key]] = _turned(key, value)
        elif block is None:
            renamed[key] = value
        elif rest.startswith("attn.in_proj_"):
            part = rest.removeprefix("attn.in_proj_")
            if not value.ndim or value.shape[0] % 3:
                raise ValueError(
                    f"{key} has shape {tuple(value.shape)}, which is not q, k and v together"
                )
            for name, third in zip(FUSED, value.chunk(3), strict=True):
                renamed[f"{tower}encoder.layers.{block}.self_attn.{name}.{part}"] = third
        else:
            module, _, part = rest.rpartition(".")
            if module not in inner:
                raise ValueError(f"{key} has no name in Hugging Face's layout")
            renamed[f"{tower}encoder.layers.{block}.{inner[module]}.{part}"] = value
    return renamed


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


def _split_block(key: str) -> tuple[str | None, str, str]:
    """`clip.visual.transformer.resblocks.3.ln_1.weight` → 3, its tower in Hugging Face's name, `ln_1.weight`; None for others."""
    for tower, name in TOWERS.items():
        prefix = f"clip.{name}transformer.resblocks."
        if key.startswith(prefix):
            block, _, rest = key.removeprefix(prefix).partition(".")
            return block, tower, rest
    return None, "", key


def _block_name(key: str) -> str:
    """`vision_model.encoder.layers.3` → `clip.visual.transformer.resblocks.3`."""
    for tower, name in TOWERS.items():
        if key.startswith(f"{tower}encoder.layers."):
            return f"clip.{name}transformer.resblocks.{key.removeprefix(f'{tower}encoder.layers.')}"
    raise ValueError(f"{key} is unexpected")


def _released_name(key: str) -> str:
    if key in NAMES:
        return f"clip.{NAMES[key]}"
    for inner, ours in IN_BLOCKS.items():
        block, found, part = key.partition(f".{inner}.")
        if found:
            return f"{_block_name(block)}.{ours}.{part}"
    if key.startswith(tuple(TOWERS)):
        raise ValueError(f"{key} is unexpected")
    return key


def _turned(name: str, value: Tensor) -> Tensor:
    return (
        value.T.contiguous()
        if name.removeprefix("clip.") in TRANSPOSED and value.ndim == 2
        else value
    )

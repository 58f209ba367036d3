"""The names that others give CLIP's tensors, and what their configs must say for them to fit (OpenAI's ViT with quick GELU).

Three layouts are told apart by their keys: *released* (CLIP4IDC's, `clip.…`), *plain* (OpenAI's and open_clip's, the same without
`clip.`) and *huggingface* (transformers' CLIPModel, and CLIP4IDC's own tensors beside CLIP's).
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from modules.model.clip import CLIP, PAIR_KEYS, ClipSizes


def released_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the released names, in float32: OpenAI's own names get `clip.`, its archive's extras go."""
    return {key: value.float() for key, value in from_openai(weights).items()}


def clip_tensors(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors below `clip.`, without the prefix."""
    return {
        key.removeprefix("clip."): value
        for key, value in weights.items()
        if key.startswith("clip.")
    }


def has_full_clip(weights: Mapping[str, Tensor]) -> bool:
    """Whether released-name weights have every tensor of OpenAI's CLIP, so that no CLIP file is needed."""
    try:
        sizes = ClipSizes.from_weights(clip_tensors(weights))
    except ValueError:
        return False
    with torch.device("meta"):
        keys = CLIP(sizes, intra_layers=0, linear_patch="2d").state_dict()
    return all(
        f"clip.{key}" in weights for key in keys if key.removeprefix("visual.") not in PAIR_KEYS
    )


ARCHIVE_EXTRAS = (
    "input_resolution",
    "context_length",
    "vocab_size",
)  # numbers that OpenAI's archives alone carry


LAYER_NORM_PARTS = ("weight", "bias")


# Released name (without `clip.`) of each Hugging Face tensor outside the blocks; the last four modules are CLIP4IDC's own.
HF_TO_RELEASED = {
    "logit_scale": "logit_scale",
    "text_projection.weight": "text_projection",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    **{f"text_model.final_layer_norm.{part}": f"ln_final.{part}" for part in LAYER_NORM_PARTS},
    "visual_projection.weight": "visual.proj",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    **{f"vision_model.pre_layrnorm.{part}": f"visual.ln_pre.{part}" for part in LAYER_NORM_PARTS},
    **{
        f"vision_model.post_layernorm.{part}": f"visual.ln_post.{part}" for part in LAYER_NORM_PARTS
    },
    "vision_model.embeddings.pair_patch_embedding.weight": "visual.conv2.weight",
    "vision_model.embeddings.before_embedding": "visual.bef_embedding",
    "vision_model.embeddings.after_embedding": "visual.aft_embedding",
    "vision_model.embeddings.joint_position_embedding.weight": "visual.joint_positional_embedding",
    **{f"vision_model.mid_layernorm.{part}": f"visual.ln_mid.{part}" for part in LAYER_NORM_PARTS},
}


HF_BLOCK_PARTS = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


QKV = ("q_proj", "k_proj", "v_proj")  # in this order one matrix in OpenAI's


TOWERS = {"text_model.": "", "vision_model.": "visual."}


TRANSPOSED = ("text_projection", "visual.proj")  # matrices that multiply from the other side


BUFFERS = (
    "text_model.embeddings.position_ids",
    "vision_model.embeddings.position_ids",
)  # older files hold these numbers


def layout_of(keys: Iterable[str]) -> str:
    """ "released", "plain" or "huggingface"; "other" for what none of them is."""
    keys = set(keys)
    if any(key.startswith(tuple(TOWERS)) for key in keys):
        return "huggingface"
    if any(key.startswith(("clip.", "decoder.", "cross.")) for key in keys):
        return "released"
    return "plain" if any(key.startswith("visual.") for key in keys) else "other"


def strip_wrappers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
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
        else {"plain": from_openai, "huggingface": from_huggingface}[layout](weights)
    )


def from_openai(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenAI's names → released ones, which pass: they get `clip.`, and its archive's extras go."""
    prefix = "" if any(key.startswith("clip.") for key in weights) else "clip."
    return {
        f"{prefix}{key}": value
        for key, value in weights.items()
        if key.removeprefix("clip.") not in ARCHIVE_EXTRAS
    }


def from_huggingface(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's names → released ones, q, k and v of each block joined. ValueError where one of the three is missing."""
    released, left = {}, {key: value for key, value in weights.items() if key not in BUFFERS}
    for key in [
        key
        for key in left
        if key.endswith(tuple(f".self_attn.q_proj.{part}" for part in LAYER_NORM_PARTS))
    ]:
        parts = [key.replace(".q_proj.", f".{name}.") for name in QKV]
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
        _released_name(key): _transpose_projection(_released_name(key), value)
        for key, value in left.items()
    }


def to_huggingface(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Released names → Hugging Face's; what is not CLIP's (decoder.*) keeps its name. ValueError for what has no name there."""
    back = {f"clip.{name}": key for key, name in HF_TO_RELEASED.items()}
    inner = {name: key for key, name in HF_BLOCK_PARTS.items()}
    renamed = {}
    for key, value in weights.items():
        block, tower, rest = _split_block(key)
        if key in back:
            renamed[back[key]] = _transpose_projection(key, value)
        elif block is None:
            renamed[key] = value
        elif rest.startswith("attn.in_proj_"):
            part = rest.removeprefix("attn.in_proj_")
            if not value.ndim or value.shape[0] % 3:
                raise ValueError(
                    f"{key} has shape {tuple(value.shape)}, which is not q, k and v together"
                )
            for name, third in zip(QKV, value.chunk(3), strict=True):
                renamed[f"{tower}encoder.layers.{block}.self_attn.{name}.{part}"] = third
        else:
            module, _, part = rest.rpartition(".")
            if module not in inner:
                raise ValueError(f"{key} has no name in Hugging Face's layout")
            renamed[f"{tower}encoder.layers.{block}.{inner[module]}.{part}"] = value
    return renamed


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
    if key in HF_TO_RELEASED:
        return f"clip.{HF_TO_RELEASED[key]}"
    for inner, ours in HF_BLOCK_PARTS.items():
        block, found, part = key.partition(f".{inner}.")
        if found:
            return f"{_block_name(block)}.{ours}.{part}"
    if key.startswith(tuple(TOWERS)):
        raise ValueError(f"{key} is unexpected")
    return key


def _transpose_projection(name: str, value: Tensor) -> Tensor:
    return (
        value.T.contiguous()
        if name.removeprefix("clip.") in TRANSPOSED and value.ndim == 2
        else value
    )

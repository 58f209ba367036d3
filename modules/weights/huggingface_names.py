"""The names that Hugging Face's CLIPModel gives its tensors, to the released names and back.

CLIP4IDC's own tensors get names in the same style; `decoder.*` keeps its names.
"""

from collections.abc import Mapping, Set
from typing import NamedTuple

import torch
from torch import Tensor

WEIGHT_PARTS = ("weight", "bias")
LAYER_NORMS = {
    "text_model.final_layer_norm": "ln_final",
    "vision_model.pre_layrnorm": "visual.ln_pre",  # their spelling
    "vision_model.post_layernorm": "visual.ln_post",
    "vision_model.mid_layernorm": "visual.ln_mid",
}
# Their name → the released name without `clip.`, for tensors outside the blocks. CLIP does not have
# the last four.
HF_TO_RELEASED = {
    "logit_scale": "logit_scale",
    "text_projection.weight": "text_projection",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "visual_projection.weight": "visual.proj",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.embeddings.pair_patch_embedding.weight": "visual.conv2.weight",
    "vision_model.embeddings.before_embedding": "visual.bef_embedding",
    "vision_model.embeddings.after_embedding": "visual.aft_embedding",
    "vision_model.embeddings.joint_position_embedding.weight": "visual.joint_positional_embedding",
}
HF_TO_RELEASED |= {
    f"{theirs}.{part}": f"{ours}.{part}"
    for theirs, ours in LAYER_NORMS.items()
    for part in WEIGHT_PARTS
}
RELEASED_TO_HF = {f"clip.{ours}": theirs for theirs, ours in HF_TO_RELEASED.items()}
HF_BLOCK_PARTS = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
BLOCK_PARTS_TO_HF = {ours: theirs for theirs, ours in HF_BLOCK_PARTS.items()}
QKV = ("q_proj", "k_proj", "v_proj")  # stacked in this order in OpenAI's matrix
TOWERS = {"text_model.": "", "vision_model.": "visual."}
TRANSPOSED = ("text_projection", "visual.proj")  # stored transposed in Hugging Face's layout
# Index tensors in older files.
BUFFERS = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")


class BlockKey(NamedTuple):
    """`clip.visual.transformer.resblocks.3.ln_1.weight` → "vision_model.", "3", "ln_1.weight"."""

    tower: str
    number: str
    rest: str


def is_huggingface(keys: Set[str]) -> bool:
    """Whether these are the names of a CLIPModel."""
    return any(key.startswith(tuple(TOWERS)) for key in keys)


def from_huggingface(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's names → released ones, q, k and v of each block joined.

    Raises ValueError for an unknown name, or for q, k and v that do not belong together.
    """
    remaining = {key: value for key, value in weights.items() if key not in BUFFERS}
    released = {}
    endings = tuple(f".self_attn.q_proj.{part}" for part in WEIGHT_PARTS)
    query_keys = [key for key in remaining if key.endswith(endings)]
    for key in query_keys:
        block, _, part = key.partition(".self_attn.q_proj.")
        released[f"{_block_name(block)}.attn.in_proj_{part}"] = _pop_qkv(remaining, key)
    for key, value in remaining.items():
        name = _released_name(key)
        released[name] = _transpose_projection(name, value)
    return released


def to_huggingface(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Released names → Hugging Face's. Raises ValueError for CLIP tensors without a name there."""
    renamed = {}
    for key, value in weights.items():
        block = _split_block(key)
        if key in RELEASED_TO_HF:
            renamed[RELEASED_TO_HF[key]] = _transpose_projection(key, value)
        elif block is None:
            renamed[key] = value
        else:
            renamed.update(_block_to_huggingface(block, key, value))
    return renamed


def _pop_qkv(weights: dict[str, Tensor], query: str) -> Tensor:
    """Remove a block's q, k and v from the weights and join them along their rows."""
    names = [query.replace(".q_proj.", f".{name}.") for name in QKV]
    absent = [name for name in names if name not in weights]
    if absent:
        raise ValueError(f"{absent[0]} is missing")
    parts = [weights.pop(name) for name in names]
    if not all(part.ndim and part.shape == parts[0].shape for part in parts):
        raise ValueError(f"{query} and its k_proj and v_proj differ in shape")
    return torch.cat(parts)


def _released_name(key: str) -> str:
    if key in HF_TO_RELEASED:
        return f"clip.{HF_TO_RELEASED[key]}"
    for theirs, ours in HF_BLOCK_PARTS.items():
        block, found, part = key.partition(f".{theirs}.")
        if found:
            return f"{_block_name(block)}.{ours}.{part}"
    if key.startswith(tuple(TOWERS)):
        raise ValueError(f"{key} is unexpected")
    return key


def _block_name(key: str) -> str:
    """`vision_model.encoder.layers.3` → `clip.visual.transformer.resblocks.3`."""
    for theirs, ours in TOWERS.items():
        start = f"{theirs}encoder.layers."
        if key.startswith(start):
            return f"clip.{ours}transformer.resblocks.{key.removeprefix(start)}"
    raise ValueError(f"{key} is unexpected")


def _block_to_huggingface(block: BlockKey, key: str, value: Tensor) -> dict[str, Tensor]:
    """A block's tensor under Hugging Face's name; joint q, k and v become three tensors."""
    start = f"{block.tower}encoder.layers.{block.number}"
    if block.rest.startswith("attn.in_proj_"):
        part = block.rest.removeprefix("attn.in_proj_")
        if not value.ndim or value.shape[0] % 3:
            shape = tuple(value.shape)
            raise ValueError(f"{key} has shape {shape}, which is not q, k and v together")
        thirds = zip(QKV, value.chunk(3), strict=True)
        return {f"{start}.self_attn.{name}.{part}": third for name, third in thirds}
    module, _, part = block.rest.rpartition(".")
    if module not in BLOCK_PARTS_TO_HF:
        raise ValueError(f"{key} has no name in Hugging Face's layout")
    return {f"{start}.{BLOCK_PARTS_TO_HF[module]}.{part}": value}


def _split_block(key: str) -> BlockKey | None:
    """The parts of a released name in a block; None for other names."""
    for theirs, ours in TOWERS.items():
        prefix = f"clip.{ours}transformer.resblocks."
        if key.startswith(prefix):
            number, _, rest = key.removeprefix(prefix).partition(".")
            return BlockKey(theirs, number, rest)
    return None


def _transpose_projection(name: str, value: Tensor) -> Tensor:
    is_transposed = name.removeprefix("clip.") in TRANSPOSED and value.ndim == 2
    return value.T.contiguous() if is_transposed else value

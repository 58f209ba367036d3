"""Chooses which parameters learn: early blocks, and whatever the task does not use, are frozen."""

from modules.clip4idc import CLIP4IDC


def freeze(model: CLIP4IDC, freeze_layer_num: int, train_token_embedding: bool = False) -> None:
    """Freeze the backbone's early parts: blocks below freeze_layer_num, and what precedes them.

    −1 freezes nothing. With `train_token_embedding` the token embedding learns all the same. Raises
    ValueError if freeze_layer_num is out of range. See docs/reference.md, Optimization.
    """
    num_blocks = _count_blocks(model)
    if not -1 <= freeze_layer_num <= num_blocks:
        raise ValueError(
            f"freeze_layer_num is {freeze_layer_num}, "
            f"expected -1 (freeze nothing) to {num_blocks} (all blocks)"
        )
    if freeze_layer_num == -1:
        return
    token_embedding = model.backbone.caption_embeddings()[0].weight
    for name, parameter in model.named_parameters():
        is_kept = train_token_embedding and parameter is token_embedding
        parameter.requires_grad_(is_kept or _learns(model, name, freeze_layer_num))


def freeze_unused(model: CLIP4IDC) -> None:
    """Freeze what the task's loss does not depend on, such as the text tower in finetuning.

    Those parameters would get no gradient anyway, but DistributedDataParallel must know beforehand.
    """
    backbone = model.backbone
    unused = backbone.unused_prefixes(model.task)
    if model.task == "caption" or model.uses_cross_encoder:
        unused += ("logit_scale",)
    for name, parameter in backbone.named_parameters():
        if name.startswith(unused):
            parameter.requires_grad_(False)


def _learns(model: CLIP4IDC, name: str, freeze_layer_num: int) -> bool:
    part = model.part_of(name)
    if isinstance(part, int):
        return part >= freeze_layer_num
    return part != "stem"


def _count_blocks(model: CLIP4IDC) -> int:
    """One more than the highest block number."""
    parts = [model.part_of(name) for name, _ in model.named_parameters()]
    return 1 + max((part for part in parts if isinstance(part, int)), default=-1)

"""TODO."""

from modules.clip4idc import CLIP4IDC
from modules.optimization import ALWAYS_TRAINED, TEXT_BLOCK


def freeze(model: "CLIP4IDC", freeze_layer_num: int, train_token_embedding: bool = False) -> None:
    """Stop CLIP's early parts from learning (SPEC §5, Freezing): blocks below freeze_layer_num and all that stands before them.

    −1 freezes nothing. `train_token_embedding` leaves the token embedding learning (finetuning on Spot-the-Diff).
    """
    num_blocks = max(model.clip.sizes.vision_layers, model.clip.sizes.transformer_layers)
    if not -1 <= freeze_layer_num <= num_blocks:
        raise ValueError(
            f"freeze_layer_num is {freeze_layer_num}, expected -1 (freeze nothing) to {num_blocks} (all blocks)"
        )
    if freeze_layer_num == -1:
        return
    for name, parameter in model.named_parameters():
        block = TEXT_BLOCK.match(name)
        trained = (
            not name.startswith("clip.")
            or name.startswith(ALWAYS_TRAINED)
            or (block is not None and int(block.group(1)) >= freeze_layer_num)
            or (train_token_embedding and name == "clip.token_embedding.weight")
        )
        parameter.requires_grad_(trained)


def freeze_unused(model: "CLIP4IDC") -> None:
    """Take what the stage's forward never reaches out of the graph: conv1 beside conv2, and in finetuning the text tower.

    Such parameters get no gradient and so would not move anyway; DistributedDataParallel wants to know beforehand.
    """
    unused = ["clip.visual.conv1."] if model.clip.visual.linear_patch == "3d" else []
    if model.task == "caption":
        unused += [
            "clip.transformer.",
            "clip.ln_final.",
            "clip.text_projection",
            "clip.logit_scale",
        ]
    elif hasattr(model, "cross"):
        unused += ["clip.logit_scale"]
    for name, parameter in model.named_parameters():
        if name.startswith(tuple(unused)):
            parameter.requires_grad_(False)

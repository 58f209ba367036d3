"""The small model whose results by the published code are in tests/golden, computed by ours."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dataloaders.images import normalize
from modules.clip4idc import CLIP4IDC
from modules.generation import greedy_search
from modules.losses import caption_loss, contrastive_loss
from modules.optimization import BertAdam, parameter_groups
from system.places import ROOT

GOLDEN = ROOT / "tests" / "golden"
CASES = [(patch, task) for patch in ("2d", "3d") for task in ("caption", "retrieval")]
EOT = 599
MAX_WORDS = 32
NUM_STEPS = 4
# The largest difference in float32, absolute for outputs and relative for a training.
TOLERANCES = {
    "visual_hidden": 1e-4,
    "visual_pooled": 1e-4,
    "text_hidden": 1e-4,
    "text_pooled": 1e-4,
    "sim_text_by_pair": 1e-3,
    "logits": 1e-3,
}
TRAINING_TOLERANCE = 2e-3

Golden = Mapping[str, Tensor]


@dataclass
class Trajectory:
    """What a training of NUM_STEPS steps showed; norms are those before clipping."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    first_grad_norms: dict[str, float] = field(default_factory=dict)


def build_model(patch: str, task: str) -> CLIP4IDC:
    """The golden model with 2d or 3d patches, without dropout's noise."""
    weights = load_file(GOLDEN / f"weights_{patch}.safetensors")
    decoder_config = GOLDEN / "decoder_config.json"
    return CLIP4IDC.from_weights(
        weights, task, intra_layers=2, linear_patch=patch, decoder_config=decoder_config
    ).eval()


def load_golden(patch: str, device: torch.device) -> Golden:
    """Inputs (`in.…`) and what the published code makes of them."""
    golden = load_file(GOLDEN / f"expected_{patch}.safetensors")
    return {name: value.to(device) for name, value in golden.items()}


def load_training(patch: str, task: str) -> dict[str, Any]:
    """A training's settings, and its losses and norms by the published code."""
    return json.loads((GOLDEN / f"training_{patch}.json").read_text())[task]


@torch.no_grad()
def compute_outputs(model: CLIP4IDC, golden: Golden) -> dict[str, Tensor]:
    """The outputs by their golden names. Only those at a token have a meaning (`keep_tokens`)."""
    pair = model.encode_pairs(normalize(golden["in.images_uint8"]))
    text = model.encode_text(golden["in.text_ids"])
    outputs = {
        "visual_hidden": pair.tokens,
        "visual_pooled": pair.pooled,
        "text_hidden": text.tokens,
        "text_pooled": text.pooled,
        "sim_text_by_pair": model.similarity(text.pooled, pair.pooled),
    }
    if model.task == "caption":
        ids, mask = golden["in.caption_input_ids"], golden["in.caption_mask"]
        outputs["logits"] = model.caption_logits(pair.tokens, ids, mask)
    return outputs


def keep_tokens(name: str, output: Tensor, golden: Golden) -> Tensor:
    """An output without its rows at padding."""
    masks = {"text_hidden": "in.text_mask", "logits": "in.caption_mask"}
    return output[golden[masks[name]].bool()] if name in masks else output


def largest_differences(model: CLIP4IDC, golden: Golden) -> dict[str, float]:
    """Output → the largest difference from the published code's."""
    differences = {}
    for name, output in compute_outputs(model, golden).items():
        ours = keep_tokens(name, output, golden).float()
        theirs = keep_tokens(name, golden[f"{model.task}.{name}"], golden)
        differences[name] = (ours - theirs).abs().max().item()
    return differences


@torch.no_grad()
def write_captions(model: CLIP4IDC, golden: Golden) -> list[list[int]]:
    """Greedy captions, without what follows EOT."""
    tokens = model.encode_pairs(normalize(golden["in.images_uint8"])).tokens
    rows = greedy_search(model, tokens, MAX_WORDS).tolist()
    return [cut_at_end(row) for row in rows]


def cut_at_end(ids: list[int]) -> list[int]:
    """Token ids up to EOT; the published code runs on after it."""
    return ids[: ids.index(EOT) + 1] if EOT in ids else ids


@torch.no_grad()
def gap_at_first_difference(
    model: CLIP4IDC, golden: Golden, row: int, ours: list[int], theirs: list[int]
) -> float:
    """How much higher the logit of their token is than ours, where two captions first differ.

    The captions are those of pair `row`, and the model computes in float32. 0 for equal captions.
    """
    if ours == theirs:
        return 0.0
    position = next(n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
    images = golden["in.images_uint8"][row : row + 1]
    tokens = model.encode_pairs(normalize(images)).tokens
    ids = torch.tensor([[model.sot, *theirs[:position]]], device=images.device)
    logits = model.caption_logits(tokens, ids, torch.ones_like(ids))[0, -1]
    return (logits[theirs[position]] - logits[ours[position]]).item()


def build_optimizer(model: CLIP4IDC, settings: Mapping[str, Any]) -> BertAdam:
    """The optimizer of a golden training."""
    groups = parameter_groups(
        model, lr=settings["lr"], coef_lr=settings["coef_lr"], weight_decay=settings["weight_decay"]
    )
    return BertAdam(
        groups,
        lr=settings["lr"],
        warmup=settings["warmup"],
        t_total=settings["t_total"],
        schedule=settings["schedule"].removeprefix("warmup_"),
        betas=(settings["b1"], settings["b2"]),
        eps=settings["eps"],
    )


def train(model: CLIP4IDC, golden: Golden, optimizer: BertAdam) -> Trajectory:
    """NUM_STEPS steps on the golden inputs."""
    trajectory = Trajectory()
    for step in range(NUM_STEPS):
        loss = _compute_loss(model, golden)
        loss.backward()
        if step == 0:
            trajectory.first_grad_norms = {
                name: 0.0 if parameter.grad is None else parameter.grad.norm().item()
                for name, parameter in model.named_parameters()
            }
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        trajectory.losses.append(loss.item())
        trajectory.grad_norms.append(norm.item())
    return trajectory


def _compute_loss(model: CLIP4IDC, golden: Golden) -> Tensor:
    pair = model.encode_pairs(normalize(golden["in.images_uint8"]))
    if model.task == "caption":
        ids, mask = golden["in.caption_input_ids"], golden["in.caption_mask"]
        logits = model.caption_logits(pair.tokens, ids, mask)
        return caption_loss(logits, golden["in.caption_target_ids"])
    text = model.encode_text(golden["in.text_ids"])
    return contrastive_loss(model.similarity(text.pooled, pair.pooled))


def largest_relative_difference(ours: list[float], theirs: list[float]) -> float:
    """Of two lists of positive numbers, element by element."""
    return max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))

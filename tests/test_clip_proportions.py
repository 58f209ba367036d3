"""CLIPs of other proportions than ViT-B/32 take steps of both tasks."""

import json

import numpy as np
import pytest
import torch

import CLIP4IDCinference
import main_task_retrieval
from modules.clip4idc import CLIP4IDC
from modules.model.clip_sizes import ClipSizes
from modules.tokenizer import tokenize_caption
from modules.training.objectives import TrainingData
from modules.training.objectives.contrastive import Contrastive
from modules.training.objectives.cross_entropy import CrossEntropy
from modules.weights.sources import random_clip
from tests.conftest import TINY
from tests.runs import arguments

SMALL = {
    "B/16": {"vision_patch_size": 16, "vision_width": 128},
    "L/14": {
        "embed_dim": 128,
        "transformer_width": 128,
        "vision_width": 192,
        "vision_patch_size": 8,
    },
}
WHOLE = {
    "B/16": {
        "embed_dim": 512,
        "image_resolution": 224,
        "vision_layers": 12,
        "vision_width": 768,
        "vision_patch_size": 16,
        "transformer_width": 512,
        "transformer_layers": 12,
    },
    "L/14": {
        "embed_dim": 768,
        "image_resolution": 224,
        "vision_layers": 24,
        "vision_width": 1024,
        "vision_patch_size": 14,
        "transformer_width": 768,
        "transformer_layers": 12,
    },
}


def batch_of_two() -> dict[str, torch.Tensor]:
    """A batch for either task: each pair has a distractor."""
    arrays = [tokenize_caption(text, 12) for text in ("a box is gone", "nothing has changed")]

    def stacked(name: str) -> torch.Tensor:
        return torch.from_numpy(np.stack([array[name] for array in arrays]))

    batch = {
        "images": torch.randint(0, 256, (2, 3, 3, 64, 64), dtype=torch.uint8),
        "text_ids": stacked("retrieval_text_ids"),
    }
    for name in ("caption_input_ids", "caption_mask", "caption_target_ids"):
        batch[name] = torch.stack([stacked(name)] * 2, dim=1)
    return batch


@pytest.mark.parametrize("name", SMALL)
def test_other_proportions_take_a_step_of_either_task(name):
    weights = random_clip(ClipSizes(**{**TINY, **SMALL[name]}))
    for task, objective in (("retrieval", Contrastive), ("caption", CrossEntropy)):
        model = CLIP4IDC.from_weights(weights, task, intra_layers=1)
        batch = batch_of_two()
        if task == "retrieval":
            batch["images"] = batch["images"][:, :2]  # adaptation has no distractor
        objective(model, TrainingData([], 12))(batch).backward()
        assert model.clip.visual.proj.grad.abs().sum() > 0
        weights = model.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_openais_other_clips_run_both_tasks(name, clevr, tmp_path):
    """At full size, from random weights; L/14 takes 12 GB."""
    sizes = tmp_path / "sizes.json"
    sizes.write_text(json.dumps({**TINY, **WHOLE[name]}))
    more = ("--do_train", "--epochs", "1", "--keep_checkpoints", "1")
    first = tmp_path / "first"
    assert main_task_retrieval.main(arguments(clevr, first, sizes, "retrieval", *more)) == 0
    more = (*more, "--init_model", str(first))
    second = tmp_path / "second"
    assert CLIP4IDCinference.main(arguments(clevr, second, sizes, "caption", *more)) == 0
    assert (second / "report.html").is_file()

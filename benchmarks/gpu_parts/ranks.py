"""One process of several that train together: is their gradient that of one process?

    torchrun --nproc_per_node=2 -m benchmarks.gpu_parts.ranks --device cuda

prints one JSON line: for each stage, the largest difference relative to the largest gradient.
"""

import json

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks.gpu_parts.setting import STAGES, TINY
from benchmarks.steps import OBJECTIVE_OF, random_batch, random_model
from modules.clip4idc import CLIP4IDC
from modules.registries import OBJECTIVES
from modules.training.freezing import freeze_unused
from modules.training.objectives import TrainingData
from system.compute import select_device, use_fast_matmuls
from system.flags import device_name
from system.launcher import read_place
from system.parser import OneLineParser, first_line

NUM_PAIRS = 4

Gradients = dict[str, Tensor]


def _make_batch(task: str, device: torch.device) -> dict[str, Tensor]:
    torch.manual_seed(1)
    batch = random_batch(task, NUM_PAIRS, TINY)
    return {name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)}


def _compute_gradients(task: str, device: torch.device, rank: int, world_size: int) -> Gradients:
    """The gradients of this process's share of the batch, exchanged with the others' if any."""
    model = random_model(task, TINY).to(device)
    freeze_unused(model)
    objective = OBJECTIVES[OBJECTIVE_OF[task]](model, TrainingData([], TINY.max_words))
    if dist.is_initialized():
        devices = [device] if device.type == "cuda" else None
        objective = DistributedDataParallel(objective, device_ids=devices)
    batch = _make_batch(task, device)
    objective({name: value[rank::world_size] for name, value in batch.items()}).backward()
    return _list_gradients(model)


def _list_gradients(model: CLIP4IDC) -> Gradients:
    named = model.named_parameters()
    return {name: parameter.grad for name, parameter in named if parameter.grad is not None}


def _relative_difference(ours: Gradients, theirs: Gradients) -> float:
    if ours.keys() != theirs.keys():
        raise RuntimeError("other parameters have gradients in one process than in several")
    largest = max(gradient.abs().max().item() for gradient in theirs.values())
    difference = max((ours[name] - theirs[name]).abs().max().item() for name in ours)
    return difference / largest


def main() -> None:
    """Print one JSON line, on the first process."""
    parser = OneLineParser(description=first_line(__doc__))
    parser.add_argument("--device", type=device_name, default="auto")
    device = select_device(parser.parse_args().device)
    rank, world_size, _ = read_place()
    with use_fast_matmuls(device, "fp32"):
        alone = {task: _compute_gradients(task, device, 0, 1) for task in STAGES.values()}
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        together = {
            task: _compute_gradients(task, device, rank, world_size) for task in STAGES.values()
        }
    differences = {
        stage: _relative_difference(together[task], alone[task]) for stage, task in STAGES.items()
    }
    if rank == 0:
        print(json.dumps(differences), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

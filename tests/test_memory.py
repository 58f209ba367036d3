"""A step that needs more memory than the GPU has: one line that names a batch that fits."""

import weakref
from dataclasses import dataclass

import pytest
import torch

from modules.options.groups import TrainingOptions
from modules.training.memory import advise_on_memory
from modules.training.objectives.contrastive import Contrastive
from system.runtime import Runtime
from tests.runs import arguments, run_refused


@pytest.fixture
def limit(monkeypatch):
    """Lets each step have room for so many pairs; the batches that were tried are recorded."""
    tried = []

    def set_limit(most: int) -> list[int]:
        forward = Contrastive.forward

        def limited(objective, batch):
            tried.append(len(batch["images"]))
            if tried[-1] > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return forward(objective, batch)

        monkeypatch.setattr(Contrastive, "forward", limited)
        return tried

    return set_limit


def refused(clevr, tmp_path, tiny_sizes, capsys, *more: str) -> str:
    words = arguments(clevr, tmp_path / "run", tiny_sizes, "retrieval", "--do_train", *more)
    return run_refused("retrieval", words, capsys)


def test_the_largest_batch_that_fits_is_found_by_trying(limit, clevr, tiny_sizes, tmp_path, capsys):
    tried = limit(3)
    line = refused(clevr, tmp_path, tiny_sizes, capsys, "--batch_size", "8")
    assert tried == [8, 4, 2]
    assert line.endswith(
        "out of GPU memory with 8 pairs at a time; 2 fit: use --batch_size 2, or "
        "--gradient_accumulation_steps 4 and the same --batch_size"
    )


def test_accumulation_counts(limit, clevr, tiny_sizes, tmp_path, capsys):
    limit(1)
    more = ("--batch_size", "6", "--gradient_accumulation_steps", "2")
    line = refused(clevr, tmp_path, tiny_sizes, capsys, *more)
    assert "with 3 pairs at a time; 1 fit: use --batch_size 2, or" in line
    assert "--gradient_accumulation_steps 6 and" in line


def test_a_model_that_is_too_large_for_any_batch(limit, clevr, tiny_sizes, tmp_path, capsys):
    limit(0)
    line = refused(clevr, tmp_path, tiny_sizes, capsys, "--batch_size", "4")
    assert "a single pair does not fit either" in line


def test_room_is_left_for_the_moments_that_the_first_step_makes(
    limit, clevr, tiny_sizes, tmp_path, capsys, monkeypatch
):
    limit(3)
    sizes = []

    def full(parameter, device):
        sizes.append(parameter.numel())
        if len(sizes) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return parameter

    monkeypatch.setattr(torch, "empty_like", full)
    line = refused(clevr, tmp_path, tiny_sizes, capsys, "--batch_size", "4")
    assert "a single pair does not fit either" in line


@dataclass
class TwoProcesses:
    """What the advice needs of a trainer of two processes."""

    options: TrainingOptions = TrainingOptions()

    @property
    def runtime(self) -> Runtime:
        return Runtime(0, 2)


BATCH = {"images": torch.zeros(64, 1)}


def test_several_processes_are_told_to_halve():
    message = "64 pairs at a time in each process: try --batch_size 64,"
    with pytest.raises(ValueError, match=message), advise_on_memory(TwoProcesses(), BATCH):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_what_the_failed_step_held_is_free_before_the_next_try():
    held = []
    seen = []

    def fail():
        tensor = torch.zeros(3)
        held.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError(f"CUDA out of memory with {len(tensor)}")

    class Watching(TwoProcesses):
        @property
        def runtime(self) -> Runtime:
            seen.append(held[0]())
            return Runtime(0, 2)

    with pytest.raises(ValueError, match="out of GPU"), advise_on_memory(Watching(), BATCH):
        fail()
    assert seen
    assert set(seen) == {None}

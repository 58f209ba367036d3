"""Losses, and two processes = one on the same global batch."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from dataloaders.batches import trim_padding
from modules.clip4idc import CLIP4IDC
from modules.losses import caption_loss, contrastive_loss, vocabulary_loss
from modules.training.freezing import freeze_unused
from modules.training.objectives import TrainingData
from modules.training.objectives.contrastive import Contrastive
from modules.training.objectives.cross_entropy import CrossEntropy
from tests.conftest import tiny_weights
from tests.test_model import CROSS

STEPS = {"retrieval": Contrastive, "caption": CrossEntropy}
NO_DATA = TrainingData([], 12)
CASES = [  # task, similarity header, with distractors
    ("retrieval", "loose", False),
    ("retrieval", "tight", False),
    ("caption", "loose", False),
    ("caption", "loose", True),
]
NO_DROPOUT = {
    "hidden_size": 64,
    "num_attention_heads": 1,
    "intermediate_size": 64,
    "num_decoder_layers": 1,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def test_contrastive_loss_by_hand():
    similarity = torch.tensor([[2.0, 0.0], [1.0, 3.0]])
    rows = -(similarity.log_softmax(dim=1)).diagonal().mean()
    columns = -(similarity.log_softmax(dim=0)).diagonal().mean()
    assert contrastive_loss(similarity).item() == pytest.approx(((rows + columns) / 2).item())


def test_caption_loss_ignores_pad():
    logits = torch.randn(2, 3, 7)
    target = torch.tensor([[1, 2, 0], [3, 0, 0]])
    rows = torch.stack([logits[0, 0], logits[0, 1], logits[1, 0]])
    expected = F.cross_entropy(rows, torch.tensor([1, 2, 3]))
    assert caption_loss(logits, target).item() == pytest.approx(expected.item())
    assert caption_loss(logits, torch.zeros_like(target)).item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [0, 5, 150])  # 150 fill more than two chunks
def test_vocabulary_loss_has_the_gradients_of_cross_entropy(rows, dtype):
    draw = torch.Generator().manual_seed(0)
    states = torch.randn(rows, 16, generator=draw, requires_grad=True)
    words = torch.randn(300, 16, generator=draw, requires_grad=True)
    bias = torch.randn(300, generator=draw, requires_grad=True)
    target = torch.randint(1, 300, (rows,), generator=draw)
    weights = torch.rand(rows, generator=draw) / 100
    by_target = F.cross_entropy(states @ words.T + bias, target, reduction="none")
    expected = 3 * (weights * by_target).sum()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = 3 * vocabulary_loss(states, words, bias, target, weights)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    inputs = (states, words, bias)
    ours = torch.autograd.grad(loss, inputs)
    for found, right in zip(ours, torch.autograd.grad(expected, inputs), strict=True):
        largest = right.abs().amax().item() if rows else 0.0
        torch.testing.assert_close(found, right, rtol=0, atol=tolerance * largest)


def test_vocabulary_loss_leaves_frozen_words_alone():
    states = torch.randn(5, 16, requires_grad=True)
    words = torch.randn(300, 16)
    bias = torch.zeros(300, requires_grad=True)
    target = torch.arange(5)
    loss = vocabulary_loss(states, words, bias, target, torch.ones(5))
    found = torch.autograd.grad(loss, (states, bias))
    expected = F.cross_entropy(states @ words.T + bias, target, reduction="sum")
    torch.testing.assert_close(found, torch.autograd.grad(expected, (states, bias)))
    with torch.no_grad():
        loss = vocabulary_loss(states, words, bias, target, torch.ones(5))
    assert not loss.requires_grad


def batch_of(task: str, with_distractors: bool) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    num_captions = 2 if with_distractors else 1
    size = (4, 1 + num_captions, 3, 64, 64)
    images = torch.randint(0, 255, size, dtype=torch.uint8, generator=draw)
    if task == "retrieval":
        words = torch.randint(1, 48, (4, 6), generator=draw)
        return {
            "images": images,
            "text_ids": torch.cat([words, torch.full((4, 1), 49)], dim=1),
            "text_mask": torch.ones(4, 7, dtype=torch.long),
        }
    ids = torch.randint(1, 48, (4, num_captions, 6), generator=draw)
    lengths = torch.randint(2, 7, (4, num_captions, 1), generator=draw)
    mask = (torch.arange(6) < lengths).long()  # the processes have different numbers of words
    return {
        "images": images,
        "caption_input_ids": ids,
        "caption_mask": mask,
        "caption_target_ids": ids.roll(-1, dims=2) * mask,
    }


def test_trimmed_padding_changes_no_loss():
    torch.manual_seed(0)
    model = CLIP4IDC.from_weights(tiny_weights(), "caption", 1, decoder_config=NO_DROPOUT)
    batch = batch_of("caption", with_distractors=True)
    batch = {
        name: F.pad(value, (0, 3)) if name.startswith("caption_") else value
        for name, value in batch.items()
    }
    step = STEPS["caption"](model, NO_DATA)
    torch.testing.assert_close(step(trim_padding(batch)), step(batch))
    model = CLIP4IDC.from_weights(tiny_weights(), "retrieval", 1)
    batch = batch_of("retrieval", with_distractors=False)
    step = STEPS["retrieval"](model, NO_DATA)
    padded = {name: F.pad(batch[name], (0, 3)) for name in ("text_ids", "text_mask")}
    padded = {**batch, **padded}
    assert trim_padding(padded)["text_ids"].shape == batch["text_ids"].shape
    torch.testing.assert_close(step(padded), step(batch))


def test_finetuning_ignores_a_target_0_inside_a_caption():
    torch.manual_seed(0)
    model = CLIP4IDC.from_weights(tiny_weights(), "caption", 1, decoder_config=NO_DROPOUT)
    batch = batch_of("caption", with_distractors=False)
    batch["caption_target_ids"][1, 0, 0] = 0
    pairs = model.encode_against_first(model.normalize_images(batch["images"]))
    ids, mask, target = (
        batch[f"caption_{name}"].flatten(0, 1) for name in ("input_ids", "mask", "target_ids")
    )
    expected = caption_loss(model.caption_logits(pairs.tokens, ids, mask), target)
    torch.testing.assert_close(STEPS["caption"](model, NO_DATA)(batch), expected)


def gradients(
    task: str, header: str, distractors: bool, rank: int, world: int
) -> tuple[float, dict[str, torch.Tensor]]:
    cross = {**CROSS, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(0)
    model = CLIP4IDC.from_weights(
        tiny_weights(), task, 1, decoder_config=NO_DROPOUT, sim_header=header, cross_config=cross
    )
    freeze_unused(model)
    step = STEPS[task](model, NO_DATA)
    if world > 1:
        step = torch.nn.parallel.DistributedDataParallel(step)
    share = 4 // world
    batch = {
        name: value[rank * share :][:share] for name, value in batch_of(task, distractors).items()
    }
    loss = step(batch)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def worker(rank: int, port: int, results) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for case in CASES:
        loss, found = gradients(*case, rank, 2)
        results.put((case, loss, {name: g.numpy() for name, g in found.items()}))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def answers_of_two_processes():
    """Case → the loss and the gradients of both processes, which start once for all cases."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    processes = [context.Process(target=worker, args=(rank, port, results)) for rank in range(2)]
    for process in processes:
        process.start()
    answers = {case: [] for case in CASES}
    for _ in range(2 * len(CASES)):
        case, loss, found = results.get()
        answers[case].append((loss, found))
    for process in processes:
        process.join()
    return answers


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_two_processes_have_the_gradient_of_one(case, answers_of_two_processes):
    one_loss, one = gradients(*case, 0, 1)
    answers = answers_of_two_processes[case]
    assert sum(loss for loss, _ in answers) / 2 == pytest.approx(one_loss, rel=1e-5)
    for _, found in answers:
        assert found.keys() == one.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(
                torch.from_numpy(gradient),
                one[name],
                atol=2e-6,
                rtol=1e-3,
                msg=lambda m, n=name: f"{n}: {m}",
            )

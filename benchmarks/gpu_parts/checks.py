"""Parts of benchmarks/gpu.py that check results: golden numbers, equal runs, overflow, ranks."""

import json
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import main_task_retrieval
from benchmarks import golden
from benchmarks.gpu_parts.setting import (
    STAGES,
    TINY,
    Row,
    Setting,
    adaptation_words,
    attempt,
    check,
    draw_scenes,
    last_line,
    run_to_end,
    start,
    wait_for_line,
    write_sizes,
)
from benchmarks.steps import build_trainer, random_batch, random_model, train_one_epoch
from modules.clip4idc import CLIP4IDC
from modules.generation import generate
from modules.options.decoding import Decoding
from modules.training.trainer import Trainer
from system.compute import use_deterministic_algorithms, use_fast_matmuls
from system.signals import EXIT_TRY_AGAIN

LOGIT_TOLERANCES = {"bf16": 2e-2, "fp16": 2e-3}
OVERFLOWING_SCALE = 2.0**60
NUM_STEPS = 4
RANK_TOLERANCE = 1e-3  # of the largest gradient


def check_golden(setting: Setting) -> Iterator[Row]:
    """The published code's numbers in float32, and the lower precisions against float32."""
    patches = setting.scale.golden_patches
    for patch, task in [case for case in golden.CASES if case[0] in patches]:
        fields = {"patch": patch, "task": task}
        yield attempt("golden outputs", partial(_check_outputs, setting, patch, task), **fields)
        yield attempt("golden training", partial(_check_training, setting, patch, task), **fields)
    for patch in patches:
        yield attempt("golden captions", partial(_check_captions, setting, patch), patch=patch)
        for precision in LOGIT_TOLERANCES:
            work = partial(_check_precision, setting, patch, precision)
            yield attempt("golden captioner", work, patch=patch, precision=precision)


def _check_outputs(setting: Setting, patch: str, task: str) -> Row:
    model = golden.build_model(patch, task).to(setting.device)
    tensors = golden.load_golden(patch, setting.device)
    with use_fast_matmuls(setting.device, "fp32"):
        differences = golden.largest_differences(model, tensors)
    shares = {name: value / golden.TOLERANCES[name] for name, value in differences.items()}
    worst = max(shares, key=shares.get)
    return check(shares[worst] <= 1, worst=worst, difference=differences[worst])


def _check_training(setting: Setting, patch: str, task: str) -> Row:
    model = golden.build_model(patch, task).to(setting.device).train()
    tensors = golden.load_golden(patch, setting.device)
    expected = golden.load_training(patch, task)
    with use_fast_matmuls(setting.device, "fp32"):
        found = golden.train(model, tensors, golden.build_optimizer(model, expected))
    by_loss = golden.largest_relative_difference(found.losses, expected["losses"])
    by_norm = golden.largest_relative_difference(found.grad_norms, expected["grad_norms"])
    difference = max(by_loss, by_norm)
    return check(difference <= golden.TRAINING_TOLERANCE, difference=difference)


def _check_captions(setting: Setting, patch: str) -> Row:
    model = golden.build_model(patch, "caption").to(setting.device)
    tensors = golden.load_golden(patch, setting.device)
    theirs = [golden.cut_at_end(row) for row in tensors["caption.greedy_ids"].tolist()]
    with use_fast_matmuls(setting.device, "fp32"):
        ours = golden.write_captions(model, tensors)
    equal = sum(a == b for a, b in zip(ours, theirs, strict=True))
    return check(ours == theirs, equal=equal, captions=len(theirs))


def _check_precision(setting: Setting, patch: str, precision: str) -> Row:
    """Logits within the tolerance, and captions that differ only where float32 nearly tied."""
    runtime = setting.runtime(precision)
    model = golden.build_model(patch, "caption").to(setting.device)
    tensors = golden.load_golden(patch, setting.device)
    with use_fast_matmuls(setting.device, "fp32"):
        exact = golden.compute_outputs(model, tensors)["logits"]
        expected = golden.write_captions(model, tensors)
    with use_fast_matmuls(setting.device, precision), runtime.autocast():
        rounded = golden.compute_outputs(model, tensors)["logits"]
        captions = golden.write_captions(model, tensors)
    kept = golden.keep_tokens("logits", (exact - rounded).abs(), tensors)
    difference = kept.max().item()
    gaps = [
        golden.gap_at_first_difference(model, tensors, row, ours, theirs)
        for row, (ours, theirs) in enumerate(zip(captions, expected, strict=True))
    ]
    tolerance = LOGIT_TOLERANCES[precision]
    return check(
        difference <= tolerance and max(gaps) <= 2 * tolerance,
        difference=difference,
        equal=sum(a == b for a, b in zip(captions, expected, strict=True)),
        captions=len(expected),
        largest_gap=max(gaps),
    )


def check_training(setting: Setting) -> Iterator[Row]:
    """Repeated runs are equal bit by bit, and fp16 goes on after an overflow."""
    for stage, task in STAGES.items():
        yield attempt("two equal runs", partial(_check_repetition, setting, task), stage=stage)
    yield attempt("two equal samplings", partial(_check_sampling, setting))
    for stage, task in STAGES.items():
        yield attempt("fp16 overflow", partial(_check_overflow, setting, task), stage=stage)


def _check_repetition(setting: Setting, task: str) -> Row:
    with use_deterministic_algorithms(True):
        one, other = (_train_tiny(setting, task) for _ in range(2))
    different = [name for name, value in one.items() if not torch.equal(value, other[name])]
    return check(not different, different_tensors=len(different))


def _train_tiny(setting: Setting, task: str) -> dict[str, Tensor]:
    """The weights after a short training, which is the same whenever it is repeated."""
    model = random_model(task, TINY)
    torch.manual_seed(1)
    batch = random_batch(task, 4, TINY)
    runtime = setting.runtime("auto")
    train_one_epoch(build_trainer(task, model, batch, runtime, steps=NUM_STEPS))
    return model.state_dict()


def _check_sampling(setting: Setting) -> Row:
    """Sampling with all algorithms deterministic."""
    model = random_model("caption", TINY).to(setting.device).eval()
    images = random_batch("caption", 4, TINY)["images"].to(setting.device)
    decoding = Decoding(num_captions=3, temperature=1.0, top_p=0.9)
    with use_deterministic_algorithms(True), torch.no_grad():
        tokens = model.encode_against_first(model.normalize_images(images)).tokens
        one, other = (generate(model, tokens, TINY.max_words, decoding) for _ in range(2))
    return check(torch.equal(one, other))


def _check_overflow(setting: Setting, task: str) -> Row:
    """A step whose scaled gradients overflow changes no weight; the next ones do."""
    runtime = setting.runtime("fp16")
    model = random_model(task, TINY)
    trainer = build_trainer(task, model, random_batch(task, 4, TINY), runtime, steps=NUM_STEPS)
    train_one_epoch(trainer)
    before = _copy_weights(model)
    trainer.scaler.update(OVERFLOWING_SCALE)
    taken = _take_step(task, trainer)
    kept = all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    trainer.scaler.update(1024.0)
    goes_on = _take_step(task, trainer)
    moved = any(not torch.equal(v, before[name]) for name, v in model.state_dict().items())
    return check(
        not taken and kept and goes_on and moved,
        skipped=not taken,
        weights_kept=kept,
        goes_on=goes_on and moved,
    )


def _copy_weights(model: CLIP4IDC) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _take_step(task: str, trainer: Trainer) -> bool:
    trainer.backward(random_batch(task, 4, TINY), is_last_micro_batch=True)
    return trainer.step()


def check_interruption(setting: Setting) -> Iterator[Row]:
    """A run that SIGTERM stops and --resume continues has the weights of one that runs through."""
    data = draw_scenes(setting, "data", setting.scale.run_scenes, test=2)
    yield attempt("stopped and continued", partial(_check_stop, setting, data))


def _check_stop(setting: Setting, data: Path) -> Row:
    whole, stopped = setting.folder / "whole", setting.folder / "stopped"
    with start(_tiny_run(setting, data, stopped)) as process:
        wait_for_line(process, "step 1/")
        process.send_signal(signal.SIGTERM)
        process.communicate()
    code = process.returncode
    if code != EXIT_TRY_AGAIN:
        raise RuntimeError(f"SIGTERM ended the run with {code}, expected {EXIT_TRY_AGAIN}")
    for words in (
        _tiny_run(setting, data, stopped, "--resume", "auto"),
        _tiny_run(setting, data, whole),
    ):
        _, *options = words
        if main_task_retrieval.main(options):
            raise RuntimeError(f"a run failed: {' '.join(words)}")
    return _compare_runs(whole, stopped)


def _tiny_run(setting: Setting, data: Path, output: Path, *more: str) -> list[str]:
    sizes = write_sizes(setting.folder, TINY.clip)
    return adaptation_words(
        setting,
        data,
        output,
        *("--pretrained_clip_name", str(sizes), "--intra_num_hidden_layers", "1"),
        *("--batch_size", "2", "--batch_size_val", "4", "--max_words", "12", "--epochs", "1"),
        *("--num_thread_reader", "0", "--deterministic", *more),
    )


def _compare_runs(one: Path, other: Path) -> Row:
    name = "pytorch_model.bin.0"
    ours, theirs = (torch.load(run / name, map_location="cpu") for run in (one, other))
    equal = [torch.equal(value, theirs[key]) for key, value in ours.items()]
    return check(all(equal) and ours.keys() == theirs.keys(), tensors=len(equal))


def check_ranks(setting: Setting) -> Iterator[Row]:
    """torchrun with a process for each GPU, two at most: their gradient is that of one process."""
    is_gpu = setting.device.type == "cuda"
    count = min(torch.cuda.device_count(), 2) if is_gpu else 1
    work = partial(_check_ranks, setting, count)
    yield attempt("torchrun", work, processes=count, backend="nccl" if is_gpu else "gloo")


def _check_ranks(setting: Setting, count: int) -> Row:
    words = ["-m", "torch.distributed.run", f"--nproc_per_node={count}", "--standalone"]
    words += ["-m", "benchmarks.gpu_parts.ranks", "--device", setting.device.type]
    differences = json.loads(last_line(run_to_end(words)))
    return check(max(differences.values()) <= RANK_TOLERANCE, differences=differences)

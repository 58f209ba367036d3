"""Parts of benchmarks/gpu.py that measure how fast the device, training and captioning are."""

import statistics
import subprocess
from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.gpu_parts.setting import STAGES, Row, Setting, attempt
from benchmarks.machine import all_cores, gemm_rate, machine_info, synchronize, time_runs
from benchmarks.steps import (
    build_trainer,
    caption_images,
    captioning_gflop,
    random_batch,
    random_captioner,
    random_model,
    train_one_epoch,
    training_gflop,
)
from modules.clip4idc import CLIP4IDC
from modules.options.decoding import Decoding
from system.compute import DTYPES, use_fast_matmuls

BEAM_SIZE = 5
METHODS = {
    "greedy": Decoding(),
    f"beam {BEAM_SIZE}": Decoding(beam_size=BEAM_SIZE),
    "sampling": Decoding(temperature=1.0),
}
SPEED_PRECISION = "bf16"


def measure_device(setting: Setting) -> Iterator[Row]:
    """Hardware, versions, and the rate of matrix products."""
    yield attempt("device", partial(_describe_device, setting))
    for precision in ("bf16", "fp16", "fp32"):
        yield attempt(
            "matrix product", partial(_matrix_rate, setting, precision), precision=precision
        )


def _describe_device(setting: Setting) -> Row:
    device = setting.device
    facts: Row = {**machine_info(device), "cores": all_cores()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpus": torch.cuda.device_count(),
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "capability": f"{properties.major}.{properties.minor}",
            "driver": _find_driver(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
    return facts


def _find_driver() -> str:
    """The driver's version, by nvidia-smi."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.split("\n")[0].strip()


def _matrix_rate(setting: Setting, precision: str) -> Row:
    setting.runtime(precision)  # refuses what the device lacks
    with use_fast_matmuls(setting.device, precision):
        gflops = gemm_rate(DTYPES[precision], setting.device, setting.scale.matrix_size)
    return {"tflops": round(gflops / 1000, 2)}


def measure_training(setting: Setting) -> Iterator[Row]:
    """A step of both stages by batch, in bf16, and one in fp16."""
    scale = setting.scale
    runs = [(SPEED_PRECISION, batch) for batch in scale.training_batches]
    runs.append(("fp16", scale.fp16_batch))
    for stage, task in STAGES.items():
        model = random_model(task, scale.model).to(setting.device)
        for precision, batch in runs:
            yield _attempt_training(setting, stage, model, batch, precision)


def measure_compiled_training(setting: Setting) -> Iterator[Row]:
    """A step of both stages with --compile, and how long compiling took."""
    for stage, task in STAGES.items():
        model = random_model(task, setting.scale.model).to(setting.device)
        batch = setting.scale.compiled_batch
        yield _attempt_training(setting, stage, model, batch, SPEED_PRECISION, compiled=True)


def _attempt_training(
    setting: Setting,
    stage: str,
    model: CLIP4IDC,
    num_pairs: int,
    precision: str,
    compiled: bool = False,
) -> Row:
    work = partial(_time_training, setting, STAGES[stage], model, num_pairs, precision, compiled)
    fields = {"stage": stage, "precision": precision, "compiled": compiled, "batch": num_pairs}
    return attempt("training step", work, **fields)


def _time_training(
    setting: Setting, task: str, model: CLIP4IDC, num_pairs: int, precision: str, compiled: bool
) -> Row:
    scale = setting.scale
    runtime = setting.runtime(precision)
    batch = random_batch(task, num_pairs, scale.model)
    _reset_peak_memory(setting.device)
    with use_fast_matmuls(setting.device, precision):
        rate = gemm_rate(DTYPES[precision], setting.device, scale.matrix_size)
        trainer = build_trainer(task, model, batch, runtime, compiled, scale.steps)
        (first,) = time_runs(lambda: train_one_epoch(trainer), setting.device, 1, warm_up=False)
        runs = time_runs(lambda: train_one_epoch(trainer), setting.device, scale.repeats)
    seconds = statistics.median(runs) / scale.steps
    gflop = training_gflop(task, model, batch, scale.model) * num_pairs
    return {
        "seconds": round(seconds, 5),
        "pairs_per_second": round(num_pairs / seconds, 1),
        "share_of_matrix_rate": round(gflop / seconds / rate, 4),
        "peak_gb": _peak_memory(setting.device),
        "first_seconds": round(first, 2),
    }


def _reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _peak_memory(device: torch.device) -> float | None:
    """GB of the GPU since the last reset."""
    if device.type != "cuda":
        return None
    synchronize(device)
    return round(torch.cuda.max_memory_allocated(device) / 1e9, 2)


def measure_captioning(setting: Setting) -> Iterator[Row]:
    """Captions of full length by each method and batch, in bf16."""
    runtime = setting.runtime(SPEED_PRECISION)
    model = random_captioner(runtime, setting.scale.model)
    for batch in setting.scale.captioning_batches:
        for method, decoding in METHODS.items():
            work = partial(_time_captioning, setting, model, batch, decoding)
            fields = {"method": method, "precision": SPEED_PRECISION, "batch": batch}
            yield attempt("captioning", work, **fields)


def _time_captioning(setting: Setting, model: CLIP4IDC, num_pairs: int, decoding: Decoding) -> Row:
    scale = setting.scale
    runtime = setting.runtime(SPEED_PRECISION)
    images = random_batch("caption", num_pairs, scale.model)["images"]
    num_words = scale.model.max_words
    _reset_peak_memory(setting.device)
    with use_fast_matmuls(setting.device, SPEED_PRECISION):
        rate = gemm_rate(DTYPES[SPEED_PRECISION], setting.device, scale.matrix_size)
        runs = time_runs(
            lambda: caption_images(model, images, decoding, runtime, num_words),
            setting.device,
            scale.repeats,
        )
    seconds = statistics.median(runs)
    gflop = captioning_gflop(model, decoding.beam_size, scale.model) * num_pairs
    return {
        "seconds": round(seconds, 5),
        "pairs_per_second": round(num_pairs / seconds, 1),
        "words_per_second": round(num_pairs * num_words / seconds),
        "share_of_matrix_rate": round(gflop / seconds / rate, 4),
        "peak_gb": _peak_memory(setting.device),
    }

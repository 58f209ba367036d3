"""One process among several, and arithmetic that is fast only where it stays exact."""

import logging

import pytest
import torch

from system import compute
from system.logs import log_to_file, logging_to_terminal
from system.runtime import Runtime, open_runtime

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("vendor", "is_exact", "expected"),
    [
        ("AuthenticAMD", True, "medium"),
        ("AuthenticAMD", False, "highest"),
        ("GenuineIntel", True, "highest"),
    ],
)
def test_onednn_is_used_on_amd_and_only_where_it_is_exact(monkeypatch, vendor, is_exact, expected):
    monkeypatch.setattr(compute, "_is_amd_processor", lambda: vendor == "AuthenticAMD")
    monkeypatch.setattr(compute, "_stays_float32", lambda setting: is_exact)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    before = torch.get_float32_matmul_precision()
    with compute.use_fast_matmuls(CPU, "fp32"):
        assert torch.get_float32_matmul_precision() == expected
        assert compute.allows_onednn() is (expected == "medium")
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize(
    ("precision", "expected"), [("fp32", "highest"), ("bf16", "high"), ("fp16", "high")]
)
def test_tf32_is_allowed_on_gpus_below_fp32(precision, expected):
    before = torch.get_float32_matmul_precision()
    with compute.use_fast_matmuls(torch.device("cuda"), precision):
        assert torch.get_float32_matmul_precision() == expected
    assert torch.get_float32_matmul_precision() == before


def test_the_trial_tells_float32_from_bfloat16(monkeypatch):
    assert compute._stays_float32.__wrapped__("highest")
    product = torch.Tensor.__matmul__

    def rounded_product(left, right):
        if left.dtype != torch.float32:
            return product(left, right)
        return product(left.bfloat16(), right.bfloat16()).float()

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded_product)
    assert not compute._stays_float32.__wrapped__("highest")


def test_matmuls_inside_are_float32():
    """Whatever setting this machine gets."""
    left, right = torch.randn(2, 300, 300, generator=torch.Generator().manual_seed(3))
    with compute.use_fast_matmuls(CPU, "fp32"):
        ours = left @ right
    assert (ours - left.double() @ right.double()).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("wanted", "capability", "expected"),
    [
        ("auto", (8, 0), "bf16"),
        ("auto", (7, 5), "fp16"),
        ("fp32", (8, 0), "fp32"),
    ],
)
def test_auto_is_the_best_precision_of_a_gpu(monkeypatch, wanted, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert compute.choose_precision(wanted, torch.device("cuda")) == expected
    assert compute.choose_precision("auto", CPU) == "fp32"


def shares_of(items, world_size: int) -> list:
    return [Runtime(rank, world_size).own_share(items) for rank in range(world_size)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_shares_are_merged_into_item_order(monkeypatch, world_size):
    items = list("abcde")
    shares = shares_of(items, world_size)
    assert shares[0] == items[::world_size]
    monkeypatch.setattr(Runtime, "gather_objects", lambda self, value: shares)
    for rank in range(world_size):
        assert Runtime(rank, world_size).merge_shares(shares[rank]) == items


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_rows_are_merged_into_item_order(monkeypatch, world_size):
    rows = torch.arange(10).reshape(5, 2)
    shares = shares_of(rows, world_size)
    monkeypatch.setattr(Runtime, "gather_objects", lambda self, value: shares)
    assert torch.equal(Runtime(0, world_size).merge_rows(shares[0]), rows)


def test_shares_of_a_range_are_numbers():
    assert [list(share) for share in shares_of(range(5), 2)] == [[0, 2, 4], [1, 3]]


def test_seeds_differ_by_rank_and_by_each_number():
    draws = []
    for rank, numbers in ((0, (1, 2, 3)), (1, (1, 2, 3)), (0, (1, 2, 4)), (0, (1, 2, 3))):
        Runtime(rank, 2).seed(*numbers)
        draws.append(torch.rand(1).item())
    assert len(set(draws)) == 3
    assert draws[0] == draws[3]


def test_one_process_needs_no_others():
    runtime = Runtime()
    value = torch.tensor([1.0, 2.0])
    assert runtime.is_main
    assert runtime.sum_over_processes(value) is value
    assert (runtime.any_process(True), runtime.any_process(False)) == (True, False)
    assert runtime.on_main(lambda: 7) == 7
    assert runtime.gather_objects("x") == ["x"]


@pytest.mark.parametrize(("quiet", "lines"), [(False, ["early", "warning"]), (True, ["warning"])])
def test_early_log_lines_reach_the_file(tmp_path, monkeypatch, quiet, lines):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    log = logging.getLogger("system.test")
    with open_runtime("fp32", quiet=quiet) as runtime:
        log.info("early")
        log_to_file(tmp_path)
        log.warning("warning")
        assert (runtime.rank, runtime.world_size, runtime.precision) == (0, 1, "fp32")
    log.warning("late")
    found = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split()[-1] for line in found] == lines


def test_other_processes_show_errors_only_and_escaped(capsys):
    with logging_to_terminal(is_main=False, level=logging.INFO):
        logging.getLogger("x").warning("not shown")
        logging.getLogger("x").error("clears the screen: %s", "\x1b[2J")
    assert capsys.readouterr().err == "clears the screen: \\x1b[2J\n"

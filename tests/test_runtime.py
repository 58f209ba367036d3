"""Matrix products: fast where they stay float32, and the setting is handed back."""

import pytest
import torch

from system import compute

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("vendor", "exact", "expected"),
    [
        ("AuthenticAMD", True, "medium"),
        ("AuthenticAMD", False, "highest"),
        ("GenuineIntel", True, "highest"),
    ],
)
def test_onednn_is_used_off_intel_and_only_where_it_is_exact(monkeypatch, vendor, exact, expected):
    monkeypatch.setattr(compute, "_describe_processor", lambda: f"vendor_id : {vendor}")
    monkeypatch.setattr(compute, "_stays_float32", lambda setting: exact)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    before = torch.get_float32_matmul_precision()
    with compute.matmul_precision(CPU, "fp32"):
        assert torch.get_float32_matmul_precision() == expected
    assert torch.get_float32_matmul_precision() == before


def test_the_trial_tells_float32_from_bfloat16(monkeypatch):
    assert compute._stays_float32.__wrapped__("highest")
    product = torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor,
        "__matmul__",
        lambda a, b: (
            product(a.bfloat16(), b.bfloat16()).float()
            if a.dtype == torch.float32
            else product(a, b)
        ),
    )
    assert not compute._stays_float32.__wrapped__("highest")


def test_products_inside_are_float32():
    """Whatever this machine chooses."""
    left, right = torch.randn(2, 300, 300, generator=torch.Generator().manual_seed(3))
    with compute.matmul_precision(CPU, "fp32"):
        ours = left @ right
    assert (ours - left.double() @ right.double()).abs().max() < 1e-3

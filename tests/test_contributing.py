"""CONTRIBUTING.md shows the examples that tests/test_extend_*.py run, word for word."""

import inspect

import pytest

from tests import test_extend_backbone, test_extend_dataset, test_extend_decoding
from tests.conftest import ROOT


@pytest.mark.parametrize(
    "example",
    [
        test_extend_dataset.LevirSettings,
        test_extend_dataset.LevirCC,
        test_extend_decoding.Settings,
        test_extend_decoding.diverse_first_words,
        test_extend_backbone.ConvNet,
    ],
)
def test_the_guide_shows_what_is_tested(example):
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert inspect.getsource(example) in guide

"""CONTRIBUTING.md shows the examples that the tests of the seams run, word for word."""

import inspect

import pytest

from tests import test_seam_backbone, test_seam_dataset, test_seam_decoding
from tests.conftest import ROOT


@pytest.mark.parametrize(
    "example",
    [
        test_seam_dataset.LevirSettings,
        test_seam_dataset.LevirCC,
        test_seam_decoding.Settings,
        test_seam_decoding.diverse_first_words,
        test_seam_backbone.ConvNet,
    ],
)
def test_the_guide_shows_what_is_tested(example):
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert inspect.getsource(example) in guide

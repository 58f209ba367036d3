"""report.html: which pairs it shows, its learning curves, and how it looks on a phone."""

import math

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from modules.model.explanation import Caption, Explanation
from modules.report.caption_page import ReportedPair, choose_best_and_worst, write_caption_page
from modules.report.curves import make_curves
from modules.report.page import Page
from tests.browser import find_violations, running_browser

HISTORY = pd.DataFrame(
    {
        "epoch": [0, 1, 2, 3],
        "loss": [4.0, 3.0, 2.0, 1.0],
        "CIDEr": [math.nan, 0.5, 0.5, 0.25],
    }
)


def pairs_with_scores(*scores: float, image: str = "") -> list[ReportedPair]:
    return [
        ReportedPair(f"pair{n}", image, image, "a dot", ["a dot appears"], score)
        for n, score in enumerate(scores)
    ]


@pytest.mark.parametrize(
    ("scores", "shown"),
    [
        ([0.0], {"the only pair": [0]}),
        ([1.0, 3.0, 2.0], {"all 3 pairs, from the best to the worst": [1, 2, 0]}),
        ([1.0, 5.0, 2.0, 4.0, 3.0], {"best pairs": [1, 3], "worst pairs": [0, 2]}),
        ([math.nan, 1.0, 2.0], {"first pairs": [0, 1, 2]}),
    ],
)
def test_few_pairs_are_not_called_the_best(scores, shown):
    chosen = choose_best_and_worst(pairs_with_scores(*scores))
    found = {heading: [int(pair.id[4:]) for pair in pairs] for heading, pairs in chosen}
    assert found == shown


def test_curves_mark_the_epoch_that_was_chosen():
    names = {"loss": "training loss", "CIDEr": "CIDEr", "other": "other"}
    loss, score = make_curves(HISTORY, names, "CIDEr")
    assert (loss.name, loss.epochs, loss.best) == ("training loss", [1, 2, 3, 4], 2)
    assert loss.points[0] == (0, 0)
    assert loss.points[-1] == (270, 140)
    assert (score.epochs, score.best) == ([2, 3, 4], 1), "of equal scores the latest is chosen"
    assert score.points == [(0, 0), (135, 0), (270, 140)]
    assert [curve.best for curve in make_curves(HISTORY, names, "other")] == [None, None]
    assert make_curves(HISTORY[:1], names, "CIDEr") == []


@pytest.fixture(scope="module")
def browser():
    with running_browser() as browser:
        yield browser


@pytest.fixture
def report(tmp_path):
    """A report with long names, and everything that it can hold."""
    image = str(tmp_path / "image.png")
    Image.new("RGB", (480, 320), "teal").save(image)
    scores = {f"Bleu_{n}": 0.1234 for n in range(8)}
    page = Page(
        title=f"Captions: /{'folder/' * 20}",
        summary="5 pairs",
        scores={"all": scores},
        baselines=[("best constant (all: “the scene is the same as before”)", scores)],
        history=HISTORY,
        facts={"checkpoint": "x" * 200, "--pretrained_clip_name": "ViT-B/32"},
        defaults={"--intra_num_hidden_layers": 9},
    )
    pairs = pairs_with_scores(1.0, image=image)
    maps = np.ones((2, 2, 3, 3))
    explanation = Explanation(Caption("a dot", -0.5), ("a", "dot"), maps, maps)
    path = tmp_path / "report.html"
    write_caption_page(path, page, {"all": pairs}, {"pair0": explanation}, "CIDEr")
    return path


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_can_be_read_on_a_phone(report, browser, scheme):
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    tab = context.new_page()
    tab.goto(report.as_uri())
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    heights = [one["height"] for one in (row.bounding_box() for row in tab.locator("tr").all())]
    assert max(heights) < 120, "the first column is wide enough for its words"
    assert find_violations(tab) == []
    assert tab.locator("svg circle").count() == 2
    assert "CIDEr: 0.5 in the best epoch, 3; 0.25 in the last, 4" in tab.inner_text("main")
    context.close()

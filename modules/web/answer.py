"""What the page shows after its button was pressed: captions, or what is wrong, as HTML."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from PIL import Image

from modules.model.explanation import Explanation
from modules.options.decoding import Decoding
from modules.report.pictures import NO_MAPS, Panel, attention_panels, fit_to_box, jpeg_uri
from system.json_files import to_json

TEMPLATES = Path(__file__).parent / "templates"
COMPARED_BOX = (720, 720)  # pixels that the two compared pictures fit into


@cache
def _templates() -> Environment:
    return Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True)


def problem_html(problem: str, side: str = "") -> str:
    """What is wrong and what to do; `side` is the picture that it is about, if there is one."""
    return _render(problem=problem, side=side)


def answer_html(
    before: Image.Image,
    after: Image.Image,
    explanations: Sequence[Explanation],
    decoding: Decoding,
) -> str:
    """A pair's captions, each with its sureness and its attention, and the pair to compare."""
    captions = [_describe(before, after, one) for one in explanations]
    compared = fit_to_box(before, COMPARED_BOX)
    height, width = compared.shape[:2]
    return _render(
        captions=captions,
        spoken=_spoken(captions),
        before=jpeg_uri(compared),
        after=jpeg_uri(fit_to_box(after, COMPARED_BOX)),
        width=width,
        height=height,
        no_maps="" if captions[0]["looks"] else f"{NO_MAPS.capitalize()}.",
        result=result_json(explanations, decoding),
    )


def result_json(explanations: Sequence[Explanation], decoding: Decoding) -> str:
    """The captions, their scores and the settings, as the file that visitors can download."""
    rows = [
        {"caption": one.caption.text, "score": round(one.caption.score, 4)} for one in explanations
    ]
    return to_json({"captions": rows, "decoding": decoding.settings_by_name()}, indent=2)


def _describe(before: Image.Image, after: Image.Image, explanation: Explanation) -> dict[str, Any]:
    """A caption as the template takes it. `looks` is empty without attention maps."""
    panels = attention_panels(before, after, explanation)
    looks = []
    for label, (one, other) in _words_first(panels[1:], len(explanation.words)):
        looks.append({"label": label, "before": jpeg_uri(one), "after": jpeg_uri(other)})
    caption = explanation.caption
    return {"text": caption.text, "sureness": f"{caption.sureness:.0f}", "looks": looks}


def _words_first(panels: Sequence[Panel], num_words: int) -> list[Panel]:
    """The panels of the words, and after them those of the whole pictures."""
    split = len(panels) - num_words
    return [*panels[split:], *panels[:split]]


def _spoken(captions: Sequence[dict[str, Any]]) -> str:
    """What a screen reader says when the answer is there."""
    texts = [f"{one['text']}, {one['sureness']} percent sure of the wording" for one in captions]
    return "; ".join(texts)


def _render(**values: Any) -> str:
    html = _templates().get_template("answer.html").render(**values)
    # Gradio fills in what stands between braces.
    return html.replace("{", "&#123;")

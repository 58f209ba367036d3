"""The page that visitors see: two pictures, the settings of decoding, and the results."""

import html
import json
import threading
from collections.abc import Sequence
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from modules.model.explanation import Explanation
from modules.options.decoding import Decoding
from modules.predictor import Predictor
from modules.report.pictures import attention_panels, jpeg_uri
from modules.web.image_decoding import MAX_MEGABYTES, MAX_MEGAPIXELS, decode_uploads
from modules.web.uploads import UploadFolder
from system.escaping import escape_markdown
from system.json_files import to_json
from system.places import ROOT

EXAMPLES = ROOT / "docs" / "examples"
ERROR_SECONDS = 8  # that a message stays on the page
MAX_BEAMS = 10
MAX_CAPTIONS = 10
MAX_QUEUE = 32  # requests that may wait; others are asked to come back later
MAX_CONCURRENT_CALLS = 4  # one is captioned while the pictures of the others are decoded

STYLE = """
.words { display: flex; flex-wrap: wrap; gap: 10px; }
.words figure { margin: 0; width: 250px; max-width: 100%; }
.words img { width: 49%; display: inline-block; border-radius: 4px; }
"""

# The visitor's browser saves the result in a file; the server writes none.
SAVE_RESULT_SCRIPT = """(text) => {
  if (!text) { return; }
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([text], {type: 'application/json'}));
  link.download = 'caption.json';
  link.click();
  URL.revokeObjectURL(link.href);
}"""


def build_page(predictor: Predictor, model_name: str, uploads: UploadFolder) -> gr.Blocks:
    """The Gradio page around a predictor."""
    captioner = PageCaptioner(predictor, uploads)
    with gr.Blocks(title="CLIP4IDC: what changed?", analytics_enabled=False) as page:
        gr.Markdown(page_heading(model_name, uploads.max_age))
        with gr.Row():
            pictures = [add_picture("Before", uploads), add_picture("After", uploads)]
        add_examples(pictures)
        with gr.Row():
            go = gr.Button("Caption", variant="primary", elem_id="caption")
            swap = gr.Button("Swap before and after", elem_id="swap")
        sentence = gr.Textbox(label="Caption", elem_id="sentence", interactive=False)
        settings = add_settings()
        results = add_results()
        cleared = go.click(
            lambda: ("", gr.Column(visible=False)),
            None,
            [sentence, results[-1]],
            api_name=False,
            queue=False,
        )
        cleared.then(
            captioner.caption_uploads,
            [*pictures, *settings],
            [sentence, *results],
            concurrency_limit=MAX_CONCURRENT_CALLS,
            api_name="caption",
        )
        swap.click(lambda one, other: (other, one), pictures, pictures, api_name=False)
    page.queue(default_concurrency_limit=1, max_size=MAX_QUEUE)
    return page


def page_heading(model_name: str, max_age: float) -> str:
    """The first lines of the page, as Markdown. `max_age` is in seconds."""
    kept = f"{max_age / 60:.0f} minutes" if max_age >= 120 else f"{max_age:.0f} seconds"
    limits = f"{MAX_MEGABYTES} MB and {MAX_MEGAPIXELS} million pixels"
    return (
        "# What changed?\n"
        "Upload two pictures of nearly the same scene and get a sentence that says what changed. "
        f"Each picture can have up to {limits}. Pictures are deleted after {kept}.\n\n"
        f"Model: {escape_markdown(model_name)}"
    )


def add_picture(name: str, uploads: UploadFolder) -> gr.Image:
    """An image component that returns an upload's path, and lets Gradio open no other file."""

    def own_path(path: object) -> str | None:
        try:
            return None if path is None else str(uploads.resolve(str(path)))
        except PermissionError as error:
            raise page_error(str(error)) from None

    async def own_path_later(path: object) -> str | None:
        return own_path(path)

    picture = gr.Image(
        label=name,
        type="filepath",
        sources=["upload", "clipboard"],
        height=280,
        elem_id=name.lower(),
    )
    picture.preprocess = lambda payload: None if payload is None else own_path(payload.path)
    picture.async_move_resource_to_block_cache = own_path_later
    return picture


def add_examples(pictures: list[gr.Image]) -> None:
    """Buttons that fill the two pictures with pairs that ship with the code."""
    names = json.loads((EXAMPLES / "captions.json").read_text(encoding="utf-8"))
    pairs = []
    for name in names:
        pairs.append([str(EXAMPLES / f"{name}_{side}.png") for side in ("before", "after")])
    gr.Examples(pairs, pictures, label="Examples", example_labels=list(names))


def add_settings() -> list[gr.Component]:
    """The components of the settings, in the order of `choose_decoding`'s parameters."""
    sampled = "Captions (more than 1: words are sampled)"
    with gr.Accordion("How words are chosen", open=False):
        return [
            gr.Slider(1, MAX_BEAMS, 1, step=1, label="Beams (1: the most likely word each time)"),
            gr.Slider(0, 2, 0, step=0.1, label="Length penalty of beam search"),
            gr.Slider(1, MAX_CAPTIONS, 1, step=1, label=sampled),
            gr.Slider(0.1, 2, 1, step=0.1, label="Temperature of sampling"),
            gr.Slider(0.05, 1, 0.9, step=0.05, label="Share of probability to sample from (top p)"),
            gr.Number(42, label="Seed of sampling", precision=0),
        ]


def add_results() -> tuple[gr.Component, ...]:
    """The score table, the attention, the result to download, and their hidden column."""
    with gr.Column(visible=False) as column:
        scores = gr.Dataframe(
            headers=["caption", "score"],
            label="Scores: mean log-probability of a caption's words",
            interactive=False,
            wrap=True,
            column_widths=["75%", "25%"],
        )
        gr.Markdown(
            "Where the model looked: the attention of each class token in the joint layers, and of "
            "each word."
        )
        attention = gr.HTML(elem_id="attention")
        download = gr.Button("Download the result", elem_id="download")
    result = gr.Textbox(visible=False)
    download.click(None, result, js=SAVE_RESULT_SCRIPT)
    return scores, attention, result, column


class PageCaptioner:
    """Captions the page's uploads.

    One pair at a time, because the model stores the attention of the pass that is running.
    """

    def __init__(self, predictor: Predictor, uploads: UploadFolder) -> None:
        self.predictor = predictor
        self.uploads = uploads
        self._lock = threading.Lock()

    # Gradio reads the names in its API from these parameters.
    def caption_uploads(
        self,
        before_path: str | None,
        after_path: str | None,
        beam_size: float,
        length_penalty: float,
        num_captions: float,
        temperature: float,
        top_p: float,
        seed: float | None,
    ) -> tuple[Any, ...]:
        """Values for the page's captions, score table, attention, download and results column."""
        settings = (beam_size, length_penalty, num_captions, temperature, top_p, seed)
        try:
            before, after = decode_uploads([before_path, after_path], self.uploads)
            decoding = choose_decoding(*settings)
        except ValueError as error:
            raise page_error(str(error)) from None
        with self._lock:
            [explanations] = self.predictor.explanations([(before, after)], decoding)
        sentences, table, result = format_captions(explanations, decoding)
        attention = attention_html(before, after, explanations)
        return sentences, table, attention, result, gr.Column(visible=True)


def format_captions(
    explanations: Sequence[Explanation], decoding: Decoding
) -> tuple[str, list[list[Any]], str]:
    """A pair's captions, one a line; rows of the score table; the JSON to download."""
    captions = [explanation.caption for explanation in explanations]
    rows = [{"caption": one.text, "score": round(one.score, 4)} for one in captions]
    sentences = "\n".join(row["caption"] for row in rows)
    table = [[row["caption"], row["score"]] for row in rows]
    result = to_json({"captions": rows, "decoding": decoding.settings_by_name()}, indent=2)
    return sentences, table, result


def choose_decoding(
    beam_size: float,
    length_penalty: float,
    num_captions: float,
    temperature: float,
    top_p: float,
    seed: float | None,
) -> Decoding:
    """The Decoding of the page's settings. Raises ValueError with a message for the visitor."""
    has_several = num_captions > 1
    if has_several and beam_size > 1:
        raise ValueError("Beams and captions cannot be combined: set one of the two to 1.")
    decoding = Decoding(
        beam_size=int(beam_size),
        length_penalty=float(length_penalty),
        num_captions=int(num_captions),
        # The page always sends a value; it only matters if several captions are asked for.
        temperature=temperature if has_several else None,
        top_p=top_p if has_several else None,
        seed=int(seed or 0),
    )
    decoding.method_name()  # refuses settings that contradict each other
    return decoding


def attention_html(
    before: Image.Image, after: Image.Image, explanations: Sequence[Explanation]
) -> str:
    """The pictures of a pair's explanations as data URIs; several explanations get headings."""
    parts = []
    for explanation in explanations:
        panels = attention_panels(before, after, explanation)
        figures = "".join(figure_html(label, images) for label, images in panels)
        if len(explanations) > 1:
            parts.append(f"<h3>{html.escape(explanation.caption.text)}</h3>")
        parts.append(f'<div class="words">{figures}</div>')
    return "".join(parts)


def figure_html(label: str, images: Sequence[np.ndarray]) -> str:
    """Two images with a label, before and after, RGB arrays (H, W, 3) each."""
    text = html.escape(label)
    pictures = ""
    for side, image in zip(("before", "after"), images, strict=True):
        pictures += f'<img alt="{text}, {side}" src="{jpeg_uri(image)}">'
    return f"<figure><figcaption>{text}</figcaption>{pictures}</figure>"


def page_error(text: str) -> gr.Error:
    """A message for the visitor. Nothing is written to the server's log."""
    return gr.Error(html.escape(text), duration=ERROR_SECONDS, print_exception=False)

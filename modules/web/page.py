"""The page that visitors see: what the model knows, two pictures, the answer, examples, options."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import gradio as gr

from dataloaders.picture_files import HEIF_ENDINGS, known_formats
from modules.predictor import Predictor
from modules.report.pictures import fit_to_box, jpeg_uri
from modules.web.answer import TEMPLATES, problem_html
from modules.web.captioner import PageCaptioner, page_error
from modules.web.image_decoding import MAX_MEGABYTES
from modules.web.uploads import UploadFolder
from system.escaping import escape_markdown
from system.places import ROOT

EXAMPLES = ROOT / "docs" / "examples"
EXAMPLE_NAMES = {
    "removed": "An object was removed",
    "recolored": "An object changed its color",
    "added": "An object was added",
    "moved": "An object was moved",
    "rematerialed": "An object changed its material",
    "unchanged": "Only the camera and the light moved",
}
THUMBNAIL_BOX = (150, 100)  # pixels
MAX_BEAMS = 10
MAX_CAPTIONS = 10
MAX_QUEUE = 32  # requests that may wait; others are asked to come back later
MAX_CONCURRENT_CALLS = 4  # one is captioned while the pictures of the others are decoded

NO_ANSWER = problem_html(
    "There is no answer: the page is busy or cannot be reached. Wait a moment, then press the "
    "button again."
)
SPOKEN = '<p id="spoken" role="status"></p>'  # what a screen reader says of the answer
CLEAR = "() => ''"
SWAP = "(before, after) => [after, before]"
# A phone's camera on its back, and pictures as they are: left stays left.
CAMERA = gr.WebcamOptions(mirror=False, constraints={"video": {"facingMode": "environment"}})


def build_page(predictor: Predictor, model_name: str, uploads: UploadFolder) -> gr.Blocks:
    """The Gradio page around a predictor."""
    captioner = PageCaptioner(predictor, uploads)
    with gr.Blocks(title="CLIP4IDC: what changed?", analytics_enabled=False) as page:
        add_heading(predictor, model_name, uploads.max_age)
        with gr.Row(elem_classes="pictures"):
            pictures = [add_picture("Before", uploads), add_picture("After", uploads)]
        with gr.Row():
            go = add_button("Say what changed", "caption", variant="primary")
            swap = add_button("Swap the pictures", "swap", variant="secondary")
        answer = gr.HTML(elem_id="answer", js_on_load=None)
        gr.HTML(SPOKEN, elem_classes="unseen", js_on_load=None)
        add_examples(pictures, uploads)
        settings = add_settings()
        inputs = [*pictures, *settings]
        answered = go.click(None, None, answer, js=CLEAR).then(
            captioner.answer,
            inputs,
            answer,
            concurrency_id="caption",
            concurrency_limit=MAX_CONCURRENT_CALLS,
            api_visibility="private",
        )
        answered.failure(None, None, answer, js=f"() => {json.dumps(NO_ANSWER)}")
        swap.click(None, pictures, pictures, js=SWAP)
        swap.click(None, None, answer, js=CLEAR)
        gr.on([picture.input for picture in pictures], None, None, answer, js=CLEAR)
        add_api(captioner, inputs)
    page.queue(default_concurrency_limit=1, max_size=MAX_QUEUE)
    return page


def add_heading(predictor: Predictor, model_name: str, max_age: float) -> None:
    """What the page does, and what its model understands. `max_age` is in seconds."""
    kept = f"{max_age / 60:.0f} minutes" if max_age >= 120 else f"{max_age:.0f} seconds"
    gr.Markdown(
        "# What changed?\n"
        "Choose two pictures of nearly the same scene, and get a sentence that says what changed. "
        f"A picture can have up to {MAX_MEGABYTES} MB. Pictures are deleted after {kept}.",
        elem_id="heading",
    )
    gr.Markdown(model_note(predictor, model_name), elem_id="limits")


def model_note(predictor: Predictor, model_name: str) -> str:
    """Which pictures the model understands, as far as that is known, as Markdown."""
    name = escape_markdown(model_name)
    if predictor.limits:
        return f"**This is {name}.** {escape_markdown(predictor.limits)}"
    if predictor.trained_on:
        return (
            f"**The model is {name}**, trained on {escape_markdown(predictor.trained_on)}. "
            "It understands pictures of that kind."
        )
    return f"**The model is {name}.** It understands pictures like those it was trained on."


def add_picture(name: str, uploads: UploadFolder) -> gr.Image:
    """An image component that returns an upload's path, and lets Gradio open no other file.

    Below it is a place for notes about the visitor's file.
    """

    def own_path(path: object) -> str | None:
        try:
            return None if path is None else str(uploads.resolve(str(path)))
        except PermissionError as error:
            raise page_error(str(error)) from None

    async def own_path_later(path: object) -> str | None:
        return own_path(path)

    side = name.lower()
    with gr.Column():
        picture = gr.Image(
            label=name,
            type="filepath",
            sources=["upload", "clipboard", "webcam"],
            webcam_options=CAMERA,
            height=240,
            min_width=100,
            elem_id=side,
            alt_text=f"The {side} picture",
            buttons=["fullscreen"],
        )
        note = f'<p id="{side}-note" class="note" role="alert"></p>'
        gr.HTML(note, elem_classes="notes", js_on_load=None)
    picture.preprocess = lambda payload: None if payload is None else own_path(payload.path)
    picture.async_move_resource_to_block_cache = own_path_later
    return picture


def add_button(text: str, name: str, variant: str) -> gr.Button:
    """A button that is not too wide to stand beside another one on a phone."""
    return gr.Button(text, variant=variant, size="md", elem_id=name, min_width=120)


def add_examples(pictures: list[gr.Image], uploads: UploadFolder) -> None:
    """Buttons that fill in a pair that ships with the code, and ask for its caption."""
    gr.Markdown("## Or try an example")
    with gr.Row(elem_classes="examples"):
        for name, label in EXAMPLE_NAMES.items():
            button = gr.Button(label, size="sm", elem_id=f"example-{name}")
            filled = button.click(
                _example_filler(name, uploads),
                None,
                pictures,
                queue=False,
                api_visibility="private",
            )
            filled.then(None, None, None, js="() => document.getElementById('caption').click()")


def _example_filler(name: str, uploads: UploadFolder) -> Callable[[], list[str]]:
    """A function that returns the paths of an example's two pictures, stored as uploads."""
    paths = []
    for path in example_pair(name):
        with open(path, "rb") as file:
            paths.append(str(uploads.store(path.name, file)))
    return lambda: paths


def example_pair(name: str) -> list[Path]:
    """The before and after pictures of an example."""
    return [EXAMPLES / f"{name}_{side}.png" for side in ("before", "after")]


def add_settings() -> list[gr.Component]:
    """The components of the settings, in the order of `choose_decoding`'s parameters."""
    with gr.Accordion("Options", open=False):
        num_captions = gr.Slider(
            1,
            MAX_CAPTIONS,
            1,
            step=1,
            label="Number of captions",
            info="With more than one, words are drawn at random, the likely ones more often.",
        )
        temperature = gr.Slider(
            0.1,
            2,
            1,
            step=0.1,
            label="Variety (temperature)",
            info="For several captions: the higher, the more they differ and the more often they "
            "are wrong.",
        )
        top_p = gr.Slider(
            0.05,
            1,
            0.9,
            step=0.05,
            label="Only likely words (top-p)",
            info="For several captions: at 0.9, the least likely words, which together have a "
            "probability of 0.1, are never drawn.",
        )
        seed = gr.Number(
            42,
            label="Seed",
            info="For several captions: the same seed gives the same captions again.",
            precision=0,
        )
        beam_size = gr.Slider(
            1,
            MAX_BEAMS,
            1,
            step=1,
            label="Beams",
            info="For one caption: how many beginnings of a sentence are followed at a time. More "
            "find likelier sentences, and take longer.",
        )
        length_penalty = gr.Slider(
            0,
            2,
            0,
            step=0.1,
            label="Preference for long captions (length penalty)",
            info="With more than one beam: the higher, the longer the caption.",
        )
    return [beam_size, length_penalty, num_captions, temperature, top_p, seed]


def add_api(captioner: PageCaptioner, inputs: Sequence[gr.Component]) -> None:
    """The function that programs call, /caption, on components that nobody sees."""
    outputs = [
        gr.Textbox(label="Caption", visible=False),
        gr.Dataframe(
            headers=["caption", "score"],
            label="Scores: mean log-probability of a caption's words",
            visible=False,
        ),
        gr.HTML(label="Attention", visible=False, js_on_load=None),
        gr.Textbox(label="Result (JSON)", visible=False),
    ]
    gr.Button(visible=False).click(
        captioner.caption_uploads,
        inputs,
        outputs,
        concurrency_id="caption",
        concurrency_limit=MAX_CONCURRENT_CALLS,
        api_name="caption",
    )


def page_style() -> str:
    """The page's CSS, with the examples' thumbnails."""
    rules = [(TEMPLATES / "page.css").read_text(encoding="utf-8")]
    for name in EXAMPLE_NAMES:
        thumbnails = [jpeg_uri(fit_to_box(path, THUMBNAIL_BOX)) for path in example_pair(name)]
        images = ", ".join(f"url({uri})" for uri in thumbnails)
        rules.append(f"#example-{name}::before {{ background-image: {images}; }}")
    return "\n".join(rules)


def page_script() -> str:
    """The page's JavaScript, a function that Gradio calls once."""
    script = (TEMPLATES / "page.js").read_text(encoding="utf-8")
    settings = {
        "max_megabytes": MAX_MEGABYTES,
        "heic_endings": sorted(HEIF_ENDINGS),
        "reads_heic": "HEIF" in known_formats(),
    }
    return f"() => {{ ({script})({json.dumps(settings)}); }}"

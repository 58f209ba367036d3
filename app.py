"""A web page that captions two images: python app.py, then open the address that it prints."""

import argparse
import html
import importlib.util
import json
import logging
import os
import re
import sys
import threading

from modules.web.hosts import host_name, own_hosts, plain_names
from system.command import OneLineParser, run_command
from system.escaping import SafeFormatter, markdown_text, show
from system.places import ROOT
from system.urls import Address

EXAMPLES = ROOT / "docs" / "examples"
MAX_MEGABYTES, MAX_MEGAPIXELS = 20, 50  # of an upload, in 2**20 bytes and millions
MAX_SIDE = 20_000  # pixels: resizing what is long and thin takes far more memory than the picture
MAX_SECONDS = 10  # that decoding the pictures of a request may take
ERROR_SECONDS = 8  # that a message stays on the page
MOST_CAPTIONS = 10
MOST_WAITING = 32  # requests; more are told to come back later
DECODING_AT_ONCE = 4  # requests whose pictures are decoded while another is captioned

STYLE = """
.words { display: flex; flex-wrap: wrap; gap: 10px; }
.words figure { margin: 0; width: 250px; max-width: 100%; }
.words img { width: 49%; display: inline-block; border-radius: 4px; }
"""
# The result goes from the page into a file of the visitor's own; the server writes none.
DOWNLOAD = """(text) => {
  if (!text) { return; }
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([text], {type: 'application/json'}));
  link.download = 'caption.json';
  link.click();
  URL.revokeObjectURL(link.href);
}"""


def decode_uploads(paths, uploads) -> list:
    """A request's two uploads as PIL images.

    Raises ValueError, for the visitor to read, for what is no upload, is too large, or cannot be
    decoded within MAX_SECONDS.
    """
    from modules.web.decoding import decode

    names = ("before", "after")
    found = [check_upload(path, name, uploads) for path, name in zip(paths, names, strict=True)]
    return decode(found, names, MAX_MEGAPIXELS * 1_000_000, MAX_SIDE, MAX_SECONDS)


def check_upload(path: str | None, which: str, uploads) -> str:
    """The real path of an upload of allowed size. Raises ValueError, for the visitor to read."""
    if path is None:
        raise ValueError(f"The {which} image is missing.")
    try:
        real = uploads.resolve(path)
    except PermissionError:
        raise ValueError(f"The {which} image was not uploaded to this page.") from None
    if not real.is_file():
        raise ValueError(f"The {which} image is no longer on the server: upload it again.")
    if real.stat().st_size > MAX_MEGABYTES * 2**20:
        raise ValueError(f"The {which} image is larger than {MAX_MEGABYTES} MB.")
    return str(real)


def attention_html(before, after, explanations) -> str:
    """The pictures of a pair's explanations, inside the page itself; several have headings."""
    from modules.report.pictures import attention_panels

    parts = []
    for explanation in explanations:
        cells = attention_panels(before, after, explanation)
        figures = "".join(figure_html(label, images) for label, images in cells)
        if len(explanations) > 1:
            parts.append(f"<h3>{html.escape(explanation.caption.text)}</h3>")
        parts.append(f'<div class="words">{figures}</div>')
    return "".join(parts)


def figure_html(label: str, images) -> str:
    """Before and after, (h, w, 3) each, under a label."""
    from modules.report.pictures import jpeg_uri

    text = html.escape(label)
    pictures = "".join(
        f'<img alt="{text}, {side}" src="{jpeg_uri(image)}">'
        for side, image in zip(("before", "after"), images, strict=True)
    )
    return f"<figure><figcaption>{text}</figcaption>{pictures}</figure>"


def page_error(text: str):
    """A message for the visitor; nothing is written to the server's log."""
    import gradio as gr

    return gr.Error(html.escape(text), duration=ERROR_SECONDS, print_exception=False)


def choose_decoding(beam_size, length_penalty, num_captions, temperature, top_p, seed):
    """The Decoding of the page's settings. Raises ValueError, for the visitor to read."""
    from modules.options.decoding import Decoding

    decoding = Decoding(
        beam_size=int(beam_size),
        length_penalty=float(length_penalty),
        num_captions=int(num_captions),
        # The page always shows a value; it counts once several captions are asked for.
        temperature=temperature if num_captions > 1 else None,
        top_p=top_p if num_captions > 1 else None,
        seed=int(seed or 0),
    )
    decoding.method()
    return decoding


class PageCaptioner:
    """Captions the page's uploads, a pair at a time, since the model records its attention."""

    def __init__(self, predictor, uploads) -> None:
        self.predictor = predictor
        self.uploads = uploads
        self._lock = threading.Lock()

    def caption(
        self,
        before_path,
        after_path,
        beam_size,
        length_penalty,
        num_captions,
        temperature,
        top_p,
        seed,
    ):
        """Values for the page's captions, score table, attention, download and results column."""
        import gradio as gr

        settings = (beam_size, length_penalty, num_captions, temperature, top_p, seed)
        try:
            before, after = decode_uploads([before_path, after_path], self.uploads)
            decoding = choose_decoding(*settings)
        except ValueError as error:
            raise page_error(str(error)) from None
        with self._lock:
            explanations = self.predictor.explanations([(before, after)], decoding)[0]
        captions = [one.caption for one in explanations]
        rows = [{"caption": one.text, "score": round(one.score, 4)} for one in captions]
        shown = "\n".join(row["caption"] for row in rows)
        table = [[row["caption"], row["score"]] for row in rows]
        attention = attention_html(before, after, explanations)
        result = json.dumps({"captions": rows, "decoding": decoding.values()}, indent=2)
        return shown, table, attention, result, gr.Column(visible=True)


def add_picture(name: str, uploads):
    """An image component that passes on an upload's path, and makes Gradio open no other file."""
    import gradio as gr

    def own_path(path) -> str | None:
        try:
            return None if path is None else str(uploads.resolve(str(path)))
        except PermissionError as error:
            raise page_error(str(error)) from None

    async def own_path_later(path) -> str | None:
        return own_path(path)

    sources = ["upload", "clipboard"]
    picture = gr.Image(
        label=name, type="filepath", sources=sources, height=280, elem_id=name.lower()
    )
    picture.preprocess = lambda payload: None if payload is None else own_path(payload.path)
    picture.async_move_resource_to_block_cache = own_path_later
    return picture


def add_examples(pictures: list) -> None:
    """Buttons that fill the two pictures with pairs that ship."""
    import gradio as gr

    names = json.loads((EXAMPLES / "captions.json").read_text(encoding="utf-8"))
    pairs = [
        [str(EXAMPLES / f"{name}_{side}.png") for side in ("before", "after")] for name in names
    ]
    gr.Examples(pairs, pictures, label="Examples", example_labels=list(names))


def add_settings() -> list:
    """The components of a decoding's settings, in the order of `choose_decoding`."""
    import gradio as gr

    most = MOST_CAPTIONS
    with gr.Accordion("How words are chosen", open=False):
        return [
            gr.Slider(1, 10, 1, step=1, label="Beams (1: the likeliest word each time)"),
            gr.Slider(0, 2, 0, step=0.1, label="Length penalty of beams"),
            gr.Slider(1, most, 1, step=1, label="Captions (more than 1: words are drawn)"),
            gr.Slider(0.1, 2, 1, step=0.1, label="Temperature of drawing"),
            gr.Slider(0.05, 1, 0.9, step=0.05, label="Share of probability to draw from"),
            gr.Number(42, label="Seed of drawing", precision=0),
        ]


def add_results() -> tuple:
    """The score table, the attention, the text to download, and their column, which is hidden."""
    import gradio as gr

    label = "Scores: mean log-probability of a caption's words"
    looked = "Where the model looked: from each class token in the joint layers, and for each word."
    with gr.Column(visible=False) as found:
        scores = gr.Dataframe(
            headers=["caption", "score"],
            label=label,
            interactive=False,
            wrap=True,
            column_widths=["75%", "25%"],
        )
        gr.Markdown(looked)
        attention = gr.HTML(elem_id="attention")
        download = gr.Button("Download the result", elem_id="download")
    result = gr.Textbox(visible=False)
    download.click(None, result, js=DOWNLOAD)
    return scores, attention, result, found


def page_heading(model_name: str, max_age: float) -> str:
    """The page's first lines, as Markdown."""
    kept = f"{max_age / 60:.0f} minutes" if max_age >= 120 else f"{max_age:.0f} seconds"
    limits = f"{MAX_MEGABYTES} MB and {MAX_MEGAPIXELS} million pixels"
    return (
        "# What changed?\n"
        "Two pictures of nearly the same scene go in, a sentence that says what changed comes out. "
        f"Each may have up to {limits}; none is kept longer than {kept}.\n\n"
        f"Model: {markdown_text(model_name)}"
    )


def build_page(predictor, model_name: str, uploads):
    """The Gradio page around a predictor; `uploads` is the UploadFolder of its files."""
    import gradio as gr

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
            captioner.caption,
            [*pictures, *settings],
            [sentence, *results],
            concurrency_limit=DECODING_AT_ONCE,
            api_name="caption",
        )
        swap.click(lambda one, other: (other, one), pictures, pictures, api_name=False)
    return page


def serve(args: argparse.Namespace) -> None:
    """Load the model and serve until stopped."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_RUN_HISTORY"] = "False"  # what visitors do is not written down
    if importlib.util.find_spec("gradio") is None:
        raise OSError("the page needs Gradio: pip install -r requirements-app.txt")
    from modules.predictor import Predictor
    from modules.web.decoding import start_decoding
    from modules.web.server import (
        address_of,
        build_application,
        ending_on_signals,
        open_socket,
        run_server,
    )
    from modules.web.uploads import open_upload_folder
    from system.compute import keep_freed_memory

    lines = logging.StreamHandler()
    lines.setFormatter(SafeFormatter("%(message)s"))
    logging.getLogger().addHandler(lines)
    hosts, others = own_hosts(args.host), plain_names(args.allowed_hosts)
    with ending_on_signals(), open_socket(args.host, args.port) as listening:
        predictor = Predictor.load(args.init_model)
        keep_freed_memory()
        name = str(args.init_model) if args.init_model else "the small one that ships"
        if predictor.trained_on:
            name += f", trained on {predictor.trained_on}"
        start_decoding()
        with open_upload_folder(args.upload_age, args.upload_space) as uploads:
            # Gradio reads this when it is imported; the folder goes with the server.
            os.environ["GRADIO_TEMP_DIR"] = str(uploads.root)
            page = build_page(predictor, name, uploads)
            page.queue(default_concurrency_limit=1, max_size=MOST_WAITING)
            application = build_application(
                page, STYLE, uploads, hosts, others, MAX_MEGABYTES * 2**20
            )
            uploads.keep_present()
            show(f"The page: {address_of(args.host, args.port)}  (Ctrl-C ends it)", flush=True)
            run_server(application, listening)


def byte_count(text: str) -> int:
    """Bytes of a size such as 500MB, 2 GB or 1000000. ArgumentTypeError for what is none."""
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?) *([kmgt]?)b?", text.strip().lower())
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size, such as 500MB or 2GB")
    factor = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}[found.group(2)]
    return int(float(found.group(1)) * factor)


def parse_words(argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked; wrong words print one line and exit with 2."""
    parser = OneLineParser(description=__doc__)
    model = "finetuned weights (default: the small model in ckpts/demo)"
    host = "address to listen on (default: 127.0.0.1, this machine alone)"
    names = (
        "further names that the page answers to, such as that of a web server in front of it "
        "(default: localhost, --host, and on 0.0.0.0 and :: this machine's name and addresses)"
    )
    age = "seconds that an upload is kept at most (default: 3600)"
    space = "what all uploads may take together, such as 500MB; the oldest go first (default: 2GB)"
    parser.add_argument("--init_model", type=Address, help=model)
    parser.add_argument("--host", default="127.0.0.1", help=host)
    parser.add_argument("--port", type=int, default=7860, help="default: 7860")
    parser.add_argument(
        "--allowed_hosts", nargs="+", action="extend", default=[], metavar="NAME", help=names
    )
    parser.add_argument("--upload_age", type=float, default=3600, metavar="SECONDS", help=age)
    parser.add_argument(
        "--upload_space", type=byte_count, default=2 * 10**9, metavar="SIZE", help=space
    )
    args = parser.parse_args(argv)
    args.allowed_hosts = [name for names in args.allowed_hosts for name in names.split(",") if name]
    problems = [
        f"--allowed_hosts {name} is no name of a host"
        for name in args.allowed_hosts
        if host_name(name) is None
    ]
    if not 1 <= args.port <= 65535:
        problems.append(f"--port is {args.port}, expected 1 to 65535")
    if not 1 <= args.upload_age <= 10**9:
        problems.append(f"--upload_age is {args.upload_age:g}, expected at least 1 second")
    if args.upload_space < 1:
        problems.append(f"--upload_space is {args.upload_space}, expected at least 1 byte")
    if args.init_model == Address(""):
        problems.append("--init_model is empty")
    if problems:
        parser.error("; ".join(problems))
    return args


def main(argv: list[str] | None = None) -> int:
    """Command line; see --help."""
    args = parse_words(argv)
    return run_command("app.py", lambda: serve(args))


if __name__ == "__main__":
    sys.exit(main())

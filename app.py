"""A web page that captions two images: python app.py, then open the address that it prints. A thin caller of the Predictor."""

import argparse
import html
import json
import os
import socket
import sys
import tempfile
from pathlib import Path

from modules.options import OneLineParser, run_and_report

ROOT = Path(__file__).parent
EXAMPLES = ROOT / "docs" / "examples"
MAX_MEGABYTES, MAX_MEGAPIXELS = 20, 50  # of an upload, in 2**20 bytes and millions
KEPT_SECONDS = 3600  # that the server's copies of uploads live at most
MOST_CAPTIONS = 10
MOST_WAITING = 32  # requests; more are told to come back later

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


def open_upload(path: str | None, which: str):
    """An uploaded file as a PIL image, its size looked at before it is decoded. Raises ValueError, for the visitor to read."""
    from PIL import Image, UnidentifiedImageError

    from dataloaders.images import read_image

    if path is None:
        raise ValueError(f"The {which} image is missing.")
    if not Path(path).is_file():
        raise ValueError(f"The {which} image is no longer on the server: upload it again.")
    if Path(path).stat().st_size > MAX_MEGABYTES * 2**20:
        raise ValueError(f"The {which} image is larger than {MAX_MEGABYTES} MB.")
    try:
        with Image.open(path) as image:
            too_many = image.width * image.height > MAX_MEGAPIXELS * 1_000_000
    except Image.DecompressionBombError:
        too_many = True
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError):
        raise ValueError(f"The {which} file is not an image that can be read.") from None
    if too_many:
        raise ValueError(f"The {which} image has more than {MAX_MEGAPIXELS} million pixels.")
    try:
        return read_image(path)
    except ValueError:  # whose text names a path of the server
        raise ValueError(f"The {which} file is not an image that can be read.") from None


def attention_html(before, after, explanations) -> str:
    """The pictures of one or several explanations of a pair, inside the page itself; several stand under their captions."""
    from modules.visualization import explanation_cells, jpeg_uri

    parts = []
    for explanation in explanations:
        figures = [f"<figure><figcaption>{html.escape(label)}</figcaption>"
                   + "".join(f'<img alt="{html.escape(label)}, {side}" src="{jpeg_uri(image)}">'
                             for side, image in zip(("before", "after"), images, strict=True)) + "</figure>"
                   for label, images in explanation_cells(before, after, explanation)]
        heading = f"<h3>{html.escape(explanation.caption.text)}</h3>" if len(explanations) > 1 else ""
        parts.append(f'{heading}<div class="words">{"".join(figures)}</div>')
    return "".join(parts)


def build_page(predictor, model_name: str):
    """The Gradio page around a predictor, the model's name shown on it."""
    import gradio as gr

    from modules.predictor import Decoding

    def upload(name: str) -> gr.Image:
        """An image component that hands over the upload's path undecoded, so that what is wrong with it can be told."""
        image = gr.Image(label=name, type="filepath", sources=["upload", "clipboard"], height=280, elem_id=name.lower())
        image.preprocess = lambda payload: None if payload is None else payload.path
        return image

    def caption(before_path, after_path, beam_size, length_penalty, num_captions, temperature, top_p, seed):
        try:
            before, after = open_upload(before_path, "before"), open_upload(after_path, "after")
            if num_captions > 1 and beam_size > 1:
                raise ValueError("Beams and several captions do not go together: set one of them to 1.")
            drawn = {"num_captions": int(num_captions), "temperature": temperature, "top_p": top_p} if num_captions > 1 else {}
            decoding = Decoding(int(beam_size), float(length_penalty), seed=int(seed or 0), **drawn)
        except ValueError as error:
            raise gr.Error(str(error), duration=8, print_exception=False) from None
        explanations = predictor.explanations([(before, after)], decoding)[0]
        rows = [{"caption": one.caption.text, "score": round(one.caption.score, 4)} for one in explanations]
        shown = "\n".join(row["caption"] for row in rows)
        result = json.dumps({"captions": rows, "decoding": vars(decoding)}, indent=2)
        table = [[row["caption"], row["score"]] for row in rows]
        return shown, table, attention_html(before, after, explanations), result, gr.Column(visible=True)

    kept = (min(60, KEPT_SECONDS), KEPT_SECONDS)  # how often the server looks, and what is then too old
    with gr.Blocks(title="CLIP4IDC: what changed?", delete_cache=kept, analytics_enabled=False) as page:
        gr.Markdown("# What changed?\nTwo pictures of nearly the same scene go in, a sentence that says what changed comes out. "
                    f"Each may have up to {MAX_MEGABYTES} MB and {MAX_MEGAPIXELS} million pixels; none is kept longer than "
                    "about an hour.\n\n"
                    f"Model: {model_name}")
        with gr.Row():
            before, after = upload("Before"), upload("After")
        names = json.loads((EXAMPLES / "captions.json").read_text(encoding="utf-8"))
        pairs = [[str(EXAMPLES / f"{name}_{side}.png") for side in ("before", "after")] for name in names]
        gr.Examples(pairs, [before, after], label="Examples", example_labels=list(names))
        with gr.Row():
            go = gr.Button("Caption", variant="primary", elem_id="caption")
            swap = gr.Button("Swap before and after", elem_id="swap")
        sentence = gr.Textbox(label="Caption", elem_id="sentence", interactive=False)
        with gr.Accordion("How words are chosen", open=False):
            beam_size = gr.Slider(1, 10, 1, step=1, label="Beams (1: the likeliest word each time)")
            length_penalty = gr.Slider(0, 2, 0, step=0.1, label="Length penalty of beams")
            num_captions = gr.Slider(1, MOST_CAPTIONS, 1, step=1, label="Captions (more than 1: words are drawn)")
            temperature = gr.Slider(0.1, 2, 1, step=0.1, label="Temperature of drawing")
            top_p = gr.Slider(0.05, 1, 0.9, step=0.05, label="Share of probability to draw from")
            seed = gr.Number(42, label="Seed of drawing", precision=0)
        with gr.Column(visible=False) as found:
            scores = gr.Dataframe(headers=["caption", "score"], label="Scores: mean log-probability of a caption's words",
                                  interactive=False, wrap=True, column_widths=["75%", "25%"])
            gr.Markdown("Where the model looked: from each class token in the joint layers, and for each word.")
            attention = gr.HTML(elem_id="attention")
            download = gr.Button("Download the result", elem_id="download")
        result = gr.Textbox(visible=False)
        settings = [beam_size, length_penalty, num_captions, temperature, top_p, seed]
        shown = [sentence, scores, attention, result, found]
        go.click(lambda: ("", gr.Column(visible=False)), None, [sentence, found], api_name=False, queue=False).then(
            caption, [before, after, *settings], shown, concurrency_limit=1, api_name="caption")
        swap.click(lambda one, other: (other, one), [before, after], [before, after], api_name=False)
        download.click(None, result, js=DOWNLOAD)
    return page


def serve(args: argparse.Namespace) -> None:
    """Load the model and serve until stopped."""
    from PIL import Image

    from modules.predictor import Predictor
    from modules.runtime import keep_freed_memory

    try:
        import gradio  # noqa: F401
    except ImportError:
        raise OSError("the page needs Gradio: pip install -r requirements-app.txt") from None
    with socket.socket(socket.AF_INET6 if ":" in args.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((args.host, args.port))
        except OSError as error:
            raise OSError(f"cannot listen on {args.host}, port {args.port}: {error.strerror}") from None
    predictor = Predictor.load(args.init_model)
    keep_freed_memory()
    Image.MAX_IMAGE_PIXELS = MAX_MEGAPIXELS * 500_000  # Pillow refuses twice as many
    name = Path(args.init_model).name if args.init_model else "the small one that ships"
    if predictor.trained_on:
        name += f", trained on {predictor.trained_on}"
    with tempfile.TemporaryDirectory(prefix="clip4idc-") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads  # gone with the server
        page = build_page(predictor, name).queue(default_concurrency_limit=1, max_size=MOST_WAITING)
        print(f"The page: http://{args.host}:{args.port}  (Ctrl-C ends it)", flush=True)
        page.launch(server_name=args.host, server_port=args.port, css=STYLE, max_file_size=MAX_MEGABYTES * 2**20, show_error=False,
                    allowed_paths=[], share=False, footer_links=["api"], quiet=True)


def main(argv: list[str] | None = None) -> int:
    """Command line; see --help."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--init_model", help="finetuned weights (default: the small model in ckpts/demo)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine alone)")
    parser.add_argument("--port", type=int, default=7860, help="default: 7860")
    args = parser.parse_args(argv)
    if not 1 <= args.port <= 65535:
        parser.error(f"--port is {args.port}, expected 1 to 65535")
    return run_and_report("app.py", lambda: serve(args))


if __name__ == "__main__":
    sys.exit(main())

"""Captions the page's uploads, for visitors and for programs that call the page."""

import html
import threading
from typing import Any

import gradio as gr
from PIL import Image

from modules.model.explanation import Explanation
from modules.options.decoding import Decoding
from modules.predictor import Predictor
from modules.web.answer import answer_html, problem_html, result_json
from modules.web.image_decoding import PictureError, decode_uploads
from modules.web.uploads import UploadFolder

ERROR_SECONDS = 8  # that a message stays on the page
Captioned = tuple[Image.Image, Image.Image, list[Explanation], Decoding]


class PageCaptioner:
    """Captions the page's uploads.

    One pair at a time, because the model stores the attention of the pass that is running.
    """

    def __init__(self, predictor: Predictor, uploads: UploadFolder) -> None:
        self.predictor = predictor
        self.uploads = uploads
        self._lock = threading.Lock()

    def answer(self, before_path: str | None, after_path: str | None, *settings: float) -> str:
        """The HTML that the page shows: captions, or what is wrong."""
        try:
            return answer_html(*self._caption(before_path, after_path, *settings))
        except PictureError as error:
            return problem_html(str(error), error.side)
        except ValueError as error:
            return problem_html(str(error))

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
        """The captions, one a line; the table of their scores; the page's HTML; the JSON file."""
        settings = (beam_size, length_penalty, num_captions, temperature, top_p, seed)
        try:
            captioned = self._caption(before_path, after_path, *settings)
        except ValueError as error:
            raise page_error(str(error)) from None
        _, _, explanations, decoding = captioned
        captions = [one.caption for one in explanations]
        sentences = "\n".join(caption.text for caption in captions)
        scores = [[caption.text, round(caption.score, 4)] for caption in captions]
        result = result_json(explanations, decoding)
        return sentences, scores, answer_html(*captioned), result

    def _caption(
        self, before_path: str | None, after_path: str | None, *settings: float | None
    ) -> Captioned:
        """The decoded pictures and their captions. Raises ValueError with a visitor's message."""
        before, after = decode_uploads([before_path, after_path], self.uploads)
        decoding = choose_decoding(*settings)
        with self._lock:
            [explanations] = self.predictor.explanations([(before, after)], decoding)
        return before, after, explanations, decoding


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
        raise ValueError(
            "Beams and several captions cannot be combined. Under Options, set Beams or Number of "
            "captions to 1."
        )
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


def page_error(text: str) -> gr.Error:
    """A message for the visitor. Nothing is written to the server's log."""
    return gr.Error(html.escape(text), duration=ERROR_SECONDS, print_exception=False)

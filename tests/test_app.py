"""app.py's command line, and the parts of the page that need no browser and no server."""

import argparse
import asyncio
import io
import multiprocessing
import os
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import app
from modules.model.explanation import Caption, Explanation
from modules.options.decoding import Decoding
from modules.web import image_decoding
from modules.web.uploads import UploadFolder
from system.escaping import escape_markdown
from tests.page_server import EXAMPLES, copy_example

pytest.importorskip("gradio", reason="the page needs requirements-app.txt")


@pytest.fixture
def uploads(tmp_path: Path) -> UploadFolder:
    return UploadFolder(tmp_path, max_age=60, max_bytes=10**9)


@pytest.fixture
def intact(tmp_path: Path) -> str:
    """An upload of 480×320 pixels."""
    return str(copy_example("removed_before.png", tmp_path))


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("500MB", 500 * 10**6),
        ("2 GB", 2 * 10**9),
        ("1000", 1000),
        ("1.5gb", 15 * 10**8),
        ("2G", 2 * 10**9),
        ("7b", 7),
    ],
)
def test_sizes_are_read(text, size):
    assert app.parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "x", "-1", "nan", "inf", "1e400", "1" * 5000, "1 XB", "1 MB MB"]
)
def test_other_texts_are_not_sizes(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not a size, such as 500MB"):
        app.parse_size(text)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--port", "99999"], "--port: 99999 is out of range, expected 1 to 65535"),
        (["--init_model", "nowhere"], "no weights"),
        (["--upload_age", "0"], "--upload_age: 0 is out of range, expected 1 to 1000000000"),
        (["--upload_age", "2e9"], "--upload_age: 2e9 is out of range, expected 1 to 1000000000"),
        (["--upload_age", "nan"], "--upload_age: nan is out of range, expected 1 to 1000000000"),
        (["--upload_space", "0"], "--upload_space: 0 is out of range, expected 1 B to 1 EB"),
        (["--upload_space", "much"], "--upload_space: 'much' is not a size"),
        (["--upload_space", "1e400"], "'1e400' is not a size"),
        (["--init_model", ""], "--init_model is empty"),
        (["--allowed_hosts", "a b"], "--allowed_hosts a b is not a host name"),
        (["--host", "256.1.1.1"], "cannot listen on 256.1.1.1, port 7860: "),
        (["--init_model", "htps://user:hunter2@host/x"], "no weights htps://host/x"),
    ],
)
def test_wrong_options_are_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        app.main(words)
    assert stop.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in line
    assert "hunter2" not in line


def test_names_separated_by_commas_and_blanks_are_allowed():
    args = app.parse_arguments(["--allowed_hosts", "a.example,b.example", "c.example"])
    assert args.allowed_hosts == ["a.example", "b.example", "c.example"]


def test_uploads_are_decoded(uploads, intact):
    images = image_decoding.decode_uploads([intact, intact], uploads)
    assert [(image.mode, image.size) for image in images] == [("RGB", (480, 320))] * 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("broken.png", (EXAMPLES / "removed_before.png").read_bytes()[:300], "cannot be read"),
        ("text.png", b"no image", "cannot be read"),
        ("gone.png", None, "no longer on the server"),
        ("../elsewhere.png", b"x", "not uploaded"),
        (None, None, "missing"),
    ],
)
def test_each_side_is_refused_by_its_name(name, content, message, tmp_path):
    folder = tmp_path / "uploads"
    folder.mkdir()
    uploads = UploadFolder(folder, max_age=60, max_bytes=10**9)
    intact = str(copy_example("removed_before.png", folder))
    path = None if name is None else str(folder / name)
    if content is not None:
        Path(path).write_bytes(content)
    with pytest.raises(image_decoding.PictureError, match=f"The before .*{message}"):
        image_decoding.decode_uploads([path, intact], uploads)
    with pytest.raises(image_decoding.PictureError, match=f"The after .*{message}"):
        image_decoding.decode_uploads([intact, path], uploads)


@pytest.mark.parametrize(
    ("limit", "value", "message"),
    [
        ("MAX_MEGAPIXELS", 0.01, "more than 0.01 million pixels"),
        ("MAX_SIDE", 400, "a side of more than 400"),
        ("MAX_MEGABYTES", 0.001, "larger than 0.001 MB"),
    ],
)
def test_pictures_over_a_limit_are_refused(limit, value, message, uploads, intact, monkeypatch):
    monkeypatch.setattr(image_decoding, limit, value)
    with pytest.raises(image_decoding.PictureError, match=message):
        image_decoding.decode_uploads([intact, intact], uploads)


def slow_picture() -> bytes:
    """A JPEG of 300 kB that takes minutes to decode: it repeats its last scan 3,000 times."""
    buffer = io.BytesIO()
    Image.new("L", (6000, 6000)).save(buffer, "JPEG", progressive=True)
    whole = buffer.getvalue()
    scan = whole[whole.rindex(b"\xff\xda") : -2]
    return whole[:-2] + 3000 * scan + whole[-2:]


def test_decoding_that_takes_too_long_is_ended(uploads, monkeypatch):
    monkeypatch.setattr(image_decoding, "MAX_SECONDS", 1)
    content = (EXAMPLES / "removed_before.png").read_bytes()
    intact = str(uploads.store("a.png", io.BytesIO(content)))
    slow = str(uploads.store("b.jpg", io.BytesIO(slow_picture())))
    with pytest.raises(image_decoding.PictureError, match="The before picture took too long"):
        image_decoding.decode_uploads([slow, intact], uploads)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ("settings", "values"),
    [
        ((3.0, 1, 1, 0.5, 0.9, 7), {"beam_size": 3, "length_penalty": 1.0, "seed": 7}),
        (
            (1, 0, 2.0, 0.5, 0.9, None),
            {"num_captions": 2, "temperature": 0.5, "top_p": 0.9, "seed": 0},
        ),
    ],
)
def test_the_pages_settings_choose_how_to_decode(settings, values):
    from modules.web.captioner import choose_decoding

    found = choose_decoding(*settings)
    defaults = {
        "beam_size": 1,
        "length_penalty": 0.0,
        "num_captions": 1,
        "temperature": None,
        "top_p": None,
    }
    assert found.settings_by_name() == defaults | values


def test_beams_and_several_captions_are_refused():
    from modules.web.captioner import choose_decoding

    expected = "^Beams and several captions cannot be combined. Under Options, set Beams or "
    with pytest.raises(ValueError, match=expected):
        choose_decoding(2, 0, 2, 1, 0.9, 42)


def test_captions_are_text_in_the_page():
    from modules.web.answer import answer_html

    image = Image.new("RGB", (20, 20))
    script = "<script>alert(1)</script> {{value}} ${1}"
    maps = np.zeros((2, 2, 6, 6))
    explanation = Explanation(Caption(script, -1.0), (script,), maps, maps[:1])
    page = answer_html(image, image, [explanation, explanation], Decoding())
    assert "<script>" not in page
    assert "{" not in page, "Gradio would fill in what stands in braces"
    assert page.count('<p class="caption">&lt;script&gt;') == 2
    assert page.count("sure of the wording: 37 %") == 2
    assert page.count("data:image/jpeg;base64,") == 2 + 2 * 6
    without_maps = Explanation.without_maps(explanation.caption)
    assert "This model has no attention maps." in answer_html(
        image, image, [without_maps], Decoding()
    )


@pytest.mark.parametrize(
    ("limits", "trained_on", "note"),
    [
        ("It knows <b>solids", None, "**This is x/y.** It knows &lt;b&gt;solids"),
        ("", "a garden", "**The model is x/y**, trained on a garden. It understands pictures of"),
        ("", None, "**The model is x/y.** It understands pictures like those it was trained on."),
    ],
)
def test_the_page_says_what_its_model_understands(limits, trained_on, note):
    from modules.web.page import model_note

    found = model_note(SimpleNamespace(limits=limits, trained_on=trained_on), "x/y")
    assert found.startswith(note)


def test_model_info_is_text_in_the_page():
    sly = (
        "mine\n\n# Session expired\n\n[Log in](http://127.0.0.1:9/) ![](http://127.0.0.1:9/p.png) "
        "<form action=x> **b** `c` | d\x1b[31m"
    )
    text = escape_markdown(sly)
    assert "\n" not in text
    assert "\x1b" not in text
    for mark in ("# S", "[L", "](", "![", "<form", "**b", "`c"):
        assert not re.search(rf"(?<!\\){re.escape(mark)}", text), mark
    assert len(escape_markdown("a" * 10**6)) == 300


def test_the_components_refuse_files_that_the_guard_would_let_through(uploads):
    """The second door: the page itself accepts only uploads, whoever calls it."""
    import gradio as gr

    from modules.web.page import build_page

    predictor = SimpleNamespace(limits="", trained_on=None)
    page = build_page(predictor, "", uploads)
    images = [block for block in page.blocks.values() if isinstance(block, gr.Image)]
    assert len(images) == 2
    for image in images:
        for path in (str(EXAMPLES / "removed_before.png"), "/dev/zero", "http://127.0.0.1/x.png"):
            with pytest.raises(gr.Error, match="not uploaded"):
                image.preprocess(image.data_model(path=path))
            with pytest.raises(gr.Error, match="not uploaded"):
                asyncio.run(image.async_move_resource_to_block_cache(path))


def test_proxies_are_forgotten(monkeypatch):
    names = ("ALL_PROXY", "all_proxy", "HTTP_PROXY", "https_proxy")
    for name in names:
        monkeypatch.setenv(name, "socks5://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "localhost")
    app._forget_proxies()
    assert [name for name in names if name in os.environ] == []
    assert os.environ["NO_PROXY"] == "localhost"


@pytest.mark.parametrize("text", ["0", "0.1B", "2000000000GB"])
def test_sizes_out_of_range_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is out of range, expected 1 B to 1 EB"):
        app.parse_size(text)

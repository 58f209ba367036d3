"""Models by name: the table, `clip4idc models`, and what a name means where."""

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from modules.predictor import DEMO
from modules.weights import known_models
from modules.weights.known_models import BUNDLED, MODELS, KnownModel
from modules.weights.sources import find_weights, load_weights
from preprocess import list_models
from system import download, places
from system.files import compute_sha256
from system.suggestions import suggest
from tests.conftest import tiny_weights
from tests.servers import web_site

SETTINGS = {"intra_num_hidden_layers": 1, "max_words": 12}


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(download, "FIRST_DELAY", 0.0)


@pytest.fixture
def content(tmp_path) -> bytes:
    """A file of weights."""
    torch.save(tiny_weights(), tmp_path / "x.bin")
    return (tmp_path / "x.bin").read_bytes()


def enter(monkeypatch: pytest.MonkeyPatch, location: str, sha256: str | None) -> None:
    """Put a model called `mine` into the table."""
    model = KnownModel(
        location, "captioner", "dots", "ten dots", "mit", {}, "", sha256=sha256, settings=SETTINGS
    )
    monkeypatch.setitem(MODELS.targets, "mine", model)


def test_the_bundled_model_is_what_the_table_says():
    model = MODELS[BUNDLED]
    assert model.find_here() == DEMO == find_weights(BUNDLED)
    assert compute_sha256(DEMO) == model.sha256
    assert model.limits.startswith("It knows only drawn scenes like CLEVR's")
    assert model.limits.endswith("; expect nonsense on photographs.")


def test_checksums_and_scores_are_not_guessed():
    """The authors publish no checksums, and their scores are marked as theirs."""
    for name in MODELS:
        model = MODELS[name]
        assert model.sha256 is None or re.fullmatch("[0-9a-f]{64}", model.sha256)
        assert not model.scores or model.scores_from
        if name.startswith("authors-"):
            assert model.sha256 is None
            assert "not stated" in model.license or "none stated" in model.license
            assert model.scores_from in ("", "the authors' README, not measured here")


def test_a_model_at_a_url_is_downloaded_once_and_its_settings_stand_in(
    content, tmp_path, monkeypatch
):
    with web_site({"m/x.bin": content}) as site:
        enter(monkeypatch, f"{site.url}/m/x.bin", hashlib.sha256(content).hexdigest())
        loaded = load_weights("mine", "no CLIP is looked for", str(tmp_path / "cache"))
        assert loaded.info == SETTINGS
        assert Path(loaded.named_source).read_bytes() == content
        asked = len(site.asked)
        find_weights("mine", str(tmp_path / "cache"))
        assert len(site.asked) == asked


def test_half_a_download_is_finished_by_the_next_call(content, tmp_path, monkeypatch):
    cache = str(tmp_path / "cache")
    half = len(content) // 2
    with web_site({"m/x.bin": content}) as site:
        enter(monkeypatch, f"{site.url}/m/x.bin", hashlib.sha256(content).hexdigest())
        site.broken["m/x.bin"] = [half] * (download.MAX_ATTEMPTS + 1)
        with pytest.raises(OSError, match=r"\d bytes are kept, and the same command continues"):
            find_weights("mine", cache)
        site.broken.clear()
        assert find_weights("mine", cache).read_bytes() == content
        name, asked = [one for one in site.asked if one[0] == "m/x.bin"][-1]
        assert re.fullmatch(r"bytes=[1-9]\d+-", asked)


def test_a_file_with_another_checksum_is_refused(content, tmp_path, monkeypatch):
    with web_site({"m/x.bin": content + b" "}) as site:
        enter(monkeypatch, f"{site.url}/m/x.bin", hashlib.sha256(content).hexdigest())
        with pytest.raises(OSError, match="x.bin: SHA-256 mismatch"):
            find_weights("mine", str(tmp_path / "cache"))
    monkeypatch.setattr(places, "ROOT", tmp_path)
    (tmp_path / "ckpts").mkdir()
    (tmp_path / "ckpts" / "m.bin").write_bytes(content)
    enter(monkeypatch, "ckpts/m.bin", "0" * 64)
    with pytest.raises(OSError, match="m.bin is not the file of the model mine, whose SHA-256 is"):
        find_weights("mine")
    enter(monkeypatch, "ckpts/m.bin", None)
    assert find_weights("mine") == tmp_path / "ckpts" / "m.bin"


def test_a_file_or_folder_of_that_name_goes_first(content, tmp_path, monkeypatch):
    enter(monkeypatch, "ckpts/nowhere.bin", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").write_bytes(content)
    assert find_weights("mine") == Path("mine")
    assert load_weights("mine", "no CLIP").info == {}, "settings are those of the table's file"
    (tmp_path / "mine").unlink()
    (tmp_path / "mine").mkdir()
    with pytest.raises(FileNotFoundError, match="mine is a folder without model.safetensors"):
        find_weights("mine")


def test_what_is_not_here_says_how_to_get_it():
    expected = (
        r"authors-spot is not here yet, .*spot: get it with python -m clip4idc download trained"
    )
    with pytest.raises(FileNotFoundError, match=expected):
        find_weights("authors-spot")


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("authors_spot", "authors-spot"), ("dem", "demo"), ("ViT-B-32", "ViT-B/32"), ("zzz", None)],
)
def test_an_unknown_name_gives_the_nearest_right_one(wrong, right):
    with pytest.raises(FileNotFoundError) as error:
        find_weights(wrong)
    ending = f'; did you mean "{right}"?' if right else "ViT-L/14@336px"
    assert str(error.value).endswith(ending)


def test_suggestions_see_through_case_and_hyphens():
    assert suggest("--Do-Predict", ["--do_predict", "--do_train"]) == (
        '; did you mean "--do_predict"?'
    )
    assert suggest("", ["a"]) == suggest("abc", []) == ""


def test_the_list_for_programs_has_every_model(capsys):
    assert list_models.main(["--format", "json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert list(facts) == list(MODELS)
    assert facts["demo"]["bytes"] == DEMO.stat().st_size
    assert facts["authors-clevr"]["scores"]["CIDEr"] == 1.5075
    assert facts["authors-clevr"]["sha256"] is None


def test_the_list_for_people(capsys, monkeypatch):
    at_a_url = replace(MODELS["demo"], location="https://example.org/x.bin")
    monkeypatch.setitem(MODELS.targets, "far", at_a_url)
    assert list_models.main([]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "scores CIDEr 1.5310 (2,000 drawn scenes that it was not trained on)" in text
    assert f"here yes, 20 MB: {DEMO}" in text
    assert "here no, get it with python -m clip4idc download trained" in text
    assert "here downloaded from https://example.org/x.bin when it is used" in text


def test_a_new_model_is_one_entry_of_an_installed_package(monkeypatch):
    monkeypatch.setattr(
        type(MODELS), "_find_installed", lambda _: {"theirs": "tests.test_known_models:THEIRS"}
    )
    assert "theirs" in list(MODELS)
    assert MODELS["theirs"].limits == "It knows only squares."


THEIRS = KnownModel("ckpts/a.bin", known_models.CAPTIONER, "squares", "squares", "mit", {}, "")

"""Weights from elsewhere: OpenAI's names and URLs; downloads that fail."""

import hashlib
from pathlib import Path

import pytest
import torch

from modules.weights import remote
from modules.weights.sources import LoadedWeights, find_weights, load_weights
from system import download, places
from tests.conftest import tiny_weights
from tests.servers import web_site

FILES = {"ViT-B/32": "ViT-B-32.pt", "ViT-L/14@336px": "ViT-L-14-336px.pt"}
INFO = {"intra_num_hidden_layers": 1}
INFO_FILE = b'{"intra_num_hidden_layers": 1}'


@pytest.fixture
def content(tmp_path) -> bytes:
    """A file of weights."""
    torch.save(tiny_weights(), tmp_path / "x.bin")
    return (tmp_path / "x.bin").read_bytes()


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(download, "FIRST_DELAY", 0.0)


def load(url: str, cache: Path) -> LoadedWeights:
    return load_weights(url, "no CLIP is looked for", str(cache))


def test_without_a_network_the_url_the_checksum_and_the_folder_are_named(
    tmp_path, cache, monkeypatch
):
    monkeypatch.setattr(remote, "OPENAI", "http://127.0.0.1:9/clip/models")
    monkeypatch.setattr(places, "ROOT", tmp_path)
    with pytest.raises(OSError, match=r"ViT-B-32\.pt \(SHA-256 40d365.*modules"):
        load_weights(None, "ViT-B/32", str(cache))
    assert not list(cache.glob("[!.]*"))


@pytest.mark.parametrize("name", FILES)
def test_openais_clips_are_downloaded_once_and_checked(name, tmp_path, cache, monkeypatch):
    content = b"\x08weights"
    digest = hashlib.sha256(content).hexdigest()
    place = f"{digest}/{FILES[name]}"
    monkeypatch.setattr(places, "ROOT", tmp_path)
    monkeypatch.setitem(remote.CLIP_SHA256, name, digest)
    with web_site({place: content}) as site:
        monkeypatch.setattr(remote, "OPENAI", site.url)
        cached = find_weights(name, str(cache))
        assert cached == cache / FILES[name]
        assert cached.read_bytes() == content
        assert find_weights(name, str(cache)) == cached
        assert len(site.asked) == 1
        cached.unlink()
        site.files[place] = b"corrupted"
        expected = rf"SHA-256 mismatch .*put {site.url}/{place}"
        with pytest.raises(OSError, match=expected):
            find_weights(name, str(cache))
        assert not cached.exists()


def test_openais_clips_are_looked_for_in_modules_then_in_ckpts(tmp_path, monkeypatch, caplog):
    content = b"\x08weights"
    monkeypatch.setattr(places, "ROOT", tmp_path)
    monkeypatch.setitem(remote.CLIP_SHA256, "ViT-B/32", hashlib.sha256(content).hexdigest())
    for folder in ("ckpts", "modules"):
        (tmp_path / folder).mkdir()
    in_ckpts = tmp_path / "ckpts" / "ViT-B-32.pt"
    in_ckpts.write_bytes(content)
    assert find_weights("ViT-B/32", str(tmp_path / "cache")) == in_ckpts
    assert not caplog.records
    in_modules = tmp_path / "modules" / "ViT-B-32.pt"
    in_modules.write_bytes(b"another")
    assert find_weights("ViT-B/32", str(tmp_path / "cache")) == in_modules
    assert "is not the ViT-B/32 that OpenAI published" in caplog.text


def test_weights_at_a_url_come_with_their_model_json(content, cache):
    files = {"run/pytorch_model.bin.best": content, "run/model.json": INFO_FILE}
    with web_site(files) as site:
        url = f"{site.url}/run/pytorch_model.bin.best"
        loaded = load(url, cache)
        assert loaded.info == INFO
        assert torch.equal(loaded.tensors["clip.visual.proj"], tiny_weights()["clip.visual.proj"])
        num_requests = len(site.asked)
        assert load(url, cache).info == INFO
        assert len(site.asked) == num_requests
        signed = load(f"{url}?signature=x", cache)
        assert signed.info == {}, "a signed URL opens one file only"
        with pytest.raises(FileNotFoundError, match="404"):
            load(f"{site.url}/run/none.bin", cache)


def test_a_model_json_that_cannot_be_downloaded_now_is_not_taken_for_none(content, cache):
    with web_site({"run/x.bin": content, "run/model.json": INFO_FILE}) as site:
        site.busy["run/model.json"] = download.MAX_ATTEMPTS
        with pytest.raises(OSError, match="model.json: the server answered 503"):
            load(f"{site.url}/run/x.bin", cache)
        assert load(f"{site.url}/run/x.bin", cache).info == INFO


def test_a_page_in_the_place_of_model_json_means_that_there_is_none(content, cache):
    files = {"any/x.bin": content, "any/model.json": b"<!doctype html><p>our home page"}
    with web_site(files) as site:
        assert load(f"{site.url}/any/x.bin", cache).info == {}


@pytest.mark.parametrize(
    "rubbish", [b"", b'{"error": "busy"}', b"PK\3\4 and no more", b"\x80\x02K\x01."]
)
def test_what_is_no_file_of_weights_does_not_stay_in_the_cache(rubbish, content, cache):
    with web_site({"x.bin": rubbish}) as site:
        with pytest.raises(OSError, match=f"{site.url}/x.bin: "):
            load(f"{site.url}/x.bin", cache)
        site.files["x.bin"] = content
        in_capitals = site.url.replace("http", "HTTP")
        assert load(f"{in_capitals}/x.bin", cache).tensors

"""Models on the Hugging Face hub, here a local one: loaded, pushed, refused."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from modules.predictor import Predictor
from modules.weights.hub import HubAccess
from modules.weights.known_models import MODELS, KnownModel
from modules.weights.sources import find_weights
from preprocess import export_model
from tests.conftest import ROOT
from tests.hub_server import TOKEN, Hub, hugging_face_hub

NAME = "someone/model"


@pytest.fixture(scope="module")
def shared(captioner_folder, tmp_path_factory) -> dict[str, bytes]:
    """The files of a tiny captioner as they are shared."""
    folder = tmp_path_factory.mktemp("shared") / "model"
    predictor = Predictor.load(captioner_folder, "cpu", "fp32")
    predictor.save_pretrained(folder, trained_on="squares", license="mit")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[Hub]:
    with hugging_face_hub(monkeypatch, tmp_path / "hub cache") as hub:
        yield hub


def downloads(hub: Hub) -> set[str]:
    return {path.rpartition("/")[2] for path, _ in hub.asked if "/resolve/" in path}


def test_a_model_is_loaded_by_its_name_and_only_what_is_needed(hub, shared):
    hub.add(NAME, {**shared, "flax.msgpack": b"x", "pytorch_model.bin": b"x"})
    predictor = Predictor.load(NAME, "cpu", "fp32")
    assert repr(predictor).startswith("<Predictor: someone/model, ")
    assert predictor.trained_on == "squares"
    assert predictor.limits == ""
    assert downloads(hub) == {"model.safetensors", "model.json"}


def test_from_pretrained_takes_a_revision_a_token_and_a_cache(hub, shared, tmp_path):
    old = {**shared, "model.json": shared["model.json"].replace(b"squares", b"circles")}
    commit = hub.add(NAME, old, "v1")
    hub.add(NAME, shared)
    hub.private.add(NAME)
    options = {"token": TOKEN, "cache_dir": tmp_path / "mine", "device": "cpu"}
    found = Predictor.from_pretrained(NAME, revision="v1", **options)
    assert found.trained_on == "circles"
    assert repr(found).startswith("<Predictor: someone/model@v1, ")
    assert Predictor.from_pretrained(NAME, **options).trained_on == "squares"
    assert (tmp_path / "mine" / "hub").is_dir()
    by_commit = find_weights(f"{NAME}@{commit}", hub=HubAccess(TOKEN))
    assert by_commit.with_name("model.json").read_bytes() == old["model.json"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("someone/none", "the hub has no such model, or it is private: log in with hf auth login"),
        ("someone/private", "the hub has no such model, or it is private: log in"),
        ("someone/gated", "ask its owner for access, on its page; then log in"),
        ("someone/model@v9", "it has no such revision"),
        ("someone/empty", "a folder without model.safetensors or pytorch_model.bin.best"),
    ],
)
def test_what_the_hub_refuses_is_told_in_one_line(name, expected, hub, shared):
    for one in (NAME, "someone/private", "someone/gated"):
        hub.add(one, shared)
    hub.private.add("someone/private")
    hub.gated.add("someone/gated")
    hub.add("someone/empty", {"model.json": b"{}"})
    with pytest.raises(OSError, match=expected) as error:
        find_weights(name)
    assert "\n" not in str(error.value)


def test_without_a_network_what_was_downloaded_is_used(monkeypatch, tmp_path, shared, caplog):
    with hugging_face_hub(monkeypatch, tmp_path) as hub:
        hub.add(NAME, {**shared, "README.md": b"not downloaded"})
        first = find_weights(NAME)
    assert find_weights(NAME) == first
    assert "using what was downloaded earlier, since the hub cannot be reached" in caplog.text
    with pytest.raises(OSError, match=r"other is not a path .*: the hub cannot be reached; check"):
        find_weights("someone/other")
    with pytest.raises(OSError, match="the hub cannot be reached"):
        Predictor.from_pretrained(NAME, force_download=True)


def test_half_a_download_is_finished_by_the_next_call(hub, shared, monkeypatch):
    import huggingface_hub.file_download as theirs

    monkeypatch.setattr(theirs.time, "sleep", lambda _: None)
    hub.add(NAME, shared)
    hub.broken["hub"] = [len(shared["model.safetensors"]) // 2] * 20
    with pytest.raises(
        OSError, match="someone/model is not a path here .* could not be downloaded"
    ):
        find_weights(NAME)
    hub.broken.clear()
    assert find_weights(NAME).read_bytes() == shared["model.safetensors"]


def test_local_files_only_asks_nobody(hub, shared):
    hub.add(NAME, shared)
    with pytest.raises(OSError, match="it was not downloaded earlier, and local_files_only is set"):
        Predictor.from_pretrained(NAME, local_files_only=True)
    assert hub.asked == []
    found = find_weights(NAME)
    count = len(hub.asked)
    assert find_weights(NAME, hub=HubAccess(local_files_only=True)) == found
    assert len(hub.asked) == count


def test_a_model_of_the_table_on_the_hub_is_checked(hub, shared, monkeypatch):
    hub.add(NAME, shared)
    right = hashlib.sha256(shared["model.safetensors"]).hexdigest()
    for sha256 in (right, "0" * 64):
        model = KnownModel(NAME, "captioner", "dots", "dots", "mit", {}, "", sha256=sha256)
        monkeypatch.setitem(MODELS.targets, "mine", model)
        if sha256 == right:
            assert find_weights("mine").name == "model.safetensors"
        else:
            with pytest.raises(OSError, match="is not the file of the model mine, whose SHA-256"):
                find_weights("mine")


def test_what_is_pushed_is_what_export_writes_and_is_loaded_again(hub, captioner_folder, tmp_path):
    options = [str(captioner_folder), str(tmp_path / "exported"), "--trained_on", "squares"]
    options += ["--license", "mit", "--datasets", "me/squares", "--name", "me/pushed"]
    assert export_model.main(options) == 0
    exported = {path.name: path.read_bytes() for path in (tmp_path / "exported").iterdir()}
    predictor = Predictor.load(captioner_folder, "cpu", "fp32")
    url = predictor.push_to_hub(
        "me/pushed", trained_on="squares", license="mit", datasets=["me/squares"], token=TOKEN
    )
    assert url.startswith(f"{hub.url}/me/pushed/commit/")
    assert hub.repositories["me/pushed"]["main"] == exported
    _, metadata, _ = exported["README.md"].decode().split("---\n", 2)
    card = yaml.safe_load(metadata)
    assert card["license"] == "mit"
    assert card["datasets"] == ["me/squares"]
    assert card["pipeline_tag"] == "image-to-text"
    again = Predictor.from_pretrained("me/pushed", device="cpu", precision="fp32")
    assert again.trained_on == "squares"
    again.save_pretrained(tmp_path / "again", name="me/pushed", datasets=["me/squares"])
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == exported


def test_nothing_is_created_on_the_hub_before_all_is_known(hub, captioner_folder, tmp_path):
    predictor = Predictor.load(captioner_folder, "cpu", "fp32")
    with pytest.raises(ValueError, match="trained_on is missing: say what"):
        predictor.push_to_hub("me/pushed", token=TOKEN)
    with pytest.raises(ValueError, match="the license is 'MIT License', expected the hub's name"):
        predictor.push_to_hub("me/pushed", trained_on="squares", license="MIT License", token=TOKEN)
    with pytest.raises(ValueError, match="'my data' is no name of a dataset on the hub"):
        predictor.save_pretrained(tmp_path / "x", trained_on="squares", datasets=["my data"])
    assert not (tmp_path / "x").exists()
    assert hub.posted == []
    with pytest.raises(OSError, match="me/pushed could not be pushed .*: log in with hf auth"):
        predictor.push_to_hub("me/pushed", trained_on="squares")
    assert hub.repositories == {}
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists already"):
        predictor.save_pretrained(tmp_path, trained_on="squares")


@pytest.mark.slow
def test_a_script_loads_from_the_hub_that_hf_endpoint_names(hub, shared, tmp_path):
    hub.add(NAME, shared)
    example = ROOT / "docs" / "examples" / "removed_before.png"
    command = [sys.executable, "CLIP4IDCinference.py", "--do_predict", "--init_model", NAME]
    command += ["--before", str(example), "--after", str(example)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    command[4] = "someone/none"
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT, env=os.environ
    )
    assert done.returncode == 2
    assert "the hub has no such model" in done.stderr
    assert Path(os.environ["HF_HOME"], "hub").is_dir()

"""Where weights come from: formats, safety, lookups, downloads that fail."""

import hashlib
import json
import os
import pickle
import subprocess
import sys
import zipfile

import pytest
import torch
from safetensors.torch import save, save_file

from modules.clip4idc import CLIP4IDC
from modules.model.clip import CLIP
from modules.model.clip_sizes import ClipSizes
from modules.weights import remote, sources
from modules.weights.fitting import resize_positions
from modules.weights.sources import find_weights, load_weights, random_clip, read_sizes
from modules.weights.tensor_files import read_weights
from system import download, places
from system.urls import is_html
from tests.conftest import ROOT, TINY, tiny_weights
from tests.servers import web_site


def test_pickle_and_safetensors_give_the_same(tmp_path):
    weights = tiny_weights()
    torch.save(weights, tmp_path / "a.bin")
    save_file({k: v.contiguous() for k, v in weights.items()}, tmp_path / "a.safetensors")
    for file in ("a.bin", "a.safetensors"):
        read = read_weights(tmp_path / file)
        assert read.keys() == weights.keys()
        assert all(torch.equal(read[key], weights[key]) for key in weights)


def test_a_torchscript_archive_is_read_without_running_it(tmp_path):
    class Tower(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(3, 2).half()
            self.scale = torch.nn.Parameter(torch.tensor(2.5))
            self.register_buffer("context_length", torch.tensor(77))

        def forward(self, x):
            return self.inner(x.half()).float() * self.scale

    tower = Tower()
    torch.jit.save(torch.jit.trace(tower, torch.randn(1, 3)), str(tmp_path / "clip.pt"))
    read = read_weights(tmp_path / "clip.pt")
    expected = tower.state_dict()
    assert read.keys() == expected.keys()
    assert all(
        torch.equal(read[key], expected[key]) and read[key].dtype == expected[key].dtype
        for key in expected
    )


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_that_would_run_code_is_refused_before_it_runs(tmp_path):
    trap = tmp_path / "ran"
    torch.save({"clip.x": Payload(str(trap))}, tmp_path / "evil.bin")
    (tmp_path / "evil2.bin").write_bytes(pickle.dumps(Payload(str(trap))))
    with zipfile.ZipFile(tmp_path / "evil.pt", "w") as archive:
        archive.writestr("evil/data.pkl", pickle.dumps(Payload(str(trap))))
        archive.writestr("evil/constants.pkl", b"")
    for file in ("evil.bin", "evil2.bin", "evil.pt"):
        with pytest.raises(ValueError, match="cannot read weights"):
            read_weights(tmp_path / file)
        assert not trap.exists()


def test_damaged_files_are_refused_by_name(tmp_path):
    torch.save(tiny_weights(), tmp_path / "whole.bin")
    whole = (tmp_path / "whole.bin").read_bytes()
    cases = {
        "truncated.bin": whole[: len(whole) // 2],
        "empty.bin": b"",
        "page.bin": b"<!DOCTYPE html><html>quota</html>",
        "noise.safetensors": b"\x08\0\0\0\0\0\0\0{}garbage!",
        "text.bin": b"hello",
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            read_weights(tmp_path / name)
    torch.save({"epoch": 3}, tmp_path / "other.bin")
    with pytest.raises(ValueError, match="no state dict"):
        read_weights(tmp_path / "other.bin")


def test_random_clip_of_sizes_is_openais_initialisation(tmp_path):
    path = tmp_path / "sizes.json"
    path.write_text(
        json.dumps({**TINY, "vision_width": 256, "vision_layers": 4, "transformer_width": 128})
    )
    torch.manual_seed(0)
    weights = random_clip(read_sizes(path))
    layers, width = 4, 256
    expected = {
        "visual.transformer.resblocks.0.attn.in_proj_weight": width**-0.5,
        "visual.transformer.resblocks.3.mlp.c_proj.weight": width**-0.5 * (2 * layers) ** -0.5,
        "visual.transformer.resblocks.1.mlp.c_fc.weight": (2 * width) ** -0.5,
        "visual.proj": width**-0.5,
        "token_embedding.weight": 0.02,
        "positional_embedding": 0.01,
        "text_projection": 128**-0.5,
    }
    for name, std in expected.items():
        assert weights[name].std().item() == pytest.approx(std, rel=0.05), name
    assert "visual.bef_embedding" not in weights
    assert weights["logit_scale"].item() == pytest.approx(2.6593, abs=1e-3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"embed_dim": 64}', "missing"),
        ("[1]", "expected an object"),
        ("{", "not JSON"),
        (json.dumps({**TINY, "vision_width": 65}), "multiple of 64"),
        (json.dumps({**TINY, "vision_layers": 0}), "at least 1"),
        (json.dumps({**TINY, "extra": 1}), "extra"),
    ],
)
def test_wrong_sizes_are_refused(tmp_path, content, message):
    (tmp_path / "sizes.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        random_clip(read_sizes(tmp_path / "sizes.json"))


def test_the_clip_file_is_not_touched_where_init_model_holds_all(tmp_path):
    torch.save(tiny_weights(), tmp_path / "adapted.bin")
    weights = load_weights(
        str(tmp_path / "adapted.bin"), str(tmp_path / "does-not-exist.pt")
    ).tensors
    assert "clip.logit_scale" in weights


def test_tensors_that_init_model_lacks_come_from_clip(tmp_path):
    ours, clips = tiny_weights(0), tiny_weights(1)
    part = {key: value for key, value in ours.items() if key.startswith("clip.visual.")}
    torch.save(part, tmp_path / "part.bin")
    torch.save({k.removeprefix("clip."): v for k, v in clips.items()}, tmp_path / "clip.pt")
    weights = load_weights(
        str(tmp_path / "part.bin"), str(tmp_path / "clip.pt"), quick_gelu=True
    ).tensors
    assert torch.equal(weights["clip.visual.proj"], ours["clip.visual.proj"])
    assert torch.equal(weights["clip.text_projection"], clips["clip.text_projection"])


def test_unknown_names_say_what_was_tried(tmp_path):
    for name in ("ViT-Z-99", "nowhere.bin", "pretrained/pytorch_model.bin.30", "a/b/c"):
        with pytest.raises(
            FileNotFoundError, match=rf"no weights {name}: tried .*ckpts.*ViT-B/32, ViT-B/16"
        ):
            find_weights(name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty is a folder without model.safetensors or"):
        find_weights(str(tmp_path / "empty"))


def test_without_network_the_address_checksum_and_folder_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "OPENAI", "http://127.0.0.1:9/clip/models")
    monkeypatch.setattr(places, "ROOT", tmp_path)
    monkeypatch.setattr(download, "FIRST_DELAY", 0.0)
    with pytest.raises(OSError, match=r"ViT-B-32\.pt \(SHA-256 40d365.*modules"):
        load_weights(None, "ViT-B/32", str(tmp_path / "cache"))
    assert not list((tmp_path / "cache").glob("[!.]*"))


@pytest.mark.parametrize("name", ["ViT-B/32", "ViT-L/14@336px"])
def test_openais_names_are_looked_for_here_then_downloaded_and_checked(
    name, tmp_path, monkeypatch, caplog
):
    content, file = (
        b"\x08weights",
        {"ViT-B/32": "ViT-B-32.pt", "ViT-L/14@336px": "ViT-L-14-336px.pt"}[name],
    )
    digest = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(places, "ROOT", tmp_path)
    monkeypatch.setitem(remote.CLIP_SHA256, name, digest)
    with web_site({f"{digest}/{file}": content}) as site:
        monkeypatch.setattr(remote, "OPENAI", site.address)
        cached = find_weights(name, str(tmp_path / "cache"))
        assert cached == tmp_path / "cache" / file
        assert cached.read_bytes() == content
        assert find_weights(name, str(tmp_path / "cache")) == cached
        assert len(site.asked) == 1
        for folder in (
            "ckpts",
            "modules",
        ):  # the latter goes before the former, and both before the cache
            (tmp_path / folder).mkdir()
            (tmp_path / folder / file).write_bytes(content if folder == "ckpts" else b"another")
            assert not caplog.records
            assert find_weights(name, str(tmp_path / "cache")) == tmp_path / folder / file
        assert f"is not the {name} that OpenAI published" in caplog.text
        for path in (tmp_path / "modules" / file, tmp_path / "ckpts" / file, cached):
            path.unlink()
        site.files[f"{digest}/{file}"] = b"spoilt"
        with pytest.raises(
            OSError, match=rf"SHA-256 mismatch .*put {site.address}/{digest}/{file}"
        ):
            find_weights(name, str(tmp_path / "cache"))
        assert not cached.exists()


def test_folders_stand_for_the_weights_in_them(tmp_path):
    for present in reversed(sources.WEIGHT_FILES):
        (tmp_path / present).write_bytes(b"x")
        assert find_weights(str(tmp_path)).name == present
    assert find_weights("demo") == ROOT / "ckpts" / "demo" / "model.safetensors"


def test_weights_at_an_address_bring_their_card(tmp_path):
    torch.save(tiny_weights(), tmp_path / "x.bin")
    files = {
        "run/pytorch_model.bin.best": (tmp_path / "x.bin").read_bytes(),
        "run/model.json": b'{"intra_num_hidden_layers": 1}',
    }
    with web_site(files) as site:
        url = f"{site.address}/run/pytorch_model.bin.best"
        loaded = load_weights(url, "none", str(tmp_path / "cache"))
        assert loaded.info == {"intra_num_hidden_layers": 1}
        assert torch.equal(loaded.tensors["clip.visual.proj"], tiny_weights()["clip.visual.proj"])
        asked = len(site.asked)
        assert load_weights(url, "none", str(tmp_path / "cache")).info == loaded.info
        assert len(site.asked) == asked
        assert load_weights(f"{url}?signature=x", "none", str(tmp_path / "cache")).info == {}, (
            "a signed address has no neighbours"
        )
        with pytest.raises(FileNotFoundError, match="404"):
            load_weights(f"{site.address}/run/none.bin", "none", str(tmp_path / "cache"))


def test_a_card_that_cannot_be_had_now_is_not_taken_for_none(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "FIRST_DELAY", 0.0)
    torch.save(tiny_weights(), tmp_path / "x.bin")
    with web_site(
        {
            "run/x.bin": (tmp_path / "x.bin").read_bytes(),
            "run/model.json": b'{"intra_num_hidden_layers": 1}',
        }
    ) as site:
        site.busy["run/model.json"] = download.MAX_ATTEMPTS
        with pytest.raises(OSError, match="model.json: the server answers 503"):
            load_weights(f"{site.address}/run/x.bin", "none", str(tmp_path / "cache"))
        assert load_weights(f"{site.address}/run/x.bin", "none", str(tmp_path / "cache")).info == {
            "intra_num_hidden_layers": 1
        }
        site.files |= {
            "any/x.bin": site.files["run/x.bin"],
            "any/model.json": b"<!doctype html><p>our home page",
        }
        assert load_weights(f"{site.address}/any/x.bin", "none", str(tmp_path / "cache")).info == {}


@pytest.mark.parametrize(
    "content", [b"", b'{"error": "busy"}', b"PK\3\4 and no more", b"\x80\x02K\x01."]
)
def test_what_is_no_weights_does_not_stay_in_the_cache(content, tmp_path):
    torch.save(tiny_weights(), tmp_path / "x.bin")
    with web_site({"x.bin": content}) as site:
        with pytest.raises(OSError, match=f"{site.address}/x.bin: "):
            load_weights(f"{site.address}/x.bin", "none", str(tmp_path / "cache"))
        site.files["x.bin"] = (tmp_path / "x.bin").read_bytes()
        assert load_weights(
            f"{site.address.replace('http', 'HTTP')}/x.bin", "none", str(tmp_path / "cache")
        ).tensors


def test_files_that_only_begin_like_a_page_are_weights(tmp_path):
    """A safetensors file whose header's length reads " <"."""
    content = next(
        content
        for content in (
            save({"clip.x": torch.ones(2)}, {"note": "x" * 8 * n}) for n in range(1900, 1930)
        )
        if content[:2] == b" <"
    )
    (tmp_path / "x.safetensors").write_bytes(content)
    assert read_weights(tmp_path / "x.safetensors").keys() == {"clip.x"}
    for page in (b"<!DOCTYPE html>", b"\n  <html lang='en'>", b"\xef\xbb\xbf<?xml version='1.0'?>"):
        assert is_html(page)


def test_types_that_torch_alone_knows_and_strange_files_are_refused(tmp_path):
    save_file({"clip.x": torch.ones(2, dtype=torch.complex64)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="clip.x is of the type complex64"):
        read_weights(tmp_path / "x.safetensors")
    (tmp_path / "README.md").write_text("# words")
    with pytest.raises(ValueError, match="README.md: not a PyTorch or safetensors file"):
        read_weights(tmp_path / "README.md")


def test_a_model_of_the_hub_is_its_files_in_a_folder(tmp_path, monkeypatch):
    """A stand-in for the hub that answers what `huggingface_hub` asks."""
    import huggingface_hub

    torch.save(tiny_weights(), tmp_path / "x.bin")
    there = {
        "pytorch_model.bin": (tmp_path / "x.bin").read_bytes(),
        "model.json": b'{"intra_num_hidden_layers": 1}',
        "flax.msgpack": b"x",
    }
    taken = []

    def snapshot(repo_id, revision, allow_patterns, cache_dir):
        taken.append((repo_id, revision, allow_patterns))
        for name in allow_patterns:
            (tmp_path / "hub").mkdir(exist_ok=True)
            (tmp_path / "hub" / name).write_bytes(there[name])
        return str(tmp_path / "hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "list_repo_files", lambda self, repository, revision: list(there)
    )
    assert load_weights("someone/clip4idc-spot@v1", "none").info == {"intra_num_hidden_layers": 1}
    assert taken == [("someone/clip4idc-spot", "v1", ["pytorch_model.bin", "model.json"])]


def test_a_hub_that_refuses_ends_in_one_line(monkeypatch):
    import huggingface_hub

    def refuse(*_, **_more):
        raise LookupError("404 Client Error.\n\nRepository Not Found")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", refuse)
    with pytest.raises(
        OSError,
        match="someone/model is no path here .* does not give it: 404 Client Error. Repository Not Found",
    ):
        find_weights("someone/model")


@pytest.mark.slow
def test_an_unreachable_hub_ends_in_one_line():
    program = (
        "import sys; from modules.weights.sources import find_weights\n"
        "try: find_weights('someone/model')\nexcept OSError as error: sys.exit(str(error))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=ROOT,
        env={**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9"},
    )
    assert done.returncode == 1
    assert "someone/model is no path here" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("resolution", [32, 96, 128])
def test_other_resolutions_resize_the_positions_of_each_image(resolution):
    weights = tiny_weights(image_resolution=64)
    row = torch.linspace(0, 1, 2)[:, None].expand(2, 64)
    weights["clip.visual.positional_embedding"][1:] = torch.stack([row, row + 2], dim=0).flatten(
        0, 1
    )
    resized = resize_positions(weights, resolution)
    side = resolution // 32
    alone, joint = (
        resized["clip.visual.positional_embedding"],
        resized["clip.visual.joint_positional_embedding"],
    )
    assert alone.shape == (1 + side**2, 64)
    assert joint.shape == (2 * (1 + side**2), 64)
    assert torch.equal(alone[0], weights["clip.visual.positional_embedding"][0])
    grid = alone[1:].unflatten(0, (side, side))
    if side > 1:
        assert (grid[1:] > grid[:-1]).all()
        assert (grid[:, 1:] > grid[:, :-1]).all()
    torch.testing.assert_close(grid.mean(), torch.tensor(1.5), atol=0.05, rtol=0)
    halves, before = joint.chunk(2), weights["clip.visual.joint_positional_embedding"].chunk(2)
    for half, old in zip(halves, before, strict=True):
        assert torch.equal(half[0], old[0])
    model = CLIP4IDC.from_weights(resized, "retrieval", 1)
    assert model.encode_pairs(torch.randn(2, 2, 3, resolution, resolution)).tokens.shape == (
        2,
        2 * (1 + side**2),
        64,
    )
    untouched = resize_positions(weights, 64)
    assert all(torch.equal(untouched[key], weights[key]) for key in weights)


def test_a_resolution_that_patches_do_not_fill_is_refused():
    with pytest.raises(
        ValueError, match="image_resolution 80 is not a multiple of vision_patch_size 32"
    ):
        resize_positions(tiny_weights(), 80)


def test_a_released_style_checkpoint_loads(tmp_path, tiny_captioner):
    """Reference keys, CLIP's matrices in float16, a plain pickle."""
    state = {
        key: value.half()
        if key.startswith("clip.") and value.ndim >= 2 and "embedding" not in key
        else value
        for key, value in tiny_captioner.state_dict().items()
    }
    torch.save(state, tmp_path / "pytorch_model.bin.spot")
    model = CLIP4IDC.from_weights(
        load_weights(str(tmp_path / "pytorch_model.bin.spot"), "ViT-B/32").tensors, "caption", 1
    ).eval()
    images = torch.randn(2, 2, 3, 64, 64)
    torch.testing.assert_close(
        model.encode_pairs(images).tokens,
        tiny_captioner.encode_pairs(images).tokens,
        atol=0.03,
        rtol=0.03,
    )


def test_sizes_come_from_shapes():
    sizes = ClipSizes(**TINY)
    assert ClipSizes.from_weights(CLIP(sizes, 0, "2d").state_dict()) == sizes

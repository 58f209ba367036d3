"""Where weights come from: formats, safety, lookups, downloads that fail."""

import hashlib
import http.server
import json
import os
import pickle
import threading
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from modules import pretrained
from modules.clip import CLIP, ClipSizes
from modules.clip4idc import CLIP4IDC
from modules.pretrained import fetch, find_checkpoint, load_weights, random_clip
from modules.weight_files import read_weights
from tests.conftest import TINY, tiny_weights


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
    assert all(torch.equal(read[key], expected[key]) and read[key].dtype == expected[key].dtype for key in expected)


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
    cases = {"truncated.bin": whole[: len(whole) // 2], "empty.bin": b"", "page.bin": b"<!DOCTYPE html><html>quota</html>",
             "noise.safetensors": b"\x08\0\0\0\0\0\0\0{}garbage!", "text.bin": b"hello"}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            read_weights(tmp_path / name)
    torch.save({"epoch": 3}, tmp_path / "other.bin")
    with pytest.raises(ValueError, match="no state dict"):
        read_weights(tmp_path / "other.bin")


def test_random_clip_of_sizes_is_openais_initialisation(tmp_path):
    path = tmp_path / "sizes.json"
    path.write_text(json.dumps({**TINY, "vision_width": 256, "vision_layers": 4, "transformer_width": 128}))
    torch.manual_seed(0)
    weights = random_clip(path)
    layers, width = 4, 256
    expected = {"visual.transformer.resblocks.0.attn.in_proj_weight": width**-0.5,
                "visual.transformer.resblocks.3.mlp.c_proj.weight": width**-0.5 * (2 * layers) ** -0.5,
                "visual.transformer.resblocks.1.mlp.c_fc.weight": (2 * width) ** -0.5, "visual.proj": width**-0.5,
                "token_embedding.weight": 0.02, "positional_embedding": 0.01, "text_projection": 128**-0.5}
    for name, std in expected.items():
        assert weights[name].std().item() == pytest.approx(std, rel=0.05), name
    assert "visual.bef_embedding" not in weights
    assert weights["logit_scale"].item() == pytest.approx(2.6593, abs=1e-3)


@pytest.mark.parametrize(("content", "message"), [
    ('{"embed_dim": 64}', "missing"), ("[1]", "expected an object"), ("{", "not JSON"),
    (json.dumps({**TINY, "vision_width": 65}), "multiple of 64"), (json.dumps({**TINY, "vision_layers": 0}), "at least 1"),
    (json.dumps({**TINY, "extra": 1}), "extra")])
def test_wrong_sizes_are_refused(tmp_path, content, message):
    (tmp_path / "sizes.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        random_clip(tmp_path / "sizes.json")


def test_the_clip_file_is_not_touched_where_init_model_holds_all(tmp_path):
    torch.save(tiny_weights(), tmp_path / "adapted.bin")
    weights = load_weights(str(tmp_path / "adapted.bin"), str(tmp_path / "does-not-exist.pt"))
    assert "clip.logit_scale" in weights


def test_tensors_that_init_model_lacks_come_from_clip(tmp_path):
    ours, clips = tiny_weights(0), tiny_weights(1)
    part = {key: value for key, value in ours.items() if key.startswith("clip.visual.")}
    torch.save(part, tmp_path / "part.bin")
    torch.save({k.removeprefix("clip."): v for k, v in clips.items()}, tmp_path / "clip.pt")
    weights = load_weights(str(tmp_path / "part.bin"), str(tmp_path / "clip.pt"))
    assert torch.equal(weights["clip.visual.proj"], ours["clip.visual.proj"])
    assert torch.equal(weights["clip.text_projection"], clips["clip.text_projection"])


def test_unknown_names_say_what_was_tried(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"neither a file nor one of ViT-B/32"):
        load_weights(None, "ViT-Z/99")
    with pytest.raises(FileNotFoundError, match="ckpts"):
        find_checkpoint("nowhere.bin")


def test_without_network_the_address_checksum_and_folder_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "OPENAI", "http://127.0.0.1:9/clip/models")
    monkeypatch.setattr(pretrained, "ROOT", tmp_path)
    with pytest.raises(OSError, match=r"ViT-B-32\.pt \(SHA-256 40d365.*modules"):
        load_weights(None, "ViT-B/32", str(tmp_path / "cache"))
    assert not list((tmp_path / "cache").glob("*"))


@pytest.fixture
def server(tmp_path):
    """A local server: /good is whole, /short breaks off half-way."""
    body = b"weights" * 1000

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if "gone" not in self.path else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body if "good" in self.path else body[:3000])

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}", body
        httpd.shutdown()


def test_downloads_are_checked_and_leave_no_part_behind(tmp_path, server):
    address, body = server
    digest = hashlib.sha256(body).hexdigest()
    assert fetch(f"{address}/good.bin", str(tmp_path / "c"), digest).read_bytes() == body
    for bad, checksum in (("short.bin", None), ("gone.bin", None), ("good2.bin", "0" * 64)):
        with pytest.raises(OSError):  # noqa: PT011 (requests' own words differ by version)
            fetch(f"{address}/{bad}", str(tmp_path / "d"), checksum)
    assert not list((tmp_path / "d").glob("*"))


def test_a_released_style_checkpoint_loads(tmp_path, tiny_captioner):
    """Reference keys, CLIP's matrices in float16, a plain pickle."""
    state = {key: value.half() if key.startswith("clip.") and value.ndim >= 2 and "embedding" not in key else value
             for key, value in tiny_captioner.state_dict().items()}
    torch.save(state, tmp_path / "pytorch_model.bin.spot")
    model = CLIP4IDC.from_weights(load_weights(str(tmp_path / "pytorch_model.bin.spot"), "ViT-B/32"), "caption", 1).eval()
    images = torch.randn(2, 2, 3, 64, 64)
    torch.testing.assert_close(model.encode_pairs(images).tokens, tiny_captioner.encode_pairs(images).tokens, atol=0.03, rtol=0.03)


def test_sizes_come_from_shapes():
    sizes = ClipSizes(**TINY)
    assert ClipSizes.from_weights(CLIP(sizes, 0, "2d").state_dict()) == sizes

"""convert_weights.py: bits stay, model.json goes along, --inspect says what a file is."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from modules.clip4idc import CLIP4IDC
from modules.weights.huggingface_names import to_huggingface
from modules.weights.sources import read_released
from preprocess import convert_weights
from tests.conftest import tiny_weights
from tests.test_layouts import close, openai_weights, save_safetensors, text_features, text_ids

INFO = {"intra_num_hidden_layers": 1, "linear_patch": "2d", "head_width": 64, "max_words": 12}


def released_captioner() -> dict[str, Tensor]:
    """As published: CLIP's matrices in float16."""
    state = CLIP4IDC.from_weights(tiny_weights(), "caption", 1).state_dict()
    for key, value in state.items():
        if key.startswith("clip.") and value.ndim >= 2 and "embedding" not in key:
            state[key] = value.half()
    return state


@pytest.fixture
def converted(tmp_path) -> list[Path]:
    """A captioner as a torch pickle, safetensors, Hugging Face's folder, and a pickle again."""
    torch.save(released_captioner(), tmp_path / "pytorch_model.bin.spot")
    (tmp_path / "model.json").write_text(json.dumps(INFO))
    paths = [
        tmp_path / "pytorch_model.bin.spot",
        tmp_path / "a" / "spot.safetensors",
        tmp_path / "b",
        tmp_path / "c" / "spot.bin",
    ]
    for source, target in zip(paths, paths[1:], strict=False):
        assert convert_weights.main([str(source), str(target)]) == 0
    return paths


def test_conversion_keeps_every_bit_and_model_json(converted):
    expected = released_captioner()
    back = read_released(converted[-1])
    assert back.keys() == expected.keys()
    for key, value in expected.items():
        assert back[key].dtype == value.dtype
        assert torch.equal(back[key], value)
    assert load_file(converted[1])["clip.visual.proj"].dtype == torch.float16
    beside = converted[-1].with_name("spot.bin.json")
    assert json.loads(beside.read_text()) == INFO


def inspected(path: Path, capsys) -> str:
    capsys.readouterr()
    assert convert_weights.main(["--inspect", str(path)]) == 0
    return capsys.readouterr().out


def test_inspect_describes_a_captioner(converted, capsys):
    said = inspected(converted[-1], capsys)
    for line in (
        "saved by torch",
        "names      CLIP4IDC's",
        "backbone   clip",
        "stage      captioner",
        "activation quick GELU\n",
        "patches    2d\n",
        "float16",
        "intra_num_hidden_layers 1",
        "vision_width 64",
        "fits       yes",
    ):
        assert line in said, line


def test_inspect_lists_what_is_missing_and_left_over(tmp_path, capsys):
    weights = tiny_weights()
    del weights["clip.visual.ln_post.bias"]
    del weights["clip.ln_final.weight"]
    save_safetensors(weights | {"clip.more": torch.zeros(2)}, tmp_path / "x.safetensors")
    said = inspected(tmp_path / "x.safetensors", capsys)
    for line in (
        "safetensors",
        "adapted backbone",
        "info       none",
        "clip.visual.ln_post.bias is missing",
        "clip.ln_final.weight is missing",
        "clip.more is unexpected",
    ):
        assert line in said, line


def test_inspect_says_that_the_activation_is_unknown(tmp_path, capsys):
    save_safetensors(to_huggingface(tiny_weights()), tmp_path / "model.safetensors")
    said = inspected(tmp_path, capsys)
    assert "activation not the one built here, or unknown" in said


def test_inspect_of_weights_that_are_no_clips_says_why_they_do_not_fit(tmp_path, capsys):
    torch.save({"clip.visual.x": torch.zeros(1)}, tmp_path / "part.bin")
    said = inspected(tmp_path / "part.bin", capsys)
    assert "backbone   unknown" in said
    assert "fits       no:\n           not CLIP weights: visual.conv1.weight is missing" in said


def test_transformers_reads_what_is_converted_to_its_layout(tmp_path):
    transformers = pytest.importorskip("transformers")
    ids = text_ids()
    extras = {"input_resolution": 96, "context_length": 77, "vocab_size": 50}
    numbers = {name: torch.tensor(value) for name, value in extras.items()}
    torch.save(openai_weights() | numbers, tmp_path / "clip.pt")
    assert convert_weights.main([str(tmp_path / "clip.pt"), str(tmp_path / "hf")]) == 0
    theirs = transformers.CLIPModel.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        text = theirs.text_model(ids, attention_mask=torch.ones_like(ids)).pooler_output
        expected = theirs.text_projection(text)
    close(text_features(openai_weights(), ids), expected)


WRONG_COMMANDS = [
    ["none", "out.bin"],
    ["x.safetensors", "x.safetensors"],
    ["x.safetensors", "file"],
    ["x.safetensors"],
    [],
    ["x.safetensors", ""],
    ["x.safetensors", "--inspect", "x"],
    ["--inspect", "x.safetensors", "--quick_gelu"],
    ["x.safetensors", "full"],
    ["full", "full"],
    ["x.safetensors", "with_info.bin"],
    ["x.safetensors", "file/y.bin"],
]


@pytest.mark.parametrize("arguments", WRONG_COMMANDS, ids=" ".join)
def test_conversions_that_cannot_be_end_in_one_line(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_safetensors(tiny_weights(), tmp_path / "x.safetensors")
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "model.safetensors").write_bytes(b"there already")
    (tmp_path / "with_info.bin.json").write_text("{}")
    before = contents_of(tmp_path)
    with pytest.raises(SystemExit) as stop:
        convert_weights.main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert contents_of(tmp_path) == before


def contents_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("foo.weight", torch.zeros(2), "resblocks.0.foo.weight has no name in Hugging Face's"),
        ("attn.in_proj_bias", torch.tensor(1.0), "is not q, k and v together"),
    ],
)
def test_tensors_without_a_place_in_hugging_faces_layout_are_refused(
    name, value, reason, tmp_path, capsys
):
    weights = tiny_weights() | {f"clip.visual.transformer.resblocks.0.{name}": value}
    save_safetensors(weights, tmp_path / "x.safetensors")
    with pytest.raises(SystemExit) as stop:
        convert_weights.main([str(tmp_path / "x.safetensors"), str(tmp_path / "hf")])
    assert stop.value.code == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()

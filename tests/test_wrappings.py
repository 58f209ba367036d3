"""Weights as other trainers leave them: wrapped, in several files, by newer pickles, with NaN."""

import argparse
import json
import tempfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from modules.weights.sources import load_weights, read_released
from modules.weights.tensor_files import hash_weights, list_parts, read_weights
from modules.weights.wrappings import find_state_dict
from preprocess import convert_weights
from system.files import compute_sha256
from tests.conftest import tiny_weights

WEIGHTS = {name: value.float() for name, value in tiny_weights().items()}


def is_same(found: dict[str, torch.Tensor]) -> bool:
    return found.keys() == WEIGHTS.keys() and all(
        torch.equal(found[name], value) for name, value in WEIGHTS.items()
    )


def prefixed(*prefixes: str) -> dict[str, torch.Tensor]:
    return {"".join(prefixes) + name: value for name, value in WEIGHTS.items()}


def save(folder: Path, content, **options) -> Path:
    path = folder / "weights.pt"
    torch.save(content, path, **options)
    return path


@pytest.mark.parametrize(
    "prefixes",
    [
        ("_orig_mod.",),
        ("module.",),
        ("model.",),
        ("module.", "_orig_mod."),
        ("_orig_mod.", "module."),
        ("model.", "module.", "_orig_mod."),
        ("captioner.", "net."),
        ("_fsdp_wrapped_module.",),
    ],
    ids="".join,
)
def test_prefixes_of_trainers(tmp_path, prefixes):
    assert is_same(read_released(save(tmp_path, prefixed(*prefixes))))


def test_blocks_that_were_compiled_one_by_one(tmp_path):
    names = {name: name.replace("resblocks.0.", "resblocks.0._orig_mod.") for name in WEIGHTS}
    assert any("_orig_mod" in name for name in names.values())
    content = {names[name]: value for name, value in WEIGHTS.items()}
    assert is_same(read_released(save(tmp_path, content)))


def test_an_averaged_model_brings_a_count(tmp_path):
    content = {"n_averaged": torch.tensor(4), **prefixed("module.")}
    assert is_same(read_released(save(tmp_path, content)))


def test_other_parts_of_a_lightning_module_are_left_out(tmp_path):
    content = {**prefixed("model."), "criterion.weight": torch.ones(3)}
    assert is_same(read_released(save(tmp_path, {"state_dict": content, "epoch": 3})))


def test_names_that_no_prefix_explains_are_refused(tmp_path):
    path = save(
        tmp_path, {"module.encoder.weight": torch.ones(2), "module.head.bias": torch.ones(2)}
    )
    with pytest.raises(ValueError, match=r"weights\.pt: no registered backbone"):
        read_released(path)


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": WEIGHTS},
        {"epoch": 3, "model_state_dict": WEIGHTS, "optimizer_state_dict": {"state": {}}},
        {"model": WEIGHTS, "optimizer": {"state": {}, "param_groups": []}, "epoch": 5},
        {"model": {"state_dict": WEIGHTS}},
        {"ema": WEIGHTS, "epoch": 1},
        OrderedDict(module=OrderedDict(WEIGHTS)),
    ],
    ids=lambda content: "-".join(content),
)
def test_checkpoints_that_hold_a_state_dict(tmp_path, content):
    assert is_same(read_released(save(tmp_path, content)))


def test_a_training_state_of_this_project_stays_what_it_is():
    state = {"model": WEIGHTS, "optimizer": {}, "scaler": {}}
    assert find_state_dict(state) is state
    assert find_state_dict([1]) == [1]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_protocols(tmp_path, protocol, zipped):
    options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": zipped}
    assert is_same(read_weights(save(tmp_path, WEIGHTS, **options)))


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_no_protocol_runs_anything(tmp_path, protocol):
    class Harm:
        def __reduce__(self):
            return Path.mkdir, (tmp_path / "harmed",)

    path = save(tmp_path, {"clip.x": Harm()}, pickle_protocol=protocol)
    with pytest.raises(ValueError, match="is not allowed in a weights file"):
        read_weights(path)
    assert not (tmp_path / "harmed").exists()


def split(folder: Path, stem: str = "model", ending: str = "safetensors") -> Path:
    """The tiny weights in two files and their index, as `save_pretrained` writes them."""
    names = sorted(WEIGHTS)
    parts = {f"{stem}-0000{n + 1}-of-00002.{ending}": names[n::2] for n in range(2)}
    for part, chosen in parts.items():
        content = {name: WEIGHTS[name].contiguous() for name in chosen}
        if ending == "safetensors":
            save_file(content, folder / part)
        else:
            torch.save(content, folder / part)
    places = {name: part for part, chosen in parts.items() for name in chosen}
    index = folder / f"{stem}.{ending}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


@pytest.mark.parametrize("form", [("model", "safetensors"), ("pytorch_model", "bin")])
def test_weights_in_several_files(tmp_path, form):
    index = split(tmp_path, *form)
    for source in (tmp_path, index):
        assert is_same(load_weights(str(source), "ViT-B/32").tensors)
    missing = tmp_path / list_parts(index)[1]
    missing.unlink()
    with pytest.raises(FileNotFoundError, match=f"{missing.name} is missing, one of the files"):
        load_weights(str(tmp_path), "ViT-B/32")


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        '{"weight_map": {"a": "../x.bin"}}',
        '{"weight_map": 3}',
        '{"weight_map": {"a": "model.safetensors.index.json"}}',
        '{"weight_map": {"a": 1}}',
    ],
)
def test_a_broken_index_is_refused(tmp_path, content):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(content)
    with pytest.raises(ValueError, match=r"index\.json is no index of weights"):
        load_weights(str(tmp_path), "ViT-B/32")


def test_the_hash_of_weights_in_several_files_covers_each(tmp_path):
    names = ("model-1.safetensors", "model-2.safetensors")
    for name in names:
        save_file({name: torch.zeros(1)}, tmp_path / name)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: name for name in names}}))
    before = hash_weights(index)
    assert before == hash_weights(index)
    save_file({names[1]: torch.ones(1)}, tmp_path / names[1])
    assert hash_weights(index) != before
    assert hash_weights(tmp_path / names[0]) == compute_sha256(tmp_path / names[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(tmp_path, value, capsys):
    name = "clip.visual.proj"
    broken = {**WEIGHTS, name: WEIGHTS[name].clone()}
    broken[name][0, 0] = value
    path = save(tmp_path, broken)
    with pytest.raises(ValueError, match=rf"weights\.pt: {name} has values that are not finite"):
        load_weights(str(path), "ViT-B/32")
    convert_weights.main(["--inspect", str(path)])
    assert f"{name} has NaN or infinite values" in capsys.readouterr().out


PREFIXES = st.lists(
    st.sampled_from(["module.", "_orig_mod.", "model.", "net.", "_fsdp_wrapped_module."]),
    max_size=3,
    unique=True,
)
WRAPPINGS = st.lists(
    st.sampled_from(["state_dict", "model", "model_state_dict", "ema", "module"]),
    max_size=2,
    unique=True,
)
EXTRAS = st.dictionaries(
    st.sampled_from(["epoch", "optimizer", "lr_scheduler", "best", "args"]),
    st.sampled_from([1, 0.5, "text", None, {"state": {}, "param_groups": []}, [1, 2]]),
    max_size=3,
)


@settings(max_examples=25)
@given(
    prefixes=PREFIXES,
    wrappings=WRAPPINGS,
    extras=EXTRAS,
    protocol=st.integers(2, 5),
    is_zip=st.booleans(),
    is_half=st.booleans(),
)
def test_any_wrapping_gives_the_same_weights(
    prefixes, wrappings, extras, protocol, is_zip, is_half
):
    content = prefixed(*prefixes)
    if is_half:
        content = {name: value.half() for name, value in content.items()}
    for name in wrappings:
        content = {**extras, name: content}
    options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": is_zip}
    with tempfile.TemporaryDirectory() as folder:
        found = read_released(save(Path(folder), content, **options))
    assert found.keys() == WEIGHTS.keys()
    for name, value in WEIGHTS.items():
        assert torch.equal(found[name], value.half().float() if is_half else value)


def test_what_trainers_keep_beside_the_weights(tmp_path):
    scheduler = torch.optim.lr_scheduler.MultiStepLR(
        torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]), [3, 6]
    )
    extras = {
        "scheduler": scheduler.state_dict(),
        "size": torch.Size([1, 2]),
        "device": torch.device("cpu"),
        "args": argparse.Namespace(lr=1e-3, output=Path("runs/a")),
    }
    assert is_same(read_released(save(tmp_path, {"state_dict": WEIGHTS, **extras})))


@pytest.mark.parametrize("kind", [torch.int8, torch.bool])
def test_quantized_weights_are_refused(kind, tmp_path):
    path = save(tmp_path, {name: value.to(kind) for name, value in WEIGHTS.items()})
    with pytest.raises(ValueError, match=r"is of the type|quantized"):
        load_weights(str(path), "ViT-B/32")


def test_a_torch_file_of_another_name(tmp_path):
    path = tmp_path / "weights.safetensors"
    torch.save(WEIGHTS, path)
    assert is_same(read_weights(path))


def test_a_part_of_a_backbone_is_completed_with_a_word(tmp_path, caplog):
    whole = save(tmp_path, WEIGHTS)
    part = tmp_path / "part.pt"
    torch.save(dict(list(WEIGHTS.items())[:-3]), part)
    loaded = load_weights(str(part), str(whole), quick_gelu=True)
    assert loaded.tensors.keys() == WEIGHTS.keys()
    assert f"{part} has only part of its backbone: 3 tensors, such as" in caplog.text

"""Benchmarks: operations counted by hand against torch's counter, and the programs' output."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import attention, data_path, flops, hand_written, run_all, steps
from dataloaders.datasets.spot_the_diff import merge_entries
from modules.model import layers
from modules.model.bert import load_decoder_config
from modules.model.clip import CLIP
from modules.model.clip_sizes import ClipSizes
from modules.model.decoder import CaptionDecoder
from system.runtime import Runtime

SIZES = ClipSizes(64, 64, 3, 128, 16, 40, 300, 64, 2)


def count_operations(work) -> int:
    """The operations that torch counts."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        work()
    return counter.get_total_flops()


def test_operations_of_the_towers():
    clip = CLIP(SIZES, intra_layers=2, linear_patch="2d")
    images = torch.randn(3, 2, 3, 64, 64)
    counted = count_operations(lambda: clip.visual(images))
    assert counted == 3 * flops.pair_encoder(SIZES, 2)
    ids = torch.randint(1, 299, (5, 9))
    counted = count_operations(lambda: clip.encode_text(ids))
    all_but_eot = 5 * (9 - 1) * 2 * 64 * 64  # the model projects all words; only EOT is necessary
    assert counted - all_but_eot == 5 * flops.text_encoder(SIZES, 9)


def test_operations_of_the_captioner():
    clip = CLIP(SIZES, 2, "2d")
    config = load_decoder_config("decoder-base").fitted_to(64)
    decoder = CaptionDecoder(config, clip.token_embedding, clip.positional_embedding).eval()
    num_pairs, num_tokens, num_words = 3, 2 * SIZES.num_tokens, 7
    pair_tokens = torch.randn(num_pairs, num_tokens, 64)
    ids = torch.randint(1, 299, (num_pairs, num_words))
    mask = torch.ones(num_pairs, num_words)
    counted = count_operations(lambda: decoder.predictions(decoder(pair_tokens, ids, mask)))
    encoder = flops.caption_encoder(config, num_tokens)
    words = flops.caption_decoder(config, num_tokens, num_words)
    assert counted == num_pairs * (encoder + words + flops.vocabulary(SIZES, num_words))


@pytest.mark.parametrize("what", list(steps.BENCHMARKS))
def test_steps_and_their_table(what, monkeypatch, capsys):
    sizes = steps.Model(ClipSizes(64, 64, 10, 64, 32, 77, 49408, 64, 1), 9, 32)
    monkeypatch.setattr(steps, "PUBLISHED", sizes)
    rates = {torch.float32: 100.0, torch.bfloat16: 200.0}
    monkeypatch.setattr(steps, "gemm_rate", lambda dtype, device: rates[dtype])
    with steps.silence_logs():
        row = steps.measure(what, Runtime(precision="bf16"), pairs=2, repeats=2)
    assert row["cost_per_pair"] == pytest.approx(row["seconds"] * 100 / 2, abs=0.1)
    assert row["pairs_per_second"] == pytest.approx(2 / row["seconds"], rel=0.05, abs=0.06)
    assert 0 < row["share_of_gemm"] < 10
    aim = run_all.AIMS[what]["bf16"]
    run_all.print_costs([row, {**row, "cost_per_pair": aim}, {**row, "cost_per_pair": aim + 0.1}])
    lines = capsys.readouterr().out.strip().splitlines()
    assert [line.endswith("met") for line in lines[2:]] == [True, False]


def test_attention_is_timed_in_both_ways_and_the_limit_is_put_back(monkeypatch):
    found = []

    def record(work, device, repeats):
        found.append(layers.MAX_PRODUCT_KEYS)
        return [0.002, 0.001]

    monkeypatch.setattr(attention, "time_runs", record)
    chosen = layers.MAX_PRODUCT_KEYS
    results = attention.measure("fp32", 2)
    assert results["25f"] == results["800fb"] == [1.0, 1.0]
    assert set(found) == {800, 0}
    assert chosen == layers.MAX_PRODUCT_KEYS


def test_data_path(capsys):
    words = ["--datatype", "clevr", "--scenes", "256", "--workers", "1", "--read", "16"]
    assert data_path.main(words) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["scenes"] == 256
    for training in ("adaptation", "finetuning"):
        assert row[training]["pairs_per_second"]["1"] > 0
        assert row[training]["worker_grows_mb"] < 100
    run_all.print_data_paths([row])
    assert "clevr    256, finetuning" in capsys.readouterr().out


def test_replicated_spot_has_the_ids_of_the_annotations(tmp_path):
    drawn, root = tmp_path / "drawn", tmp_path / "data"
    (drawn / "images_test").mkdir(parents=True)
    for name in ("7.png", "7_2.png"):
        (drawn / "images_test" / name).write_bytes(name.encode())
    entries = [(image_id, [image_id]) for image_id in ("1", "2", "1")]
    data_path.replicate_spot(drawn, root, merge_entries(entries))
    assert json.loads((root / "reformat_train.json").read_text()) == [
        {"img_id": "1", "sentences": ["1", "1"]},
        {"img_id": "2", "sentences": ["2"]},
    ]
    images = {path.name: path.read_bytes() for path in (root / "images_test").iterdir()}
    before, after = b"7.png", b"7_2.png"
    assert images == {"1.png": before, "1_2.png": after, "2.png": before, "2_2.png": after}


def test_speed_by_several_processes_is_relative_to_one(capsys):
    rows = [
        {"benchmark": "adaptation", "processes": 1, "seconds": 2.0, "pairs_per_second": 16.0},
        {"benchmark": "adaptation", "processes": 2, "seconds": 2.5, "pairs_per_second": 12.8},
    ]
    run_all.print_processes(rows)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert lines == [["adaptation", "1", "16.0", "100%"], ["adaptation", "2", "12.8", "80%"]]


def test_annotations_without_scale_are_refused(capsys):
    with pytest.raises(SystemExit):
        run_all.main(["--annotations", "images"])
    assert "--annotations is for --scale" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--datatype spot", "--annotations"),
        ("--datatype spot --annotations nowhere", "train.json"),
        ("--datatype clevr --scenes 3", "256"),
    ],
)
def test_wrong_input_to_data_path_is_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        data_path.main(words.split())
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_hand_written_parts_take_turns_with_plain_calls(monkeypatch, tmp_path):
    monkeypatch.setattr(hand_written, "PROC", tmp_path / "none")  # memory needs processes
    sizes = hand_written.Sizes(300, 64, 64, 64, 32, 2, (8,))
    cpu = torch.device("cpu")
    rows = {
        part: hand_written.measure(sizes, cpu, "bf16", repeats=2, part=part)
        for part in hand_written.build_parts(sizes, cpu)
    }
    assert len(rows) == 4
    for row in rows.values():
        times = row["milliseconds"]
        assert row["relative"]["ours"] == 1
        assert len(times) >= 2
        assert min(times.values()) > 0
    assert "cross_entropy" in rows["caption loss, 8 targets"]["relative"]

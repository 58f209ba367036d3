"""Benchmarks: operations counted by hand against torch's counter, and each program's line of numbers."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import data_path, flops, run_all, steps
from modules.model.bert import load_decoder_config
from modules.model.clip import CLIP
from modules.model.clip_sizes import ClipSizes
from modules.model.decoder import CaptionDecoder
from system.runtime import Runtime

SIZES = ClipSizes(64, 64, 3, 128, 16, 40, 300, 64, 2)


def counted(work) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        work()
    return counter.get_total_flops()


def test_operations_of_the_towers():
    clip = CLIP(SIZES, intra_layers=2, linear_patch="2d")
    assert counted(lambda: clip.visual(torch.randn(3, 2, 3, 64, 64))) == 3 * flops.pair_encoder(
        SIZES, 2
    )
    all_projected = (
        5 * (9 - 1) * 2 * 64 * 64
    )  # the model projects every word; only EOT is necessary
    assert counted(
        lambda: clip.encode_text(torch.randint(1, 299, (5, 9)))
    ) - all_projected == 5 * flops.text_encoder(SIZES, 9)


def test_operations_of_the_captioner():
    clip, config = CLIP(SIZES, 2, "2d"), load_decoder_config("decoder-base").fitted_to(64)
    decoder = CaptionDecoder(config, clip.token_embedding, clip.positional_embedding).eval()
    pairs, tokens, words = 3, 2 * SIZES.num_tokens, 7
    ids = torch.randint(1, 299, (pairs, words))
    work = counted(
        lambda: decoder.predictions(
            decoder(torch.randn(pairs, tokens, 64), ids, torch.ones(pairs, words))
        )
    )
    assert work == pairs * (
        flops.caption_encoder(config, tokens)
        + flops.caption_decoder(config, tokens, words)
        + flops.vocabulary(SIZES, words)
    )


@pytest.mark.parametrize("what", list(steps.BENCHMARKS))
def test_steps_and_their_table(what, monkeypatch, capsys):
    monkeypatch.setattr(steps, "VIT_B_32", ClipSizes(64, 64, 10, 64, 32, 77, 49408, 64, 1))
    monkeypatch.setattr(
        steps, "gemm_rate", lambda dtype, device: 100.0 if dtype == torch.float32 else 200.0
    )
    with steps.quiet():
        row = steps.measure(what, Runtime(precision="bf16"), pairs=2, repeats=2)
    assert row["cost_per_pair"] == pytest.approx(row["seconds"] * 100 / 2, abs=0.1)
    assert row["pairs_per_second"] == pytest.approx(2 / row["seconds"], rel=0.05, abs=0.06)
    assert 0 < row["share_of_gemm"] < 10
    aim = run_all.AIMS[what]["bf16"]
    run_all.print_costs([row, {**row, "cost_per_pair": aim}, {**row, "cost_per_pair": aim + 0.1}])
    lines = capsys.readouterr().out.strip().splitlines()
    assert [line.endswith("met") for line in lines[2:]] == [True, False]


def test_data_path(tmp_path, capsys):
    assert (
        data_path.main(["--datatype", "clevr", "--scenes", "256", "--workers", "1", "--read", "16"])
        == 0
    )
    row = json.loads(capsys.readouterr().out)
    assert row["scenes"] == 256
    for stage in ("adaptation", "finetuning"):
        assert row[stage]["pairs_per_second"]["1"] > 0
        assert row[stage]["worker_grows_mb"] < 100
    run_all.print_data_paths([row])
    assert "clevr    256, finetuning" in capsys.readouterr().out


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

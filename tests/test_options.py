"""The command line: SPEC §2's flags and defaults, and one line for what is wrong."""

import subprocess
import sys

import pytest

from modules.options import IGNORED_FLAGS, parse_options
from tests.conftest import ROOT

NEEDED = ["--do_train", "--output_dir", "o", "--datatype", "clevr", "--data_path", "d"]
# SPEC §2, frozen: programs and papers call these.
DEFAULTS = {
    "num_thread_reader": 1,
    "lr": 1e-4,
    "epochs": 20,
    "batch_size": 256,
    "batch_size_val": 3500,
    "gradient_accumulation_steps": 1,
    "n_display": 100,
    "seed": 42,
    "max_words": 20,
    "cross_model": "cross-base",
    "decoder_model": "decoder-base",
    "warmup_proportion": 0.1,
    "coef_lr": 1.0,
    "intra_num_hidden_layers": 9,
    "freeze_layer_num": 0,
    "linear_patch": "2d",
    "pretrained_clip_name": "ViT-B/32",
    "init_model": None,
    "resume_model": None,
    "features_path": None,
    "local_rank": None,
    "cache_dir": None,
    "task_type": None,
}


@pytest.mark.parametrize("stage", ["retrieval", "caption"])
def test_flags_and_defaults(stage):
    values = dict(parse_options(NEEDED, stage, "").items())
    assert {name: values[name] for name in DEFAULTS} == DEFAULTS
    assert ("gt_dir" in values) == (stage == "caption")
    assert ("sim_header" in values) == (stage == "retrieval")


def test_published_command_lines_parse():
    for script, stage in (
        ("adapt_spot", "retrieval"),
        ("finetune_spot", "caption"),
        ("adapt_clevr", "retrieval"),
        ("finetune_clevr", "caption"),
    ):
        text = (
            (ROOT / "scripts" / f"{script}.sh")
            .read_text()
            .replace("\\\n", " ")
            .replace("${DATA_PATH}", "images")
        )
        words = text.split(".py", 1)[1].replace('"$@"', "").split()
        options = parse_options([*words, "--epochs", "1"], stage, "")
        assert options.training.epochs == 1
        assert options.training.coef_lr == 1e-3


def test_flags_without_effect_are_accepted_and_named():
    words = [word for name in IGNORED_FLAGS for word in (f"--{name}", "1")]
    assert parse_options([*NEEDED, *words], "retrieval", "").ignored == tuple(
        f"--{name}" for name in IGNORED_FLAGS
    )
    assert parse_options([*NEEDED, "--use_mil", "--seed", "3"], "retrieval", "").run.seed == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "exactly one of --do_train and --do_eval"),
        ([*NEEDED, "--do_eval"], "exactly one"),
        (["--do_train"], "--output_dir is required"),
        ([*NEEDED, "--batch_size", "0"], "--batch_size is 0"),
        ([*NEEDED, "--max_words", "2"], "3 to 77"),
        ([*NEEDED, "--max_words", "78"], "3 to 77"),
        ([*NEEDED, "--lr", "0"], "--lr"),
        ([*NEEDED, "--lr", "nan"], "--lr"),
        ([*NEEDED, "--epochs", "x"], "epochs"),
        ([*NEEDED, "--linear_patch", "4d"], "linear_patch"),
        ([*NEEDED, "--stray"], "--stray"),
        ([*NEEDED, "--datatype", "spot"], "--features_path"),
        ([*NEEDED, "--task_type", "caption"], "--task_type"),
        ([*NEEDED, "--fp16", "--precision", "bf16"], "contradicts"),
        ([*NEEDED, "--warmup_proportion", "1"], "warmup"),
        ([*NEEDED, "--batch_size", "7", "--gradient_accumulation_steps", "2"], "not divisible"),
        ([*NEEDED, "--seed", "-1"], "--seed"),
        ([*NEEDED, "--freeze_layer_num", "-2"], "freeze"),
        ([*NEEDED, "--coef_lr", "nan"], "--coef_lr"),
    ],
)
def test_wrong_options_are_one_line_and_exit_2(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_options(words, "retrieval", "")
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_batches_divide_over_processes(capsys):
    assert parse_options([*NEEDED, "--batch_size", "6"], "caption", "", num_processes=3)
    with pytest.raises(SystemExit):
        parse_options([*NEEDED, "--batch_size", "6"], "caption", "", num_processes=4)
    assert "4 process(es)" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["main_task_retrieval", "CLIP4IDCinference"])
def test_help_needs_no_torch_and_importing_does_nothing(script):
    code = f"import sys, {script}; assert 'torch' not in sys.modules; {script}.main(['--help'])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--intra_num_hidden_layers" in done.stdout
    assert "torch" not in done.stderr

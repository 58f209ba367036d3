"""The command line: its flags and defaults, and one line that names all that is wrong."""

import subprocess
import sys
from dataclasses import dataclass

import pytest

from modules.options import IGNORED_FLAGS, parse_options
from modules.options.decoding import Decoding
from modules.options.help import format_examples
from modules.options.options import GROUPS
from modules.pipeline import choose_advice
from modules.registries import OBJECTIVES
from modules.training.states import ResumePoint
from system.command import run_command
from system.flags import FlagGroup, find_range_problems, flag, list_flags
from system.places import VERSION
from system.registry import Registry
from tests.conftest import ROOT

RUN = ["--output_dir", "o", "--datatype", "clevr", "--data_path", "d"]
TRAIN = ["--do_train", *RUN]
EVALUATE = ["--do_eval", *RUN]

# Frozen: programs and papers call these.
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
    "objective": None,
}
DECODING_DEFAULTS = {
    "decoding": None,
    "beam_size": 1,
    "length_penalty": 0.0,
    "num_captions": 1,
    "temperature": None,
    "top_p": None,
}
PUBLISHED = [
    ("adapt_spot", "retrieval"),
    ("finetune_spot", "caption"),
    ("adapt_clevr", "retrieval"),
    ("finetune_clevr", "caption"),
]


def refused(capsys, words, task="retrieval", num_processes=None) -> str:
    """The one line on stderr of a command line that is refused with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        parse_options(words, task, "", num_processes)
    assert stop.value.code == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize("task", ["retrieval", "caption"])
def test_flags_and_defaults(task):
    values = dict(parse_options(TRAIN, task, "").items())
    assert {name: values[name] for name in DEFAULTS} == DEFAULTS
    is_caption = task == "caption"
    expected = DECODING_DEFAULTS if is_caption else {}
    assert {name: values[name] for name in DECODING_DEFAULTS if name in values} == expected
    assert ("gt_dir" in values) == is_caption
    assert ("sim_header" in values) == (not is_caption)
    assert "before" not in values


def test_every_flag_is_in_one_group_and_has_a_help_text():
    flags = [one for group in GROUPS.values() for one in list_flags(group)]
    names = [one.name for one in flags]
    assert len(names) == len(set(names))
    for one in flags:
        text = one.metadata["help"]
        assert text, one.name
        assert not text.endswith("."), one.name


@pytest.mark.parametrize(("script", "task"), PUBLISHED)
def test_published_command_lines_parse(script, task):
    text = (ROOT / "scripts" / f"{script}.sh").read_text()
    command = text.replace("\\\n", " ").replace("${DATA_PATH}", "images").replace('"$@"', "")
    words = command.split(".py", 1)[1].split()
    options = parse_options([*words, "--epochs", "1"], task, "")
    assert options.training.epochs == 1
    assert options.training.coef_lr == 1e-3


@pytest.mark.parametrize(
    ("words", "helps"),
    [
        (TRAIN, "--batch_size or --batch_size_val, or more --gradient_accumulation_steps"),
        (EVALUATE, "use a smaller --batch_size_val"),
    ],
)
def test_advice_names_the_flags_that_help(words, helps):
    advice = choose_advice(parse_options(words, "caption", ""))
    assert advice.out_of_memory.endswith(helps)


def test_a_prediction_has_no_flag_against_too_little_memory(capsys):
    def fail():
        raise MemoryError

    words = ["--do_predict", "--before", "a.png", "--after", "b.png"]
    advice = choose_advice(parse_options(words, "caption", ""))
    with pytest.raises(SystemExit) as stop:
        run_command("x", fail, advice)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "x: out of memory\n"


def test_flags_without_effect_are_accepted_and_named():
    flags = [f"--{name}" for name in IGNORED_FLAGS]
    words = [word for name in flags for word in (name, "1")]
    assert parse_options([*TRAIN, *words], "retrieval", "").ignored == tuple(flags)
    options = parse_options([*TRAIN, "--use_mil", "--seed", "3"], "retrieval", "")
    assert options.run.seed == 3
    assert options.ignored == ("--use_mil",)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "exactly one of --do_train and --do_eval"),
        ([*TRAIN, "--do_eval"], "exactly one"),
        (["--do_train"], "--output_dir is required"),
        ([*TRAIN, "--batch_size", "0"], "--batch_size is 0, expected at least 1"),
        ([*TRAIN, "--max_words", "2"], "--max_words is 2, expected 3 to 77"),
        ([*TRAIN, "--max_words", "78"], "--max_words is 78, expected 3 to 77"),
        ([*TRAIN, "--lr", "0"], "--lr is 0.0, expected a number in (0, 1000000]"),
        ([*TRAIN, "--lr", "nan"], "--lr is nan"),
        ([*TRAIN, "--lr", "inf"], "--lr is inf"),
        ([*TRAIN, "--epochs", "x"], "--epochs: 'x' is not a whole number"),
        ([*TRAIN, "--linear_patch", "4d"], "--linear_patch: invalid choice: '4d'"),
        ([*TRAIN, "--lr", "x"], "--lr: 'x' is not a number"),
        ([*TRAIN, "--stray"], "unrecognized arguments: --stray (--help"),
        ([*TRAIN, "--stray", "--batchsize=2"], "--batchsize=2 (did you mean --batch_size?)"),
        ([*TRAIN, "a.png", "b.png"], "unrecognized arguments: a.png b.png"),
        ([*TRAIN, "--beam_size", "2"], "unrecognized arguments: --beam_size 2"),
        ([*TRAIN, "--datatype", "spot"], "--features_path"),
        ([*TRAIN, "--task_type", "caption"], "--task_type is caption"),
        ([*TRAIN, "--fp16", "--precision", "bf16"], "--fp16 contradicts --precision bf16"),
        ([*TRAIN, "--warmup_proportion", "1"], "--warmup_proportion is 1.0"),
        ([*TRAIN, "--batch_size", "7", "--gradient_accumulation_steps", "2"], "not divisible"),
        ([*TRAIN, "--seed", "-1"], "--seed is -1, expected 0 to"),
        ([*TRAIN, "--freeze_layer_num", "-2"], "--freeze_layer_num is -2"),
        ([*TRAIN, "--coef_lr", "nan"], "--coef_lr is nan"),
        ([*TRAIN, "--keep_checkpoints", "0"], "--keep_checkpoints is 0, expected at least 1"),
        ([*TRAIN, "--resume_force"], "--resume_force works only with --resume auto"),
        ([*TRAIN, "--init_model", ""], "--init_model is empty"),
        ([*TRAIN, "--objective", "none"], "--objective: invalid choice: 'none'"),
        ([*EVALUATE, "--resume", "auto"], "to evaluate given weights, use --init_model"),
    ],
)
def test_wrong_options_are_one_line_and_exit_2(words, message, capsys):
    assert message in refused(capsys, words)


@pytest.mark.parametrize(
    "words",
    [
        ["a.png", "b.png", "--beam-size", "3"],
        ["--beam_size=3", "a.png", "b.png"],
        ["a.png", "--beam-size=3", "b.png"],
        ["--do-predict", "a.png", "b.png", "--beam_size", "3"],
    ],
)
def test_two_bare_paths_are_captioned(words):
    options = parse_options(words, "caption", "")
    assert options.run.do_predict
    assert (options.predict.before, options.predict.after) == ("a.png", "b.png")
    assert options.decoding.beam_size == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a.png"], "expected two images, before and after, found 1: a.png"),
        (["a", "b", "c"], "found 3: a b c"),
        (["a.png", "b.png", "--do_train"], "unrecognized arguments: a.png b.png"),
        (["a.png", "b.png", "--pairs", "c.csv"], "give the images only once"),
        ([], "give two images, or exactly one of --do_train, --do_eval and --do_predict (--help"),
        (["--do_predict"], "give two images, or a folder after --before, or a table after --pairs"),
        (["--befor", "a.png"], "(did you mean --before?)"),
        (["--predict"], "(did you mean --do_predict?)"),
        ([*TRAIN, "--before", "a.png"], "--before works only with --do_predict"),
        ([*EVALUATE, "--num_captions", "2"], "--num_captions 2 works only with --do_predict"),
        ([*TRAIN, "--temperature", "0"], "--temperature is 0.0, expected 1e-30 to 1e+30"),
        ([*TRAIN, "--top_p", "1.5"], "--top_p is 1.5, expected 1e-30 to 1"),
        (
            [*EVALUATE, "--beam_size", "2", "--top_p", ".9"],
            "beam search (beam_size > 1) cannot be combined with sampling "
            "(num_captions, temperature, top_p)",
        ),
        (
            [*EVALUATE, "--decoding", "greedy", "--beam_size", "2"],
            "--decoding greedy cannot be combined with beam search (beam_size > 1)",
        ),
        (
            [*EVALUATE, "--decoding", "beam", "--top_p", ".9"],
            "--decoding beam cannot be combined with sampling",
        ),
        (
            [*TRAIN, "--scst", "--objective", "cross_entropy"],
            "--scst contradicts --objective cross_entropy",
        ),
    ],
)
def test_wrong_options_of_captioning_are_one_line(words, message, capsys):
    assert message in refused(capsys, words, "caption")


def test_all_that_is_wrong_is_said_at_once(capsys):
    words = ["--do_eval", "--do_train", "--seed", "-1", "--lr", "0", "--beam_size", "0"]
    error = refused(capsys, [*words, "--batch_size", "7"], "caption", num_processes=2)
    for message in (
        "give exactly one of --do_train, --do_eval and --do_predict",
        "--seed is -1",
        "--lr is 0.0",
        "--beam_size is 0, expected 1 to 100",
        "--data_path is required",
        "--batch_size 7 is not divisible by --gradient_accumulation_steps 1 times 2 process(es)",
    ):
        assert error.count(message) == 1


def test_batches_divide_over_processes(capsys):
    assert parse_options([*TRAIN, "--batch_size", "6"], "caption", "", num_processes=3)
    assert "4 process(es)" in refused(capsys, [*TRAIN, "--batch_size", "6"], "caption", 4)


@pytest.mark.parametrize("action", [TRAIN, EVALUATE])
def test_any_decoding_of_one_caption_can_be_evaluated(action):
    words = ["--temperature", ".7", "--top_p", ".9", "--seed", "3"]
    decoding = parse_options([*action, *words], "caption", "").decoding
    assert decoding == Decoding(temperature=0.7, top_p=0.9, seed=3)
    assert decoding.method_name() == "sampling"


@pytest.mark.parametrize(
    ("values", "method"),
    [
        ({}, "greedy"),
        ({"length_penalty": 1.0}, "greedy"),
        ({"beam_size": 2}, "beam"),
        ({"num_captions": 2}, "sampling"),
        ({"temperature": 1.0}, "sampling"),
        ({"top_p": 1.0}, "sampling"),
        ({"decoding": "beam"}, "beam"),
        ({"decoding": "sampling"}, "sampling"),
        ({"decoding": "greedy", "seed": 1}, "greedy"),
    ],
)
def test_settings_imply_the_decoding_method(values, method):
    assert Decoding(**values).method_name() == method


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": 0.0}, r"--temperature is 0.0, expected 1e-30 to 1e\+30"),
        ({"top_p": 2.0}, "--top_p is 2.0, expected 1e-30 to 1"),
        ({"num_captions": 0}, "--num_captions is 0, expected 1 to 100"),
        ({"seed": -1}, "--seed is -1, expected 0 to"),
        ({"num_captions": 2, "beam_size": 2}, "cannot be combined with sampling"),
    ],
)
def test_wrong_decoding_is_a_value_error(values, message):
    with pytest.raises(ValueError, match=message):
        Decoding(**values).method_name()


def test_values_of_a_decoding_keep_their_form_in_files():
    shared = ["beam_size", "length_penalty", "num_captions", "temperature", "top_p", "seed"]
    assert list(Decoding().settings_by_name()) == shared
    assert Decoding(decoding="beam").settings_by_name()["decoding"] == "beam"


@pytest.mark.parametrize(
    ("task", "words", "objective"),
    [
        ("retrieval", [], "contrastive"),
        ("caption", [], "cross_entropy"),
        ("caption", ["--scst"], "self_critical"),
        ("caption", ["--objective", "self_critical"], "self_critical"),
    ],
)
def test_the_objective_follows_from_the_task(task, words, objective):
    assert objective in OBJECTIVES
    assert parse_options([*TRAIN, *words], task, "").objective == objective


def test_states_of_before_an_option_can_be_resumed(tmp_path):
    """A state names the options of its time. Those that came later are not compared."""
    options = dict(parse_options([*TRAIN, "--top_p", ".9"], "caption", "").items())
    newer = {"decoding", "temperature", "top_p", "num_captions", "objective"}
    older = {name: value for name, value in options.items() if name not in newer}
    state = ResumePoint(tmp_path / "state", None, older, "data", {})
    assert state.changed_options(options, "data") == ([], [])
    older["beam_size"] = 5
    assert state.changed_options(options, "data") == (["--beam_size is 1, was 5"], [])


@dataclass(frozen=True)
class Bounds(FlagGroup):
    """One flag of each kind of bound."""

    least: float = flag(1.0, "", float, at_least=1)
    most: float = flag(1.0, "", float, at_most=2)
    between: int | None = flag(None, "", int, at_least=1, at_most=5)
    above: float = flag(1.0, "", float, above=0)
    share: float = flag(1.0, "", float, above=0, at_most=1)


@pytest.mark.parametrize(
    ("values", "problems"),
    [
        ({}, []),
        ({"least": 0.5}, ["--least is 0.5, expected at least 1"]),
        ({"most": 3.0}, ["--most is 3.0, expected at most 2"]),
        ({"between": 6}, ["--between is 6, expected 1 to 5"]),
        ({"above": float("inf")}, ["--above is inf, expected a number above 0"]),
        ({"share": 0.0}, ["--share is 0.0, expected a number in (0, 1]"]),
        ({"least": float("nan")}, ["--least is nan, expected at least 1"]),
        (
            {"between": 0, "above": -1.0},
            ["--between is 0, expected 1 to 5", "--above is -1.0, expected a number above 0"],
        ),
    ],
)
def test_bounds_of_flags(values, problems):
    assert find_range_problems(Bounds(**values)) == problems


def test_names_of_a_registry_are_listed_by_help_alone(monkeypatch, capsys):
    """Listing them means to look through all installed packages."""
    listed = []

    def remember(registry):
        listed.append(registry.kind)
        return {}

    monkeypatch.setattr(Registry, "_find_installed", remember)
    parse_options(TRAIN, "caption", "")
    parse_options([*TRAIN, "--decoding", "beam", "--objective", "cross_entropy"], "caption", "")
    assert listed == []
    with pytest.raises(SystemExit, match="0"):
        parse_options(["--help"], "caption", "")
    assert "objective" in listed
    assert "contrastive, cross_entropy, self_critical" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("script", ["main_task_retrieval", "CLIP4IDCinference"])
def test_help_needs_no_torch_and_importing_does_nothing(script):
    code = f"import sys, {script}; assert 'torch' not in sys.modules; {script}.main(['--help'])"
    dear = "{'torch', 'huggingface_hub'} & sys.modules.keys()"
    code = f"import atexit, sys; atexit.register(lambda: print({dear})); {code}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--intra_num_hidden_layers" in done.stdout
    assert done.stdout.endswith("set()\n")
    assert done.stderr == ""


@pytest.mark.parametrize("task", ["retrieval", "caption"])
def test_every_example_of_the_help_is_a_valid_command(task):
    text = format_examples("tool.py", task, []).replace("\\\n", "")
    title, *examples = text.splitlines()
    assert title == "examples:"
    for example in examples:
        python, program, *words = example.split()
        assert (python, program) == ("python", "tool.py")
        parse_options(words, task, "")


def test_a_command_shows_its_own_examples_alone():
    assert format_examples("clip4idc finetune", "caption", ["--do_train", "--help"]) == (
        "examples:\n"
        "  clip4idc finetune --datatype pairs --data_path pairs.csv \\\n"
        "    --output_dir runs/stage2 --init_model runs/stage1"
    )


def test_every_command_prints_the_version(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_options(["--version"], "caption", "")
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"clip4idc {VERSION}\n"

"""A marked password, put wherever one can be, must not appear in any output or file."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import app
import CLIP4IDCinference
import main_task_retrieval
from gt import eval_utils
from modules.metrics import ptb
from modules.metrics.meteor import Meteor
from modules.metrics.metric import MeanMetric
from modules.predictor import Predictor
from modules.weights.sources import random_clip, read_sizes
from preprocess import convert_weights, download, export_model, reformat_dataset
from system import download as system_download
from system import urls
from system.command import run_command
from system.escaping import SafeFormatter
from system.urls import Location
from tests.conftest import ROOT, make_spot
from tests.runs import arguments
from tests.servers import web_site

# In URLs that are given, and in the environment: one must not hide the other.
MARK = "hunter2Mark"
AROUND = "3nvironMark"

EXAMPLES = ROOT / "docs" / "examples"
BEFORE = str(EXAMPLES / "removed_before.png")
AFTER = str(EXAMPLES / "removed_after.png")
PAIR = ["--before", BEFORE, "--after", AFTER]


@pytest.fixture(autouse=True)
def _marked_environment(monkeypatch, tmp_path):
    """Marked proxies, S3 endpoint, keys and tokens; localhost is reached without proxies."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, f"http://someone:{AROUND}@127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1,localhost")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://someone:{AROUND}@127.0.0.1:9")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, f"{name}-{AROUND}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(system_download, "FIRST_DELAY", 0)


def check_clean(folder: Path, *texts: str) -> None:
    """Neither texts nor files and their names below the folder contain a mark."""
    for mark in (MARK, AROUND):
        assert [text for text in texts if mark in text] == []
        for path in folder.rglob("*"):
            assert mark not in path.name
            content = path.read_bytes() if path.is_file() else b""
            assert mark.encode() not in content, path


@pytest.fixture
def without_java(monkeypatch) -> None:
    """Java takes long to start, and knows no URL."""
    monkeypatch.setattr(Meteor, "rows", lambda self, references, captions: [[0.5]] * len(captions))
    monkeypatch.setattr(Meteor, "scores", MeanMetric.scores)
    monkeypatch.setattr(ptb, "tokenize_lines", lambda lines: [line.lower() for line in lines])


@pytest.mark.usefixtures("without_java")
def test_no_command_that_succeeds_shows_or_keeps_a_password(tmp_path, tiny_sizes, capsys):
    """Both stages, prediction, scoring, conversion and export, each from a URL with secrets."""
    torch.manual_seed(0)
    torch.save(random_clip(read_sizes(tiny_sizes)), tmp_path / "clip.bin")
    data = make_spot(tmp_path / "data", {"train": 4, "val": 2, "test": 3})
    work = tmp_path / "work"
    one_epoch = ["--do_train", "--epochs", "1", "--quick_gelu"]
    with web_site({"clip.bin": (tmp_path / "clip.bin").read_bytes()}) as site:
        host = site.url.removeprefix("http://")
        secret_url = f"http://user:{MARK}@{host}"

        clip = ["--pretrained_clip_name", f"{secret_url}/clip.bin?sig={MARK}"]
        options = arguments(data, work / "adapted", tiny_sizes, "retrieval", *one_epoch, *clip)
        assert main_task_retrieval.main(options) == 0
        for path in (work / "adapted").iterdir():
            if path.is_file():
                site.files[f"adapted/{path.name}"] = path.read_bytes()

        state = ["--resume_model", f"{secret_url}/adapted/training_state.bin.0"]
        options = arguments(data, work / "resumed", tiny_sizes, "retrieval", *one_epoch, *state)
        assert main_task_retrieval.main(options) == 0

        weights = ["--init_model", f"{secret_url}/adapted/pytorch_model.bin.best"]
        options = arguments(data, work / "captioner", tiny_sizes, "caption", *one_epoch, *weights)
        assert CLIP4IDCinference.main(options) == 0
        for name in ("pytorch_model.bin.best", "model.json"):
            site.files[f"captioner/{name}"] = (work / "captioner" / name).read_bytes()

        model = f"{secret_url}/captioner/pytorch_model.bin.best"
        evaluation = ["--do_eval", "--init_model", model]
        options = arguments(data, work / "evaluated", tiny_sizes, "caption", *evaluation)
        assert CLIP4IDCinference.main(options) == 0
        prediction = ["--do_predict", *PAIR, "--init_model", model]
        assert CLIP4IDCinference.main(prediction) == 0
        table = ["--predictions", str(work / "p.csv")]
        assert CLIP4IDCinference.main([*prediction, *table]) == 0
        assert convert_weights.main([model, str(work / "converted.safetensors")]) == 0
        assert convert_weights.main(["--inspect", model]) == 0
        assert export_model.main([model, str(work / "exported"), "--trained_on", "squares"]) == 0
        Predictor.load(model).caption(BEFORE, AFTER)
    truth = data / "gt" / "spot_total_change_captions_reformat.json"
    results = work / "evaluated" / "hyp_ep_eval.json"
    assert eval_utils.main(["score", "--gt", str(truth), "--results", str(results)]) == 0
    said = capsys.readouterr()
    report = (work / "evaluated" / "report.html").read_text()
    assert f"http://{host}/captioner/pytorch_model.bin.best" in report, "only its secrets are gone"
    assert "weights from " in said.err
    check_clean(tmp_path, said.out, said.err)


def bad_urls(host: str) -> list[str]:
    """URLs that lead to nothing, mistyped ones and foreign schemes included."""
    return [
        f"http://user:{MARK}@127.0.0.1:9/x.bin",
        f"http://user:{MARK}@{host}/none.bin",
        f"http://{host}/none.bin?token={MARK}",
        f"http://user:{MARK}@{host}/page.bin",
        f"http://user:{MARK}@{host}/noise.bin",
        f"http://user:{MARK}@{host}",
        f"http://user:{MARK}@far.invalid/x.bin?sig={MARK}",
        f"https://user:{MARK}@{host}/x.bin",
        f"http://user:{MARK}@[::1/x.bin",
        f"http://user:{MARK}@host:port/x.bin",
        f"http://user:{MARK}x@bad host/x.bin",
        f"http://user:a b{MARK}@{host}/none.bin",
        f"http://user:a@b{MARK}@{host}/none.bin",
        f"http://user:a?{MARK}@{host}/none.bin",
        f"http://user:a#{MARK}@{host}/none.bin",
        f"http://user:a/{MARK}@{host}/none.bin",
        f"s3://user:{MARK}@bucket/key.bin",
        f"s3://bucket/key.bin?X-Amz-Signature={MARK}",
        f"htps://user:{MARK}@host/x.bin",
        f"http:/user:{MARK}@host/x.bin",
        f"http:user:{MARK}@host/x.bin",
        f"//user:{MARK}@host/x.bin",
        f"user:{MARK}@host/x.bin",
        f"{MARK}@host/x.bin",
        f"ftp://user:{MARK}@host/x.bin",
        f"hf://user:{MARK}@host/x.bin?{MARK}={MARK}",
        f"http://user:{MARK}%40host/x.bin",
        f"http://user:{MARK}host/x.bin",
        f"http://user:{MARK}＠host/x.bin",
        f"http://user@{MARK}:host/x.bin",
        f"http://{host}/none.bin&sig={MARK}",
        f"http://{host}/none.bin%3Ftoken={MARK}",
        f"http://{host}/none.bin？token={MARK}",
        f"http://{host}/a;token={MARK}/none.bin",
        f"http://{host}/none.bin#{MARK}",
        f"http://{host}/none.bin?{MARK}",
        f"C:/user:{MARK}@host/x.bin",
        f"http://user:pa s{MARK}@host/x.bin",
        f'http://user:a"b{MARK}@host/x.bin',
        f"http://user:<{MARK}>@host/x.bin",
        f"user:{MARK}@",
        f"http://user:a\tb{MARK}@host/x.bin",
        f"http://user:a\nb{MARK}@host/x.bin",
        f"host/x.bin?X-Amz-Signature={MARK}",
        f"HTTP://USER:{MARK}@HOST.INVALID/X.BIN",
        f"http:\\\\user:{MARK}@host/x.bin",
    ]


Command = tuple[Callable[[list[str]], int], list[str]]


def commands_with(url: str, train: list[str], folder: Path) -> list[Command]:
    """Commands that take this URL where they expect weights, a state, a folder or a word."""
    evaluate = ["--do_eval", *train[1:]]
    return [
        (main_task_retrieval.main, [*train, "--pretrained_clip_name", url]),
        (main_task_retrieval.main, [*train, "--resume_model", f"{url}/training_state.bin.0"]),
        (convert_weights.main, ["--inspect", url]),
        (convert_weights.main, [url, str(folder / "out.bin")]),
        (export_model.main, [url, str(folder / "exported"), "--trained_on", "x"]),
        (main_task_retrieval.main, [*evaluate, "--init_modle", url]),
        (main_task_retrieval.main, [*evaluate, f"--init_modle={url}"]),
        (main_task_retrieval.main, [*evaluate, "--datatype", url]),
        (main_task_retrieval.main, [*train, "--data_path", url]),
        (app.main, ["--port", url]),
        (reformat_dataset.main, ["--data_path", url]),
    ]


def commands_with_run(url: str, train: list[str], folder: Path) -> list[Command]:
    """Commands that take the URL of a folder on a server that answers."""
    return [
        (main_task_retrieval.main, [*train, "--resume_model", f"{url}/training_state.bin.0"]),
        (main_task_retrieval.main, [*train, "--features_path", url]),
        (CLIP4IDCinference.main, ["--do_predict", "--before", url, "--after", url]),
        (CLIP4IDCinference.main, ["--do_predict", "--pairs", f"{url}/pairs.csv"]),
        (CLIP4IDCinference.main, ["--do_predict", *PAIR, "--decoder_model", url]),
        (eval_utils.main, ["score", "--gt", url, "--results", url]),
        (download.main, ["clip", "--to", str(folder / "c")]),
    ]


def test_no_refusal_shows_a_password(tmp_path, tiny_sizes, capsys, caplog):
    data = make_spot(tmp_path / "data", {"train": 4, "val": 2, "test": 3})
    files = {
        "run/training_state.bin.0.json": b'{"sha": 1}',
        "page.bin": b"<html>",
        "noise.bin": b"no weights",
    }
    train = arguments(data, tmp_path / "run", tiny_sizes, "retrieval")
    train.insert(0, "--do_train")
    with web_site(files) as site:
        host = site.url.removeprefix("http://")
        commands = commands_with_run(f"http://user:{MARK}@{host}/run", train, tmp_path)
        for number, url in enumerate(bad_urls(host)):
            others = commands_with(url, train, tmp_path)
            commands.append(others[number % len(others)])
            predict = ["--do_predict", *PAIR, "--init_model", url]
            commands.append((CLIP4IDCinference.main, predict))
        for command, options in commands:
            urls._known_secrets.clear()
            with pytest.raises(SystemExit) as stop:
                command(options)
            assert stop.value.code == 2, options
            said = capsys.readouterr()
            check_clean(tmp_path / "nothing", said.out, said.err)
            assert len(said.err.strip().splitlines()[-1]) > 20
        for url in bad_urls(host):
            urls._known_secrets.clear()
            with pytest.raises((ValueError, OSError)) as error:
                Predictor.load(url)
            assert MARK not in str(error.value)
    lines = [SafeFormatter("%(message)s").format(record) for record in caplog.records]
    check_clean(tmp_path, *lines)


@pytest.mark.parametrize(
    "endpoint",
    [
        f"http://user:{MARK}{'x' * 190}@127.0.0.1:bad/",
        f"{MARK}@host",
        f"someone:pa {MARK}@host",
        f"http://u:{MARK}@bad host:1",
    ],
)
def test_an_endpoint_that_is_not_a_url_is_shown_without_its_password(endpoint, monkeypatch, capsys):
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    urls._known_secrets.clear()
    with pytest.raises(SystemExit, match="2"):
        convert_weights.main(["--inspect", "s3://bucket/key.bin"])
    said = capsys.readouterr().err
    assert "s3://bucket/key.bin" in said
    assert MARK not in said


def test_messages_of_the_hub_are_scrubbed(monkeypatch, capsys):
    import huggingface_hub

    def refuse(*_, **__):
        raise RuntimeError(
            f"401 for https://huggingface.co/api/x?token={MARK} with HF_TOKEN-{AROUND} "
            f"by http://someone:{'x' * 160}{MARK}@127.0.0.1:9"
        )

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(SystemExit, match="2"):
        CLIP4IDCinference.main(["--do_predict", *PAIR, "--init_model", "owner/name"])
    line = capsys.readouterr().err
    assert "401 for https://huggingface.co/api/x" in line
    assert MARK not in line
    assert AROUND not in line


def test_the_traceback_of_a_bug_has_no_secrets(monkeypatch, capsys):
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)  # run_command replaces it

    def job() -> None:
        secret = Location(f"http://user:{MARK}@host/x").reveal()
        raise KeyError(f"{secret} {MARK}")

    with pytest.raises(KeyError) as error:
        run_command("x", job)
    sys.excepthook(error.type, error.value, error.tb)
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert "KeyError: 'http://host/x ***'" in said
    assert MARK not in said

"""A marked password, put wherever one can stand, must not show up in any output or file."""

import json
import logging
import sys
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
from system.urls import Address, redact, scrub
from tests.conftest import ROOT, make_spot
from tests.runs import words
from tests.servers import web_site

MARK, AROUND = (
    "hunter2Mark",
    "3nvironMark",
)  # of addresses that are given, and of the environment: one must not hide the other
EXAMPLES = ROOT / "docs" / "examples"
PAIR = [
    "--before",
    str(EXAMPLES / "removed_before.png"),
    "--after",
    str(EXAMPLES / "removed_after.png"),
]


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


def is_clean(folder: Path, *texts: str) -> bool:
    """Whether the marks stand neither in the texts nor in a file or a name below the folder."""
    found = [text for text in texts if MARK in text or AROUND in text]
    for path in folder.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        found += [
            str(path) for mark in (MARK, AROUND) if mark in path.name or mark.encode() in content
        ]
    assert not found, found
    return True


def test_both_stages_prediction_scoring_conversion_and_export_keep_no_password(
    tmp_path, tiny_sizes, capsys, monkeypatch
):
    # Java takes long to start, and knows no address.
    monkeypatch.setattr(Meteor, "rows", lambda self, references, captions: [[0.5]] * len(captions))
    monkeypatch.setattr(Meteor, "scores", MeanMetric.scores)
    monkeypatch.setattr(ptb, "tokenize_lines", lambda lines: [line.lower() for line in lines])
    torch.manual_seed(0)
    torch.save(random_clip(read_sizes(tiny_sizes)), tmp_path / "clip.bin")
    data, work = make_spot(tmp_path / "data", {"train": 4, "val": 2, "test": 3}), tmp_path / "work"
    one = ["--epochs", "1", "--quick_gelu"]
    with web_site({"clip.bin": (tmp_path / "clip.bin").read_bytes()}) as site:
        place = f"http://user:{MARK}@{site.address.removeprefix('http://')}"
        run = work / "adapted"
        stage1 = words(
            data,
            run,
            tiny_sizes,
            "retrieval",
            *one,
            "--pretrained_clip_name",
            f"{place}/clip.bin?sig={MARK}",
        )
        assert main_task_retrieval.main(["--do_train", *stage1]) == 0
        for name in (
            "pytorch_model.bin.best",
            "training_state.bin.0",
            "training_state.bin.0.json",
            "model.json",
            "history.csv",
            "pytorch_model.bin.0",
        ):
            site.files[f"run/{name}"] = (run / name).read_bytes()
        again = words(
            data,
            work / "resumed",
            tiny_sizes,
            "retrieval",
            *one,
            "--resume_model",
            f"{place}/run/training_state.bin.0",
        )
        assert main_task_retrieval.main(["--do_train", *again]) == 0
        stage2 = words(
            data,
            work / "captioner",
            tiny_sizes,
            "caption",
            *one,
            "--init_model",
            f"{place}/run/pytorch_model.bin.best",
        )
        assert CLIP4IDCinference.main(["--do_train", *stage2]) == 0
        for name in ("pytorch_model.bin.best", "model.json"):
            site.files[f"done/{name}"] = (work / "captioner" / name).read_bytes()
        model = f"{place}/done/pytorch_model.bin.best"
        evaluated = words(data, work / "evaluated", tiny_sizes, "caption", "--init_model", model)
        assert CLIP4IDCinference.main(["--do_eval", *evaluated]) == 0
        for output in ([], ["--predictions", str(work / "p.csv")]):
            assert (
                CLIP4IDCinference.main(["--do_predict", *PAIR, "--init_model", model, *output]) == 0
            )
        assert convert_weights.main([model, str(work / "converted.safetensors")]) == 0
        assert convert_weights.main(["--inspect", model]) == 0
        assert export_model.main([model, str(work / "exported"), "--trained_on", "squares"]) == 0
        assert Predictor.load(model).caption(*PAIR[1::2])
    results = work / "evaluated" / "hyp_ep_eval.json"
    assert (
        eval_utils.main(
            [
                "score",
                "--gt",
                str(data / "gt" / "spot_total_change_captions_reformat.json"),
                "--results",
                str(results),
            ]
        )
        == 0
    )
    said = capsys.readouterr()
    report = (work / "evaluated" / "report.html").read_text()
    host = site.address.removeprefix("http://")
    assert f"http://{host}/done/pytorch_model.bin.best" in report, (
        "the address itself stands there, without its secrets"
    )
    assert "weights from " in said.err
    assert is_clean(tmp_path, said.out, said.err)


def bad_addresses(host: str) -> list[str]:
    """Addresses that lead to nothing, mistyped ones and foreign schemes included."""
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


def test_no_refusal_tells_a_password(tmp_path, tiny_sizes, capsys, caplog):
    data = make_spot(tmp_path / "data", {"train": 4, "val": 2, "test": 3})
    state = {
        "run/training_state.bin.0.json": b'{"sha": 1}',
        "page.bin": b"<html>",
        "noise.bin": b"no weights",
    }
    with web_site(state) as site:
        host = site.address.removeprefix("http://")
        train = ["--do_train", *words(data, tmp_path / "run", tiny_sizes, "retrieval")]
        commands = []
        for number, address in enumerate(bad_addresses(host)):
            others = [
                (main_task_retrieval.main, [*train, "--pretrained_clip_name", address]),
                (
                    main_task_retrieval.main,
                    [*train, "--resume_model", f"{address}/training_state.bin.0"],
                ),
                (convert_weights.main, ["--inspect", address]),
                (convert_weights.main, [address, str(tmp_path / "out.bin")]),
                (export_model.main, [address, str(tmp_path / "exported"), "--trained_on", "x"]),
                (main_task_retrieval.main, ["--do_eval", *train[1:], "--init_modle", address]),
                (main_task_retrieval.main, ["--do_eval", *train[1:], f"--init_modle={address}"]),
                (main_task_retrieval.main, ["--do_eval", *train[1:], "--datatype", address]),
                (main_task_retrieval.main, [*train, "--data_path", address]),
                (app.main, ["--port", address]),
                (reformat_dataset.main, ["--data_path", address]),
            ]
            commands += [
                (CLIP4IDCinference.main, ["--do_predict", *PAIR, "--init_model", address]),
                others[number % len(others)],
            ]
        url = f"http://user:{MARK}@{host}/run"
        commands += [
            (main_task_retrieval.main, [*train, "--resume_model", f"{url}/training_state.bin.0"]),
            (main_task_retrieval.main, [*train, "--features_path", url]),
            (CLIP4IDCinference.main, ["--do_predict", "--before", url, "--after", url]),
            (CLIP4IDCinference.main, ["--do_predict", "--pairs", f"{url}/pairs.csv"]),
            (CLIP4IDCinference.main, ["--do_predict", *PAIR, "--decoder_model", url]),
            (eval_utils.main, ["score", "--gt", url, "--results", url]),
            (download.main, ["clip", "--to", str(tmp_path / "c")]),
        ]
        for command, options in commands:
            urls._known.clear()
            with pytest.raises(SystemExit) as stop:
                command(options)
            assert stop.value.code == 2, options
            said = capsys.readouterr()
            assert MARK not in said.out + said.err, options
            assert AROUND not in said.out + said.err, options
            assert len(said.err.strip().splitlines()[-1]) > 20
        for address in bad_addresses(host):
            urls._known.clear()
            with pytest.raises((ValueError, OSError)) as error:
                Predictor.load(address)
            assert MARK not in str(error.value)
    assert is_clean(
        tmp_path, *(SafeFormatter("%(message)s").format(record) for record in caplog.records)
    )


@pytest.mark.parametrize(
    "endpoint",
    [
        f"http://user:{MARK}{'x' * 190}@127.0.0.1:bad/",
        f"{MARK}@host",
        f"someone:pa {MARK}@host",
        f"http://u:{MARK}@bad host:1",
    ],
)
def test_an_endpoint_that_is_none_is_told_without_its_password(endpoint, monkeypatch, capsys):
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    urls._known.clear()
    with pytest.raises(SystemExit, match="2"):
        convert_weights.main(["--inspect", "s3://bucket/key.bin"])
    said = capsys.readouterr().err
    assert "s3://bucket/key.bin" in said
    assert MARK not in said


@pytest.mark.parametrize(
    "name",
    [
        "PGPASSWORD",
        "DB_PASS",
        "GITHUB_PAT",
        "OPENAI_APIKEY",
        "HF_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "X_AUTH",
        "DATABASE_URL",
    ],
)
def test_secrets_of_the_environment_are_known(name, monkeypatch):
    value = f"https://x:{MARK}@host/" if name.endswith("URL") else MARK
    monkeypatch.setenv(name, value)
    assert scrub(f"a {MARK} b") == "a *** b"


def test_the_hubs_own_words_are_scrubbed(tmp_path, monkeypatch, capsys):
    import huggingface_hub

    def refuse(*_, **__):
        raise RuntimeError(
            f"401 for https://huggingface.co/api/x?token={MARK} with HF_TOKEN-{AROUND} "
            f"by http://someone:{'x' * 160}{MARK}@127.0.0.1:9"
        )

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", refuse)
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
        secret = Address(f"http://user:{MARK}@host/x").reveal()
        raise KeyError(f"{secret} {MARK}")

    with pytest.raises(KeyError) as error:
        run_command("x", job)
    sys.excepthook(error.type, error.value, error.tb)
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert "KeyError: 'http://host/x ***'" in said
    assert MARK not in said


def test_an_address_cannot_be_written_by_mistake():
    address = Address(f"http://user:{MARK}@host/x.bin?sig={MARK}")
    for text in (
        str(address),
        repr(address),
        f"{address}",
        f"{address:>40}",
        "%s" % address,  # noqa: UP031
        "{}".format(address),  # noqa: UP032
        f"{[address]}",
    ):
        assert MARK not in text
    with pytest.raises(TypeError):
        json.dumps(address)
    with pytest.raises(TypeError):
        "".join([address])
    assert address.reveal().count(MARK) == 2
    assert Address("x") == Address("x") != Address("y")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("https://user:word@host/a/b.bin?X-Signature=secret", "https://host/a/b.bin"),
        ("http://user@host/x", "http://host/x"),
        ("http://a:b@c@host/x", "http://host/x"),
        ("http://a:b?c@host/x", "http://***"),
        ("http://host/x?a=b@c", "http://***"),
        ("http://host/x#key=1", "http://host/x"),
        ("htps://u:p@host/x", "htps://host/x"),
        ("https:u:p@host/x", "https:host/x"),
        ("u:p@host/x", "host/x"),
        ("token@host/x", "host/x"),
        ("s3://k:s@bucket/key", "s3://bucket/key"),
        ("//u:p@host/x", "//host/x"),
        ("host/x?token=1", "host/x"),
        ("ViT-L/14@336px", "ViT-L/14@336px"),
        ("owner/name@v1.0", "owner/name@v1.0"),
        ("http://u:p%40host/x", "http://host/x"),
        ("http://u:password/x", "http://***/x"),
        ("http://host:80/x", "http://host:80/x"),
        ("http://[::1]:80/x", "http://[::1]:80/x"),
        ("http://host/x%3Fa=1", "http://host/x"),
        ("http://host/x;a=1/y", "http://host/x"),
        ("http://host/x&a=1", "http://host/x"),
        ("runs/a?b", "runs/a?b"),
        ("", ""),
    ],
)
def test_what_is_shown_of_a_name(name, shown):
    assert redact(name) == shown
    assert str(Address(name)) == shown


def test_files_that_are_there_are_called_by_their_whole_names(tmp_path):
    path = tmp_path / "me@home?x=1.bin"
    path.write_bytes(b"")
    assert redact(str(path)) == str(path)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (
            'EndpointConnectionError: "http://user:pw@127.0.0.1:9/b"',
            'EndpointConnectionError: "http://127.0.0.1:9/b"',
        ),
        (
            "Max retries exceeded with url: /x.bin?X-Amz-Signature=1 (Caused by",
            "Max retries exceeded with url: /x.bin (Caused by",
        ),
        ("proxy=('http://u:p@c:1'), next", "proxy=('http://c:1'), next"),
        ("12:30:01 mail me@example.org", "12:30:01 mail me@example.org"),
        ("weights owner/name@v1 and ViT-L/14@336px", "weights owner/name@v1 and ViT-L/14@336px"),
        ("why? because a=b", "why? because a=b"),
        ("what changed? nothing", "what changed? nothing"),
        ("a token of user:pw@host", "a token of host"),
        ("x://a@b//c@d", "x://d"),
    ],
)
def test_texts_lose_the_secrets_of_addresses_in_them(text, clean):
    assert scrub(text) == clean


def test_log_lines_lose_control_characters_and_forge_nothing():
    def line(message: str, *args: object) -> str:
        return SafeFormatter("%(message)s").format(
            logging.LogRecord("x", logging.INFO, "x", 1, message, args, None)
        )

    assert line("id %s\nrow", "a\nall 9.9\x1b[2J\u202e") == "id a\\nall 9.9\\x1b[2J\\u202e\nrow"
    assert line("%d of %.2f %s", 3, 0.5, Path("a\tb")) == "3 of 0.50 a\\tb"
    assert line("%s", ValueError("a\r\x9b")) == "a\\r\\x9b"
    assert line("%s", Address(f"http://u:{MARK}@h/x")) == "http://h/x"
    assert line("%s 字 é 👩‍👩‍👧", "字 é 👩‍👩‍👧 \ud800") == "字 é 👩‍👩‍👧 \\ud800 字 é 👩‍👩‍👧"

"""A dataset of one class and one line in the registry takes part in everything that datasets do."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from dataloaders.datasets import DATASETS, open_dataset
from dataloaders.pairs import SPLITS, ImagePair, PairDataset
from gt import eval_utils
from modules.metrics.metric import ScoringProtocol
from modules.options import parse_options
from modules.registries import PROTOCOLS
from preprocess import check_dataset
from system.flags import flag
from system.json_files import read_json, write_json
from tests.conftest import COLORS, SIZES, draw_pair, lower_case
from tests.runs import SCRIPTS, run_refused


@dataclass(frozen=True)
class LevirSettings:
    changed_only: bool = flag(False, "leave out pairs in which nothing changed", bool)


class LevirCC(PairDataset):
    """LEVIR-CC: LevirCCcaptions.json in data_path, images/<split>/{A,B}/<filename> beside it."""

    name = "levir-cc"
    title = "LEVIR-CC"
    Settings = LevirSettings
    defaults = {"max_words": 14}
    no_change_phrases = ("there is no difference", "nothing has changed")

    def pairs(self, split: str, need_images: bool = True) -> list[ImagePair]:
        folder = self.source.data_path / "images" / split
        pairs = []
        for row in read_json(self.annotation_file(split), dict)["images"]:
            if row["split"] != split or (self.settings.changed_only and not row["changeflag"]):
                continue
            pair = ImagePair(
                row["filename"],
                str(folder / "A" / row["filename"]),
                str(folder / "B" / row["filename"]),
                tuple(sentence["raw"].strip() for sentence in row["sentences"]),
                change_type="change" if row["changeflag"] else "no change",
            )
            pairs.append(pair)
        return pairs

    def annotation_file(self, split: str) -> Path:
        return self.source.data_path / "LevirCCcaptions.json"


WITHOUT_JAVA = ScoringProtocol(
    tokenize=lower_case,
    metrics=("cider",),
)


@pytest.fixture(autouse=True)
def _own_registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    for registry in (DATASETS, PROTOCOLS):
        monkeypatch.setattr(registry, "targets", dict(registry.targets))


@pytest.fixture
def registered(_own_registries: None) -> None:
    DATASETS.register("levir-cc", LevirCC)


@pytest.fixture(scope="module")
def levir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LEVIR-CC of colored squares in its layout; in every fourth pair nothing changes."""
    root = tmp_path_factory.mktemp("levir")
    rows = []
    for split, size in SIZES.items():
        for _ in range(size):
            number = len(rows)
            name = f"{split}_{number:06d}.png"
            changed = number % 4 != 3
            color = list(COLORS)[number % 4] if changed else None
            draw_pair(root / "images" / split, [f"A/{name}", f"B/{name}"], color, number)
            text = f" a {color} square has appeared" if changed else " nothing has changed"
            sentences = [{"raw": text}, {"raw": f"{text} at all"}]
            row = {"filename": name, "split": split, "changeflag": int(changed)}
            rows.append({**row, "sentences": sentences})
    write_json(root / "LevirCCcaptions.json", {"images": rows})
    return root


def command(levir: Path, output: Path, sizes: Path, *more: str) -> list[str]:
    """A command line for one epoch; --max_words is left to the dataset."""
    words = f"--datatype levir-cc --data_path {levir} --output_dir {output} --epochs 1"
    words += f" --pretrained_clip_name {sizes} --intra_num_hidden_layers 1 --lr 1e-3"
    words += " --batch_size 2 --batch_size_val 3 --num_thread_reader 0"
    return [*words.split(), *more]


def test_it_is_checked_before_a_training(
    registered: None, levir: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ["--datatype", "levir-cc", "--data_path", str(levir)]
    assert check_dataset.main(words) == 0
    out = capsys.readouterr().out
    assert "train: 8 pairs, 16 captions, the longest 8 tokens" in out
    assert "val: 3 pairs" in out
    assert check_dataset.main([*words, "--changed_only", "--splits", "train"]) == 0
    assert "train: 6 pairs, 12 captions" in capsys.readouterr().out
    assert check_dataset.main([*words, "--max_words", "7", "--splits", "train"]) == 0
    assert "6 captions are longer than --max_words 7" in capsys.readouterr().out


def test_its_ground_truth_is_written(registered: None, levir: Path, tmp_path: Path) -> None:
    words = ["--datatype", "levir-cc", "--data_path", str(levir), "--output", str(tmp_path / "gt")]
    assert eval_utils.main([*words, "--split", "val"]) == 0
    truth = json.loads((tmp_path / "gt").read_text())
    names = ["val_000008.png", "val_000009.png", "val_000010.png"]
    assert [image["id"] for image in truth["images"]] == names
    assert truth["annotations"][0]["caption"] == "a red square has appeared"
    assert eval_utils.main([*words, "--changed_only"]) == 0
    truth = json.loads((tmp_path / "gt").read_text())
    assert len(truth["images"]) == 3


def test_adaptation_resumes_and_refuses_other_settings(
    registered: None,
    levir: Path,
    tiny_sizes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    run = tmp_path / "run"
    words = command(levir, run, tiny_sizes, "--do_train")
    words += ["--changed_only", "--resume", "auto"]
    assert SCRIPTS["retrieval"].main(words) == 0
    assert SCRIPTS["retrieval"].main([*words, "--epochs", "2", "--resume_force"]) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["datatype"] == "levir-cc"
    assert "text_to_pair_R1" in metrics
    assert len((run / "history.csv").read_text().splitlines()) == 3
    assert json.loads((run / "model.json").read_text())["max_words"] == 14
    words.remove("--changed_only")
    error = run_refused("retrieval", [*words, "--epochs", "2"], capsys)
    assert "--changed_only is False, was True" in error


def test_finetuning_and_evaluation(
    registered: None,
    levir: Path,
    tiny_sizes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, judged = tmp_path / "run", tmp_path / "judged"
    PROTOCOLS.register("without java", WITHOUT_JAVA)
    with monkeypatch.context() as patch:
        patch.setattr(LevirCC, "protocols", ("without java",))
        words = command(levir, run, tiny_sizes, "--do_train", "--decoder_num_hidden_layers", "1")
        assert SCRIPTS["caption"].main(words) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics.keys() == {"stage", "datatype", "split", "CIDEr"}
    # Now with the published scores.
    weights = str(run / "pytorch_model.bin.best")
    words = command(levir, judged, tiny_sizes, "--do_eval", "--init_model", weights)
    assert SCRIPTS["caption"].main(words) == 0
    captions = json.loads((judged / "hyp_ep_eval.json").read_text())
    names = [f"test_{number:06d}.png" for number in range(11, 16)]
    assert [row["image_id"] for row in captions] == names
    metrics = json.loads((judged / "metrics.json").read_text())
    assert (metrics["datatype"], metrics["split"]) == ("levir-cc", "test")
    assert metrics["Bleu_4"] is not None
    assert json.loads((judged / "type_mapping.json").read_text()) == {
        "change": [names[1], names[2], names[3]],
        "no change": [names[0], names[4]],
    }
    truth = json.loads((judged / "ground_truth.json").read_text())
    assert [image["id"] for image in truth["images"]] == names
    log = (judged / "log.txt").read_text()
    assert "best constant (all: “" in log
    assert "random training caption (change)" in log
    scores = log[log.rindex("caption scores") :].splitlines()
    assert [line[:9].strip() for line in scores[2:5]] == ["all", "change", "no change"]
    report = (judged / "report.html").read_text()
    assert all(name in report for name in names)


def test_flags_and_defaults_of_its_own(
    registered: None, levir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = command(levir, tmp_path / "run", tmp_path / "sizes.json", "--do_train")
    options = parse_options(words, "caption", "")
    assert options.data.max_words == 14
    assert options.data.settings == LevirSettings(changed_only=False)
    assert ("changed_only", False) in options.items()
    options = parse_options([*words, "--max_words", "20", "--changed_only"], "caption", "")
    assert options.data.max_words == 20
    assert options.data.settings == LevirSettings(changed_only=True)
    assert len(options.data.open_dataset().checked_pairs("train")) == 6
    assert len(open_dataset("levir-cc", levir).checked_pairs("train")) == 8
    for main in (SCRIPTS["caption"].main, check_dataset.main, eval_utils.main):
        with pytest.raises(SystemExit, match="0"):
            main(["--datatype", "levir-cc", "--help"])
        out = " ".join(capsys.readouterr().out.split())
        assert "settings of dataset levir-cc" in out
        assert "leave out pairs in which nothing changed" in out
        assert "spot, clevr, pairs, levir-cc" in out
        assert ("(default: 14)" in out) == (main is not eval_utils.main)
    words[words.index("levir-cc")] = "pairs"
    error = run_refused("caption", [*words, "--changed_only"], capsys)
    assert "unrecognized arguments: --changed_only" in error


def test_an_installed_package_adds_it(
    levir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = tmp_path / "packages/my_package-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    entry_point = f"levir-cc = {__name__}:LevirCC"
    (metadata / "entry_points.txt").write_text(f"[{DATASETS.group}]\n{entry_point}\n")
    monkeypatch.syspath_prepend(metadata.parent)
    words = command(levir, tmp_path / "run", tmp_path / "sizes.json", "--do_train")
    dataset = parse_options(words, "retrieval", "").data.open_dataset()
    assert [len(dataset.checked_pairs(split)) for split in SPLITS] == list(SIZES.values())


def test_a_missing_image_is_one_line(
    registered: None, levir: Path, tiny_sizes: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    content = (levir / "LevirCCcaptions.json").read_text()
    (tmp_path / "LevirCCcaptions.json").write_text(content)
    words = command(tmp_path, tmp_path / "run", tiny_sizes, "--do_train")
    assert "no image" in run_refused("retrieval", words, capsys)
    assert not (tmp_path / "run").exists()


class WithoutPairs(PairDataset):
    name = "bad"
    title = "A dataset that forgot its pairs"


class TakesSeed(LevirCC):
    name = "bad"

    @dataclass(frozen=True)
    class Settings:
        seed: int = flag(0, "of another kind", int)


class SetsUnknownFlag(LevirCC):
    name = "bad"
    defaults = {"max_wrods": 14}


class SetsRefusedValue(LevirCC):
    name = "bad"
    defaults = {"max_words": 100}


class NeedsGpsFile(LevirCC):
    name = "bad"

    def find_problems(self) -> list[str]:
        return ["--gps is required: the file of the images' places"]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (None, "invalid choice: 'bad' (choose from 'spot', 'clevr', 'pairs')"),
        (WithoutPairs, "dataset 'bad' lacks pairs"),
        (LevirSettings, "dataset 'bad' lacks name, title, "),
        ("no_such_package.bad:Bad", "cannot be loaded from no_such_package.bad:Bad: No module"),
        (f"{__name__}:NoSuchClass", "has no attribute 'NoSuchClass'"),
        (LevirCC, "'bad' is registered, but its class has name = 'levir-cc'"),
        (TakesSeed, "--seed"),
        (SetsUnknownFlag, "max_wrods"),
        (SetsRefusedValue, "--max_words is 100, expected 3 to 77"),
        (NeedsGpsFile, "--gps is required: the file of the images' places"),
    ],
)
def test_a_dataset_that_cannot_be_used_is_one_line(
    target: object, message: str, levir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    if target is not None:
        DATASETS.register("bad", target)
    words = command(levir, tmp_path / "run", tmp_path / "sizes.json", "--do_train")
    words[words.index("levir-cc")] = "bad"
    with pytest.raises(SystemExit) as stop:
        SCRIPTS["caption"].main(words)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("main", [check_dataset.main, eval_utils.main])
@pytest.mark.parametrize("target", [None, WithoutPairs, LevirCC, "no_such_package:Bad"])
def test_other_commands_refuse_it_likewise(
    main: object, target: object, levir: Path, capsys: pytest.CaptureFixture
) -> None:
    if target is not None:
        DATASETS.register("bad", target)
    with pytest.raises(SystemExit) as stop:
        main(["--datatype", "bad", "--data_path", str(levir)])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "bad" in error
    assert error.count("\n") == 1


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="dataset 'spot' is registered already"):
        DATASETS.register("spot", LevirCC)

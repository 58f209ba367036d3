"""Downloads of datasets and weights from a local server instead of Google Drive; archives."""

import gzip
import hashlib
import io
import json
import random
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from dataloaders.datasets import DATASETS, open_dataset
from dataloaders.datasets.clevr_change import CAPTION_FILES, FOLDERS
from dataloaders.datasets.pair_table import PairTable
from modules.weights import remote
from preprocess import download
from system import download as system_download
from system import extraction
from system.extraction import DamagedArchive, extract_to_temporary
from tests.conftest import SIZES, tiny_weights
from tests.servers import google_drive, web_site


@pytest.fixture
def drive(tmp_path, monkeypatch):
    monkeypatch.setattr(system_download, "FIRST_DELAY", 0.0)
    monkeypatch.setattr("random.uniform", lambda *_: 0.0)  # between gdown's attempts
    with google_drive(monkeypatch, tmp_path) as site:
        yield site


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """The numbers of pairs that the drawn datasets have."""
    monkeypatch.setattr(
        download, "RAW_ENTRIES", {split: count + 1 for split, count in SIZES.items()}
    )
    monkeypatch.setattr(download, "PAIRS", SIZES)
    monkeypatch.setattr(download, "SCENES", SIZES)


def packed(folder: Path, below: str, kind: str, more: bytes = b"") -> bytes:
    """A folder as an archive, below another folder, and with a file `more` of these bytes."""
    content = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(content, "w") as archive:
            for path in sorted(folder.rglob("*")):
                archive.write(path, f"{below}/{path.relative_to(folder)}")
            archive.writestr("more", more)
    else:
        with tarfile.open(fileobj=content, mode="w:gz") as archive:
            archive.add(folder, below)
            entry = tarfile.TarInfo("more")
            entry.size = len(more)
            archive.addfile(entry, io.BytesIO(more))
    return content.getvalue()


def refused(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        download.main(list(words))
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def serve(drive, item_id: str, name: str, content: bytes) -> None:
    """Put a file on the drive."""
    drive.files[item_id] = content
    drive.names[item_id] = name


def serve_spot(drive, spot: Path, kind: str = "zip") -> None:
    """Put a drawn dataset where Spot-the-Diff is; the last pair has two annotators."""
    lists = {split: f"list-{split}-0123456789012345678" for split in SIZES}
    for split, list_id in lists.items():
        entries = json.loads((spot / f"{split}.json").read_text())
        last = entries.pop()
        entries += [{**last, "sentences": ["one"]}, {**last, "sentences": ["two"]}]
        url = f"harsh19/spot-the-diff/master/data/annotations/{split}.json"
        drive.files[url] = json.dumps(entries).encode()
        drive.files[list_id] = (spot / f"reformat_{split}.json").read_bytes()
        drive.names[list_id] = f"reformat_{split}.json"
    drive.folders[download.SPOT_LISTS.id] = list(lists.values())
    noise = random.Random(0).randbytes(2_000_000)
    images = packed(spot / "images_test", "resized_images", kind, noise)
    serve(drive, download.SPOT_IMAGES.id, "resized_images.zip", images)


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_spot_the_diff_is_downloaded_whole_and_only_once(drive, spot, tmp_path, capsys, kind):
    serve_spot(drive, spot, kind)
    folder = tmp_path / "images"
    chunk = 512 * 1024  # of gdown's
    drive.broken[download.SPOT_IMAGES.id] = [chunk, 2 * chunk] + [0] * download.RETRIES
    assert "the file that it saves" in refused(capsys, "spot", "--to", str(folder))
    assert not (folder / "images_test").exists()
    assert download.main(["spot", "--to", str(folder)]) == 0
    assert f"{sum(SIZES.values())} pairs, all images there" in capsys.readouterr().out
    dataset = open_dataset("spot", folder, folder / "images_test")
    for split, size in SIZES.items():
        assert len(dataset.checked_pairs(split)) == size
    starts = [asked for name, asked in drive.asked if name == download.SPOT_IMAGES.id and asked]
    assert starts[0] == f"bytes={chunk}-"
    assert starts[-1] == f"bytes={2 * chunk}-", "the second command resumes where the first stopped"
    left = [path.name for path in folder.iterdir()]
    assert not [name for name in left if name.endswith((".archive", ".part"))]
    assert not [name for name in left if name.startswith(".unpacking")]
    num_asked = len(drive.asked)
    assert download.main(["spot", "--to", str(folder)]) == 0
    assert len(drive.asked) == num_asked


def test_merged_lists_are_made_where_the_drive_refuses_them(drive, spot, tmp_path, capsys):
    serve_spot(drive, spot)
    drive.folders.clear()
    assert download.main(["spot", "--to", str(tmp_path / "images")]) == 0
    assert "Making them from the annotations instead" in capsys.readouterr().err
    merged = json.loads((tmp_path / "images" / "reformat_val.json").read_text())
    assert merged[-1]["sentences"] == ["one", "two"]


def test_clevr_change_is_downloaded_whole(drive, clevr, tmp_path, capsys):
    serve(drive, download.CLEVR.id, "clevr.tar.gz", packed(clevr, "CLEVR_Change/data", "tar.gz"))
    folder = tmp_path / "data"
    assert download.main(["clevr", "--to", str(folder)]) == 0
    assert f"{sum(SIZES.values())} scenes, all images there" in capsys.readouterr().out


def test_a_lost_image_comes_back_and_other_files_stay(drive, clevr, tmp_path):
    serve(drive, download.CLEVR.id, "clevr.tar.gz", packed(clevr, "CLEVR_Change/data", "tar.gz"))
    folder = tmp_path / "data"
    assert download.main(["clevr", "--to", str(folder)]) == 0
    lost = folder / "sc_images" / "CLEVR_semantic_000003.png"
    lost.unlink()
    (folder / "own.txt").write_text("mine")
    assert download.main(["clevr", "--to", str(folder)]) == 0
    assert lost.is_file()
    assert (folder / "own.txt").read_text() == "mine"


def test_an_archive_of_another_dataset_is_refused(drive, spot, clevr, tmp_path, capsys):
    serve_spot(drive, spot)
    drive.files[download.SPOT_IMAGES.id] = packed(clevr, "x", "zip")
    line = refused(capsys, "spot", "--to", str(tmp_path / "a"))
    assert "is not laid out as Spot-the-Diff's images: it holds more, x" in line
    assert not (tmp_path / "a" / "images_test").exists()


def test_wrong_counts_are_refused(drive, spot, clevr, tmp_path, capsys, monkeypatch):
    serve_spot(drive, spot)
    monkeypatch.setattr(download, "RAW_ENTRIES", {**download.RAW_ENTRIES, "val": 1634})
    line = refused(capsys, "spot", "--to", str(tmp_path / "b"))
    assert f"4 entries of {tmp_path / 'b' / 'val.json'}, expected 1634" in line
    few = tmp_path / "few"
    for folder, prefix in FOLDERS.items():
        (few / folder).mkdir(parents=True)
        (few / folder / f"{prefix}000000.png").write_bytes(b"x")
    for name in (*CAPTION_FILES, "splits.json", "type_mapping.json"):
        (few / name).write_bytes((clevr / name).read_bytes())
    serve(drive, download.CLEVR.id, "clevr.zip", packed(few, "data", "zip"))
    assert "3 images below" in refused(capsys, "clevr", "--to", str(tmp_path / "c"))


def test_a_spent_quota_says_what_to_do_by_hand(drive, spot, tmp_path, capsys):
    serve_spot(drive, spot)
    drive.exhausted.add(download.SPOT_IMAGES.id)
    line = refused(capsys, "spot", "--to", str(tmp_path / "images"))
    assert "Too many users have viewed or downloaded this file recently" in line
    url = f"https://drive.google.com/file/d/{download.SPOT_IMAGES.id}"
    assert f"open {url} in a browser and give --archive" in line
    by_hand = tmp_path / "saved.zip"
    by_hand.write_bytes(drive.files[download.SPOT_IMAGES.id])
    assert download.main(["spot", "--to", str(tmp_path / "images"), "--archive", str(by_hand)]) == 0
    assert by_hand.is_file(), "the user's own file stays"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("<!DOCTYPE html><html>Quota exceeded</html>", "saved.zip is an HTML page, not CLEVR-Chan"),
        ("no archive", "neither a zip nor a tar archive"),
    ],
)
def test_a_file_by_hand_that_is_no_archive_is_refused(tmp_path, capsys, content, message):
    by_hand = tmp_path / "saved.zip"
    by_hand.write_text(content)
    words = ("clevr", "--to", str(tmp_path / "c"), "--archive", str(by_hand))
    assert message in refused(capsys, *words)


def test_a_corrupt_download_is_deleted(drive, clevr, tmp_path, capsys):
    corrupt = packed(clevr, "x", "zip")[:-100] + bytes(100)
    serve(drive, download.CLEVR.id, "clevr.zip", corrupt)
    line = refused(capsys, "clevr", "--to", str(tmp_path / "c"))
    assert "is incomplete" in line
    assert not list((tmp_path / "c").iterdir()), "or it would be taken for complete the next time"


def test_the_authors_weights_are_read_after_the_download(drive, tmp_path, capsys):
    content = io.BytesIO()
    torch.save(tiny_weights(), content)
    weights_id, readme_id = "adapted-spot-0123456789012345", "readme-01234567890123456789012"
    serve(drive, weights_id, "pytorch_model.bin.spot", content.getvalue())
    serve(drive, readme_id, "readme.txt", b"words")
    drive.folders[download.ADAPTED.id] = [weights_id, readme_id]
    assert download.main(["pretrained", "--to", str(tmp_path / "pretrained")]) == 0
    assert "pytorch_model.bin.spot: adapted CLIP" in capsys.readouterr().out
    assert (tmp_path / "pretrained" / "readme.txt").read_bytes() == b"words"
    drive.folders[download.CAPTIONERS.id] = [weights_id]
    drive.exhausted.add(weights_id)
    line = refused(capsys, "trained", "--to", str(tmp_path / "trained"))
    url = f"https://drive.google.com/drive/folders/{download.CAPTIONERS.id}"
    assert f"open {url} in a browser and save its files in" in line
    assert not list((tmp_path / "trained").glob("*.bin*"))


def test_openais_clip_goes_where_it_is_looked_for(tmp_path, monkeypatch, capsys):
    digest = hashlib.sha256(b"clip").hexdigest()
    monkeypatch.setitem(remote.CLIP_SHA256, "ViT-B/16", digest)
    with web_site({f"{digest}/ViT-B-16.pt": b"clip"}) as site:
        monkeypatch.setattr(remote, "OPENAI", site.url)
        assert download.main(["clip", "--name", "ViT-B/16", "--to", str(tmp_path)]) == 0
    assert (tmp_path / "ViT-B-16.pt").read_bytes() == b"clip"
    line = refused(capsys, "clip", "--name", "RN50", "--to", str(tmp_path))
    assert "OpenAI has no CLIP called RN50" in line


def test_a_registered_dataset_downloads_itself(tmp_path, monkeypatch, capsys):
    class Toy(PairTable):
        name, title = "toy", "Toy"

        def download(self, folder: Path) -> None:
            (folder / "table.csv").write_text(f"of {self.source.data_path}")

    monkeypatch.setattr(DATASETS, "targets", dict(DATASETS.targets))
    DATASETS.register("toy", Toy)
    assert download.main(["toy", "--to", str(tmp_path)]) == 0
    assert (tmp_path / "table.csv").read_text() == f"of {tmp_path}"
    assert "fetch it by hand" in refused(capsys, "pairs", "--to", str(tmp_path))


def test_contradicting_options_are_refused(capsys):
    assert "--to is one folder" in refused(capsys, "spot", "clevr", "--to", "x")
    assert "--archive is for" in refused(capsys, "clip", "--archive", "x")
    assert "--name is for clip" in refused(capsys, "spot", "--name", "ViT-B/16")
    assert "no file x" in refused(capsys, "clevr", "--archive", "x", "--to", "/nonexistent/none")


LINK = stat.S_IFLNK | 0o777
DEVICE = stat.S_IFCHR | 0o666


def harmful_zip(name: str, kind: int = 0) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        entry = zipfile.ZipInfo(name)
        entry.external_attr = kind << 16
        archive.writestr(entry, b"/etc/passwd")
    return content.getvalue()


def harmful_tar(name: str, kind: bytes = tarfile.REGTYPE) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        entry = tarfile.TarInfo(name)
        entry.type, entry.linkname = kind, "/etc"
        entry.size = 4 if kind == tarfile.REGTYPE else 0
        archive.addfile(entry, io.BytesIO(b"harm"))
    return content.getvalue()


HARMFUL_MESSAGE = "x.archive (would write outside|holds more than files|holds a name that Windows)"
OUTSIDE = ("../out", "/tmp/clip4idc-out", "a/../../out", "..\\out", "C:\\out", "a/..")
HARMFUL = [
    *map(harmful_zip, OUTSIDE),
    *map(harmful_tar, OUTSIDE),
    harmful_zip("link", LINK),
    harmful_zip("device", DEVICE),
    harmful_tar("x", tarfile.SYMTYPE),
    harmful_tar("x", tarfile.LNKTYPE),
    harmful_tar("x", tarfile.CHRTYPE),
    harmful_tar("x", tarfile.FIFOTYPE),
]


@pytest.mark.parametrize("content", HARMFUL)
def test_archives_that_would_write_elsewhere_are_refused_and_leave_nothing(tmp_path, content):
    (tmp_path / "deep").mkdir()
    (tmp_path / "x.archive").write_bytes(content)
    with (
        pytest.raises(ValueError, match=HARMFUL_MESSAGE),
        extract_to_temporary(tmp_path / "x.archive", tmp_path / "deep"),
    ):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "x.archive"]
    assert not list((tmp_path / "deep").iterdir())


def test_archives_that_are_cut_short_or_too_large_are_refused(tmp_path, clevr, monkeypatch):
    noise = random.Random(0).randbytes(200_000)
    corrupted = []
    for kind in ("zip", "tar.gz"):
        whole = packed(clevr, "x", kind, noise)
        corrupted += [whole[: len(whole) // 2], whole[:-20_000] + bytes(10_000) + whole[-10_000:]]
    plain = gzip.decompress(packed(clevr, "x", "tar.gz"))
    second = plain.index(b"x/images")  # a header that is not the first
    corrupted += [plain[:second], plain[:second] + b"y" * 100 + plain[second + 100 :]]
    for content in corrupted:
        (tmp_path / "x").write_bytes(content)
        with (
            pytest.raises(DamagedArchive, match="is corrupt|is incomplete|neither a zip nor a tar"),
            extract_to_temporary(tmp_path / "x", tmp_path / "deep"),
        ):
            pass
    (tmp_path / "x").write_bytes(packed(clevr, "x", "zip"))
    monkeypatch.setattr(
        extraction.shutil,
        "disk_usage",
        lambda _: type("Usage", (), {"total": 10**9, "free": extraction.MIN_FREE_BYTES + 10})(),
    )
    with (
        pytest.raises(OSError, match="no room to extract"),
        extract_to_temporary(tmp_path / "x", tmp_path / "deep"),
    ):
        pass
    assert not (tmp_path / "deep").exists(), "the folder that was made for it is deleted, too"


def test_moving_goes_on_where_it_broke_off_and_overwrites_nothing(tmp_path):
    for folder in ("from", "to"):
        (tmp_path / folder / "images").mkdir(parents=True)
    (tmp_path / "from" / "images" / "a.png").write_bytes(b"12345")
    (tmp_path / "from" / "images" / "b.png").write_bytes(b"123")
    (tmp_path / "to" / "images" / "a.png").write_bytes(b"12345")
    assert extraction.move_into(tmp_path / "from", tmp_path / "to", {".png"}) == 2
    assert sorted(path.name for path in (tmp_path / "to" / "images").iterdir()) == [
        "a.png",
        "b.png",
    ]
    (tmp_path / "from" / "images" / "b.png").write_bytes(b"another")
    with pytest.raises(ValueError, match="b.png exists already and differs"):
        extraction.move_into(tmp_path / "from", tmp_path / "to", {".png"})
    assert (tmp_path / "to" / "images" / "b.png").read_bytes() == b"123"

"""Datasets and weights from where the published README links to, played by a local server; archives that mean harm."""

import gzip
import io
import json
import random
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from dataloaders.datasets.clevr_change import FOLDERS
from preprocess import download
from system import download as system_download
from system import extraction
from system.extraction import DamagedArchive, extracted
from tests.conftest import SIZES, tiny_weights
from tests.servers import google_drive


@pytest.fixture
def drive(tmp_path, monkeypatch):
    monkeypatch.setattr(system_download, "FIRST_DELAY", 0.0)
    monkeypatch.setattr("random.uniform", lambda *_: 0.0)  # between gdown's attempts
    with google_drive(monkeypatch, tmp_path) as site:
        yield site


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Counts as the drawn datasets have them."""
    monkeypatch.setattr(
        download, "RAW_ENTRIES", {split: count + 1 for split, count in SIZES.items()}
    )
    monkeypatch.setattr(download, "PAIRS", SIZES)
    monkeypatch.setattr(download, "SCENES", SIZES)


def packed(folder: Path, below: str, kind: str, more: bytes = b"") -> bytes:
    """A folder as an archive, with all of it below another; beside it lies what makes the archive long enough to break off."""
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


def serve_spot(drive, spot: Path, kind: str = "zip") -> None:
    raw = {split: json.loads((spot / f"{split}.json").read_text()) for split in SIZES}
    for split, entries in raw.items():
        doubled = [
            *entries[:-1],
            {**entries[-1], "sentences": ["one"]},
            {**entries[-1], "sentences": ["two"]},
        ]
        drive.files[f"harsh19/spot-the-diff/master/data/annotations/{split}.json"] = json.dumps(
            doubled
        ).encode()
        drive.files[f"list-{split}-0123456789012345678"] = (
            spot / f"reformat_{split}.json"
        ).read_bytes()
        drive.names[f"list-{split}-0123456789012345678"] = f"reformat_{split}.json"
    drive.folders[download.SPOT_LISTS.id] = [f"list-{split}-0123456789012345678" for split in SIZES]
    drive.files[download.SPOT_IMAGES.id] = packed(
        spot / "images_test", "resized_images", kind, more=random.Random(0).randbytes(2_000_000)
    )
    drive.names[download.SPOT_IMAGES.id] = "resized_images.zip"


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_spot_the_diff_comes_whole_and_is_not_brought_again(drive, spot, tmp_path, capsys, kind):
    from dataloaders.datasets import load_pairs

    serve_spot(drive, spot, kind)
    place, chunk = tmp_path / "images", 512 * 1024  # of gdown's
    drive.broken[download.SPOT_IMAGES.id] = [chunk, 2 * chunk] + [0] * download.RETRIES
    assert "the file that it saves" in refused(capsys, "spot", "--to", str(place))
    assert not (place / "images_test").exists()
    assert download.main(["spot", "--to", str(place)]) == 0
    assert f"{sum(SIZES.values())} pairs, all images there" in capsys.readouterr().out
    assert [
        len(load_pairs("spot", place, place / "images_test", split)) for split in SIZES
    ] == list(SIZES.values())
    starts = [asked for name, asked in drive.asked if name == download.SPOT_IMAGES.id and asked]
    assert starts[0] == f"bytes={chunk}-"
    assert starts[-1] == f"bytes={2 * chunk}-", (
        "the second command went on where the first had stopped"
    )
    assert not [
        path
        for path in place.iterdir()
        if path.suffix in (".archive", ".part") or path.name.startswith(".unpacking")
    ]
    asked = len(drive.asked)
    assert download.main(["spot", "--to", str(place)]) == 0
    assert len(drive.asked) == asked


def test_merged_lists_are_made_where_the_drive_does_not_give_them(drive, spot, tmp_path, capsys):
    serve_spot(drive, spot)
    drive.folders.clear()
    assert download.main(["spot", "--to", str(tmp_path / "images")]) == 0
    assert "Made from the annotations instead" in capsys.readouterr().err
    made = json.loads((tmp_path / "images" / "reformat_val.json").read_text())
    assert made[-1]["sentences"] == ["one", "two"]


def test_clevr_change_comes_whole(drive, clevr, tmp_path, capsys):
    types = {
        "type_mapping.json": json.dumps(
            {"add": [f"{n:06d}.png" for n in range(sum(SIZES.values()))]}
        )
    }
    assert (
        json.loads((clevr / "type_mapping.json").read_text())["add"]
        == json.loads(types["type_mapping.json"])["add"]
    )
    drive.files[download.CLEVR.id], drive.names[download.CLEVR.id] = (
        packed(clevr, "CLEVR_Change/data", "tar.gz"),
        "clevr.tar.gz",
    )
    place = tmp_path / "data"
    assert download.main(["clevr", "--to", str(place)]) == 0
    assert f"{sum(SIZES.values())} scenes, all images there" in capsys.readouterr().out
    (
        place / "sc_images" / "CLEVR_semantic_000003.png"
    ).unlink()  # what is lost comes back, what is there stays
    (place / "own.txt").write_text("mine")
    assert download.main(["clevr", "--to", str(place)]) == 0
    assert (place / "sc_images" / "CLEVR_semantic_000003.png").is_file()
    assert (place / "own.txt").read_text() == "mine"


def test_wrong_counts_and_layouts_are_told(drive, spot, clevr, tmp_path, capsys, monkeypatch):
    serve_spot(drive, spot)
    drive.files[download.SPOT_IMAGES.id] = packed(clevr, "x", "zip")
    assert "is not laid out as Spot-the-Diff's images: it holds more, x" in refused(
        capsys, "spot", "--to", str(tmp_path / "a")
    )
    assert not (tmp_path / "a" / "images_test").exists()
    monkeypatch.setattr(download, "RAW_ENTRIES", {**download.RAW_ENTRIES, "val": 1634})
    assert f"4 entries of {tmp_path / 'b' / 'val.json'}, expected 1634" in refused(
        capsys, "spot", "--to", str(tmp_path / "b")
    )
    short = tmp_path / "short"
    (short / "images").mkdir(parents=True)
    (short / "sc_images").mkdir()
    (short / "nsc_images").mkdir()
    for folder, prefix in FOLDERS.items():
        (short / folder / f"{prefix}000000.png").write_bytes(b"x")
    for name in (
        "splits.json",
        "change_captions.json",
        "no_change_captions.json",
        "type_mapping.json",
    ):
        (short / name).write_bytes((clevr / name).read_bytes())
    drive.files[download.CLEVR.id], drive.names[download.CLEVR.id] = (
        packed(short, "data", "zip"),
        "clevr.zip",
    )
    assert "3 images below" in refused(capsys, "clevr", "--to", str(tmp_path / "c"))


def test_a_spent_quota_says_what_to_do_by_hand(drive, spot, clevr, tmp_path, capsys):
    serve_spot(drive, spot)
    drive.exhausted.add(download.SPOT_IMAGES.id)
    line = refused(capsys, "spot", "--to", str(tmp_path / "images"))
    assert "Too many users have viewed or downloaded this file recently" in line
    assert (
        f"open https://drive.google.com/file/d/{download.SPOT_IMAGES.id} in a browser and give --archive"
        in line
    )
    by_hand = tmp_path / "saved.zip"
    by_hand.write_bytes(drive.files[download.SPOT_IMAGES.id])
    assert download.main(["spot", "--to", str(tmp_path / "images"), "--archive", str(by_hand)]) == 0
    assert by_hand.is_file(), "a file of the user's own stays"
    by_hand.write_text("<!DOCTYPE html><html>Quota exceeded</html>")
    assert "saved.zip is a web page, not CLEVR-Change" in refused(
        capsys, "clevr", "--to", str(tmp_path / "c"), "--archive", str(by_hand)
    )
    drive.files[download.CLEVR.id], drive.names[download.CLEVR.id] = (
        packed(clevr, "x", "zip")[:-100] + bytes(100),
        "clevr.zip",
    )
    assert "neither a zip nor a tar archive" in refused(
        capsys, "clevr", "--to", str(tmp_path / "c")
    )
    assert not list((tmp_path / "c").iterdir()), (
        "what came damaged is not taken for the archive the next time"
    )
    by_hand.write_text("no archive")
    assert "neither a zip nor a tar archive" in refused(
        capsys, "clevr", "--to", str(tmp_path / "c"), "--archive", str(by_hand)
    )


def test_the_authors_weights_are_read_when_they_have_come(drive, tmp_path, capsys):
    content = io.BytesIO()
    torch.save(tiny_weights(), content)
    ids = ["adapted-spot-0123456789012345", "readme-01234567890123456789012"]
    drive.files = {ids[0]: content.getvalue(), ids[1]: b"words"}
    drive.names = {ids[0]: "pytorch_model.bin.spot", ids[1]: "readme.txt"}
    drive.folders[download.ADAPTED.id] = ids
    assert download.main(["pretrained", "--to", str(tmp_path / "pretrained")]) == 0
    assert "pytorch_model.bin.spot: adapted CLIP" in capsys.readouterr().out
    assert (tmp_path / "pretrained" / "readme.txt").read_bytes() == b"words"
    drive.folders[download.CAPTIONERS.id] = ids[:1]
    drive.exhausted.add(ids[0])
    line = refused(capsys, "trained", "--to", str(tmp_path / "trained"))
    assert (
        f"open https://drive.google.com/drive/folders/{download.CAPTIONERS.id} in a browser and save its files in"
        in line
    )
    assert not list((tmp_path / "trained").glob("*.bin*"))


def test_openais_clip_goes_where_it_is_looked_for(tmp_path, monkeypatch, capsys):
    import hashlib

    from modules.weights import remote
    from tests.servers import web_site

    digest = hashlib.sha256(b"clip").hexdigest()
    monkeypatch.setitem(remote.CLIP_SHA256, "ViT-B/16", digest)
    with web_site({f"{digest}/ViT-B-16.pt": b"clip"}) as site:
        monkeypatch.setattr(remote, "OPENAI", site.address)
        assert download.main(["clip", "--name", "ViT-B/16", "--to", str(tmp_path)]) == 0
    assert (tmp_path / "ViT-B-16.pt").read_bytes() == b"clip"
    assert "no CLIP of OpenAI's is called RN50" in refused(
        capsys, "clip", "--name", "RN50", "--to", str(tmp_path)
    )


def test_contradicting_options_are_refused(capsys):
    assert "--to is one folder" in refused(capsys, "spot", "clevr", "--to", "x")
    assert "--archive belongs to" in refused(capsys, "clip", "--archive", "x")
    assert "no file x" in refused(capsys, "clevr", "--archive", "x", "--to", "/nonexistent/none")


LINK, DEVICE = stat.S_IFLNK | 0o777, stat.S_IFCHR | 0o666


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


@pytest.mark.parametrize(
    "content",
    [
        *(
            make(name)
            for make in (harmful_zip, harmful_tar)
            for name in ("../out", "/tmp/clip4idc-out", "a/../../out", "..\\out", "C:\\out", "a/..")
        ),
        harmful_zip("link", LINK),
        harmful_zip("device", DEVICE),
        *(
            harmful_tar("x", kind)
            for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)
        ),
    ],
)
def test_archives_that_would_write_elsewhere_are_refused_and_leave_nothing(tmp_path, content):
    (tmp_path / "deep").mkdir()
    (tmp_path / "x.archive").write_bytes(content)
    with (
        pytest.raises(ValueError, match="x.archive (would write outside|holds more than files)"),
        extracted(tmp_path / "x.archive", tmp_path / "deep"),
    ):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "x.archive"]
    assert not list((tmp_path / "deep").iterdir())


def test_archives_that_are_cut_short_or_too_large_are_refused(tmp_path, clevr, monkeypatch):
    noise = random.Random(0).randbytes(200_000)
    spoilt = []
    for kind in ("zip", "tar.gz"):
        whole = packed(clevr, "x", kind, noise)
        spoilt += [whole[: len(whole) // 2], whole[:-20_000] + bytes(10_000) + whole[-10_000:]]
    plain = gzip.decompress(packed(clevr, "x", "tar.gz"))
    second = plain.index(b"x/images")  # a header that is not the first
    spoilt += [plain[:second], plain[:second] + b"y" * 100 + plain[second + 100 :]]
    for content in spoilt:
        (tmp_path / "x").write_bytes(content)
        with (
            pytest.raises(DamagedArchive, match="is damaged|neither a zip nor a tar"),
            extracted(tmp_path / "x", tmp_path / "deep"),
        ):
            pass
    (tmp_path / "x").write_bytes(packed(clevr, "x", "zip"))
    monkeypatch.setattr(
        extraction.shutil,
        "disk_usage",
        lambda _: type("Usage", (), {"free": extraction.MIN_FREE_BYTES + 10})(),
    )
    with (
        pytest.raises(OSError, match="no room to unpack"),
        extracted(tmp_path / "x", tmp_path / "deep"),
    ):
        pass
    assert not (tmp_path / "deep").exists(), "a folder that was made for it goes, too"


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
    with pytest.raises(ValueError, match="b.png is there already, and another"):
        extraction.move_into(tmp_path / "from", tmp_path / "to", {".png"})
    assert (tmp_path / "to" / "images" / "b.png").read_bytes() == b"123"

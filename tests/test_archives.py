"""Hostile archives: extracted in their folder, or refused with little memory and nothing left."""

import bz2
import gzip
import io
import lzma
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from dataloaders.picture_files import picture_endings
from preprocess import download
from system import archives, extraction
from system.extraction import DamagedArchive, extract_to_temporary
from tests.conftest import ROOT
from tests.hostile import MIB


def tar_entry(name: str, content: bytes = b"x", **values: object) -> bytes:
    """The header and content of a tar's entry, whatever they say."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in values.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


def zipped(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, b"x")
    return buffer.getvalue()


def tarred(*names: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 1
            archive.addfile(info, io.BytesIO(b"x"))
    return buffer.getvalue()


END = bytes(1024)
SIZE = 48 * MIB  # of what a header claims


def refused(path: Path, content: bytes, message: str) -> None:
    """The archive is refused in one line that names it, and the folders made for it are deleted."""
    path.write_bytes(content)
    folder = path.parent / "made" / "for it"
    with pytest.raises(ValueError, match=message) as error, extract_to_temporary(path, folder):
        pass
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300 + len(str(path))
    assert sorted(path.parent.iterdir()) == [path]


def files_below(folder: Path) -> list[str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return sorted(str(path.relative_to(folder)) for path in files)


@pytest.mark.parametrize("make", [zipped, tarred], ids=["zip", "tar"])
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a/" * 33 + "x"], "folders more than 32 deep"),
        (["a/" * 400 + "x", "a/" * 1600 + "x"], "too long|deep"),
        (["n" * 256], "a name that is too long"),
        (["n" * 5000], "a name that is too long"),
        (["/".join(["n" * 200] * 6)], "a name that is too long"),
        (["字" * 86], "a name that is too long"),
        (["a\x1b[2Jb"], r"control characters: a\\x1b\[2Jb"),
        (["a\nall 9.9"], r"control characters: a\\nall"),
        (["x", "./x"], "twice"),
        (["ok", "../../out"], "would write outside its folder: ../../out"),
        (["/out"], "would write outside its folder: /out"),
        (["a:b/x"], "takes for a drive: a:b/x"),
        (["."], "without a name"),
    ],
)
def test_names_that_no_dataset_needs_are_refused(make, names, message, tmp_path):
    refused(tmp_path / "x.archive", make(*names), message)


@pytest.mark.parametrize("make", [zipped, tarred], ids=["zip", "tar"])
def test_names_at_the_limits_are_extracted(make, tmp_path):
    names = ["a/" * 32 + "x", "n" * 255, "字" * 85, "b/./c//d"]
    (tmp_path / "x").write_bytes(make(*names))
    with extract_to_temporary(tmp_path / "x", tmp_path / "to") as folder:
        assert files_below(folder) == sorted([*names[:3], "b/c/d"])
    assert not (tmp_path / "to").exists()
    (tmp_path / "to").mkdir()
    with extract_to_temporary(tmp_path / "x", tmp_path / "to"):
        pass
    assert (tmp_path / "to").is_dir(), "a folder that existed before stays"


def gz(parts: list[tuple[bytes, int]]) -> bytes:
    """Parts, each so many times, compressed."""
    buffer = io.BytesIO()
    with gzip.open(buffer, "wb", compresslevel=1) as file:
        for part, times in parts:
            for _ in range(times):
                file.write(part)
    return buffer.getvalue()


def sparse_header() -> bytes:
    """The header of a sparse file whose list of holes continues in the next block."""
    header = bytearray(tar_entry("x", b"", type=tarfile.GNUTYPE_SPARSE)[:512])
    header[482] = 1
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def more_holes() -> bytes:
    """A block of such a list that is not the last one."""
    return (b"%011o\0" % 1 + b"%011o\0" % 1) * 21 + b"\1" + bytes(7)


HOSTILE_TARS: dict[str, Callable[[], bytes]] = {
    "a long name": lambda: gz(
        [(long_header(SIZE), 1), (b"a" * MIB, SIZE // MIB), (tar_entry("x"), 1)]
    ),
    "a long pax header": lambda: gz(
        [(long_header(SIZE, tarfile.XHDTYPE), 1), (b"a" * MIB, SIZE // MIB), (tar_entry("x"), 1)]
    ),
    "a long global header": lambda: gz(
        [(long_header(SIZE, tarfile.XGLTYPE), 1), (b"a" * MIB, SIZE // MIB), (tar_entry("x"), 1)]
    ),
    "a long list of holes": lambda: gz([(sparse_header(), 1), (more_holes() * 2048, SIZE // MIB)]),
    "headers before headers": lambda: gz(
        [(long_header(1, tarfile.XGLTYPE) + bytes(512), SIZE // 1024)]
    ),
    "a folder with content": lambda: gz(
        [
            (long_header(SIZE, tarfile.DIRTYPE, "d/"), 1),
            (bytes(MIB), SIZE // MIB),
            (tar_entry("x"), 1),
        ]
    ),
    "global headers": lambda: gz([(pax_global(number), 1) for number in range(SIZE // MIB * 2)]),
    "an endless end": lambda: gz([(tar_entry("x"), 1), (bytes(MIB), SIZE // MIB)]),
}


def long_header(size: int, kind: bytes = tarfile.GNUTYPE_LONGNAME, name: str = "x") -> bytes:
    """Only the header of an entry that claims so many bytes."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


def pax_global(number: int) -> bytes:
    """A global pax header of half a megabyte under a key of its own, and a folder after it."""
    size = MIB // 2
    value = b"%d %05d=%s\n" % (size, number, b"a" * (size - len(b"%d %05d=\n" % (size, number))))
    return long_header(len(value), tarfile.XGLTYPE) + value + long_header(0, tarfile.DIRTYPE, "d/")


EXTRACT = """
import resource, sys
from pathlib import Path
from system.extraction import extract_to_temporary
for path in map(Path, sys.argv[1:]):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with extract_to_temporary(path, path.with_name("to")):
            print(0, "extracted")
    except ValueError as error:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, error)
"""


def test_headers_take_no_more_memory_than_is_allowed(tmp_path):
    """Small archives whose headers claim much: memory does not follow the claim.

    In a process of its own, which has not used any memory yet.
    """
    paths = [tmp_path / f"{name}.tar.gz" for name in HOSTILE_TARS]
    for path, make in zip(paths, HOSTILE_TARS.values(), strict=True):
        path.write_bytes(make())
        assert path.stat().st_size < 2 * MIB
    done = subprocess.run(
        [sys.executable, "-c", EXTRACT, *map(str, paths)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for path, line in zip(paths, done.stdout.splitlines(), strict=True):
        rise, _, said = line.partition(" ")
        assert str(path) in said
        assert int(rise) * 1024 < SIZE // 2, said
    assert sorted(tmp_path.iterdir()) == sorted(paths)


def test_an_archive_with_too_many_files_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(extraction, "MAX_FILES", 20)
    names = [f"{number}.png" for number in range(21)]
    refused(tmp_path / "x.tar", tarred(*names), "more than 20 files")
    refused(tmp_path / "x.tar", zipped(*names), "more than 20 entries")
    (tmp_path / "x.tar").write_bytes(tarred(*names[:20]))
    with extract_to_temporary(tmp_path / "x.tar", tmp_path / "to") as folder:
        assert len(list(folder.iterdir())) == 20


def test_a_zip_whose_directory_is_too_long_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_DIRECTORY_BYTES", 2000)
    refused(
        tmp_path / "x.zip",
        zipped(*(f"{number}.png" for number in range(100))),
        "is refused: .* more than 2000 bytes",
    )


def test_a_zip_that_would_not_fit_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    (tmp_path / "x.zip").write_bytes(zipped("a", "b"))
    monkeypatch.setattr(
        extraction.shutil,
        "disk_usage",
        lambda _: type("Usage", (), {"total": 10**9, "free": extraction.MIN_FREE_BYTES + 1})(),
    )
    monkeypatch.setattr(
        extraction.shutil, "copyfileobj", lambda *_: pytest.fail("something was written")
    )
    with (
        pytest.raises(OSError, match="no room to extract"),
        extract_to_temporary(tmp_path / "x.zip", tmp_path / "to"),
    ):
        pass


def xz_that_asks_for_a_gibibyte(content: bytes) -> bytes:
    """An intact xz file whose header says that its dictionary has 1 GiB."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << 12}]
    file = bytearray(lzma.compress(content, filters=filters))
    dictionary_size = file.index(b"\x21\x01", 12) + 2  # of the LZMA2 filter
    file[dictionary_size] = 36
    end = 12 + (file[12] + 1) * 4
    file[end - 4 : end] = zlib.crc32(file[12 : end - 4]).to_bytes(4, "little")
    return bytes(file)


def test_an_xz_that_asks_for_too_much_memory_is_refused(tmp_path):
    (tmp_path / "intact.tar.xz").write_bytes(lzma.compress(tarred("x"), preset=6))
    with extract_to_temporary(tmp_path / "intact.tar.xz", tmp_path / "to") as folder:
        assert (folder / "x").read_bytes() == b"x"
    assert archives.MAX_XZ_MEMORY < 1 << 30
    (tmp_path / "x.tar.xz").write_bytes(xz_that_asks_for_a_gibibyte(tarred("x")))
    with (
        pytest.raises(DamagedArchive, match="emory"),
        extract_to_temporary(tmp_path / "x.tar.xz", tmp_path / "to"),
    ):
        pass


def test_an_xz_of_several_streams_is_read_whole(tmp_path):
    content = tarred("x", "y")
    streams = [lzma.compress(content[:700]), bytes(8), lzma.compress(content[700:])]
    (tmp_path / "x.tar.xz").write_bytes(b"".join(streams))
    with extract_to_temporary(tmp_path / "x.tar.xz", tmp_path / "to") as folder:
        assert files_below(folder) == ["x", "y"]
    (tmp_path / "x.tar.xz").write_bytes(lzma.compress(content) + b"no xz")
    with (
        pytest.raises(DamagedArchive, match="is corrupt"),
        extract_to_temporary(tmp_path / "x.tar.xz", tmp_path / "to"),
    ):
        pass


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_with_unbounded_decompression_is_refused(method, tmp_path):
    """For these methods, Python's zipfile decompresses more than it is asked for."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr("a.png", bytes(1000))
    refused(tmp_path / "x.zip", buffer.getvalue(), "compressed in a way that is not read here")


WANTED_FILES = ("a/readme.txt", "b/y.JPG", "splits.json", "x.png")
OTHER_FILES = (
    "evil.py",
    "run.sh",
    ".git/hooks/post-checkout",
    ".hidden.json",
    "__init__",
    "b/.x.png",
)


def test_only_pictures_and_tables_are_moved(tmp_path):
    source = tmp_path / "from"
    target = tmp_path / "to"
    for name in (*WANTED_FILES, *OTHER_FILES):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(b"x")
    endings = picture_endings() | download.TABLE_ENDINGS
    assert extraction.move_into(source, target, endings) == len(WANTED_FILES)
    assert files_below(target) == list(WANTED_FILES)
    assert files_below(source) == sorted(OTHER_FILES)


@pytest.mark.parametrize(
    "compress",
    [bytes, gzip.compress, bz2.compress, lzma.compress],
    ids=["plain", "gzip", "bzip2", "xz"],
)
def test_tars_are_extracted_however_they_are_compressed(compress, tmp_path):
    content = bytes(range(256)) * 1000
    entries = [
        tar_entry("a/one", content),
        tar_entry("a/", b"", type=tarfile.DIRTYPE),
        tar_entry("a/two", b""),
        tar_entry("three", b"3" * 511),
    ]
    whole = b"".join(entries) + END
    (tmp_path / "x").write_bytes(compress(whole))
    with extract_to_temporary(tmp_path / "x", tmp_path / "to") as folder:
        assert (folder / "a" / "one").read_bytes() == content
        assert (folder / "a" / "two").read_bytes() == b""
        assert (folder / "three").read_bytes() == b"3" * 511
    cut_short = [compress(whole)[:-20]]
    if compress is bytes:
        cut_short = [whole[:size] for size in (100, 600, len(whole) - 1500)]
    for part in cut_short:
        (tmp_path / "x").write_bytes(part)
        with pytest.raises(DamagedArchive), extract_to_temporary(tmp_path / "x", tmp_path / "to"):
            pass


def test_a_refused_archive_is_one_line_and_leaves_no_folder(tmp_path, capsys):
    (tmp_path / "x.zip").write_bytes(zipped("a/" * 800 + "x"))
    with pytest.raises(SystemExit, match="2"):
        download.main(
            ["clevr", "--to", str(tmp_path / "new" / "to"), "--archive", str(tmp_path / "x.zip")]
        )
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_what_macos_adds_is_not_extracted(tmp_path):
    names = ("__MACOSX/a/._1.png", "a/1.png", "a/._1.png", "b/__MACOSX/x.png", "._2.png")
    (tmp_path / "x.zip").write_bytes(zipped(*names))
    with extract_to_temporary(tmp_path / "x.zip", tmp_path / "to") as folder:
        assert files_below(folder) == ["a/1.png"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (zipped("a.png", "b.png")[:-30], "is incomplete: it begins as a zip, but its end is"),
        (b"", "is empty: download it again"),
        (b"7z\xbc\xaf'\x1c" + bytes(99), "is a 7z archive, which is not read here: pack"),
        (b"Rar!\x1a\x07\x00" + bytes(99), "is a rar archive"),
        (b"<html>" + bytes(99), "is neither a zip nor a tar archive"),
    ],
)
def test_other_files_are_called_what_they_are(content, message, tmp_path):
    refused(tmp_path / "x", content, message)


def test_names_that_windows_cannot_have_are_told(tmp_path, caplog):
    (tmp_path / "x.zip").write_bytes(zipped("a.png", "A.png", "con.png"))
    with extract_to_temporary(tmp_path / "x.zip", tmp_path / "to") as folder:
        assert len(files_below(folder)) == 3
    assert caplog.messages == [
        f"{tmp_path}/x.zip: 2 of its names cannot be used on Windows, such as A.png"
    ]


def test_a_tar_that_ends_with_a_zip_is_a_tar(tmp_path):
    content = tar_entry("a.png") + tar_entry("inner.zip", zipped("b.png")) + END
    (tmp_path / "x.tar").write_bytes(content)
    with extract_to_temporary(tmp_path / "x.tar", tmp_path / "to") as folder:
        assert files_below(folder) == ["a.png", "inner.zip"]


def test_a_folders_icon_is_left_out(tmp_path):
    (tmp_path / "x.zip").write_bytes(zipped("a/Icon\r", "a/1.png"))
    with extract_to_temporary(tmp_path / "x.zip", tmp_path / "to") as folder:
        assert files_below(folder) == ["a/1.png"]

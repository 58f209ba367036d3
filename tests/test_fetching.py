"""Downloads: broken off and gone on with, checked, refused; over HTTP and S3."""

import hashlib
import io
import json
import threading

import pytest
from botocore.response import StreamingBody

from system import download, transports
from system.download import cache_path, fetch
from system.transports import BLOCK
from system.urls import redact
from tests.servers import s3, web_site

BODY = bytes(range(256)) * 40_000  # 10 MB
DIGEST = hashlib.sha256(BODY).hexdigest()


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(download, "FIRST_DELAY", 0.0)


@pytest.fixture
def site():
    with web_site(
        {"whole.bin": BODY, "page.bin": b"\n <!DOCTYPE html><html>Quota exceeded</html>"}
    ) as site:
        yield site


@pytest.mark.parametrize("tags", [True, False])
def test_a_download_that_breaks_off_goes_on_where_it_stopped(tmp_path, site, tags):
    site.tags, site.broken = tags, {"whole.bin": [40 * BLOCK, 100 * BLOCK]}
    assert (
        fetch(f"{site.address}/whole.bin", tmp_path / "c" / "whole.bin", DIGEST).read_bytes()
        == BODY
    )
    starts = [asked for _, asked in site.asked]
    assert starts[0] is None
    assert [int(asked[6:-1]) for asked in starts[1:]] == [40 * BLOCK, 100 * BLOCK]
    assert [path.name for path in (tmp_path / "c").iterdir() if path.suffix != ".lock"] == [
        "whole.bin"
    ]


def test_a_part_is_kept_and_the_next_call_goes_on_from_it(tmp_path, site):
    target = tmp_path / "whole.bin"
    site.broken = {"whole.bin": [60 * BLOCK] + [0] * download.MAX_ATTEMPTS}
    with pytest.raises(OSError, match=r"the connection breaks off; 3932160 bytes are kept"):
        fetch(f"{site.address}/whole.bin", target, DIGEST)
    assert not target.exists()
    site.asked.clear()
    assert fetch(f"{site.address}/whole.bin", target, DIGEST).read_bytes() == BODY
    assert site.asked == [("whole.bin", f"bytes={60 * BLOCK}-")]
    fetch(f"{site.address}/whole.bin", target, DIGEST)
    assert len(site.asked) == 1, "what is there is not asked for again"


def test_a_part_of_an_older_version_is_not_glued_to_a_newer_one(tmp_path, site):
    target = tmp_path / "whole.bin"
    site.broken = {"whole.bin": [60 * BLOCK] + [0] * download.MAX_ATTEMPTS}
    with pytest.raises(OSError, match="breaks off"):
        fetch(f"{site.address}/whole.bin", target)
    site.files["whole.bin"] = newer = BODY[::-1]
    assert fetch(f"{site.address}/whole.bin", target).read_bytes() == newer


def test_a_server_that_knows_no_ranges_or_no_versions_is_asked_for_all_of_it(tmp_path, site):
    site.ranges, site.broken = False, {"whole.bin": [60 * BLOCK]}
    assert fetch(f"{site.address}/whole.bin", tmp_path / "a").read_bytes() == BODY
    site.ranges, site.tags, site.broken = True, False, {"whole.bin": [60 * BLOCK]}
    site.asked.clear()
    assert fetch(f"{site.address}/whole.bin", tmp_path / "b").read_bytes() == BODY
    assert [asked for _, asked in site.asked] == [None, None], (
        "without a version or checksum nothing says that the rest belongs to it"
    )


@pytest.mark.parametrize("part", [BODY, BODY + b"more"])
def test_a_part_that_is_whole_or_too_long(tmp_path, site, part):
    (tmp_path / "whole.bin.part").write_bytes(part)
    assert fetch(f"{site.address}/whole.bin", tmp_path / "whole.bin", DIGEST).read_bytes() == BODY


def test_a_server_that_zips_unasked_gives_the_file_all_the_same(tmp_path, site):
    site.zipped = True
    assert fetch(f"{site.address}/whole.bin", tmp_path / "whole.bin", DIGEST).read_bytes() == BODY


def test_an_s3_that_knows_no_ranges_is_asked_for_all_of_it(tmp_path, monkeypatch):
    import boto3

    class Client:
        def client(self, *_, **_more):
            return self

        def get_object(self, **_):
            return {"Body": StreamingBody(io.BytesIO(BODY), len(BODY)), "ContentLength": len(BODY)}

    monkeypatch.setattr(boto3, "Session", Client)
    (tmp_path / "x.part").write_bytes(BODY[:1000])
    (tmp_path / "x.part.json").write_text(
        json.dumps({"address": download._hash_text("s3://a/x"), "version": '"1"'})
    )
    assert fetch("s3://a/x", tmp_path / "x").read_bytes() == BODY


def test_a_busy_server_is_asked_again(tmp_path, site):
    site.busy["whole.bin"] = download.MAX_ATTEMPTS - 1
    assert fetch(f"{site.address}/whole.bin", tmp_path / "whole.bin").read_bytes() == BODY
    site.busy["whole.bin"] = 100
    with pytest.raises(OSError, match="503"):
        fetch(f"{site.address}/whole.bin", tmp_path / "again.bin")


def test_refusals_name_the_address_and_leave_nothing_under_the_name(tmp_path, site):
    cases = {
        "gone.bin": (None, FileNotFoundError, "404"),
        "page.bin": (None, OSError, "web page"),
        "whole.bin": ("0" * 64, OSError, "SHA-256"),
    }
    for name, (sha256, kind, words) in cases.items():
        with pytest.raises(kind, match=words) as caught:
            fetch(f"{site.address}/{name}", tmp_path / name, sha256)
        assert f"{site.address}/{name}" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not [
        path for path in tmp_path.iterdir() if path.suffix not in (".lock", ".part", ".json")
    ]
    assert not (tmp_path / "whole.bin.part").exists(), (
        "what failed its checksum is not gone on with"
    )


def test_unreachable_hosts_end_in_one_line(tmp_path):
    for url, words in (
        ("http://127.0.0.1:9/x.bin", "Connection refused"),
        (
            "https://no-such-host.invalid/x.bin",
            "x.bin: (Name or service|Temporary failure|ConnectionError|no answer)",
        ),
    ):
        with pytest.raises(OSError, match=words) as caught:
            fetch(url, tmp_path / "x.bin")
        assert len(str(caught.value)) < 260
    assert not list(tmp_path.glob("x.bin*"))


def test_a_full_disk_is_known_beforehand(tmp_path, site, monkeypatch):
    monkeypatch.setattr(
        download.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})()
    )
    with pytest.raises(OSError, match="no room for .* 0.010 GB more"):
        fetch(f"{site.address}/whole.bin", tmp_path / "whole.bin")
    assert not list(tmp_path.glob("whole*"))


def test_of_many_that_want_a_file_one_downloads_it(tmp_path, site):
    got: list[bytes] = []
    threads = [
        threading.Thread(
            target=lambda: got.append(
                fetch(f"{site.address}/whole.bin", tmp_path / "whole.bin").read_bytes()
            )
        )
        for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [BODY] * 5
    assert len(site.asked) == 1


def test_a_server_that_breaks_off_ever_earlier_is_given_up(tmp_path, site):
    site.ranges, site.broken = (
        False,
        {"whole.bin": [n * BLOCK for n in (30, 10, 20, 10, 20, 10, 20, 10)]},
    )
    with pytest.raises(OSError, match="breaks off"):
        fetch(f"{site.address}/whole.bin", tmp_path / "whole.bin")
    assert len(site.asked) == 1 + download.MAX_ATTEMPTS


def test_a_file_that_is_there_with_another_checksum_is_brought_anew(tmp_path, site):
    (tmp_path / "whole.bin").write_bytes(b"garbage")
    assert fetch(f"{site.address}/whole.bin", tmp_path / "whole.bin", DIGEST).read_bytes() == BODY
    assert fetch(f"{site.address}/whole.bin", tmp_path / "whole.bin", DIGEST).read_bytes() == BODY
    assert len(site.asked) == 1


def test_what_a_look_refuses_does_not_take_the_name(tmp_path, site):
    def refuse(part):
        raise ValueError(f"{part} is odd")

    with pytest.raises(OSError, match=f"{site.address}/whole.bin: the file there is odd"):
        fetch(f"{site.address}/whole.bin", tmp_path / "whole.bin", check=refuse)
    assert not list(tmp_path.glob("whole*"))


def test_no_line_and_no_file_tells_a_secret(tmp_path, site, caplog):
    caplog.set_level("DEBUG", logger="modules")
    host = site.address.removeprefix("http://")
    site.broken = {"whole.bin": [60 * BLOCK] + [0] * 9}
    lines = []
    for address in (
        f"http://user:hunter2@{host}/whole.bin?sig=SECRET",
        f"http://user:hunter2@{host}/none?sig=SECRET",
        "http://user:hunter2@127.0.0.1:9/x?sig=SECRET",
        f"https://user:hunter2@{host}/x?sig=SECRET",
        "http://user:hunter2@[::1/x?sig=SECRET",
        "http://user:hunter2@host:port/x?sig=SECRET",
    ):
        with pytest.raises(OSError) as caught:  # noqa: PT011 (what they say is looked at below)
            fetch(address, tmp_path / f"{len(lines)}.bin")
        lines.append(str(caught.value))
    kept = [path.read_text(errors="ignore") for path in tmp_path.rglob("*.json")]
    assert kept
    for text in (*lines, caplog.text, *kept):
        assert "hunter2" not in text
        assert "SECRET" not in text


def test_secrets_in_addresses_are_not_shown():
    assert redact("https://user:word@host/a/b.bin?X-Signature=secret") == "https://host/a/b.bin"
    assert (
        cache_path("https://host/a?key=1", None)[1] != cache_path("https://host/a?key=2", None)[1]
    )
    folder, _, name = cache_path("s3://bucket/run?/x.bin", None)
    assert (folder.reveal(), name) == ("s3://bucket/run?", "x.bin")


def test_s3_is_read_gone_on_with_and_refused(tmp_path, monkeypatch):
    pytest.importorskip("moto")
    with s3(monkeypatch, "weights") as client:
        client.put_object(Bucket="weights", Key="run/whole.bin", Body=BODY)
        assert fetch("S3://weights/run/whole.bin", tmp_path / "a.bin", DIGEST).read_bytes() == BODY
        version = client.head_object(Bucket="weights", Key="run/whole.bin")["ETag"]
        (tmp_path / "b.bin.part").write_bytes(BODY[: 80 * BLOCK])
        (tmp_path / "b.bin.part.json").write_text(
            json.dumps(
                {"address": download._hash_text("s3://weights/run/whole.bin"), "version": version}
            )
        )
        starts = []
        opened = transports._open_s3
        monkeypatch.setattr(
            transports,
            "_open_s3",
            lambda url, start, version: starts.append(start) or opened(url, start, version),
        )
        assert fetch("s3://weights/run/whole.bin", tmp_path / "b.bin", DIGEST).read_bytes() == BODY
        assert starts == [80 * BLOCK]
        client.put_object(
            Bucket="weights", Key="run/whole.bin", Body=BODY[::-1]
        )  # another version: the part does not count
        (tmp_path / "c.bin.part").write_bytes(BODY[: 80 * BLOCK])
        (tmp_path / "c.bin.part.json").write_text(
            json.dumps(
                {"address": download._hash_text("s3://weights/run/whole.bin"), "version": version}
            )
        )
        assert fetch("s3://weights/run/whole.bin", tmp_path / "c.bin").read_bytes() == BODY[::-1]
        for url, kind, words in (
            ("s3://weights/run/none.bin", FileNotFoundError, "NoSuchKey"),
            ("s3://other/x", OSError, "NoSuchBucket"),
            ("s3://weights", ValueError, "s3://bucket/key"),
        ):
            with pytest.raises(kind, match=words):
                fetch(url, tmp_path / "d.bin")
    with pytest.raises(
        OSError,
        match="cannot get s3://weights/x: Connection was closed|cannot get s3://weights/x: .*[Cc]onnect",
    ):
        fetch("s3://weights/x", tmp_path / "d.bin")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(OSError, match="credentials.*AWS_ACCESS_KEY_ID"):
        fetch("s3://weights/x", tmp_path / "d.bin")
    assert not (tmp_path / "d.bin").exists()

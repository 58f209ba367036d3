"""Downloads over HTTP and S3: resumed, checked, locked, refused."""

import hashlib
import io
import json
import threading
from pathlib import Path

import pytest
from botocore.response import StreamingBody

from system import download
from system.download import MAX_ATTEMPTS, HtmlInsteadOfFile, fetch, locate_in_cache
from system.transports import NETWORK_BYTES
from tests.servers import s3, web_site

BODY = bytes(range(256)) * 40_000  # 10 MB
NEWER = BODY[::-1]
DIGEST = hashlib.sha256(BODY).hexdigest()
PAGE = b"\n <!DOCTYPE html><html>Quota exceeded</html>"


@pytest.fixture(autouse=True)
def _no_delays(monkeypatch):
    monkeypatch.setattr(download, "FIRST_DELAY", 0.0)


@pytest.fixture
def site():
    with web_site({"whole.bin": BODY, "page.bin": PAGE}) as site:
        yield site


@pytest.fixture
def url(site) -> str:
    return f"{site.url}/whole.bin"


def break_off(site, *sizes: int) -> None:
    """Break off each next answer after so many blocks."""
    site.broken = {"whole.bin": [size * NETWORK_BYTES for size in sizes]}


def break_off_for_good(site) -> None:
    break_off(site, 60, *[0] * MAX_ATTEMPTS)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def write_part(target: Path, content: bytes, url: str, version: str) -> None:
    """What an earlier download of this version leaves when it is interrupted."""
    sidecar = {"address": hashlib.sha256(url.encode()).hexdigest(), "version": version}
    target.with_name(f"{target.name}.part").write_bytes(content)
    target.with_name(f"{target.name}.part.json").write_text(json.dumps(sidecar))


@pytest.mark.parametrize("has_versions", [True, False])
def test_an_interrupted_download_resumes_where_it_stopped(tmp_path, site, url, has_versions):
    site.tags = has_versions
    break_off(site, 40, 100)
    assert fetch(url, tmp_path / "c" / "whole.bin", DIGEST).read_bytes() == BODY
    ranges = [requested for _, requested in site.asked]
    assert ranges == [None, f"bytes={40 * NETWORK_BYTES}-", f"bytes={100 * NETWORK_BYTES}-"]
    assert names_in(tmp_path / "c") == ["whole.bin"]


def test_a_part_is_kept_and_the_next_call_resumes_it(tmp_path, site, url):
    target = tmp_path / "whole.bin"
    break_off_for_good(site)
    with pytest.raises(OSError, match=r"the connection broke off; 3932160 bytes are kept"):
        fetch(url, target, DIGEST)
    assert not target.exists()
    site.asked.clear()
    assert fetch(url, target, DIGEST).read_bytes() == BODY
    assert site.asked == [("whole.bin", f"bytes={60 * NETWORK_BYTES}-")]
    fetch(url, target, DIGEST)
    assert len(site.asked) == 1, "a file that is there is not requested again"


def test_parts_of_two_versions_are_not_joined(tmp_path, site, url):
    target = tmp_path / "whole.bin"
    break_off_for_good(site)
    with pytest.raises(OSError, match="broke off"):
        fetch(url, target)
    site.files["whole.bin"] = NEWER
    assert fetch(url, target).read_bytes() == NEWER


def test_a_server_without_ranges_sends_the_whole_file_again(tmp_path, site, url):
    site.ranges = False
    break_off(site, 60)
    assert fetch(url, tmp_path / "whole.bin").read_bytes() == BODY


def test_without_version_and_checksum_nothing_is_resumed(tmp_path, site, url):
    """Nothing would tell whether the rest belongs to the part."""
    site.tags = False
    break_off(site, 60)
    assert fetch(url, tmp_path / "whole.bin").read_bytes() == BODY
    assert [requested for _, requested in site.asked] == [None, None]


@pytest.mark.parametrize("part", [BODY, BODY + b"more"], ids=["complete", "too long"])
def test_a_part_that_needs_no_more_bytes(tmp_path, url, part):
    (tmp_path / "whole.bin.part").write_bytes(part)
    assert fetch(url, tmp_path / "whole.bin", DIGEST).read_bytes() == BODY


def test_an_answer_compressed_unasked_is_decompressed(tmp_path, site, url):
    site.zipped = True
    assert fetch(url, tmp_path / "whole.bin", DIGEST).read_bytes() == BODY


def test_a_busy_server_is_asked_again(tmp_path, site, url):
    site.busy["whole.bin"] = MAX_ATTEMPTS - 1
    assert fetch(url, tmp_path / "whole.bin").read_bytes() == BODY
    site.busy["whole.bin"] = 100
    with pytest.raises(OSError, match="503"):
        fetch(url, tmp_path / "again.bin")


def test_a_server_that_breaks_off_ever_earlier_is_given_up(tmp_path, site, url):
    site.ranges = False
    break_off(site, 30, 10, 20, 10, 20, 10, 20, 10)
    with pytest.raises(OSError, match="broke off"):
        fetch(url, tmp_path / "whole.bin")
    assert len(site.asked) == 1 + MAX_ATTEMPTS


@pytest.mark.parametrize(
    ("name", "sha256", "kind", "message"),
    [
        ("gone.bin", None, FileNotFoundError, "the server answered 404"),
        ("page.bin", None, HtmlInsteadOfFile, "web page instead of the file"),
        ("whole.bin", "0" * 64, OSError, f"SHA-256 mismatch .expected {'0' * 64}"),
    ],
)
def test_a_refusal_names_the_url_and_leaves_no_file(tmp_path, site, name, sha256, kind, message):
    with pytest.raises(kind, match=message) as error:
        fetch(f"{site.url}/{name}", tmp_path / name, sha256)
    assert f"{site.url}/{name}" in str(error.value)
    assert "\n" not in str(error.value)
    assert name not in names_in(tmp_path)
    if sha256:
        assert names_in(tmp_path) == [], "a file with a wrong checksum is not resumed"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1:9/x.bin", "Connection refused"),
        (
            "https://no-such-host.invalid/x.bin",
            "x.bin: (Name or service|Temporary failure|ConnectionError|no answer)",
        ),
    ],
)
def test_an_unreachable_host_is_one_line(tmp_path, url, message):
    with pytest.raises(OSError, match=message) as error:
        fetch(url, tmp_path / "x.bin")
    assert len(str(error.value)) < 260
    assert names_in(tmp_path) == []


def test_a_full_disk_is_noticed_beforehand(tmp_path, url, monkeypatch):
    class Usage:
        total = 10**9
        free = 1000

    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage)
    with pytest.raises(OSError, match="no room for .* it takes 0.010 GB"):
        fetch(url, tmp_path / "whole.bin")
    assert names_in(tmp_path) == []


def test_of_many_that_need_a_file_one_downloads_it(tmp_path, site, url):
    contents: list[bytes] = []

    def download_it() -> None:
        contents.append(fetch(url, tmp_path / "whole.bin").read_bytes())

    threads = [threading.Thread(target=download_it) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert contents == [BODY] * 5
    assert len(site.asked) == 1


def test_a_file_with_another_checksum_is_downloaded_again(tmp_path, site, url):
    (tmp_path / "whole.bin").write_bytes(b"garbage")
    for _ in range(2):
        assert fetch(url, tmp_path / "whole.bin", DIGEST).read_bytes() == BODY
    assert len(site.asked) == 1


def test_a_file_that_its_check_refuses_leaves_nothing(tmp_path, url):
    def refuse(part: Path) -> None:
        raise ValueError(f"{part} is odd")

    with pytest.raises(OSError, match=f"{url}: the file there is odd"):
        fetch(url, tmp_path / "whole.bin", check=refuse)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    "url",
    [
        "http://user:hunter2@{host}/whole.bin?sig=SECRET",
        "http://user:hunter2@{host}/none?sig=SECRET",
        "http://user:hunter2@127.0.0.1:9/x?sig=SECRET",
        "https://user:hunter2@{host}/x?sig=SECRET",
        "http://user:hunter2@[::1/x?sig=SECRET",
        "http://user:hunter2@host:port/x?sig=SECRET",
    ],
)
def test_no_line_and_no_file_has_a_secret(tmp_path, site, caplog, url):
    caplog.set_level("DEBUG", logger="system")
    break_off_for_good(site)
    host = site.url.removeprefix("http://")
    with pytest.raises(OSError, match="http") as error:
        fetch(url.format(host=host), tmp_path / "x.bin")
    assert "downloading http" in caplog.text
    files = [path.read_text(errors="ignore") for path in tmp_path.rglob("*.json")]
    for text in (str(error.value), caplog.text, *files):
        assert "hunter2" not in text
        assert "SECRET" not in text


def test_the_sidecar_of_a_part_has_no_secret(tmp_path, site):
    break_off_for_good(site)
    host = site.url.removeprefix("http://")
    with pytest.raises(OSError, match="broke off"):
        fetch(f"http://user:hunter2@{host}/whole.bin?sig=SECRET", tmp_path / "x.bin")
    sidecar = (tmp_path / "x.bin.part.json").read_text()
    assert list(json.loads(sidecar)) == ["address", "version"]
    assert "hunter2" not in sidecar
    assert "SECRET" not in sidecar


def test_each_folder_of_a_server_has_one_in_the_cache():
    _, first, _ = locate_in_cache("https://host/a?key=1", None)
    _, second, _ = locate_in_cache("https://host/a?key=2", None)
    assert first != second
    assert (
        locate_in_cache("https://host/f/a.bin", "c")[1]
        == locate_in_cache("https://host/f/b.bin", "c")[1]
    )
    folder, _, name = locate_in_cache("s3://bucket/run?/x.bin", None)
    assert (folder.reveal(), name) == ("s3://bucket/run?", "x.bin")
    assert locate_in_cache("https://host", None)[2] == "file"


S3_URL = "s3://weights/run/whole.bin"


@pytest.fixture
def bucket(monkeypatch):
    """A client of a local S3 whose bucket `weights` holds run/whole.bin."""
    pytest.importorskip("moto")
    with s3(monkeypatch, "weights") as client:
        client.put_object(Bucket="weights", Key="run/whole.bin", Body=BODY)
        yield client


def version_in(bucket) -> str:
    return bucket.head_object(Bucket="weights", Key="run/whole.bin")["ETag"]


def test_s3_is_downloaded_and_resumed(tmp_path, bucket, monkeypatch):
    url = S3_URL.replace("s3", "S3")
    assert fetch(url, tmp_path / "a.bin", DIGEST).read_bytes() == BODY
    write_part(tmp_path / "b.bin", BODY[: 80 * NETWORK_BYTES], S3_URL, version_in(bucket))
    starts = []
    open_url = download.open_url

    def record_start(url, start, version):
        starts.append(start)
        return open_url(url, start, version)

    monkeypatch.setattr(download, "open_url", record_start)
    assert fetch(S3_URL, tmp_path / "b.bin", DIGEST).read_bytes() == BODY
    assert starts == [80 * NETWORK_BYTES]


def test_a_newer_file_in_s3_is_not_joined_to_an_older_part(tmp_path, bucket):
    write_part(tmp_path / "c.bin", BODY[: 80 * NETWORK_BYTES], S3_URL, version_in(bucket))
    bucket.put_object(Bucket="weights", Key="run/whole.bin", Body=NEWER)
    assert fetch(S3_URL, tmp_path / "c.bin").read_bytes() == NEWER


@pytest.mark.usefixtures("bucket")
@pytest.mark.parametrize(
    ("url", "kind", "message"),
    [
        ("s3://weights/run/none.bin", FileNotFoundError, "NoSuchKey"),
        ("s3://other/x", OSError, "NoSuchBucket"),
        ("s3://weights", ValueError, "s3://bucket/key"),
    ],
)
def test_what_s3_refuses_is_named(tmp_path, url, kind, message):
    with pytest.raises(kind, match=message):
        fetch(url, tmp_path / "d.bin")


def test_s3_that_cannot_be_reached_and_missing_credentials_are_named(tmp_path, monkeypatch):
    pytest.importorskip("moto")
    with s3(monkeypatch, "weights"):
        pass  # its variables lead to a server that has ended
    with pytest.raises(OSError, match="cannot get s3://weights/x: .*[Cc]onnect"):
        fetch("s3://weights/x", tmp_path / "d.bin")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(OSError, match="credentials.*AWS_ACCESS_KEY_ID"):
        fetch("s3://weights/x", tmp_path / "d.bin")
    assert not (tmp_path / "d.bin").exists()


def test_an_s3_without_ranges_sends_the_whole_file_again(tmp_path, monkeypatch):
    import boto3

    class Client:
        def client(self, *_, **_more):
            return self

        def get_object(self, **_):
            body = StreamingBody(io.BytesIO(BODY), len(BODY))
            return {"Body": body, "ContentLength": len(BODY)}

    monkeypatch.setattr(boto3, "Session", Client)
    write_part(tmp_path / "x", BODY[:1000], "s3://a/x", '"1"')
    assert fetch("s3://a/x", tmp_path / "x").read_bytes() == BODY

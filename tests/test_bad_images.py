"""docs/reliability.md: images that cannot be read are found before a run begins."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

import main_task_retrieval
from tests.quick_scores import skip_reports
from tests.runs import arguments, run_refused


@pytest.fixture(autouse=True)
def _without_reports(monkeypatch):
    skip_reports(monkeypatch.setattr)


def spoil(images: Path) -> None:
    """Of five training pairs one image each: empty, cut off, text, a folder, missing."""
    empty, cut_off, text, folder, missing = (images / f"{number}_2.png" for number in range(5))
    empty.write_bytes(b"")
    content = cut_off.read_bytes()
    cut_off.write_bytes(content[: len(content) // 2])
    text.write_text("no image")
    folder.unlink()
    folder.mkdir()
    missing.unlink()


@pytest.mark.parametrize("cached", [False, True])
def test_images_that_cannot_be_read_end_the_run_before_it_begins_or_are_left_out(
    cached, spot, tiny_sizes, tmp_path, capsys, caplog
):
    data = shutil.copytree(spot, tmp_path / "data")
    images = data / "images_test"
    spoil(images)
    run = tmp_path / "run"
    more = ["--do_train", "--epochs", "1", "--batch_size", "2"]
    if cached:
        more += ["--image_cache", str(tmp_path / "cache")]
    options = arguments(data, run, tiny_sizes, "retrieval", *more)
    assert "no image" in run_refused("retrieval", options, capsys)
    shutil.copy2(images / "4.png", images / "4_2.png")
    line = run_refused("retrieval", options, capsys)
    assert "0_2.png" in line
    if not cached:
        assert "3 more of 26 images cannot be read either (--on_bad_image skip" in line
    (images / "4_2.png").unlink()
    assert not run.exists()
    assert main_task_retrieval.main([*options, "--on_bad_image", "skip"]) == 0
    assert "leaving out 5 of the 8 pairs of the train split" in caplog.text
    for number in range(5):
        assert f"images_test/{number}_2.png" in caplog.text


def test_images_are_checked_once_and_again_where_one_has_changed(
    spot, tiny_sizes, tmp_path, caplog
):
    data = shutil.copytree(spot, tmp_path / "data")
    options = arguments(
        data, tmp_path / "run", tiny_sizes, "retrieval", "--do_train", "--epochs", "1"
    )
    image = data / "images_test" / "1.png"

    def checks_of(runs: int) -> int:
        caplog.clear()
        for _ in range(runs):
            assert main_task_retrieval.main(options) == 0
        messages = [record.getMessage() for record in caplog.records]
        return messages.count("checking that 26 images can be read")

    assert checks_of(runs=2) == 1
    Image.open(image).rotate(180).save(image)
    assert checks_of(runs=2) == 1

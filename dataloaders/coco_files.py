"""COCO's caption files: ground truth and results."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from system.json_files import read_json, write_json


def write_results(folder: Path, label: str, captions: Mapping[str, str]) -> Path:
    """Write `hyp_ep_<label>.json`, `[{"caption", "image_id"}]`, and return its path."""
    path = folder / f"hyp_ep_{label}.json"
    rows = [{"caption": caption, "image_id": key} for key, caption in captions.items()]
    write_json(path, rows)
    return path


def write_references(
    folder: Path, references: Mapping[str, Sequence[str]], subsets: Mapping[str, Sequence[str]]
) -> None:
    """Write `ground_truth.json` and, if there are subsets, `type_mapping.json`.

    `gt/eval_utils.py score` needs them if no ground-truth file exists yet.
    """
    write_json(folder / "ground_truth.json", coco_ground_truth(references.items()))
    if subsets:
        write_json(folder / "type_mapping.json", subsets)


def coco_ground_truth(captions: Iterable[tuple[str, Sequence[str]]]) -> dict[str, Any]:
    """(caption id, sentences) of every entry → COCO's captions format.

    Each entry becomes one image row, even if its id occurs more than once.
    """
    fields = ("contributor", "date_created", "description", "url", "version", "year")
    dummy = dict.fromkeys(fields, "dummy")
    images: list[dict[str, str]] = []
    annotations: list[dict[str, Any]] = []
    for caption_id, sentences in captions:
        images.append({"filename": caption_id, "id": caption_id})
        for sentence in sentences:
            row = {"caption": sentence, "id": len(annotations), "image_id": caption_id}
            annotations.append(row)
    return {
        "info": dummy,
        "licenses": dict(dummy),
        "type": "captions",
        "images": images,
        "annotations": annotations,
    }


def read_ground_truth(path: str | Path) -> dict[str, list[str]]:
    """Caption id → sentences of a ground-truth file; ids may be numbers, as COCO's own are.

    Raises ValueError for other content.
    """
    rows = read_json(path, dict).get("annotations")
    if not isinstance(rows, list):
        raise ValueError(f"{path}: expected a list `annotations`")
    captions: dict[str, list[str]] = {}
    for index, row in enumerate(rows):
        if not _is_caption_row(row):
            expected = '{"image_id": "…", "caption": "…"}'
            raise ValueError(f"{path}: annotation {index} is not {expected}")
        captions.setdefault(str(row["image_id"]), []).append(row["caption"])
    return captions


def read_results(path: str | Path) -> dict[str, str]:
    """Caption id → caption of a result file, `[{"image_id", "caption"}]`; ids may be numbers.

    Raises ValueError for other content, and for two captions of one id.
    """
    captions: dict[str, str] = {}
    for index, row in enumerate(read_json(path, list)):
        if not _is_caption_row(row):
            raise ValueError(f'{path}: result {index} is not {{"image_id": "…", "caption": "…"}}')
        caption_id = str(row["image_id"])
        if caption_id in captions:
            raise ValueError(f"{path}: two captions of {caption_id}")
        captions[caption_id] = row["caption"]
    if not captions:
        raise ValueError(f"{path} holds no captions")
    return captions


def _is_caption_row(row: Any) -> bool:
    # `type`, not isinstance: true and false are integers to Python.
    is_row = isinstance(row, dict) and type(row.get("image_id")) in (str, int)
    return is_row and isinstance(row.get("caption"), str)

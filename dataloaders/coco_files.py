"""COCO's caption files: ground truth and results."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from system.json_files import read_json, write_json


def write_results(folder: Path, label: str, captions: Mapping[str, str]) -> Path:
    """`hyp_ep_<label>.json`: `[{"caption", "image_id"}]`."""
    path = folder / f"hyp_ep_{label}.json"
    write_json(path, [{"caption": caption, "image_id": key} for key, caption in captions.items()])
    return path


def write_references(
    folder: Path, references: Mapping[str, Sequence[str]], subsets: Mapping[str, Sequence[str]]
) -> None:
    """`ground_truth.json`, and where pairs have types `type_mapping.json`: what `gt/eval_utils.py score` needs of a user's data."""
    write_json(folder / "ground_truth.json", coco_ground_truth(references.items()))
    if subsets:
        write_json(folder / "type_mapping.json", subsets)


def coco_ground_truth(captions: Iterable[tuple[str, Sequence[str]]]) -> dict:
    """(image id, sentences) of every entry → COCO's captions format; an entry gives one image row, repeated ids included."""
    dummy = dict.fromkeys(
        ("contributor", "date_created", "description", "url", "version", "year"), "dummy"
    )
    images, annotations = [], []
    for image_id, sentences in captions:
        images.append({"filename": image_id, "id": image_id})
        annotations += [
            {"caption": s, "id": len(annotations) + n, "image_id": image_id}
            for n, s in enumerate(sentences)
        ]
    return {
        "info": dummy,
        "licenses": dict(dummy),
        "type": "captions",
        "images": images,
        "annotations": annotations,
    }


def read_ground_truth(path: str | Path) -> dict[str, list[str]]:
    """The captions by id of a COCO ground-truth file; ValueError for another schema."""
    rows = read_json(path, dict).get("annotations", [])
    if not isinstance(rows, list):
        raise ValueError(f"{path}: annotations is no list")
    captions: dict[str, list[str]] = {}
    for number, row in enumerate(rows):
        if not (
            isinstance(row, dict)
            and isinstance(row.get("image_id"), str)
            and isinstance(row.get("caption"), str)
        ):
            raise ValueError(
                f'{path}: annotation {number} is not {{"image_id": "…", "caption": "…"}}'
            )
        captions.setdefault(row["image_id"], []).append(row["caption"])
    return captions


def read_results(path: str | Path) -> dict[str, str]:
    """Caption by id of a COCO result file, `[{"image_id", "caption"}]`; ids may be numbers. ValueError for any other schema."""
    captions: dict[str, str] = {}
    for number, row in enumerate(read_json(path, list)):
        if not (
            isinstance(row, dict)
            and type(row.get("image_id")) in (str, int)
            and isinstance(row.get("caption"), str)
        ):
            raise ValueError(f'{path}: result {number} is not {{"image_id": "…", "caption": "…"}}')
        if str(row["image_id"]) in captions:
            raise ValueError(f"{path}: two captions of {row['image_id']}")
        captions[str(row["image_id"])] = row["caption"]
    if not captions:
        raise ValueError(f"{path} holds no captions")
    return captions

"""What the published README links to: the two datasets, OpenAI's CLIP, the authors' weights.

    python preprocess/download.py spot                 # annotations, images and merged lists of Spot-the-Diff into images/
    python preprocess/download.py clevr                # CLEVR-Change into data/
    python preprocess/download.py clip                 # OpenAI's ViT-B/32 into modules/
    python preprocess/download.py pretrained trained   # the authors' adapted CLIPs and captioners into ckpts/

A download that breaks off goes on when the command is given again; what is there and right is not brought again. Google Drive hands
a file out only so often a day: then a browser may still get it, and `--archive FILE` takes it from there.
"""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataloaders.pairs import SPLITS
from system.command import OneLineParser, run_command
from system.escaping import show

ROOT = Path(__file__).resolve().parents[1]


ANNOTATIONS = "https://raw.githubusercontent.com/harsh19/spot-the-diff/master/data/annotations"


RAW_ENTRIES = {"train": 9524, "val": 1634, "test": 1404}  # of Spot-the-Diff's lists


PAIRS = {"train": 8566, "val": 1493, "test": 1270}


SCENES = {"train": 33830, "val": 1988, "test": 3985}  # of CLEVR-Change


TIMEOUT, RETRIES = 60, 5


TABLE_ENDINGS = frozenset((".json", ".jsonl", ".csv", ".tsv", ".txt", ".md", ".h5", ".npy"))


@dataclass(frozen=True)
class DriveItem:
    """A file or a folder on Google Drive."""

    name: str
    id: str
    folder: bool = False

    @property
    def address(self) -> str:
        """What a browser opens."""
        return f"https://drive.google.com/{'drive/folders' if self.folder else 'file/d'}/{self.id}"


SPOT_IMAGES = DriveItem("Spot-the-Diff's images", "1OVb4_3Uec_xbyUk90aWC6LFpKsIOtR7v")


SPOT_LISTS = DriveItem(
    "Spot-the-Diff's merged lists", "1g8QD6Y3La8cIamE7jeSSlXTw8G3r5Q8o", folder=True
)


CLEVR = DriveItem("CLEVR-Change", "1HJ3gWjaUJykEckyb2M0MB4HnrJSihjVe")


ADAPTED = DriveItem("the adapted CLIPs", "1qOYVpZy57clJPF6AThsnO0Tfy4zq-gg1", folder=True)


CAPTIONERS = DriveItem("the captioners", "18UfIvwKt0EE14EbogJycMmANpUJtsZbE", folder=True)


def download_from_drive(item: DriveItem, target: Path, by_hand: str) -> None:
    """Bring a file, or a folder's files, from Google Drive to `target`; OSError saying what to do by hand where it refuses."""
    import gdown
    import requests
    from gdown.exceptions import DownloadError

    from system.files import error_line

    last_way = f"open {item.address} in a browser and {by_hand}"
    bring = gdown.download_folder if item.folder else gdown.download
    try:
        bring(
            id=item.id,
            output=str(target),
            resume=True,
            use_cookies=False,
            timeout=TIMEOUT,
            retries=RETRIES,
            quiet=not sys.stderr.isatty(),
        )
    except requests.ConnectionError:
        raise OSError(
            f"Google Drive cannot be reached for {item.name}: try again with a network, or {last_way}"
        ) from None
    except (DownloadError, requests.RequestException) as error:
        reason = error_line(error)
        raise OSError(
            f"Google Drive does not give {item.name} ({reason}). It hands a file out only so often a day: try again "
            f"tomorrow, or {last_way}"
        ) from None


def download_spot(folder: Path, archive: Path | None) -> None:
    """Annotations, images, merged lists."""
    from dataloaders.datasets.spot_the_diff import read_annotations
    from preprocess.reformat_dataset import reformat
    from system.download import fetch

    for split in SPLITS:
        fetch(f"{ANNOTATIONS}/{split}.json", folder / f"{split}.json")
        raw = folder / f"{split}.json"
        _check_count(
            len(read_annotations(raw)),
            RAW_ENTRIES[split],
            f"entries of {raw}",
            "remove it to bring it anew",
        )
    lists = [folder / f"reformat_{split}.json" for split in SPLITS]
    if not all(path.is_file() for path in lists):
        try:
            download_from_drive(SPOT_LISTS, folder, "save its files")
        except OSError as error:
            show(f"{error}. Made from the annotations instead:", file=sys.stderr)
        if not all(path.is_file() for path in lists):
            reformat(folder, list(SPLITS), folder)
    entries = {split: read_annotations(path) for split, path in zip(SPLITS, lists, strict=True)}
    for split, found in entries.items():
        _check_count(
            len(found),
            PAIRS[split],
            f"pairs of {folder / f'reformat_{split}.json'}",
            "remove it to bring it anew",
        )
    images = folder / "images_test"
    wanted = [
        f"{image_id}{ending}.png"
        for found in entries.values()
        for image_id, _ in found
        for ending in ("", "_2")
    ]
    if _missing(images, wanted):
        _unpack_from(
            SPOT_IMAGES,
            folder,
            archive,
            lambda names: any(name.endswith("_2.png") for name in names),
            images,
        )
    _check_count(len(wanted) - len(_missing(images, wanted)), len(wanted), f"images of {images}")
    show(f"Spot-the-Diff in {folder}: {sum(PAIRS.values())} pairs, all images there")


def download_clevr(folder: Path, archive: Path | None) -> None:
    """The dataset's archive, unpacked."""
    from dataloaders.datasets.clevr_change import (
        CAPTION_FILES,
        FOLDERS,
        change_types,
        read_captions,
        read_split,
    )

    splits = folder / "splits.json"
    files = (*CAPTION_FILES, splits.name, "type_mapping.json")

    def lacking() -> list[str]:
        names = (
            [name for split in SPLITS for name in read_split(folder, split)]
            if splits.is_file()
            else []
        )
        absent = [str(folder / file) for file in files if not (folder / file).is_file()]
        return absent + [
            missing
            for place, prefix in FOLDERS.items()
            for missing in _missing(folder / place, [prefix + name for name in names])
        ]

    if lacking():
        needed = {*FOLDERS, *(file for file in files if not (folder / file).is_file())}
        _unpack_from(CLEVR, folder, archive, needed.issubset, folder)
    for split in SPLITS:
        _check_count(
            len(read_split(folder, split)),
            SCENES[split],
            f"scenes of the {split} split in {splits}",
        )
    total = sum(SCENES.values())
    for file in CAPTION_FILES:
        _check_count(len(read_captions(folder / file)), total, f"scenes in {folder / file}")
    _check_count(
        sum(map(len, change_types(folder).values())),
        total,
        f"scenes in {folder / 'type_mapping.json'}",
    )
    absent = lacking()
    _check_count(
        3 * total - len(absent),
        3 * total,
        f"images below {folder}" + (f" (no {absent[0]})" if absent else ""),
    )
    show(f"CLEVR-Change in {folder}: {total} scenes, all images there")


def download_clip(folder: Path, name: str) -> None:
    """One of OpenAI's CLIPs, under the name that is looked for."""
    from modules.weights.remote import download_openai_clip

    show(download_openai_clip(name, folder, folder))


def download_weights(item: DriveItem, folder: Path) -> None:
    """The files of a folder of weights; each is read and named."""
    from modules.weights.key_names import clip_tensors, has_full_clip
    from modules.weights.sources import read_released

    download_from_drive(item, folder, f"save its files in {folder}")
    files = sorted(path for path in folder.rglob("*.bin*") if path.suffix not in (".part", ".json"))
    if not files:
        raise ValueError(f"no weights came into {folder}: look at {item.address}")
    for path in files:
        weights = read_released(path)
        kind = "captioner" if any(key.startswith("decoder.") for key in weights) else "adapted CLIP"
        whole = "" if has_full_clip(weights) else ", without all of CLIP"
        show(f"{path}: {kind} of {len(clip_tensors(weights))} CLIP tensors{whole}")


def _unpack_from(
    item: DriveItem,
    folder: Path,
    archive: Path | None,
    fits: Callable[[list[str]], bool],
    target: Path,
) -> None:
    """An archive's uppermost folder whose entries fit, moved to `target`; the archive is brought first, and goes at the end."""
    from dataloaders.picture_files import picture_endings
    from system.extraction import DamagedArchive, extracted, move_into

    brought = archive or folder / f"{item.id}.archive"
    if archive is None:
        folder.mkdir(parents=True, exist_ok=True)
        download_from_drive(item, brought, "give --archive with the file that it saves")
    elif not archive.is_file():
        raise FileNotFoundError(f"--archive: no file {archive}")
    try:
        with open(brought, "rb") as file:
            if file.read(64).lstrip()[:1] == b"<":
                raise DamagedArchive(
                    f"{brought} is a web page, not {item.name}: open {item.address} in a browser, and give "
                    "--archive with the file that it saves"
                )
        with extracted(brought, folder) as root:
            found = next(
                (place for place, folders, files in os.walk(root) if fits([*folders, *files])), None
            )
            if found is None:
                raise ValueError(
                    f"{brought} is not laid out as {item.name}: it holds {', '.join(sorted(os.listdir(root))[:5])}"
                )
            move_into(Path(found), target, picture_endings() | TABLE_ENDINGS)
    except DamagedArchive:
        if archive is None:
            brought.unlink()
        raise
    if archive is None:
        brought.unlink()


def _missing(folder: Path, names: list[str]) -> list[str]:
    present = set(os.listdir(folder)) if folder.is_dir() else set()
    return [str(folder / name) for name in names if name not in present]


def _check_count(found: int, expected: int, what: str, way_out: str = "") -> None:
    if found != expected:
        raise ValueError(f"{found} {what}, expected {expected}{way_out and f': {way_out}'}")


def main(argv: list[str] | None = None) -> int:
    """Command line; see --help."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what", nargs="+", choices=("spot", "clevr", "clip", "pretrained", "trained")
    )
    parser.add_argument(
        "--to", type=Path, metavar="DIR", help="folder to put it into (defaults: see above)"
    )
    parser.add_argument(
        "--archive",
        type=Path,
        metavar="FILE",
        help="images of spot, or clevr: an archive got by hand",
    )
    parser.add_argument(
        "--name", default="ViT-B/32", help="clip: which of OpenAI's (default: ViT-B/32)"
    )
    args = parser.parse_args(argv)
    if args.to and len(set(args.what)) > 1:
        parser.error("--to is one folder: give one thing to download")
    if args.archive and args.what not in (["spot"], ["clevr"]):
        parser.error("--archive belongs to spot or clevr alone")
    places = {
        "spot": "images",
        "clevr": "data",
        "clip": "modules",
        "pretrained": "ckpts/pretrained",
        "trained": "ckpts/trained",
    }
    jobs = {
        "spot": lambda to: download_spot(to, args.archive),
        "clevr": lambda to: download_clevr(to, args.archive),
        "clip": lambda to: download_clip(to, args.name),
        "pretrained": lambda to: download_weights(ADAPTED, to),
        "trained": lambda to: download_weights(CAPTIONERS, to),
    }
    refused = None
    for what in dict.fromkeys(args.what):
        try:
            run_command(parser.prog, lambda what=what: jobs[what](args.to or ROOT / places[what]))
        except SystemExit as stop:
            if stop.code != 2:
                raise
            refused = stop  # one that cannot be had does not keep the others away
    if refused:
        raise refused
    return 0


if __name__ == "__main__":
    sys.exit(main())

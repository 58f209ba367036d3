"""Download what the published README links to: two datasets, OpenAI's CLIP, the authors' weights.

    python preprocess/download.py spot                 # Spot-the-Diff into images/
    python preprocess/download.py clevr                # CLEVR-Change into data/
    python preprocess/download.py clip                 # OpenAI's ViT-B/32 into modules/
    python preprocess/download.py pretrained trained   # adapted CLIPs and captioners into ckpts/

The same command resumes an interrupted download, and downloads nothing that is complete. Google
Drive limits the downloads of a file per day. A browser may still be able to download it; pass that
file with `--archive`. Other registered datasets define their own download, into data/NAME. The
folders are in the checkout, or in the user's cache where pip installed the command.
"""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from system.requirements import report_missing

    report_missing()

from dataloaders.datasets import DATASETS, open_dataset
from dataloaders.datasets.clevr_change import (
    CAPTION_FILES,
    FOLDERS,
    read_captions,
    read_change_types,
    read_split,
)
from dataloaders.datasets.spot_the_diff import read_annotations
from dataloaders.pairs import SPLITS
from dataloaders.picture_files import picture_endings
from preprocess.reformat_dataset import reformat
from system.command import run_command
from system.download import fetch
from system.escaping import show, summarize_error
from system.extraction import DamagedArchive, extract_to_temporary, move_into
from system.files import is_html
from system.parser import OneLineParser
from system.places import choose_downloads_folder

ANNOTATIONS = "https://raw.githubusercontent.com/harsh19/spot-the-diff/master/data/annotations"

RAW_ENTRIES = {"train": 9524, "val": 1634, "test": 1404}  # in Spot-the-Diff's lists
PAIRS = {"train": 8566, "val": 1493, "test": 1270}  # in the same lists, merged
SCENES = {"train": 33830, "val": 1988, "test": 3985}  # in CLEVR-Change

CLEVR_FILES = (*CAPTION_FILES, "splits.json", "type_mapping.json")

DEFAULT_CLIP = "ViT-B/32"  # of OpenAI's

TIMEOUT = 60  # seconds, for Google Drive
RETRIES = 5

# What is extracted from an archive besides images; other files are not extracted.
TABLE_ENDINGS = frozenset((".json", ".jsonl", ".csv", ".tsv", ".txt", ".md", ".h5", ".npy"))

DOWNLOAD_AGAIN = "delete it to download it again"


@dataclass(frozen=True)
class DriveItem:
    """A file or a folder on Google Drive."""

    name: str
    id: str
    is_folder: bool = False

    @property
    def url(self) -> str:
        """What a browser opens."""
        kind = "drive/folders" if self.is_folder else "file/d"
        return f"https://drive.google.com/{kind}/{self.id}"


SPOT_IMAGES = DriveItem("Spot-the-Diff's images", "1OVb4_3Uec_xbyUk90aWC6LFpKsIOtR7v")
SPOT_LISTS = DriveItem("Spot-the-Diff's merged lists", "1g8QD6Y3La8cIamE7jeSSlXTw8G3r5Q8o", True)
CLEVR = DriveItem("CLEVR-Change", "1HJ3gWjaUJykEckyb2M0MB4HnrJSihjVe")
ADAPTED = DriveItem("the adapted CLIPs", "1qOYVpZy57clJPF6AThsnO0Tfy4zq-gg1", True)
CAPTIONERS = DriveItem("the captioners", "18UfIvwKt0EE14EbogJycMmANpUJtsZbE", True)


def download_from_drive(item: DriveItem, target: Path, by_hand: str) -> None:
    """Download a file, or a folder's files, from Google Drive to `target`.

    `by_hand` says what to do in a browser. Raises OSError with that text if Google Drive refuses.
    """
    import gdown
    import requests
    from gdown.exceptions import DownloadError

    manual_way = f"open {item.url} in a browser and {by_hand}"
    download = gdown.download_folder if item.is_folder else gdown.download
    try:
        download(
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
            f"Google Drive cannot be reached for {item.name}: try again with a network, "
            f"or {manual_way}"
        ) from None
    except (DownloadError, requests.RequestException) as error:
        raise OSError(
            f"Google Drive refuses {item.name} ({summarize_error(error)}). It limits the downloads "
            f"of a file per day: try again tomorrow, or {manual_way}"
        ) from None


def download_spot(folder: Path, archive: Path | None) -> None:
    """Download Spot-the-Diff: its annotations, the same merged by pair, its images."""
    _download_annotations(folder)
    _make_merged_lists(folder)
    names = []
    for split in SPLITS:
        merged = folder / f"reformat_{split}.json"
        pairs = read_annotations(merged)
        _check_count(len(pairs), PAIRS[split], f"pairs of {merged}", DOWNLOAD_AGAIN)
        for image_id, _ in pairs:
            names += [f"{image_id}.png", f"{image_id}_2.png"]
    images = folder / "images_test"
    if _missing_files(images, names):
        _download_archive(SPOT_IMAGES, folder, archive, _has_second_images, images)
    num_found = len(names) - len(_missing_files(images, names))
    _check_count(num_found, len(names), f"images of {images}")
    show(f"Spot-the-Diff in {folder}: {sum(PAIRS.values())} pairs, all images there")


def _download_annotations(folder: Path) -> None:
    for split in SPLITS:
        raw = folder / f"{split}.json"
        fetch(f"{ANNOTATIONS}/{split}.json", raw)
        num_entries = len(read_annotations(raw))
        _check_count(num_entries, RAW_ENTRIES[split], f"entries of {raw}", DOWNLOAD_AGAIN)


def _make_merged_lists(folder: Path) -> None:
    """Download the authors' merged lists, or make them from the annotations if that fails."""
    merged = [folder / f"reformat_{split}.json" for split in SPLITS]
    if all(path.is_file() for path in merged):
        return
    try:
        download_from_drive(SPOT_LISTS, folder, "save its files")
    except OSError as error:
        show(f"{error}. Making them from the annotations instead:", file=sys.stderr)
    if not all(path.is_file() for path in merged):
        reformat(folder, list(SPLITS), folder)


def _has_second_images(names: set[str]) -> bool:
    """Whether a folder's entries are Spot-the-Diff's images."""
    return any(name.endswith("_2.png") for name in names)


def download_clevr(folder: Path, archive: Path | None) -> None:
    """Download CLEVR-Change: its archive is extracted."""
    if _missing_clevr_files(folder):
        needed = {*FOLDERS, *_missing_clevr_tables(folder)}
        _download_archive(CLEVR, folder, archive, needed.issubset, folder)
    for split, expected in SCENES.items():
        num_scenes = len(read_split(folder, split))
        what = f"scenes of the {split} split in {folder / 'splits.json'}"
        _check_count(num_scenes, expected, what)
    total = sum(SCENES.values())
    for file in CAPTION_FILES:
        _check_count(len(read_captions(folder / file)), total, f"scenes in {folder / file}")
    num_typed = sum(map(len, read_change_types(folder).values()))
    _check_count(num_typed, total, f"scenes in {folder / 'type_mapping.json'}")
    missing = _missing_clevr_files(folder)
    example = f" (no {missing[0]})" if missing else ""
    num_images = len(FOLDERS) * total
    _check_count(num_images - len(missing), num_images, f"images below {folder}{example}")
    show(f"CLEVR-Change in {folder}: {total} scenes, all images there")


def _missing_clevr_files(folder: Path) -> list[str]:
    """Paths of the tables and images of CLEVR-Change that are not there."""
    missing = [str(folder / file) for file in _missing_clevr_tables(folder)]
    if not (folder / "splits.json").is_file():
        return missing
    names = [name for split in SPLITS for name in read_split(folder, split)]
    for place, prefix in FOLDERS.items():
        missing += _missing_files(folder / place, [prefix + name for name in names])
    return missing


def _missing_clevr_tables(folder: Path) -> list[str]:
    return [file for file in CLEVR_FILES if not (folder / file).is_file()]


def download_clip(name: str, folder: Path) -> None:
    """Download one of OpenAI's CLIPs, under the name that the scripts look for."""
    from modules.weights.remote import download_openai_clip

    show(download_openai_clip(name, folder, folder))


def download_weights(item: DriveItem, folder: Path) -> None:
    """Download a folder of weights, read each file, and print what it holds."""
    download_from_drive(item, folder, f"save its files in {folder}")
    files = sorted(path for path in folder.rglob("*.bin*") if path.suffix not in (".part", ".json"))
    if not files:
        raise ValueError(f"no weights arrived in {folder}: see {item.url}")
    for path in files:
        show(f"{path}: {_describe_weights(path)}")


def _describe_weights(path: Path) -> str:
    from modules.model.backbone import has_all_pretrained_tensors, strip_prefix
    from modules.model.clip import CLIP
    from modules.weights.key_names import has_captioner
    from modules.weights.sources import read_released

    weights = read_released(path)
    kind = "captioner" if has_captioner(weights) else "adapted CLIP"
    note = "" if has_all_pretrained_tensors(weights) else ", without all of CLIP"
    count = len(strip_prefix(weights, CLIP.key_prefix))
    return f"{kind} of {count} CLIP tensors{note}"


def _download_archive(
    item: DriveItem,
    folder: Path,
    archive: Path | None,
    is_content: Callable[[set[str]], bool],
    target: Path,
) -> None:
    """Download an archive and move the topmost folder that holds the dataset to `target`.

    With `archive`, that file is extracted instead, and stays where it is.
    """
    if archive is not None:
        if not archive.is_file():
            raise FileNotFoundError(f"--archive: no file {archive}")
        _extract_content(item, archive, folder, is_content, target)
        return
    downloaded = folder / f"{item.id}.archive"
    folder.mkdir(parents=True, exist_ok=True)
    download_from_drive(item, downloaded, "give --archive with the file that it saves")
    try:
        _extract_content(item, downloaded, folder, is_content, target)
    except DamagedArchive:
        downloaded.unlink()  # the next attempt would consider it complete
        raise
    downloaded.unlink()


def _extract_content(
    item: DriveItem,
    archive: Path,
    folder: Path,
    is_content: Callable[[set[str]], bool],
    target: Path,
) -> None:
    with open(archive, "rb") as file:
        head = file.read(256)
    if is_html(head):
        raise DamagedArchive(
            f"{archive} is an HTML page, not {item.name}: open {item.url} in a browser, and give "
            "--archive with the file that it saves"
        )
    with extract_to_temporary(archive, folder) as root:
        content = _find_content(root, is_content)
        if content is None:
            entries = ", ".join(sorted(os.listdir(root))[:5])
            raise ValueError(f"{archive} is not laid out as {item.name}: it holds {entries}")
        move_into(content, target, picture_endings() | TABLE_ENDINGS)


def _find_content(root: Path, is_content: Callable[[set[str]], bool]) -> Path | None:
    """The topmost folder whose entries are the content."""
    for place, folders, files in os.walk(root):
        if is_content({*folders, *files}):
            return Path(place)
    return None


def _missing_files(folder: Path, names: list[str]) -> list[str]:
    """The paths of the files that a folder lacks."""
    present = set(os.listdir(folder)) if folder.is_dir() else set()
    return [str(folder / name) for name in names if name not in present]


def _check_count(found: int, expected: int, what: str, way_out: str = "") -> None:
    if found != expected:
        ending = f": {way_out}" if way_out else ""
        raise ValueError(f"{found} {what}, expected {expected}{ending}")


class Download(NamedTuple):
    """The folder that a download goes to, and the function that does it."""

    folder: str
    run: Callable[[Path, argparse.Namespace], None]


DOWNLOADS = {
    "spot": Download("images", lambda folder, args: download_spot(folder, args.archive)),
    "clevr": Download("data", lambda folder, args: download_clevr(folder, args.archive)),
    "clip": Download(
        "modules", lambda folder, args: download_clip(args.name or DEFAULT_CLIP, folder)
    ),
    "pretrained": Download("ckpts/pretrained", lambda folder, _: download_weights(ADAPTED, folder)),
    "trained": Download("ckpts/trained", lambda folder, _: download_weights(CAPTIONERS, folder)),
}


def main(argv: list[str] | None = None) -> int:
    """Command line; see --help. If one download fails, the others still run."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.to and len(set(args.what)) > 1:
        parser.error("--to is one folder: ask for one download")
    if args.archive and args.what not in (["spot"], ["clevr"]):
        parser.error("--archive is for spot alone or clevr alone")
    if args.name and "clip" not in args.what:
        parser.error("--name is for clip")
    failure = None
    for what in dict.fromkeys(args.what):
        try:
            run_command(parser.prog, lambda what=what: _download(what, args))
        except SystemExit as stop:
            if stop.code != 2:
                raise
            failure = stop
    if failure:
        raise failure
    return 0


def _download(what: str, args: argparse.Namespace) -> None:
    if what in DOWNLOADS:
        download = DOWNLOADS[what]
        download.run(args.to or choose_downloads_folder() / download.folder, args)
    else:
        folder = args.to or choose_downloads_folder() / "data" / what
        open_dataset(what, folder).download(folder)


def _parser() -> OneLineParser:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    to = "folder to download to (defaults: see above)"
    archive = "spot or clevr: the archive that a browser downloaded"
    name = f"clip: which of OpenAI's (default: {DEFAULT_CLIP})"
    others = [dataset for dataset in DATASETS if dataset not in DOWNLOADS]
    parser.add_argument("what", nargs="+", choices=(*DOWNLOADS, *others))
    parser.add_argument("--to", type=Path, metavar="DIR", help=to)
    parser.add_argument("--archive", type=Path, metavar="FILE", help=archive)
    parser.add_argument("--name", help=name)
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""Every command in README.md and docs/ is run as written, page by page, with small data.

Blocks marked `bash` and `python` are run, from a page's first to its last. A `text` block after one
is exactly what it prints on stdout. `<!-- not run: reason -->` before a block is the one way out.
The notebook's cells are run too, and its outputs compared.
Data and weights are small replacements. Training commands get options at their end that fit them
(SHRUNK); everything else is word for word.
"""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from base64 import b64decode
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import BytesIO, StringIO
from pathlib import Path

import pytest
import torch
from PIL import Image

from clip4idc.__main__ import COMMANDS
from dataloaders.coco_files import write_references, write_results
from modules.clip4idc import CLIP4IDC
from modules.model.clip import CLIP
from modules.model.clip_sizes import ClipSizes
from modules.weights.model_info import MODEL_INFO_FILE, write_model_info
from tests import quick_python
from tests.conftest import ROOT, TINY, draw_pair, make_clevr, make_spot
from tests.notebooks import run_cells

ALL_PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
PAGES = [page for page in ALL_PAGES if page not in ("docs/deviations.md", "docs/experiments.md")]
BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>.+?) -->\n)?"
    r"^```(?P<kind>[\w{}-]*)\n(?P<body>.*?)^```$"
    r"(?:\n^```text\n(?P<output>.*?)^```$)?",
    re.MULTILINE | re.DOTALL,
)
NOTEBOOK = ROOT / "docs" / "tour.ipynb"
COMMAND = r"(?:python|torchrun|bash|pip|tensorboard|scripts/\w+\.sh) "
SHRUNK = [
    "--pretrained_clip_name",
    "tiny.json",
    "--intra_num_hidden_layers",
    "1",
    "--batch_size",
    "4",
    "--batch_size_val",
    "4",
    "--epochs",
    "1",
    "--num_thread_reader",
    "0",
]
WRAPPER = """#!{python}
import os, sys
words = sys.argv[1:]
if "--do_train" in words or "--do_eval" in words or "--init_model" in words:
    words += {shrunk}
    if any(word.endswith("CLIP4IDCinference.py") for word in words):
        words += ["--decoder_num_hidden_layers", "1"]
os.execv({quick!r}, [{quick!r}, *{start}, *words])
"""


@dataclass
class Block:
    """A block of code of a page."""

    kind: str
    body: str
    output: str | None
    reason: str | None


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        Block(found["kind"], found["body"], found["output"], found["reason"])
        for found in BLOCK.finditer(text)
    ]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A copy of the project with small replacements of everything that the pages name."""
    root = tmp_path_factory.mktemp("docs") / "project"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(lambda name: (ROOT / name).is_file(), listed.stdout.splitlines()):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, root / name)
    for name, start in (("python", []), ("torchrun", ["-m", "torch.distributed.run"])):
        program = root / "bin" / name
        program.parent.mkdir(exist_ok=True)
        text = WRAPPER.format(
            python=sys.executable, quick=quick_python.executable(), shrunk=SHRUNK, start=start
        )
        program.write_text(text)
        program.chmod(0o755)
    (root / "tiny.json").write_text(json.dumps(TINY))
    make_spot(root / "images", {"train": 8, "val": 3, "test": 4})
    make_clevr(root / "data", {"train": 8, "val": 3, "test": 4})
    for dataset in ("spot", "clevr"):
        name = f"{dataset}_total_change_captions_reformat.json"
        shutil.copy2(
            root / ("images" if dataset == "spot" else "data") / "gt" / name, root / "gt" / name
        )
    draw_table(root)
    write_evaluation(root)
    draw_photos(root)
    save_weights(root / "ckpts")
    return root


def draw_table(root: Path) -> None:
    rows = [("before", "after", "split", "caption", "type")]
    for n in range(12):
        draw_pair(root / "mine", [f"img/{n}a.jpg", f"img/{n}b.jpg"], "red" if n % 2 else "blue", n)
        rows.append(
            (
                f"img/{n}a.jpg",
                f"img/{n}b.jpg",
                "train" if n < 8 else "test",
                f"square {n} is new",
                "odd" if n % 2 else "even",
            )
        )
    with open(root / "mine" / "pairs.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)


def write_evaluation(root: Path) -> None:
    """The files of an evaluation on four pairs, and another system's captions of them."""
    names = [f"test-{n}" for n in range(4)]
    run = root / "ckpts" / "mine_eval"
    run.mkdir()
    captions = dict.fromkeys(names, "a square is new")
    write_results(run, "eval", {**captions, "test-2": "square 2 is new"})
    references = {name: [f"square {n} is new"] for n, name in enumerate(names)}
    write_references(run, references, {"odd": names[1::2], "even": names[::2]})
    write_results(root, "other", captions).rename(root / "other_system.json")


def draw_photos(root: Path) -> None:
    for n in range(3):
        draw_pair(root / "photos", [f"{n}.png", f"{n}_2.png"], "red", n)
        draw_pair(root / "photos", [f"first/{n}.jpg", f"second/{n}.png"], "green", n)
    draw_pair(root, ["before.jpg", "after.jpg"], "yellow", 7)
    (root / "pairs.csv").write_text(
        "before,after,id\nbefore.jpg,after.jpg,street\nphotos/1.png,photos/1_2.png,yard\n"
    )


def save_weights(ckpts: Path) -> None:
    """Stand-ins of one block: those of runs, and published ones in float16 without model.json."""
    torch.manual_seed(0)
    clip = {
        f"clip.{key}": value for key, value in CLIP(ClipSizes(**TINY), 1, "2d").state_dict().items()
    }
    from modules.model.bert import load_decoder_config

    adapted = CLIP4IDC.from_weights(clip, "retrieval", 1)
    config = load_decoder_config("decoder-base").with_layers(1)
    captioner = CLIP4IDC.from_weights(clip, "caption", 1, decoder_config=config)
    for folder in (
        "ckpt_spot_retrieval",
        "ckpt_clevr_retrieval",
        "ckpt_spot_caption",
        "ckpt_clevr_caption",
    ):
        model = adapted if folder.endswith("retrieval") else captioner
        (ckpts / folder).mkdir()
        torch.save(model.state_dict(), ckpts / folder / "pytorch_model.bin.best")
        write_model_info(ckpts / folder / MODEL_INFO_FILE, model.info(32))
    for folder, model in (("pretrained", adapted), ("trained", captioner)):
        torch.save(
            {key: value.half() for key, value in model.state_dict().items()},
            ckpts / folder / "pytorch_model.bin.spot",
        )
    shutil.copy2(
        ckpts / "pretrained" / "pytorch_model.bin.spot",
        ckpts / "pretrained" / "pytorch_model.bin.30",
    )


def is_run(block: Block) -> bool:
    return block.kind in ("bash", "python") and not block.reason


@pytest.mark.parametrize("page", [page for page in PAGES if any(map(is_run, blocks(page)))])
def test_the_commands_of_a_page(page, prepared, tmp_path, monkeypatch):
    project = tmp_path / "project"
    shutil.copytree(prepared, project)
    found = blocks(page)
    if any("--output data " in block.body for block in found):  # the page draws this itself
        shutil.rmtree(project / "data")
    environment = {
        **os.environ,
        "PATH": f"{project / 'bin'}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "2",
        "PYTHONPATH": ".",
        "PYTHON_EXEC": str(project / "bin" / "python"),
    }
    monkeypatch.chdir(project)
    names: dict = {}
    for block in filter(is_run, found):
        printed = (
            _run_commands(page, block.body, environment)
            if block.kind == "bash"
            else _run_python(block.body, names)
        )
        if block.output is not None:
            assert printed == block.output, f"{page}:\n{block.body}"


def _run_commands(page: str, body: str, environment: dict[str, str]) -> str:
    """What the commands print on stdout."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", body],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, f"{page}:\n{body}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def _run_python(body: str, names: dict) -> str:
    """What the code prints on stdout; a page's blocks follow each other, as in a notebook."""
    with redirect_stdout(StringIO()) as printed:
        exec(body, names)
    return printed.getvalue()


@pytest.mark.parametrize("page", PAGES)
def test_no_command_stands_outside_the_blocks_that_are_run(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert (
        text.count("\n```")
        == 2 * len(blocks(page)) + sum(block.output is not None for block in blocks(page)) * 2
    )
    for block in blocks(page):
        if block.kind not in ("bash", "python"):
            assert block.reason is None
            assert not re.search(rf"^{COMMAND}", block.body, re.MULTILINE), (
                f"{page}: mark this block bash:\n{block.body}"
            )
    assert re.findall(rf"`{COMMAND}[^`]*\.(?:py|sh|txt)[^`]*`", BLOCK.sub("", text)) == []


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", BLOCK.sub("", text)):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), f"{page} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [
                re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings
            ], target
        if path.suffix == ".png":
            assert min(Image.open(path).size) > 200


def prose_and_commands(page: str) -> list[str]:
    """A page's lines without those that cannot be broken: outputs, tables, pictures, comments."""
    text = re.sub(
        r"^```text\n.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.M | re.S
    )
    return [line for line in text.splitlines() if not line.startswith(("|", "![", "<!--"))]


def test_the_readme_fits_its_limits():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120
    assert max(map(len, lines)) <= 120
    assert sum(line.startswith("![") for line in lines) == 1


@pytest.mark.parametrize("page", ALL_PAGES)
def test_the_lines_of_a_page_fit_into_a_window(page):
    width = 120 if page == "README.md" else 100
    assert [line for line in prose_and_commands(page) if len(line) > width] == []


def test_the_readme_has_the_published_commands_word_for_word():
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ").split())
    for script in ("adapt_spot.sh", "finetune_spot.sh"):
        text = (ROOT / "scripts" / script).read_text(encoding="utf-8")
        command = text.split("${PYTHON:-python} ")[1].replace("\\\n", " ").replace('"', "")
        assert "python " + " ".join(command.removesuffix(" $@\n").split()) in readme


def test_the_first_page_leads_to_every_page():
    listed = re.findall(r"^- \[.+?\]\((.+?)\)", (ROOT / "docs/index.md").read_text(), re.MULTILINE)
    pages = {path.name for path in (ROOT / "docs").glob("*.*") if path.suffix in (".md", ".ipynb")}
    assert pages - {"index.md"} == {name for name in listed if not name.startswith("../")}


def test_the_table_of_commands_names_the_scripts_that_they_stand_for():
    text = (ROOT / "docs" / "command_line.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([\w -]+)` \| `(.+?)` \|", text, re.MULTILINE))
    expected = {}
    for name, command in COMMANDS.items():
        script = command.target.partition(":")[0].replace(".", "/") + ".py"
        expected[name] = " ".join([script, *command.arguments])
    expected["doctor"] = "-m clip4idc doctor"
    assert rows == expected


def test_the_notebook_prints_what_it_shows(monkeypatch):
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert len(notebook["cells"]) < 10
    assert NOTEBOOK.stat().st_size < 400_000
    monkeypatch.chdir(ROOT)
    stored = [cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [_texts_of(cell) for cell in run_cells(notebook)] == [_texts_of(cell) for cell in stored]


def _texts_of(outputs: list[dict]) -> list[object]:
    """What a cell shows; of a picture the size, as pixels may differ between processors."""
    shown = []
    for output in outputs:
        picture = output.get("data", {}).get("image/png")
        text = output.get("text") or output["data"]["text/plain"]
        shown.append(Image.open(BytesIO(b64decode(picture))).size if picture else text)
    return shown

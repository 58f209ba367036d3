"""The docs site, from the repository's Markdown files: sphinx-build -W -c docs . site

The pages are the very files that the repository shows. `docs/index.md` lists them, and its lists
become the site's menu. The notebook `docs/tour.ipynb` becomes a page with its stored outputs.
"""

import json
import re
import sys
from pathlib import Path

from pygments.lexers import TextLexer
from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

project = "CLIP4IDC"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
root_doc = "docs/index"
source_suffix = {".md": "markdown", ".ipynb": "markdown"}
include_patterns = [
    "docs/*.md",
    "docs/*.ipynb",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "benchmarks/README.md",
    "ckpts/README.md",
]
exclude_patterns = [".*", "data", "images", "modules", "runs", "site", "tests", "ckpts/ckpt_*"]
html_theme = "furo"
html_title = "CLIP4IDC"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
myst_heading_anchors = 3
default_role = "code"  # docstrings are Markdown: `name`
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.add_lexer("mermaid", TextLexer)  # the site shows the diagram's text; GitHub draws it
    app.connect("source-read", _prepare_source)


def _prepare_source(app: Sphinx, name: str, source: list[str]) -> None:
    if name == root_doc:
        source[0] += _make_menu(source[0])
    elif app.env.doc2path(name).suffix == ".ipynb":
        source[0] = _notebook_as_markdown(json.loads(source[0]))


def _make_menu(text: str) -> str:
    """A hidden table of contents for each section's list of links."""
    menu = ""
    for section in text.split("\n## ")[1:]:
        title, _, body = section.partition("\n")
        pages = re.findall(r"^- \[.+?\]\((.+?)\.(?:md|ipynb)\)", body, re.MULTILINE)
        menu += "\n".join(["", "```{toctree}", ":hidden:", f":caption: {title}", *pages, "```", ""])
    return menu


def _notebook_as_markdown(notebook: dict) -> str:
    """Prose, code and stored outputs, in their order."""
    parts = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text)
        else:
            parts.append(f"```python\n{text}\n```")
            parts.extend(_output_as_markdown(output) for output in cell["outputs"])
    return "\n\n".join(parts)


def _output_as_markdown(output: dict) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        return f"![output](data:image/png;base64,{''.join(data['image/png']).strip()})"
    text = "".join(output.get("text") or data["text/plain"]).rstrip("\n")
    return f"```text\n{text}\n```"

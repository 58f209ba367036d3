"""Runs a notebook's code cells as Jupyter would, in one process: python -m tests.notebooks FILE

This writes the cells' outputs into FILE; the tests compare them with the stored ones. A Jupyter
kernel would take nine seconds and thirty packages, and its ports can collide in parallel tests.
"""

import ast
import base64
import contextlib
import io
import json
import sys
from pathlib import Path

from PIL import Image


def run_cells(notebook: dict) -> list[list[dict]]:
    """The outputs of each code cell, in the notebook format's form: printed text, then a result.

    A result is the value of a cell's last line, if that is an expression. Errors are raised.
    """
    names: dict = {"__name__": "__main__"}
    outputs = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            outputs.append(_run_cell("".join(cell["source"]), names, len(outputs) + 1))
    return outputs


def _run_cell(source: str, names: dict, number: int) -> list[dict]:
    statements = ast.parse(source).body
    last = statements.pop() if isinstance(statements[-1], ast.Expr) else None
    outputs: list[dict] = []
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(ast.Module(statements, []), f"cell {number}", "exec"), names)
        value = None
        if last is not None:
            value = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names)
    if printed.getvalue():
        text = printed.getvalue().splitlines(keepends=True)
        outputs.append({"name": "stdout", "output_type": "stream", "text": text})
    if value is not None:
        result = {"output_type": "execute_result", "execution_count": number, "metadata": {}}
        outputs.append({**result, "data": _show(value)})
    return outputs


def _show(value: object) -> dict:
    """A value's forms by MIME type, as Jupyter stores them."""
    if not isinstance(value, Image.Image):
        return {"text/plain": repr(value).splitlines(keepends=True)}
    buffer = io.BytesIO()
    value.save(buffer, "PNG", optimize=True)
    return {
        "image/png": base64.b64encode(buffer.getvalue()).decode(),
        "text/plain": ["<PIL.Image.Image>"],
    }


def write_outputs(path: Path) -> None:
    """Run the notebook and put its outputs into its file."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    outputs = run_cells(notebook)
    codes = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, (cell, shown) in enumerate(zip(codes, outputs, strict=True), 1):
        cell.update(execution_count=number, outputs=shown)
    path.write_text(json.dumps(notebook, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_outputs(Path(sys.argv[1]))

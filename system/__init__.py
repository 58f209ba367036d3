"""The machine: files, downloads, processes. All our code imports it first: it checks Python."""

import sys

if sys.version_info < (3, 10):  # noqa: UP036
    sys.stderr.write(
        f"CLIP4IDC needs Python 3.10 or newer, and {sys.executable} is {sys.version.split()[0]}: "
        "run bash scripts/setup.sh, then source .venv/bin/activate\n"
    )
    sys.exit(2)

"""Stage 1, adaptation: tune CLIP by retrieval between captions and image pairs, or evaluate it."""

import sys

from modules.pipeline import run_script


def main(argv: list[str] | None = None) -> int:
    """The command line; see --help.

    Returns 0. Every other exit code comes as SystemExit: 2 for what the user can correct, and those
    that `run_command` lists.
    """
    return run_script(argv, "retrieval", __doc__)


if __name__ == "__main__":
    sys.exit(main())

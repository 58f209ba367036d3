"""Stage 2, finetuning: train or evaluate the captioner, or caption your own images."""

import sys

from modules.pipeline import run_script


def main(argv: list[str] | None = None) -> int:
    """The command line; see --help.

    Returns 0. Every other exit code comes as SystemExit: 2 for what the user can correct, and those
    that `run_command` lists.
    """
    return run_script(argv, "caption", __doc__)


if __name__ == "__main__":
    sys.exit(main())

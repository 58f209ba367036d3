"""Stage 2, finetuning: train or evaluate the captioner, or caption your own images."""

import sys

from modules.options import parse_options
from system.command import run_command


def main(argv: list[str] | None = None) -> int:
    """The command line; see --help.

    Returns 0, or exits with 2 and one line for what the user can correct.
    """
    options = parse_options(argv, "caption", __doc__)

    def job() -> None:
        from modules.pipeline import run  # late, so that --help and wrong options need no torch

        run(options)

    return run_command("CLIP4IDCinference.py", job)


if __name__ == "__main__":
    sys.exit(main())

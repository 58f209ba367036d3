"""Stage 2, finetuning: train the captioner on the adapted CLIP, or evaluate it."""

import sys

from modules.options import parse_options, run_and_report


def main(argv: list[str] | None = None) -> int:
    """The command line; see --help. Returns 0, or exits with 2 and one line for what the user can mend."""
    options = parse_options(argv, "caption", __doc__)

    def job() -> None:
        from modules.session import run  # late: --help and wrong options answer without torch

        run(options)

    return run_and_report("CLIP4IDCinference.py", job)


if __name__ == "__main__":
    sys.exit(main())

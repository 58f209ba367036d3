"""The command line of both scripts as frozen dataclasses. Imports no torch."""

from modules.options.options import Options
from modules.options.parsing import IGNORED_FLAGS, parse_options

__all__ = ["IGNORED_FLAGS", "Options", "parse_options"]

"""The version, where the files that ship with the code are, and where downloads go."""

from pathlib import Path

from system.files import choose_cache_folder

VERSION = "0.2.0"

# The checkout, or the package `clip4idc` where pip installed it.
ROOT = Path(__file__).resolve().parents[1]

# In the wheel all our modules are below clip4idc (setup.py).
IS_PACKAGED = __name__.startswith("clip4idc.")


def choose_downloads_folder() -> Path:
    """The checkout, or the user's cache where pip installed the code."""
    return choose_cache_folder(None) if IS_PACKAGED else ROOT


def list_ckpts_folders() -> list[Path]:
    """The folders `ckpts` that names of weights may refer to: what ships, then downloads."""
    return list(dict.fromkeys([ROOT / "ckpts", choose_downloads_folder() / "ckpts"]))

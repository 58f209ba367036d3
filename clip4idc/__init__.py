"""CLIP4IDC: what changed between two images, in a sentence.

    from clip4idc import Predictor
    print(Predictor.load().caption("before.png", "after.png"))

Each name is loaded when it is first used, so that importing the package is quick.
"""

from typing import Any

from system.places import VERSION

__version__ = VERSION
__all__ = ["CLIP4IDC", "Decoding", "Predictor", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "CLIP4IDC":
        from modules.clip4idc import CLIP4IDC

        return CLIP4IDC
    if name == "Decoding":
        from modules.options.decoding import Decoding

        return Decoding
    if name == "Predictor":
        from modules.predictor import Predictor

        return Predictor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

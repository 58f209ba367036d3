"""Scenes → training samples and evaluation items → batches of tensors. Knows no dataset's files (SPEC §3).

Letters: B samples, L words. Images are uint8 (B, 2|3, 3, H, W): before, after and, where a dataset has it, the distractor.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class ImagePair:
    """A pair with its captions; CLEVR-Change's scenes also have a distractor: another picture in which nothing changed."""

    id: str
    before: str
    after: str
    captions: tuple[str, ...]
    distractor: str | None = None
    distractor_id: str | None = None
    distractor_captions: tuple[str, ...] = ()
    change_type: str | None = None

    @property
    def image_paths(self) -> list[str]:
        """before, after and, if there is one, the distractor."""
        return [self.before, self.after] + ([self.distractor] if self.distractor else [])


def check_pairs(scenes: Sequence[ImagePair], source: str) -> None:
    """Refuse an empty split and scenes without a sentence; count and say empty captions."""
    if not scenes:
        raise ValueError(f"{source} lists no pairs")
    for scene in scenes:
        if not (scene.captions and (scene.distractor is None or scene.distractor_captions)):
            raise ValueError(f"{source}: pair {scene.id} has no caption")
    captions = [
        caption for scene in scenes for caption in scene.captions + scene.distractor_captions
    ]
    empty = sum(not caption.strip() for caption in captions)
    log.info(
        "%s: %d pairs, %d captions%s",
        source,
        len(scenes),
        len(captions),
        f", {empty} of them empty" if empty else "",
    )

"""Pictures: sheets of pairs with lines of text, and attention maps over images."""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dataloaders.images import ImageLike, to_image
from modules.model.explanation import Explanation
from system.files import atomic_write

# Width and height in pixels that an image has to fit into: large, and on a sheet of pairs.
BOX = (336, 224)
SMALL_BOX = (210, 140)
MARGIN = 8  # pixels between images
LINE_HEIGHT = 22  # pixels: the height of a line of text
LINE_LENGTH = 72  # characters of a line below a pair
COLUMNS = 3  # pairs of images side by side
TEXT_COLORS = ("dimgray", "black")  # of the two lines below a pair
JPEG_QUALITY = 82
NO_MAPS = "this model has no attention maps"
LEAST_HEAT = 1e-12  # keeps a map of zeros from dividing by zero

Panel = tuple[str, list[np.ndarray]]  # a label, and the RGB arrays (h, w, 3) of before and after


def jpeg_uri(image: np.ndarray) -> str:
    """An RGB array (H, W, 3) uint8 as a data URI, for a page that loads nothing from elsewhere."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def space_evenly(count: int, wanted: int) -> list[int]:
    """`wanted` indices below `count`, evenly spaced from first to last; all of them if `count` is
    not larger."""
    if count <= wanted:
        return list(range(count))
    if wanted == 1:
        return [0]
    return [round(n * (count - 1) / (wanted - 1)) for n in range(wanted)]


def fit_to_box(image: ImageLike, box: tuple[int, int] = BOX) -> np.ndarray:
    """An image → (h, w, 3) uint8 RGB, as large as fits into the box, in its proportions."""
    rgb = to_image(image)
    scale = min(box[0] / rgb.width, box[1] / rgb.height)
    width = max(1, round(rgb.width * scale))
    height = max(1, round(rgb.height * scale))
    return np.asarray(rgb.resize((width, height), Image.Resampling.BICUBIC))


def draw_pairs(pairs: Sequence[tuple[ImageLike, ImageLike, Sequence[str]]]) -> Image.Image:
    """A sheet of pairs, before and after side by side, with two lines of text below each pair."""
    box_width, box_height = SMALL_BOX
    width = 2 * box_width + 3 * MARGIN
    height = box_height + 2 * LINE_HEIGHT + MARGIN
    columns = min(COLUMNS, len(pairs))
    sheet, corners = _make_sheet(len(pairs), columns, (width, height), MARGIN)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(12)
    for (x, y), (before, after, lines) in zip(corners, pairs, strict=True):
        images = [fit_to_box(before, SMALL_BOX), fit_to_box(after, SMALL_BOX)]
        _paste_side_by_side(sheet, images, x, y, box_width)
        for index, (line, color) in enumerate(zip(lines, TEXT_COLORS, strict=True)):
            text_y = y + box_height + 2 + index * (LINE_HEIGHT - 5)
            draw.text((x, text_y), line[:LINE_LENGTH], color, font)
    return sheet


def _make_sheet(
    count: int, columns: int, cell: tuple[int, int], top: int
) -> tuple[Image.Image, list[tuple[int, int]]]:
    """A white sheet for `count` cells of a width and height, and the corner (x, y) of each.

    The cells begin `top` pixels below the sheet's upper edge.
    """
    width, height = cell
    rows = -(-count // columns)
    sheet = Image.new("RGB", (columns * width + MARGIN, rows * height + top), "white")
    corners = []
    for index in range(count):
        row, column = divmod(index, columns)
        corners.append((MARGIN + column * width, top + row * height))
    return sheet, corners


def _paste_side_by_side(
    sheet: Image.Image, images: Sequence[np.ndarray], x: int, y: int, width: int
) -> None:
    """Paste RGB arrays (h, w, 3) from (x, y) on, in columns of that width."""
    for side, image in enumerate(images):
        sheet.paste(Image.fromarray(image), (x + side * (width + MARGIN // 2), y))


def overlay(image: np.ndarray, heat: np.ndarray, maximum: float) -> np.ndarray:
    """Overlay a heat map (grid, grid) on an RGB image (H, W, 3) uint8, red at `maximum`.

    Returns an image of the same shape.
    """
    share = np.clip(heat / max(maximum, LEAST_HEAT), 0, 1).astype(np.float32)
    height, width = image.shape[:2]
    smooth = cv2.resize(share, (width, height), interpolation=cv2.INTER_CUBIC)
    smooth = np.clip(smooth, 0, 1)[..., None]
    colored = cv2.applyColorMap((smooth * 255).astype(np.uint8), cv2.COLORMAP_JET)
    colored = cv2.cvtColor(colored, cv2.COLOR_BGR2RGB)
    gray = image.mean(axis=2, keepdims=True)
    return (gray * (1 - 0.7 * smooth) + colored * 0.7 * smooth).astype(np.uint8)


def attention_panels(before: ImageLike, after: ImageLike, explanation: Explanation) -> list[Panel]:
    """The pair itself, then each class token's attention map over it, then each word's.

    Each map is scaled by its own maximum over both images together. Without maps, the label of the
    pair says so.
    """
    pair = [fit_to_box(before), fit_to_box(after)]
    if not len(explanation.class_maps):
        return [(f"before, after: {NO_MAPS}", pair)]
    maps = [
        ("summary of before", explanation.class_maps[0]),
        ("summary of after", explanation.class_maps[1]),
    ]
    for word, heat in zip(explanation.words, explanation.word_maps, strict=True):
        maps.append((f"“{word}”", heat))
    panels: list[Panel] = [("before, after", pair)]
    for label, heat in maps:
        maximum = heat.max()
        images = [overlay(image, one, maximum) for image, one in zip(pair, heat, strict=True)]
        panels.append((label, images))
    return panels


def draw_explanation(
    path: Path, before: ImageLike, after: ImageLike, explanation: Explanation
) -> None:
    """Write `explanation_sheet` as a PNG."""
    sheet = explanation_sheet(before, after, explanation)
    with atomic_write(path) as temporary:
        sheet.save(temporary, "PNG")


def explanation_sheet(before: ImageLike, after: ImageLike, explanation: Explanation) -> Image.Image:
    """All of `attention_panels` in one picture, below the caption."""
    panels = attention_panels(before, after, explanation)
    _, pair = panels[0]
    before_width = pair[0].shape[1]
    width = sum(image.shape[1] for image in pair) + 3 * MARGIN
    height = max(image.shape[0] for image in pair) + LINE_HEIGHT + MARGIN
    top = LINE_HEIGHT + 2 * MARGIN
    sheet, corners = _make_sheet(len(panels), COLUMNS, (width, height), top)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(14)
    caption = explanation.caption
    sureness = f"sure of the wording: {caption.sureness:.0f} %"
    heading = f"{caption.text}  (mean log-probability {caption.score:.2f}, {sureness})"
    draw.text((MARGIN, MARGIN), heading, "black", font)
    for (x, y), (label, images) in zip(corners, panels, strict=True):
        draw.text((x, y), label, "black", font)
        _paste_side_by_side(sheet, images, x, y + LINE_HEIGHT, before_width)
    return sheet


@dataclass(frozen=True, repr=False)
class PairExplanation(Explanation):
    """An explanation that knows its pair, so that a notebook shows it as a picture."""

    before: ImageLike
    after: ImageLike

    @classmethod
    def of(cls, explanation: Explanation, before: ImageLike, after: ImageLike) -> "PairExplanation":
        """The explanation of a pair's caption, with the pair."""
        return cls(**vars(explanation), before=before, after=after)

    def draw(self) -> Image.Image:
        """The caption, and below it the pair and the attention of each word over it."""
        return explanation_sheet(self.before, self.after, self)

    def _repr_html_(self) -> str:
        caption = html.escape(self.caption.text)
        uri = jpeg_uri(np.asarray(self.draw()))
        return f'<img src="{uri}" alt="{caption}: where the model looked" style="max-width: 100%">'

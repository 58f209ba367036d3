"""Pictures: pairs with lines of text, and what a model looked at."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dataloaders.images import Picture, to_image
from modules.model.explanation import Explanation
from system.files import atomic_write

if TYPE_CHECKING:
    from modules.model.explanation import Explanation


BOX, SMALL_BOX = (
    (336, 224),
    (210, 140),
)  # pixels that a shown image has to fit into, width and height


MARGIN, LABEL = 8, 22  # pixels: the space between images, a line of text


LINE = 72  # letters of a line below a pair


COLUMNS = 3  # pairs of images beside each other


def jpeg_uri(image: np.ndarray) -> str:
    """An RGB array (H, W, 3) uint8 as a data URI, for a page that loads nothing from elsewhere."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def evenly_spaced(count: int, wanted: int) -> list[int]:
    """Numbers below `count` at even distances, the first and the last among them; all, where they are not more than wanted."""
    if count <= wanted:
        return list(range(count))
    return [round(n * (count - 1) / (wanted - 1)) for n in range(wanted)]


def fit_to_box(picture: Picture, box: tuple[int, int] = BOX) -> np.ndarray:
    """A picture as large as fits into the box, its proportions kept → (h, w, 3) uint8 RGB."""
    image = to_image(picture)
    scale = min(box[0] / image.width, box[1] / image.height)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC))


def draw_pairs(pairs: Sequence[tuple[Picture, Picture, Sequence[str]]]) -> Image.Image:
    """A sheet of pairs, before beside after, with two lines of text below each, the second one stronger."""
    (box_width, box_height), columns = SMALL_BOX, min(COLUMNS, len(pairs))
    width, height = 2 * box_width + 3 * MARGIN, box_height + 2 * LABEL + MARGIN
    sheet = Image.new(
        "RGB", (columns * width + MARGIN, -(-len(pairs) // columns) * height + MARGIN), "white"
    )
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for place, (before, after, lines) in enumerate(pairs):
        x, y = MARGIN + place % columns * width, MARGIN + place // columns * height
        for side, picture in enumerate((before, after)):
            sheet.paste(
                Image.fromarray(fit_to_box(picture, SMALL_BOX)),
                (x + side * (box_width + MARGIN // 2), y),
            )
        for number, (line, color) in enumerate(zip(lines, ("dimgrey", "black"), strict=True)):
            draw.text((x, y + box_height + 2 + number * (LABEL - 5)), line[:LINE], color, font)
    return sheet


def overlay(image: np.ndarray, heat: np.ndarray, strongest: float) -> np.ndarray:
    """An RGB image (H, W, 3) uint8 under a map (grid, grid), `strongest` being full red → (H, W, 3) uint8."""
    share = np.clip(heat / max(strongest, 1e-12), 0, 1).astype(np.float32)
    smooth = np.clip(cv2.resize(share, image.shape[1::-1], interpolation=cv2.INTER_CUBIC), 0, 1)[
        ..., None
    ]
    colored = cv2.cvtColor(
        cv2.applyColorMap((smooth * 255).astype(np.uint8), cv2.COLORMAP_JET), cv2.COLOR_BGR2RGB
    )
    grey = image.mean(axis=2, keepdims=True)
    return (grey * (1 - 0.7 * smooth) + colored * 0.7 * smooth).astype(np.uint8)


def attention_panels(
    before: Picture, after: Picture, explanation: "Explanation"
) -> list[tuple[str, list[np.ndarray]]]:
    """A label and two RGB arrays (h, w, 3), before's and after's: the pair, each class token's map, each word's.

    Each map is scaled by its own highest share, over both images together.
    """
    pair = [fit_to_box(picture) for picture in (before, after)]
    maps = [
        ("class token of before", explanation.class_maps[0]),
        ("class token of after", explanation.class_maps[1]),
    ]
    maps += [
        (f"“{word}”", heat)
        for word, heat in zip(explanation.words, explanation.word_maps, strict=True)
    ]
    return [("before, after", pair)] + [
        (label, [overlay(image, one, heat.max()) for image, one in zip(pair, heat, strict=True)])
        for label, heat in maps
    ]


def draw_explanation(
    path: Path, before: Picture, after: Picture, explanation: "Explanation"
) -> None:
    """All of `explanation_cells` in one PNG under the caption."""
    cells = attention_panels(before, after, explanation)
    rows = -(-len(cells) // COLUMNS)
    widths, heights = (
        [image.shape[1] for image in cells[0][1]],
        [image.shape[0] for image in cells[0][1]],
    )
    cell_width, cell_height = sum(widths) + 3 * MARGIN, max(heights) + LABEL + MARGIN
    sheet = Image.new(
        "RGB", (COLUMNS * cell_width + MARGIN, rows * cell_height + LABEL + 2 * MARGIN), "white"
    )
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    caption = explanation.caption
    draw.text(
        (MARGIN, MARGIN),
        f"{caption.text}  (mean log-probability {caption.score:.2f})",
        "black",
        font,
    )
    for number, (label, images) in enumerate(cells):
        x, y = (
            MARGIN + number % COLUMNS * cell_width,
            LABEL + 2 * MARGIN + number // COLUMNS * cell_height,
        )
        draw.text((x, y), label, "black", font)
        for place, image in enumerate(images):
            sheet.paste(Image.fromarray(image), (x + place * (widths[0] + MARGIN // 2), y + LABEL))
    with atomic_write(path) as temporary:
        sheet.save(temporary, "PNG")

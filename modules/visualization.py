"""Pictures: pairs with lines of text, and what a model looked at."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dataloaders.images import to_tensor
from modules.files import written_at_once

if TYPE_CHECKING:
    from modules.predictor import Explanation, Picture

SIDE, MARGIN, LABEL = 224, 8, 22  # pixels: a shown image, the space between, a line of text
SMALL, LINE = 160, 56  # pixels of an image on a sheet of pairs, letters of a line below it
COLUMNS = 3  # pairs of images beside each other


def jpeg_uri(image: np.ndarray) -> str:
    """An RGB array (H, W, 3) uint8 as a data URI, for a page that loads nothing from elsewhere."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def spread(count: int, wanted: int) -> list[int]:
    """Numbers below `count` at even distances, the first and the last among them; all, where they are not more than wanted."""
    if count <= wanted:
        return list(range(count))
    return [round(n * (count - 1) / (wanted - 1)) for n in range(wanted)]


def draw_pairs(pairs: Sequence[tuple["Picture", "Picture", Sequence[str]]]) -> Image.Image:
    """A sheet of pairs, before beside after, with two lines of text below each, the second one stronger."""
    width, height = 2 * SMALL + 3 * MARGIN, SMALL + 2 * LABEL + MARGIN
    sheet = Image.new("RGB", (COLUMNS * width + MARGIN, -(-len(pairs) // COLUMNS) * height + MARGIN), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for place, (before, after, lines) in enumerate(pairs):
        x, y = MARGIN + place % COLUMNS * width, MARGIN + place // COLUMNS * height
        for side, picture in enumerate((before, after)):
            shown = Image.fromarray(to_tensor(picture, SMALL).permute(1, 2, 0).numpy())
            sheet.paste(shown, (x + side * (SMALL + MARGIN // 2), y))
        for number, (line, color) in enumerate(zip(lines, ("dimgrey", "black"), strict=True)):
            draw.text((x, y + SMALL + 2 + number * (LABEL - 5)), line[:LINE], color, font)
    return sheet


def overlay(image: np.ndarray, heat: np.ndarray, strongest: float) -> np.ndarray:
    """An RGB image (H, W, 3) uint8 under a map (grid, grid), `strongest` being full red → (H, W, 3) uint8."""
    share = np.clip(heat / max(strongest, 1e-12), 0, 1).astype(np.float32)
    smooth = np.clip(cv2.resize(share, image.shape[1::-1], interpolation=cv2.INTER_CUBIC), 0, 1)[..., None]
    colored = cv2.cvtColor(cv2.applyColorMap((smooth * 255).astype(np.uint8), cv2.COLORMAP_JET), cv2.COLOR_BGR2RGB)
    grey = image.mean(axis=2, keepdims=True)
    return (grey * (1 - 0.7 * smooth) + colored * 0.7 * smooth).astype(np.uint8)


def explanation_cells(before: "Picture", after: "Picture", explanation: "Explanation") -> list[tuple[str, list[np.ndarray]]]:
    """A label and two RGB arrays (SIDE, SIDE, 3), before's and after's: the pair, each class token's map, each word's.

    Each map is scaled by its own highest share, over both images together.
    """
    pair = [to_tensor(picture, SIDE).permute(1, 2, 0).numpy() for picture in (before, after)]
    maps = [("class token of before", explanation.classes[0]), ("class token of after", explanation.classes[1])]
    maps += [(f"“{piece}”", heat) for piece, heat in zip(explanation.pieces, explanation.words, strict=True)]
    return [("before, after", pair)] + [
        (label, [overlay(image, one, heat.max()) for image, one in zip(pair, heat, strict=True)]) for label, heat in maps]


def draw_explanation(path: Path, before: "Picture", after: "Picture", explanation: "Explanation") -> None:
    """All of `explanation_cells` in one PNG under the caption."""
    cells = explanation_cells(before, after, explanation)
    rows = -(-len(cells) // COLUMNS)
    cell_width, cell_height = 2 * SIDE + 3 * MARGIN, SIDE + LABEL + MARGIN
    sheet = Image.new("RGB", (COLUMNS * cell_width + MARGIN, rows * cell_height + LABEL + 2 * MARGIN), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    caption = explanation.caption
    draw.text((MARGIN, MARGIN), f"{caption.text}  (mean log-probability {caption.score:.2f})", "black", font)
    for number, (label, images) in enumerate(cells):
        x, y = MARGIN + number % COLUMNS * cell_width, LABEL + 2 * MARGIN + number // COLUMNS * cell_height
        draw.text((x, y), label, "black", font)
        for place, image in enumerate(images):
            sheet.paste(Image.fromarray(image), (x + place * (SIDE + MARGIN // 2), y + LABEL))
    with written_at_once(path) as temporary:
        sheet.save(temporary, "PNG")

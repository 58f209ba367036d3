"""Draws docs/overview.png, the picture on top of the README: python docs/draw_overview.py"""

import sys
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from modules.predictor import Predictor  # noqa: E402

EXAMPLES = ROOT / "docs" / "examples"
PAIR = (EXAMPLES / "removed_before.png", EXAMPLES / "removed_after.png")
IMAGE_SIZE = (480, 320)
MARGIN = 24  # pixels
HEADING = 44  # pixels above an image
SIZE = (2 * IMAGE_SIZE[0] + 3 * MARGIN + 420, IMAGE_SIZE[1] + HEADING + MARGIN)
LETTERS = 19  # of the sentence in a line


def draw_overview(sentence: str) -> Image.Image:
    """Before, after, and the sentence, side by side."""
    sheet = Image.new("RGB", SIZE, "white")
    draw = ImageDraw.Draw(sheet)
    heading_font = ImageFont.load_default(26)
    for side, (label, path) in enumerate(zip(("before", "after"), PAIR, strict=True)):
        x = MARGIN + side * (IMAGE_SIZE[0] + MARGIN)
        draw.text((x, 8), label, "dimgray", heading_font)
        sheet.paste(Image.open(path).convert("RGB").resize(IMAGE_SIZE), (x, HEADING))
    x = 3 * MARGIN + 2 * IMAGE_SIZE[0]
    draw.text((x, 8), "CLIP4IDC says", "dimgray", heading_font)
    text = "\n".join(textwrap.wrap(f"“{sentence}”", LETTERS))
    font = ImageFont.load_default(40)
    middle = (x, HEADING + IMAGE_SIZE[1] // 2)
    draw.multiline_text(middle, text, "black", font, anchor="lm", spacing=14)
    return sheet


if __name__ == "__main__":
    overview = draw_overview(Predictor.load().caption(*PAIR))
    overview.save(ROOT / "docs" / "overview.png", optimize=True)

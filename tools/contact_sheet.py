"""Contact sheets: rows of pictures with captions, each row led by the picture that it is about."""

from pathlib import Path

import matplotlib
from attrs import frozen
from PIL import Image, ImageDraw, ImageFont

from tools.commands import in_one_line

SIDE, GAP, MARGIN = 176, 18, 28  # pixels: of the box of a picture, between boxes, around the sheet
LINE = 21  # of a caption
COLUMNS = 6  # of pictures beside the leading one
WHITE, BOX, RULE, TEXT, FAINT = "#ffffff", "#f3f4f6", "#d8dce2", "#1b1f24", "#68707b"
LEAD, SAME, OTHER = "#1f6feb", "#1a7f37", "#bc4c00"  # frames


@frozen
class Tile:
    picture: Image.Image
    title: str  # bold, on the left
    note: str  # on its right
    lines: tuple[str, ...]  # below; those too long lose their beginning
    colour: str | None = None  # of the frame, and of the first line


def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """matplotlib's own, the same everywhere."""
    file = Path(matplotlib.get_data_path(), "fonts", "ttf", f"DejaVuSans{'-Bold' * bold}.ttf")
    return ImageFont.truetype(str(file), size)


PLAIN, BOLD = font(14), font(15, bold=True)


def contact_sheet(rows: list[tuple[Tile, list[Tile]]]) -> Image.Image:
    """Each row: the leading picture, then the others, COLUMNS a line."""
    cell = LINE * (1 + max(len(tile.lines) for lead, tiles in rows for tile in (lead, *tiles))) + SIDE + GAP
    columns = min(COLUMNS, max(len(tiles) for _, tiles in rows))
    heights = [max(1, -(-len(tiles) // COLUMNS)) * cell for _, tiles in rows]
    first = MARGIN + SIDE + 2 * GAP  # left edge of the pictures beside the leading one
    size = first + columns * (SIDE + GAP) - GAP + MARGIN, sum(heights) + GAP * (len(rows) - 1) + 2 * MARGIN - GAP
    sheet = Image.new("RGB", size, WHITE)
    draw, top = ImageDraw.Draw(sheet), MARGIN
    for number, ((lead, tiles), height) in enumerate(zip(rows, heights, strict=True)):
        if number:
            draw.line((MARGIN, top - GAP, sheet.width - MARGIN, top - GAP), fill=RULE)
        paste(sheet, lead, MARGIN, top)
        draw.line((first - GAP, top, first - GAP, top + height - GAP), fill=RULE)
        for i, tile in enumerate(tiles):
            paste(sheet, tile, first + i % COLUMNS * (SIDE + GAP), top + i // COLUMNS * cell)
        top += height + GAP
    return sheet


def paste(sheet: Image.Image, tile: Tile, left: int, top: int) -> None:
    draw, right, bottom = ImageDraw.Draw(sheet), left + SIDE, top + SIDE
    draw.rectangle((left, top, right - 1, bottom - 1), fill=BOX)
    picture = fitted(tile.picture)
    sheet.paste(picture, (left + (SIDE - picture.width) // 2, top + (SIDE - picture.height) // 2))
    if tile.colour:
        draw.rectangle((left - 3, top - 3, right + 2, bottom + 2), outline=tile.colour, width=3)
    draw.text((left, bottom + 6), in_one_line(tile.title), TEXT, BOLD)
    draw.text((right, bottom + 6), in_one_line(tile.note), TEXT, PLAIN, anchor="ra")
    for i, line in enumerate(tile.lines):
        colour = (tile.colour or TEXT) if i == 0 else FAINT
        draw.text((left, bottom + 6 + LINE * (i + 1)), shortened(line), colour, PLAIN)


def fitted(picture: Image.Image) -> Image.Image:
    """As large as the box allows, in its own proportions; small ones by whole pixels, to show what is there."""
    factor = SIDE / max(picture.size)
    factor = int(factor) if factor >= 2 else factor
    size = tuple(max(1, round(edge * factor)) for edge in picture.size)
    method = Image.Resampling.NEAREST if factor >= 2 else Image.Resampling.LANCZOS
    return picture.convert("RGB").resize(size, method)


def shortened(line: str) -> str:
    """The end of it, as much as is as wide as a picture."""
    line = in_one_line(line)
    line = f"…{line[-SIDE:]}" if len(line) > SIDE else line  # a letter is wider than a pixel
    if PLAIN.getlength(line) <= SIDE:
        return line
    return next((f"…{line[i:]}" for i in range(len(line)) if PLAIN.getlength(f"…{line[i:]}") <= SIDE), "…")

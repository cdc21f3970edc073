"""Image grids with titles on rows and columns."""

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

#: Characters of a column's title that are looked at; names of classes may be foreign text of any length.
LONGEST_TITLE = 200


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] to uint8 [0, 255], rounded as the reference pipelines of the field do: x · 127.5 + 128, cut off.

    The inverse used everywhere for real images is uint8 / 127.5 − 1.
    """
    return (images.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def image_grid(
    rows: Sequence[Sequence[Image.Image]],
    row_titles: Sequence[str] | None = None,
    column_titles: Sequence[str] | None = None,
    min_cell: int = 48,
) -> Image.Image:
    """One picture of rows of equally sized images.

    Args:
        rows: PIL images; a short row is filled with background.
        row_titles, column_titles: text at the left and on top.
        min_cell: images smaller than this many pixels are enlarged by a whole factor, without smoothing.
    """
    first = rows[0][0]
    scale = max(1, -(-min_cell // first.width))
    width, height = first.width * scale, first.height * scale
    font = ImageFont.load_default(size=14)
    measure = ImageDraw.Draw(Image.new("L", (1, 1)))
    gap = 4
    left = gap + max((int(measure.textlength(title, font=font)) + 2 * gap for title in row_titles or ()), default=0)
    top = gap + (20 if column_titles else 0)
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (left + columns * (width + gap), top + len(rows) * (height + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(column_titles or ()):
        x = left + column * (width + gap) + width // 2
        draw.text((x, gap), _shortened(title, width, font, measure), fill="black", font=font, anchor="ma")
    for index, row in enumerate(rows):
        y = top + index * (height + gap)
        if row_titles:
            draw.text((gap, y + height // 2), row_titles[index], fill="black", font=font, anchor="lm")
        for column, image in enumerate(row):
            enlarged = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (left + column * (width + gap), y))
    return sheet


def tensor_to_pil(images: torch.Tensor) -> list[Image.Image]:
    """Images (B, 1 or 3, H, W) in [-1, 1] as PIL images."""
    arrays = to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(np.squeeze(array, -1) if array.shape[-1] == 1 else array) for array in arrays]


def _shortened(title: str, width: int, font: ImageFont.FreeTypeFont, measure: ImageDraw.ImageDraw) -> str:
    title = " ".join(title.split())  # of one line, whoever wrote it
    if len(title) <= LONGEST_TITLE and measure.textlength(title, font=font) <= width:
        return title
    lengths = range(1, min(len(title), LONGEST_TITLE) + 1)
    fitting = bisect_right(lengths, width, key=lambda length: measure.textlength(title[:length] + "…", font=font))
    return title[: max(fitting, 1)] + "…"

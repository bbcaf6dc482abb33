"""Pictures as files: PNGs that say what they were drawn from, and captioned grids."""

import textwrap
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from files import atomic_file


class Picture(NamedTuple):
    """A drawn picture, uint8 (H, W, 3), and what it was drawn from."""

    image: np.ndarray
    prompt: str
    seed: int

    @property
    def caption(self):
        """What stands below it in a grid: its prompt, or without one its seed."""
        return self.prompt or f"seed {self.seed}"


def save_png(picture: Picture, path, **settings):
    """Writes a picture as PNG, with its prompt if it has one, seed and `settings` as text entries of the file."""
    info = PngImagePlugin.PngInfo()
    prompt = {"prompt": picture.prompt} if picture.prompt else {}
    for name, value in {**prompt, "seed": picture.seed, **settings}.items():
        info.add_itxt(name, str(value))
    with atomic_file(path) as file:
        Image.fromarray(picture.image).save(file, "PNG", pnginfo=info)


def captioned_grid(images, captions, columns=4, cell=128, lines=3) -> Image.Image:
    """A sheet of pictures, each with its caption below.

    Args:
        images: uint8 (H, W, 3) each.
        captions: a str each.
        columns: pictures a row.
        cell: side in pixels at which a picture is shown; smaller ones are enlarged.
        lines: lines of text below a picture.
    """
    font = ImageFont.load_default(size=cell // 11)
    side = max(cell, images[0].shape[0])
    line_height = round(1.3 * side / 11)
    tile_height = side + lines * line_height + 6
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (side + 8) + 8, rows * tile_height + 8), "white")
    write = ImageDraw.Draw(sheet)
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = 8 + (index % columns) * (side + 8), 8 + (index // columns) * tile_height
        shown = Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)
        sheet.paste(shown, (left, top))
        text = "\n".join(textwrap.wrap(caption, width=22, max_lines=lines, placeholder=" ..."))
        write.multiline_text((left, top + side + 2), text, fill="black", font=font, spacing=2)
    return sheet

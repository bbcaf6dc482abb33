"""Pictures as files: PNGs that say what they were drawn from, and captioned grids."""

import textwrap
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from files import atomic_file


class Picture(NamedTuple):
    """A drawn picture, uint8 (H, W, 3), and what it was drawn from.

    `share` is how far it lies on the way to another prompt or seed, 0 to 1, or None. `label` is its caption in a grid;
    without one that is the prompt, and without a prompt the seed.
    """

    image: np.ndarray
    prompt: str
    seed: int
    share: float | None = None
    label: str | None = None

    @property
    def caption(self):
        """What stands below it in a grid."""
        return self.label or self.prompt or f"seed {self.seed}"


def save_png(picture: Picture, path, **settings):
    """Writes a picture as PNG, with prompt if it has one, seed, share and `settings` as text entries of the file."""
    info = PngImagePlugin.PngInfo()
    own = {"prompt": picture.prompt} if picture.prompt else {}
    own |= {"seed": picture.seed} | ({} if picture.share is None else {"share": f"{picture.share:g}"})
    for name, value in {**own, **settings}.items():
        info.add_itxt(name, str(value))
    with atomic_file(path) as file:
        Image.fromarray(picture.image).save(file, "PNG", pnginfo=info)


def save_gif(images, path, milliseconds=150):
    """Writes images, uint8 (H, W, 3) each, as a GIF that shows each for that long, over and over."""
    first, *others = map(Image.fromarray, images)
    with atomic_file(path) as file:
        first.save(file, "GIF", save_all=True, append_images=others, duration=milliseconds, loop=0)


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


def save_all(pictures, folder, previews, gif=False, **settings):
    """Writes each picture as soon as it is drawn, with its previews where there are any, and then their grid.

    Returns the paths of the pictures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths, images, captions = [], [], []
    for number, picture in enumerate(pictures):
        paths.append(folder / f"{number:04d}.png")
        save_png(picture, paths[-1], **settings)
        if number in previews:
            _save_steps(picture, previews.pop(number), folder / f"{number:04d}_steps.png", **settings)
        images.append(picture.image)
        captions.append(picture.caption)
    with atomic_file(folder / "grid.png") as file:
        captioned_grid(images, captions).save(file, "PNG")
    if gif:
        save_gif(images, folder / "frames.gif")
    return paths


def _save_steps(picture, previews, path, **settings):
    captions = [f"{k} of {len(previews)}" for k in range(1, len(previews) + 1)]
    sheet = captioned_grid(previews, captions, columns=10, lines=1)
    save_png(picture._replace(image=np.asarray(sheet)), path, **settings)

"""Images to look at: tensors to Pillow images and PNG files.

Images are `[N, C, H, W]`: `N` images, `C` channels (1 grey, 3 red, green, blue), `H` rows, `W` columns, 0 black, 1
white. What lies outside [0, 1] is shown as the nearest value inside.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steer.core.errors import check
from steer.files import replacing

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["save_image", "save_png", "to_pil", "to_uint8"]


MARGIN = 3
"""White pixels around every image of a grid."""
VISIBLE = 84
"""Images are enlarged to at least this many pixels."""
_LARGE, _FONT, _CAPTION, _INK = 512, 12, 18, (36, 41, 47)


def to_uint8(images: Tensor) -> Tensor:
    """Images as bytes `[N, C, H, W]` on the CPU, rounded; `InputError` for another shape, NaN or integers."""
    right = images.dim() == 4 and images.shape[1] in (1, 3) and 0 not in images.shape[2:]
    check(
        right and images.is_floating_point(),
        "images",
        f"a tensor {tuple(images.shape)} of {images.dtype}",
        "a float tensor [N, 1 or 3, H, W] in [0, 1]",
    )
    images = images.detach().cpu().float()
    check(not bool(images.isnan().any()), "images", "NaN", "numbers")
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def to_pil(images: Tensor) -> list[Image]:
    """Pillow images, mode L for one channel and RGB for three."""
    from PIL import Image

    rows = to_uint8(images).permute(0, 2, 3, 1).contiguous().numpy()
    return [Image.fromarray(row[:, :, 0] if row.shape[2] == 1 else row) for row in rows]


def save_png(
    path: Path | str,
    images: Tensor,
    columns: int | None = None,
    captions: Sequence[str | float] | Tensor | None = None,
    scale: int | None = None,
) -> None:
    """Write a grid of images `[N, C, H, W]` as one PNG, row by row, all at once.

    `columns` None makes the grid about square. `captions` `[N]` stand below the images: texts as they are, numbers with
    two decimals; what is too wide is cut. `scale` enlarges by a whole number without smoothing; None makes small
    images at least 84 pixels high and wide. Raises `InputError` for bad input and `SteerError` where the file cannot
    be written.
    """
    check(len(images) > 0, "images", f"a tensor {tuple(images.shape)}", "at least one image")
    check(columns is None or (isinstance(columns, int) and columns > 0), "columns", columns, "an integer > 0, or None")
    check(scale is None or (isinstance(scale, int) and scale > 0), "scale", scale, "an integer > 0, or None")
    texts = None if captions is None else [_caption(x) for x in captions]
    check(texts is None or len(texts) == len(images), "captions", texts and len(texts), f"{len(images)}, one an image")
    grid = _grid(to_pil(images), columns or _square(len(images)), texts, scale)
    with replacing(path) as temporary:
        grid.save(temporary, format="PNG")


def save_image(path: Path | str, image: Tensor) -> None:
    """Write one image `[C, H, W]` in [0, 1] as a PNG of its own size, all at once."""
    with replacing(path) as temporary:
        to_pil(image[None])[0].save(temporary, format="PNG")


def enlargement(height: int, width: int) -> int:
    """The whole factor that makes an image visible, without making a long one huge."""
    return max(1, min(math.ceil(VISIBLE / min(height, width)), _LARGE // max(height, width)))


def _square(count: int) -> int:
    return math.ceil(math.sqrt(count))


def _caption(x: Any) -> str:
    return x if isinstance(x, str) else f"{float(x):.2f}"


def _grid(tiles: list[Image], columns: int, captions: list[str] | None, scale: int | None) -> Image:
    from PIL import Image, ImageDraw, ImageFont

    width, height = tiles[0].size
    scale = scale or enlargement(height, width)
    width, height = width * scale, height * scale
    below = _CAPTION if captions else 0
    columns = min(columns, len(tiles))
    rows = math.ceil(len(tiles) / columns)
    step_x, step_y = width + MARGIN, height + below + MARGIN
    grid = Image.new("RGB", (columns * step_x + MARGIN, rows * step_y + MARGIN), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(_FONT)
    for i, tile in enumerate(tiles):
        x, y = MARGIN + i % columns * step_x, MARGIN + i // columns * step_y
        grid.paste(tile.resize((width, height), Image.Resampling.NEAREST), (x, y))
        if captions:
            text = _fitting(captions[i], width, font)
            draw.text((x + width / 2, y + height + below / 2), text, fill=_INK, font=font, anchor="mm")
    return grid


def _fitting(text: str, width: int, font: Any) -> str:
    """One line that is no wider than `width` pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..." if text else ""

"""Photographs as multi-GT sets, for the benchmarks; images of noise would decode more slowly."""

from pathlib import Path

import numpy as np
import skimage
from PIL import Image, ImageFilter

# The larger colour photographs in scikit-image's wheel
PHOTOS = ("astronaut.png", "coffee.png", "motorcycle_left.png", "rocket.jpg", "retina.jpg",
          "chelsea.png", "hubble_deep_field.jpg", "motorcycle_right.png")


def write_sets(root: Path, count: int, side: int = 512) -> None:
    """Write `count` sets to ROOT/{original,01,02,03,04}: PNG, side x side, of rising sharpness.

    Each photograph is resized until its shorter side is 0 to 20 % above `side`, then cropped in the
    middle. Every second pass through the photographs crops at the top left instead and mirrors.
    """
    for i in range(count):
        turn, photo = divmod(i, len(PHOTOS))
        with Image.open(Path(skimage.__file__).parent / "data" / PHOTOS[photo]) as file:
            image = file.convert("RGB")
        factor = side * (1 + 0.05 * (turn % 5)) / min(image.size)
        width, height = (max(side, round(n * factor)) for n in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
        left, top = (0, 0) if turn % 2 else ((width - side) // 2, (height - side) // 2)
        pixels = np.asarray(image.crop((left, top, left + side, top + side)))
        image = Image.fromarray(pixels[:, ::-1] if turn % 2 else pixels)
        for k, folder in enumerate(("original", "01", "02", "03", "04")):
            (root / folder).mkdir(parents=True, exist_ok=True)
            sharper = image.filter(ImageFilter.UnsharpMask(radius=1.5, percent=40 * k, threshold=0))
            suffix = f"_{folder}" if k else ""
            sharper.save(root / folder / f"photo{i:03d}{suffix}.png")

"""Pictures as arrays: PNG files in, ranges of values, cropping and padding. Nothing here knows a network."""

import numpy as np
from PIL import Image, UnidentifiedImageError
from skimage import transform

from support.cli import UserError

FOREGROUND = 0.03  # intensity in [0, 1] above which a pixel counts as brain
MAX_SIDE = 8192  # pixels: no file can fill the memory


def _load_png(path):
    """A decoded Pillow image; what is wrong with the file becomes a `UserError`."""
    if path.exists() and not path.is_file():  # a pipe, say, would be waited for
        raise UserError(f"{path} is not a file; remove it.")
    try:
        with Image.open(path, formats=["PNG"]) as image:
            if max(image.size) > MAX_SIDE:
                raise ValueError("{}x{} pixels; the largest side allowed is {}".format(*image.size, MAX_SIDE))
            image.load()
            return image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        is_other = isinstance(error, UnidentifiedImageError)
        reason = "is not a PNG image" if is_other else f"cannot be read ({error})"
        raise UserError(f"{path} {reason}; replace it by a grayscale PNG.") from error


def read_slice(path, size=None, reference=None):
    """Reads one 8-bit grayscale PNG as uint8 (height, width); it has to have the `size` of `reference`."""
    image = _load_png(path)
    if image.mode != "L":
        raise UserError(f"{path} is a PNG of mode {image.mode}; convert it to 8-bit grayscale (mode L).")
    if size is not None and (image.height, image.width) != tuple(size):
        raise UserError(f"{path} is {image.width}x{image.height} pixels but {reference} is "
                        f"{size[1]}x{size[0]}; all slices must have one size.")
    return np.asarray(image)


def pad_to_square(images, side):
    """Images (N, height, width) in the middle of black squares: (N, side, side)."""
    margins = [((side - length) // 2, (side - length + 1) // 2) for length in images.shape[1:]]
    return np.pad(images, ((0, 0), *margins))


def turn(images, front):
    """Turns images (N, S, S), whose front lies on the side `front`, front up.

    Left and right cannot be told: a brain is nearly its own mirror image. So the turn is that of the usual
    cause, volumes in RAS order written with y along the rows (front down: the rows are reversed) or the
    columns (front right: a quarter turn). There left comes to lie on the left."""
    return {"up": images, "down": images[:, ::-1],
            "left": np.rot90(images, -1, (1, 2)), "right": np.rot90(images, 1, (1, 2))}[front]


def to_uint8(images):
    """The inverse of `dataset.normalise`, for NumPy: floats in [-1, 1] (clipped) -> uint8 in [0, 255]."""
    return np.round((np.clip(images, -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8)


def to_unit(images):
    """(N, H, W, 1) in [-1, 1] -> float64 NumPy (N, H, W) in [0, 1]."""
    return (np.asarray(images, np.float64)[..., 0] + 1) / 2


def in_chunks(function, array, size=32):
    """Applies a function to up to `size` rows at a time of an array (N, ...), N > 0: NumPy (N, ...)."""
    return np.concatenate([function(array[start:start + size]) for start in range(0, len(array), size)])


def neighbours(cases, positions):
    """The indices, int (2, N), of the slices right below and above each (in order), or its own if none is."""
    is_joined = (np.diff(cases) == 0) & (np.diff(positions) == 1)
    own = np.arange(len(positions))
    return np.stack([own - np.append(False, is_joined), own + np.append(is_joined, False)])


def empty_margin(images, multiple):
    """Pixels, rounded down to `multiple`, of the border that is black in every image uint8 (N, H, W)."""
    inked = np.argwhere(images.max(axis=0))
    if not len(inked):
        return 0
    last = np.array(images.shape[1:]) - 1
    return int(min(inked.min(), (last - inked).min())) // multiple * multiple


def crop(images, margin):
    """Images (..., H, W) without the margin that the model paints black."""
    return images[..., margin:images.shape[-2] - margin, margin:images.shape[-1] - margin]


def brain_box(heads, rim=0):
    """The box of all brains of heads (N, S, H, W), uint8 or in [0, 1], and `rim` pixels more: four slices."""
    limit = FOREGROUND * (255 if heads.dtype == np.uint8 else 1)
    brain = np.argwhere(heads.max(axis=(0, 1)) > limit)  # not any(heads > limit), which is a copy of all
    if not len(brain):
        return (slice(None),) * 4  # all of a black picture
    starts, stops = np.maximum(brain.min(axis=0) - rim, 0), brain.max(axis=0) + 1 + rim
    return slice(None), slice(None), *map(slice, starts, stops)


def spread(count, wanted):
    """Up to `wanted` of the indices 0 to `count` - 1, evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, wanted).round().astype(int))


def read_own_png(path):
    """Reads a grayscale PNG of any kind as (uint8 (height, width), what was done to it, a list of texts)."""
    image = _load_png(path)
    if image.mode == "L":
        return np.asarray(image), []
    if image.mode.startswith("I"):
        deep = np.asarray(image).astype(np.float64)
        brightest = int(deep.max())
        note = f"16 bits scaled to 8 (its brightest, {brightest}, becomes 255)"
        return np.uint8(np.round(deep * 255 / max(brightest, 1))), [note]
    channels = np.asarray(image.convert("RGBA"))
    if (channels[..., 3] < 255).any():
        raise UserError(f"{path} is partly transparent; save it as grayscale without transparency.")
    if (channels[..., :3] != channels[..., :1]).any():
        raise UserError(f"{path} is in colour; the model works on gray only, so convert it.")
    return channels[..., 0], [f"mode {image.mode} turned to gray (all its pixels are)"]


def fit_to_square(images, size, is_volume=False):
    """Pads uint8 (N, height, width) to (N, size, size); returns them and what was done, a list of texts.

    Larger or much smaller ones, and slices of a volume, are resampled first."""
    height, width = images.shape[1:]
    changes, longer = [], max(height, width)
    if longer > size or 2 * longer < size or is_volume and longer != size:
        shape = tuple(max(1, round(length * size / longer)) for length in (height, width))
        resized = [transform.resize(image / 255, shape, 1, anti_aliasing=longer > size) for image in images]
        images = np.uint8(np.round(np.stack(resized) * 255))
        changes.append(f"resampled from {width}x{height} to {shape[1]}x{shape[0]} pixels")
        height, width = shape
    if (height, width) != (size, size):
        changes.append(f"padded with black from {width}x{height} to {size}x{size} pixels")
    return pad_to_square(images, size), changes

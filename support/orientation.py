"""Which way PNG slices lie, and at which heights, which files do not say: measured against the MNI152."""

from collections import namedtuple

import numpy as np
from scipy import ndimage
from skimage.transform import resize_local_mean

from support.images import spread, turn
from support.template import cut_axial, load_mni152
from support.volumes import FRAME_MM, SliceGeometry

FRONTS = "up", "down", "left", "right"  # the side of the picture on which the front of the head lies
SIDE, PIXEL_SIZE = 64, 4  # pixels and mm of the pictures that are compared
MIN_POSITIONS = 8  # from fewer slices the spacing is a guess
MAX_POSITIONS, MAX_PEOPLE = 12, 40  # compared: as many slices of the head, each the mean of as many people
# Below these, nothing is claimed. Measured: at least 0.56 and 0.15 in single people, 0.79 and 0.25 in means
# over people (real, simulated, with a skull); at most 0.52 and 0.08 in discs, eggs, torsos, blobs and noise.
MIN_CORRELATION, MIN_MARGIN = 0.55, 0.12

# How slices fit the template: the side of the picture on which the front lies, None if the match is poor; the
# spacing of neighbouring slices and the height of slice 0 above the commissure, in the data's mm; the mean
# correlation of the best fit, and by how much that of any other side is worse
Match = namedtuple("Match", "front spacing lowest correlation margin")


def match_template(slices, positions):
    """The `Match` with MNI152 of mean slices (P, S, S), black 0, 256 mm wide, at positions (P,)."""
    # Each height, each side and some scales (the MNI's brain is larger than people's) are compared, inside
    # the template's brain without its rim, whose darkness any round thing shares. The spacing is uncertain by
    # about 5 % from 32 slices and 10 % from 8, the height by 1 to 2 mm.
    if len(slices) < MIN_POSITIONS or not np.ptp(slices):
        return Match(None, 0.0, 0.0, 0.0, 0.0)
    chosen = spread(len(slices), MAX_POSITIONS)
    small = slices[chosen].astype(np.float32)
    small, positions = _centred(resize_local_mean(small, (len(chosen), SIDE, SIDE))), positions[chosen]
    volume, to_voxels = load_mni152()
    template = ndimage.gaussian_filter(volume, 1.5), to_voxels
    # First every side, coarsely; then the best one, finely
    turned = [turn(small, front) for front in FRONTS]
    fits = _fit(turned, positions, template, np.arange(0.82, 1.13, 0.06), height_step=2,
                spacings=np.geomspace(0.5, 8, 56), lowest=np.arange(-80, 71, 2))
    second, best = np.argsort([correlation for correlation, *_ in fits])[-2:]
    coarse, scale, spacing, lowest = fits[best]
    margin = coarse - fits[second][0]
    (correlation, scale, spacing, lowest), = _fit(
        turned[best:best + 1], positions, template, scale + 0.02 * np.arange(-2, 3), height_step=1,
        spacings=spacing * np.linspace(0.9, 1.1, 21), lowest=lowest + np.linspace(-4, 4, 17))
    front = FRONTS[best] if correlation >= MIN_CORRELATION and margin >= MIN_MARGIN else None
    return Match(front, *map(float, (spacing * scale, lowest * scale, correlation, margin)))


def _fit(turned, positions, template, scales, height_step, spacings, lowest):
    """The best (correlation, scale, spacing, lowest), in the template's mm, of each (P, SIDE, SIDE) given."""
    heights = np.arange(-80, 101, height_step)
    spacings, lowest = (values.reshape(-1, 1) for values in np.meshgrid(spacings, lowest))
    lines = lowest + spacings * positions
    possible = (lines[:, 0] >= heights[0]) & (lines[:, -1] <= heights[-1])
    spacings, lowest, lines = spacings[possible, 0], lowest[possible, 0], lines[possible]
    # For each slice of each line, its index in a flat table of (P, len(heights))
    indices = np.round((lines - heights[0]) / height_step).astype(int)
    indices += np.arange(len(positions)) * len(heights)
    shifts = (0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)
    pixels = np.stack([np.roll(slices, shift, (1, 2)) for slices in turned for shift in shifts])
    pixels = pixels.reshape(-1, SIDE * SIDE)  # one product of matrices: small ones keep threads waiting
    squares, least_variance = pixels ** 2, 1e-4 * pixels.max() ** 2
    best = [(-1, 1, 0, 0)] * len(turned)
    for scale in scales:
        regions, weights = _brain_regions(template, heights, scale)
        variance = squares @ regions.T - (pixels @ regions.T) ** 2
        correlations = pixels @ weights.T / np.sqrt(np.maximum(variance, least_variance))
        for index, table in enumerate(correlations.reshape(len(turned) * len(shifts), -1)):
            means = table[indices].mean(axis=1)
            line = means.argmax()
            side = index // len(shifts)
            best[side] = max(best[side], (means[line], scale, spacings[line], lowest[line]))
    return best


def _brain_regions(template, heights, scale):
    """(N, SIDE ** 2) each: dot a picture, its mean in the brain without rim; covariance with the template."""
    pictures = _centred(cut_axial(*template, heights, SIDE, PIXEL_SIZE / scale))
    cross = np.array([[[0, 1, 0], [1, 1, 1], [0, 1, 0]]])
    brain = ndimage.binary_erosion(pictures > 0.1 * pictures.max(), cross).reshape(len(heights), -1)
    pictures = pictures.reshape(len(heights), -1)
    area = brain.sum(axis=1, keepdims=True)
    brain = brain & (area * PIXEL_SIZE ** 2 > 1500)  # mm2; a smaller piece would fit anything
    regions = (brain / np.maximum(area, 1)).astype(np.float32)
    deviations = (pictures - (pictures * regions).sum(axis=1, keepdims=True)) * brain
    deviation = np.sqrt((deviations ** 2 * regions).sum(axis=1, keepdims=True))
    return regions, deviations * regions / np.maximum(deviation, 1e-6)


def _centred(images):
    """Moves each image so that the middle of what is bright lies in the middle."""
    bright = images > 0.1 * images.max()
    moved = np.zeros(images.shape, np.float32)
    for index in np.flatnonzero(bright.any(axis=(1, 2))):
        shift = (SIDE - 1) / 2 - np.array(ndimage.center_of_mass(bright[index]))
        ndimage.shift(images[index], shift, moved[index], order=1)
    return moved


def find_geometry(images, positions, front=None, spacing=None):
    """As `dataset.find_geometry`, of images uint8 (N, S, S) as read, at slice numbers (N,).

    What is stated overrules what is measured: `front`, one of `FRONTS`, and `spacing`, in mm."""
    numbers = np.unique(positions)
    members = [np.flatnonzero(positions == number) for number in numbers]
    means = [images[indices[spread(len(indices), MAX_PEOPLE)]].mean(axis=0) for indices in members]
    match = match_template(np.stack(means), numbers)
    side = front or match.front
    is_measured = match.front is not None and match.front == side  # heights of another side mean nothing
    source = match if is_measured else SliceGeometry()
    geometry = SliceGeometry(FRAME_MM / images.shape[1], spacing or source.spacing, source.lowest,
                             axes_known=side is not None)
    apart = "as stated" if spacing else "by the template" if is_measured else "as is usual, not measured"
    apart = f"{geometry.spacing:.1f} mm apart, {apart}"
    fit = f"(correlation {match.correlation:.2f}, {match.margin:.2f} above that of another side)"
    if side is None:
        return side, geometry, (f"No match with the template {fit}: nothing is turned, and nothing is said "
                                f"of the axes; {apart}.")
    other = f", though the template fits front-{match.front}" if match.front not in (None, side) else ""
    origin = f"{'as stated' if front else 'by the template'}{other} {fit}{': turned' * (side != 'up')}"
    return side, geometry, f"Slices lie front-{side} {origin}; {apart}. Which side is left cannot be told."

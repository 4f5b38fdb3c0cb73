"""Whether one person's images lie in two splits, which makes every number on held-out people a lie."""

import numpy as np
from PIL import Image
from scipy import ndimage

from support.devices import print_on_chief
from support.images import FOREGROUND

COMPARED_SIDE = 64  # pixels of the pictures that are compared
# Images that correlate above this show one person. Measured. Two people: at most 0.56 (170 real ones), 0.70
# (sampled), 0.79 (simulated from one template). One real person, 1 mm higher: at least 0.83, often above 0.9.
# One image as JPEG of quality 30, darker, brighter, noisier, blurred, of other contrast: at least 0.88.
SAME_PERSON = 0.85
MIN_BRAIN = 0.1  # share of the pixels below which an image is not compared: small blobs are all alike
CHUNK = 256  # images at a time


def _fine_detail(images):
    """Vectors, float32 (N, pixels), of images uint8 (N, S, S): the product of two is their correlation."""
    side = min(COMPARED_SIDE, images.shape[1])
    small = np.float32([Image.fromarray(image).resize((side, side), Image.BOX) for image in images])
    detail = small - ndimage.uniform_filter(small, (0, 3, 3))
    # Clipped, so that one bright edge or a letter, which all images may share, does not decide.
    detail = np.clip(detail, -15, 15).reshape(len(images), -1)
    detail -= detail.mean(axis=1, keepdims=True)
    detail /= np.maximum(np.linalg.norm(detail, axis=1, keepdims=True), 1e-6)
    brain = (images[:, ::4, ::4] > FOREGROUND * 255).mean(axis=(1, 2), keepdims=True)
    return detail * (brain[:, 0] >= MIN_BRAIN)


def warn_of_shared_people(splits):
    """Prints a line if two of a dict of `dataset.Split` show one person; 11,328 images take 8 s of CPU."""
    first, *others = sorted(splits.values(), key=lambda split: len(split.images))
    compared, count, example = [(first, _fine_detail(first.images))], 0, None
    for split in others:
        for start in range(0, len(split.images), CHUNK):  # all details of the largest may not fit into memory
            detail = _fine_detail(split.images[start:start + CHUNK])
            for other, other_detail in compared:
                rows, columns = np.nonzero(detail @ other_detail.T > SAME_PERSON)
                count += len(rows)
                if len(rows) and not example:
                    example = (split, start + rows[0]), (other, columns[0])
        if split is not others[-1]:
            compared.append((split, _fine_detail(split.images)))
    if example:
        one, another = (f"case_{split.cases[index]:03d}_slice_{split.positions[index]} of {split.name}"
                        for split, index in example)
        print_on_chief(f"Warning: the same person seems to be in two splits: {one} and {another} are nearly "
                       f"one image ({count:,} such pairs; smooth images may be of two people). Keep each "
                       "person in one split, or results on held-out people mean nothing.")

"""The space of persons. A person is a short vector that says what is the same throughout one head.

It holds the whitened principal components of coarse pictures of heads. `modules.PixelCNN` keeps the space.
"""

import numpy as np
from sklearn.decomposition import PCA
import tensorflow as tf

PICTURE_SIDE = 16  # pixels along each side of a head's coarse picture, in each slice
PERSON_BITS = 8  # a person's numbers are rounded, so that each can be stored in these
PERSON_STEP = 1 / 32  # between two values of a person's number, where people's standard deviation is 1
NUM_QUANTILES = 101  # that describe how each number is distributed
PSEUDO_HEADS = 4  # pseudo-counts of a calibration: as if so many more heads had followed their person exactly
MAX_SHIFT, MAX_SCALE = 1.0, 2.0  # of a calibration; larger values were rare in training


def fit(pictures, person_size):
    """Fits the space of persons, P numbers each, to the training heads.

    `pictures` are coarse ones of heads, float (people, positions, 16, 16), NaN where a slice is missing.
    Returns (mean_picture, components, quantiles): the heads' mean, float (positions, 16, 16); principal
    components, (positions, 16, 16, P), each as long as people's standard deviation along it; those of each
    number over these people, (101, P), with mean 0 and variance 1. Numbers beyond that of people are 0."""
    mean = np.nan_to_num(pictures).sum(axis=0) / np.maximum(np.isfinite(pictures).sum(axis=0), 1)
    deviations = np.nan_to_num(pictures - mean).reshape(len(pictures), -1)
    components = np.zeros((person_size, deviations.shape[1]))
    count = min(person_size, len(pictures) - 1)
    if count:
        pca = PCA(count, svd_solver="full").fit(deviations)
        components[:count] = pca.components_ * np.sqrt(pca.explained_variance_)[:, np.newaxis]
    mean, components = np.float32(mean), np.float32(components.T.reshape(*mean.shape, person_size))
    quantiles = np.quantile(encode(pictures, mean, components), np.linspace(0, 1, NUM_QUANTILES), axis=0)
    # `sample` draws evenly between neighbouring quantiles: mean and variance of that become 0 and 1.
    lower, upper = quantiles[:-1], quantiles[1:]
    center = (lower + upper).mean(axis=0) / 2
    spread = np.sqrt((lower ** 2 + lower * upper + upper ** 2).mean(axis=0) / 3 - center ** 2)
    return mean, components, (quantiles - center) / np.where(spread > 0, spread, 1)


def encode(pictures, mean_picture, components):
    """The persons of heads, float32 (N, P), from their pictures (see `fit`), each number rounded to 8 bits.

    A head with more than half of its slices missing gets zeros, the average person."""
    flat = components.reshape(-1, components.shape[-1])
    squares = (flat ** 2).sum(axis=0)
    deviations = np.nan_to_num(pictures - mean_picture).reshape(len(pictures), -1)
    persons = deviations @ flat / np.where(squares > 0, squares, 1)
    usual = mean_picture.any(axis=(1, 2))  # the positions that training people have
    missing = np.isnan(pictures).any(axis=(2, 3)) & usual
    persons[missing.sum(axis=1) > usual.sum() / 2] = 0
    limit = 2 ** (PERSON_BITS - 1)
    return (np.round(persons / PERSON_STEP).clip(-limit, limit - 1) * PERSON_STEP).astype(np.float32)


def pictures_around(positions, person, mean_picture, components):
    """People's mean below, at and above positions (B,), and how persons (B, P) differ: (B, 6, 16, 16)."""
    near = tf.clip_by_value(positions[:, tf.newaxis] + [-1, 0, 1], 0, mean_picture.shape[0] - 1)
    mean, components = (tf.cast(picture, tf.float32) for picture in (mean_picture, components))
    unit = tf.math.rsqrt(tf.reduce_mean(tf.reduce_sum(components ** 2, axis=-1)) + 1e-12)
    difference = unit * tf.einsum("bdhwp,bp->bdhw", tf.gather(components, near), person)
    return tf.concat([tf.gather(mean, near), difference], axis=1)


def picture_to_grid(grid_size):
    """The matrix, float32 (grid_size, 16), that resamples an axis of a picture to the grid, linearly."""
    # Not `tf.image.resize`: XLA, which compiles the sampler, does not support all of it.
    pixels, signals = np.arange(PICTURE_SIDE), np.eye(PICTURE_SIDE)
    coordinates = (np.arange(grid_size) + 0.5) * PICTURE_SIDE / grid_size - 0.5
    return np.stack([np.interp(coordinates, pixels, signal) for signal in signals], axis=1).astype(np.float32)


def sample(quantiles, uniform):
    """New persons, float32 (N, P), by quantiles (101, P), from uniform numbers (N, P) in [0, 1)."""
    # Their numbers are independent, so that no training person is reproduced.
    index = tf.transpose(uniform) * (NUM_QUANTILES - 1)
    lower = tf.minimum(tf.cast(index, tf.int32), NUM_QUANTILES - 2)
    table = tf.transpose(quantiles)
    low, high = (tf.gather(table, lower + step, batch_dims=1) for step in (0, 1))
    return tf.transpose(low + (high - low) * (index - tf.cast(lower, tf.float32)))


def calibrate(conditions, outcomes):
    """Fits (shift, scale), (P,) each: ``shift + scale * person`` lets heads differ as much as people do.

    Sampled heads follow their person too weakly: the slices below weigh more, and errors pile up from slice
    to slice. Of N heads, `conditions` (N, P) are the persons that they were given, `outcomes` (N, P) those
    that `encode` finds in them. Each number is taken as ``outcome = offset + slope * condition + noise``
    (least squares). The shift undoes the offset; the scale brings the outcome's variance to people's, 1."""
    conditions, outcomes = np.float64(conditions), np.float64(outcomes)
    x, y = (values - values.mean(axis=0) for values in (conditions, outcomes))
    slope = ((x * y).sum(axis=0) + PSEUDO_HEADS) / ((x ** 2).sum(axis=0) + PSEUDO_HEADS)
    offset = (outcomes - slope * conditions).sum(axis=0) / (len(conditions) + PSEUDO_HEADS)
    noise = (y - slope * x).var(axis=0)
    slope = np.maximum(slope, 1 / MAX_SCALE)
    shift = (-offset / slope).clip(-MAX_SHIFT, MAX_SHIFT)
    return shift, (np.sqrt(np.maximum(1 - noise, 0)) / slope).clip(1, MAX_SCALE)

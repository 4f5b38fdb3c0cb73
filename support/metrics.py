"""Every number this repository reports.

Images here are NumPy float (height, width) in [0, 1]; codes are int arrays.
"""

import functools

import numpy as np
from scipy import ndimage
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
import tensorflow as tf
from tqdm import tqdm

from support.images import FOREGROUND, in_chunks, to_unit
from support.people import PERSON_BITS


def ssim(original, reconstruction):
    """Structural similarity as the followed project measured it: scikit-image's default uniform 7x7 window.

    Args:
        original: float (H, W); its own range is the data range (1 if it is constant).
        reconstruction: float (H, W).

    Returns:
        The mean over the image, at most 1.
    """
    data_range = float(np.ptp(original)) or 1.0
    return float(structural_similarity(original, reconstruction, data_range=data_range))


def ssim_gaussian(original, reconstruction):
    """Structural similarity as in Wang et al. 2004: Gaussian window of sigma 1.5, population covariance, range 1.

    Args:
        original: float (H, W) in [0, 1].
        reconstruction: float (H, W); clipped to [0, 1].

    Returns:
        (mean over the image, mean over the original's brain). The brain is where the original exceeds 0.03; without any,
        the second is the first.

    References:
        Wang, Bovik, Sheikh, Simoncelli: Image Quality Assessment, IEEE Transactions on Image Processing 13(4), 2004.
    """
    mean, ssim_map = structural_similarity(original, np.clip(reconstruction, 0, 1), data_range=1.0, gaussian_weights=True,
                                           sigma=1.5, use_sample_covariance=False, full=True)
    brain = original > FOREGROUND
    return float(mean), float(ssim_map[brain].mean() if brain.any() else mean)


QUALITY = "ssim", "ssim_gaussian", "ssim_foreground", "psnr", "mse"


def image_quality(original, reconstruction):
    """The figures of `QUALITY` of one image, float (H, W) in [0, 1]; PSNR in dB of peak 1, 100 for an exact image."""
    mse = np.mean((original - reconstruction) ** 2)
    psnr = peak_signal_noise_ratio(original, reconstruction, data_range=1.0) if mse > 1e-10 else 100.0
    return ssim(original, reconstruction), *ssim_gaussian(original, reconstruction), psnr, mse


def reconstruction_metrics(originals, reconstructions):
    """Means over images.

    Args:
        originals: float (N, H, W) in [0, 1].
        reconstructions: float (N, H, W) in [0, 1].

    Returns:
        A dict of `ssim`, `ssim_gaussian`, `ssim_foreground`, `psnr`, `mse` (of intensities in [0, 1]; see `image_quality`) and
        `num_images`.
    """
    pairs = zip(originals, reconstructions)
    rows = [image_quality(*pair) for pair in tqdm(pairs, "Measuring", len(originals), unit=" images", leave=False, disable=None)]
    return {**dict(zip(QUALITY, np.mean(rows, axis=0).tolist())), "num_images": len(originals)}


def baselines(train_images, images):
    """What two guesses without a model score: pictures are mostly black, so that even these score high.

    Args:
        train_images: uint8 (M, H, W).
        images: uint8 (N, H, W), of other people.

    Returns:
        A dict of `reconstruction_metrics`: `mean_image`, the mean training image in place of each image; `blurred_original`,
        each image under a Gaussian filter of 1/128 of its side.
    """
    originals = images / 255
    mean = np.mean(train_images, axis=0) / 255
    sigma = images.shape[-1] / 128
    return {"mean_image": reconstruction_metrics(originals, np.broadcast_to(mean, originals.shape)),
            "blurred_original": reconstruction_metrics(originals, ndimage.gaussian_filter(originals, (0, sigma, sigma)))}


def code_metrics(codes, num_embeddings):
    """How the codebook is used.

    Args:
        codes: int (...) in [0, num_embeddings).
        num_embeddings: K.

    Returns:
        A dict of `code_entropy` (bits per code, if codes were independent), `perplexity` (2 to that: the number of equally
        likely codes with the same entropy) and `codes_used`.
    """
    share = np.bincount(np.ravel(codes), minlength=num_embeddings) / np.size(codes)
    share = share[share > 0]
    entropy = float(-(share * np.log2(share)).sum())
    return {"code_entropy": entropy, "perplexity": 2 ** entropy, "codes_used": len(share)}


@functools.lru_cache(maxsize=2)
def _compiled_log_prob(prior):
    """The log probability of each code as one graph per prior: tracing it takes seconds."""

    @tf.function(reduce_retracing=True)
    def log_prob(codes, positions, context=None, person=None):
        return prior.distribution(codes, positions, context, person).log_prob(codes)

    return log_prob


def bits_per_place(prior, coded, indices, conditional=True):
    """The prior's code length of each code, given the codes before it: where this is high, the code was unexpected.

    Args:
        prior: a `modules.PixelCNN`.
        coded: a `dataset.CodedSplit`; its version 0 is measured.
        indices: int (M,), of slices.
        conditional: whether the slices below and the person are given to the prior.

    Returns:
        float64 (M, g, g), in bits.
    """
    log_prob = _compiled_log_prob(prior)

    def bits(indices):
        inputs = [coded.slices(indices), coded.positions[indices]]
        if conditional:
            inputs += [coded.slices(coded.context[indices]), coded.persons[0, indices]]
        return -log_prob(*map(tf.constant, inputs)).numpy().astype(np.float64) / np.log(2)

    return in_chunks(bits, np.asarray(indices))


def code_lengths(prior, coded, conditional=True):
    """The code length of each slice, float64 (N,), in bits per code; see `bits_per_place`."""
    return bits_per_place(prior, coded, np.arange(len(coded.positions)), conditional).mean(axis=(1, 2))


def code_lengths_of_heads(prior, coded, image_indices, max_heads):
    """The bits per code of whole heads, float64 (N,): of `max_heads`, evenly spread, if there are more.

    Args:
        prior: a `modules.PixelCNN`.
        coded: a `dataset.CodedSplit`.
        image_indices: int (M, S), the slices of each head.
        max_heads: the largest N.
    """
    indices = image_indices[np.unique(np.linspace(0, len(image_indices) - 1, max_heads).astype(int))]
    return bits_per_place(prior, coded, indices.ravel()).reshape(len(indices), -1).mean(axis=1)


def person_bits_per_code(coded):
    """What each head's person costs, in bits per code of the head: `people.PERSON_BITS` a number."""
    num_heads = len(coded.positions) / len(np.unique(coded.positions))
    return PERSON_BITS * num_heads * coded.persons.shape[-1] / coded.codes[0].size


def spread_over_people(values, cases):
    """The standard deviation of the people's means.

    Args:
        values: float (N,), one for each image.
        cases: int (N,), the person of each image.

    Returns:
        A float; NaN of a single person.
    """
    people = np.unique(cases)
    means = [values[cases == case].mean() for case in people]
    return float(np.std(means, ddof=1)) if len(people) > 1 else float("nan")


def evaluate(vqvae, prior, batches, coded, cases):
    """Measures a trained pair of models on a split, batch by batch, so that its images need not fit into memory as floats.

    Args:
        vqvae: a `modules.VQVAE`.
        prior: a `modules.PixelCNN`.
        batches: (images in [-1, 1], positions), each image once, in order.
        coded: the `dataset.CodedSplit` of these images; version 0 has the codes of the images as they are.
        cases: int (N,), the person of each image.

    Returns:
        (the dict of metrics.json, details). The metrics are those of `reconstruction_metrics` and `code_metrics`, and
        `bits_per_code`, the prior's code length of whole heads, each slice given those below it and the person, which is
        paid for; `bytes_per_image`, that times codes over 8; `bits_per_code_alone`, of slices by themselves. `NAME_sd` is
        the `spread_over_people` of what `QUALITY` names and of `bits_per_code`; it is left out for a single person.
        The details: `per_image`, a dict of float (N,): `ssim`, `ssim_foreground`, `psnr` and `bits_per_code` (without what
        the person costs); `error_map`, the mean absolute error of each pixel, float (H, W).
    """
    rows, error_sum = [], 0.0
    for images, _ in tqdm(batches, "Measuring", unit=" batches", leave=False, disable=None):
        codes = coded.codes[0, len(rows):len(rows) + len(images)]
        originals, reconstructions = to_unit(images), to_unit(vqvae.decode_codes(codes))
        rows += [image_quality(*pair) for pair in zip(originals, reconstructions)]
        error_sum = error_sum + np.abs(originals - reconstructions).sum(axis=0)
    values = dict(zip(QUALITY, np.array(rows).T)) | {"bits_per_code": code_lengths(prior, coded)}
    measured = {name: float(value.mean()) for name, value in values.items()}
    measured["bits_per_code"] += person_bits_per_code(coded)
    if len(np.unique(cases)) > 1:
        measured |= {f"{name}_sd": spread_over_people(value, cases) for name, value in values.items()}
    measured |= {"num_images": len(rows), **code_metrics(coded.codes[0], coded.num_embeddings),
                 "bits_per_code_alone": float(code_lengths(prior, coded, conditional=False).mean()),
                 "bytes_per_image": measured["bits_per_code"] * coded.codes[0, 0].size / 8}
    per_image = {name: values[name] for name in ("ssim", "ssim_foreground", "psnr", "bits_per_code")}
    return measured, {"per_image": per_image, "error_map": error_sum / len(rows)}


# Samples --------------------------------------------------------------------------------------------------------------

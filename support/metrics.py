"""The quality of reconstructions, the use of the codebook, and what codes cost.

Images are NumPy float (H, W) in [0, 1], unless said otherwise; codes are arrays of any integer type."""

import functools

import numpy as np
from scipy import ndimage
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
import tensorflow as tf
from tqdm import tqdm

from support.images import FOREGROUND, in_chunks, to_unit
from support.people import PERSON_BITS

QUALITY = "ssim", "ssim_gaussian", "ssim_foreground", "psnr", "mse"


def ssim(original, reconstruction):
    """Mean structural similarity, at most 1, as PatternFlow measured it: with a uniform 7x7 window."""
    data_range = float(np.ptp(original)) or 1.0  # the original's own, unless it is constant
    return float(structural_similarity(original, reconstruction, data_range=data_range))


def ssim_gaussian(original, reconstruction):
    """SSIM with a Gaussian window: (mean, mean over the original's brain, of all if it has none)."""
    # Wang et al. 2004: https://doi.org/10.1109/TIP.2003.819861
    mean, ssim_map = structural_similarity(original, np.clip(reconstruction, 0, 1), data_range=1.0, full=True,
                                           gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    brain = original > FOREGROUND
    return float(mean), float(ssim_map[brain].mean() if brain.any() else mean)


def image_quality(original, reconstruction):
    """The figures of `QUALITY` of an image; PSNR in dB of peak 1, 100 for an exact image."""
    mse = np.mean((original - reconstruction) ** 2)
    psnr = peak_signal_noise_ratio(original, reconstruction, data_range=1.0) if mse > 1e-10 else 100.0
    return ssim(original, reconstruction), *ssim_gaussian(original, reconstruction), psnr, mse


def reconstruction_metrics(originals, reconstructions):
    """The means of `image_quality` over two iterables of images: a dict of `QUALITY`, and `num_images`."""
    pairs = tqdm(zip(originals, reconstructions), "Measuring", unit=" images", leave=False, disable=None)
    rows = [image_quality(*pair) for pair in pairs]
    return {**dict(zip(QUALITY, np.mean(rows, axis=0).tolist())), "num_images": len(rows)}


def baselines(train_images, images):
    """What two guesses without a model score: pictures are mostly black, so that even these score high.

    Images are uint8 (N, H, W), or a memory map. Returns a dict of `reconstruction_metrics`: `mean_image`, the
    mean training image for each image; `blurred_original`, by a Gaussian filter of 1/128 of the side."""
    mean = np.mean(train_images, axis=0) / 255  # adds bytes up as float64, few at a time: exact, no copy
    guesses = {"mean_image": lambda image: mean,
               "blurred_original": lambda image: ndimage.gaussian_filter(image, images.shape[-1] / 128)}
    # One by one: as floats, all of them would not fit into memory.
    return {name: reconstruction_metrics((image / 255 for image in images),
                                         (guess(image / 255) for image in images))
            for name, guess in guesses.items()}


def code_metrics(codes, num_embeddings):
    """How codes (N, ...) from 0 to num_embeddings - 1 use the codebook: a dict, see `report.MEANINGS`."""
    # One by one: bincount turns each code into 8 bytes.
    counts = sum(np.bincount(np.ravel(grid), minlength=num_embeddings) for grid in codes)
    share = counts[counts > 0] / counts.sum()
    entropy = float(-(share * np.log2(share)).sum())
    return {"code_entropy": entropy, "perplexity": 2 ** entropy, "codes_used": len(share)}


@functools.lru_cache(maxsize=2)
def _compiled_log_prob(prior):
    """The log probability of each code as one graph per prior: tracing it takes seconds."""
    # Not *conditions: `reduce_retracing` fails if calls differ in their number of arguments.
    def log_prob(codes, positions, context=None, person=None):
        return prior.distribution(codes, positions, context, person).log_prob(codes)
    return tf.function(log_prob, reduce_retracing=True)


def bits_per_place(prior, coded, indices, conditional=True):
    """The code length in bits, float64 (M, g, g), of each code of M slices of a `dataset.CodedSplit`.

    Version 0 is measured. `conditional`: whether the slices below and the person are given to the prior."""
    def bits(indices):
        inputs = [coded.slices(indices), coded.positions[indices]]
        if conditional:
            inputs += [coded.slices(coded.context[indices]), coded.persons[0][indices]]
        with prior.full_float32():
            log_prob = _compiled_log_prob(prior)(*map(tf.constant, inputs))
        return -log_prob.numpy().astype(np.float64) / np.log(2)
    return in_chunks(bits, np.asarray(indices))


def code_lengths(prior, coded, conditional=True):
    """The code length of each slice, float64 (N,), in bits per code; see `bits_per_place`."""
    return bits_per_place(prior, coded, np.arange(len(coded.positions)), conditional).mean(axis=(1, 2))


def code_lengths_of_heads(prior, coded, indices):
    """The bits per code, float64 (N,), of heads whose slices are int (N, S)."""
    return bits_per_place(prior, coded, indices.ravel()).reshape(len(indices), -1).mean(axis=1)


def person_bits_per_code(coded, num_people=1):
    """What the persons cost, in bits per code of the `CodedSplit` of so many people."""
    return PERSON_BITS * num_people * coded.persons.shape[-1] / coded.codes[0].size


def evaluate(vqvae, prior, batches, coded, cases):
    """Measures a trained pair of models on a split, batch by batch: as floats, they may not fit into memory.

    Args:
        batches: (images in [-1, 1], positions), each image once, in order.
        coded, cases: the `dataset.CodedSplit` of these images; int (N,), the person of each.

    Returns:
        (the dict of metrics.json, see `report.MEANINGS`, details): `per_image`, a dict of float (N,), whose
        `bits_per_code` are without the person's; `error_map`, the mean absolute error, float (H, W)."""
    rows, alone, error_sum = [], [], 0.0
    for images, _ in tqdm(batches, "Measuring", unit=" batches", leave=False, disable=None):
        indices = np.arange(len(rows), len(rows) + len(images))
        originals, reconstructions = to_unit(images), to_unit(coded.decode(vqvae, indices))
        rows += [image_quality(*pair) for pair in zip(originals, reconstructions)]
        if vqvae.sees_neighbours:
            by_themselves = to_unit(vqvae.decode_codes(coded.codes[0][indices]))
            alone += [image_quality(*pair) for pair in zip(originals, by_themselves)]
        error_sum = error_sum + np.abs(originals - reconstructions).sum(axis=0)
    columns = dict(zip(QUALITY, np.array(rows).T)) | {"bits_per_code": code_lengths(prior, coded)}
    measured = {name: float(values.mean()) for name, values in columns.items()}
    for name, values in zip(QUALITY, np.transpose(alone)):
        measured[f"{name}_alone"] = float(values.mean())
    people = np.unique(cases)
    measured["bits_per_code"] += person_bits_per_code(coded, len(people))
    for name, values in columns.items() if len(people) > 1 else ():
        measured[f"{name}_sd"] = float(np.std([values[cases == case].mean() for case in people], ddof=1))
    measured |= {"num_images": len(rows), **code_metrics(coded.codes[0], coded.num_embeddings),
                 "bits_per_code_alone": float(code_lengths(prior, coded, conditional=False).mean()),
                 "bytes_per_image": measured["bits_per_code"] * coded.codes[0][0].size / 8}
    per_image = {name: columns[name] for name in ("ssim", "ssim_foreground", "psnr", "bits_per_code")}
    return measured, {"per_image": per_image, "error_map": error_sum / len(rows)}

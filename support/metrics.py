"""Every number this repository reports.

Images here are NumPy float (height, width) in [0, 1]; codes are int arrays.
"""

import concurrent.futures
import functools
import os
from typing import NamedTuple

import numpy as np
from scipy import linalg, ndimage, stats
from skimage.measure import block_reduce
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from sklearn.decomposition import PCA
from sklearn.metrics.pairwise import euclidean_distances, polynomial_kernel
from sklearn.neighbors import NearestNeighbors
import tensorflow as tf
from tqdm import tqdm

from support.people import PERSON_BITS

FOREGROUND = 0.03  # intensity above which a pixel of the original counts as brain
FEATURE_SIDE = 64  # pixels of the pictures whose principal components are compared
NUM_FEATURES = 64
NUM_NEIGHBOURS = 5  # k of density and coverage, as in the paper
PAIRS_PER_POSITION = 10  # of the mean pairwise MS-SSIM
NUM_HEADS = 64  # sampled heads that are judged, or as many as there are training people, if these are fewer
RESAMPLES = 1000  # of the people, for an interval
MS_SSIM_WEIGHTS = 0.0448, 0.2856, 0.3001, 0.2363, 0.1333  # Wang et al. 2003, finest scale first


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


def in_chunks(function, *arrays, size=32):
    """Applies a function to a few rows of arrays at a time, so that what it needs in between fits into memory.

    Args:
        function: from as many arrays as are given, of up to `size` rows each, to an array or tensor of as many rows.
        *arrays: (N, ...), N at least 1.
        size: the number of rows at a time.

    Returns:
        NumPy (N, ...).
    """
    starts = range(0, len(arrays[0]), size)
    return np.concatenate([function(*(array[start:start + size] for array in arrays)) for start in starts])


def to_unit(images):
    """(N, H, W, 1) in [-1, 1] -> float64 NumPy (N, H, W) in [0, 1], for the functions above."""
    return (np.asarray(images, np.float64)[..., 0] + 1) / 2


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
        coded: a `people.CodedSplit`; its version 0 is measured.
        indices: int (M,), of slices.
        conditional: whether the slices below and the person are given to the prior.

    Returns:
        float64 (M, g, g), in bits.
    """
    codes = coded.codes_with_none()[0]

    log_prob = _compiled_log_prob(prior)

    def bits(indices):
        inputs = [codes[indices], coded.positions[indices]]
        if conditional:
            inputs += [codes[coded.context[indices]], coded.persons[0, indices]]
        return -log_prob(*map(tf.constant, inputs)).numpy().astype(np.float64) / np.log(2)

    return in_chunks(bits, np.asarray(indices))


def code_lengths(prior, coded, conditional=True):
    """The code length of each slice, float64 (N,), in bits per code; see `bits_per_place`."""
    return bits_per_place(prior, coded, np.arange(len(coded.positions)), conditional).mean(axis=(1, 2))


def code_lengths_of_heads(prior, coded, image_indices, max_heads):
    """The bits per code of whole heads, float64 (N,): of `max_heads`, evenly spread, if there are more.

    Args:
        prior: a `modules.PixelCNN`.
        coded: a `people.CodedSplit`.
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
        coded: the `people.CodedSplit` of these images; version 0 has the codes of the images as they are.
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


def coarse(images):
    """Images or heads averaged over blocks to about 64 pixels a side, and of heads to half the slices, as rows of numbers.

    Args:
        images: uint8 or float in [0, 1], images (N, H, W) or heads (N, S, H, W).

    Returns:
        float64 (N, pixels) in [0, 1].
    """
    side = max(1, images.shape[-1] // FEATURE_SIDE)
    block = (side, side) if images.ndim == 3 else (2, side, side)
    scale = 255 if images.dtype == np.uint8 else 1
    return np.stack([block_reduce(image, block, np.mean).ravel() / scale for image in images])


class FeatureSpace:
    """The space in which sampled and real images are compared: whitened principal components of coarse training images.

    It needs no download and knows nothing of the networks; it sees the shape of head, ventricles and larger folds, not the
    finest texture.
    """

    def __init__(self, images):
        """Fits it to training images, uint8 (N, H, W): up to 64 components, each of unit variance over these."""
        count = min(NUM_FEATURES, len(images) - 1)
        self.pca = PCA(count, whiten=True, svd_solver="randomized", random_state=0).fit(coarse(images))

    def transform(self, images):
        """The features of images, uint8 or float in [0, 1], (M, H, W): float64 (M, F), F = 64, or N - 1 if that is less."""
        return self.pca.transform(coarse(images))


class Nearest(NamedTuple):
    """What `Neighbours.nearest` returns.

    Attributes:
        distances: float (N,), to the nearest training picture.
        indices: int (N,), of that picture.
        mirrored: bool (N,), whether its mirror image is nearer than itself.
        over_second: float (N,), the distance over that to the second nearest picture: 0 for a copy, 1 for a picture that is
            equally far from two.
    """

    distances: np.ndarray
    indices: np.ndarray
    mirrored: np.ndarray
    over_second: np.ndarray


class Neighbours:
    """Finds the training picture that is nearest to another; its mirror image counts as the picture: the prior learns both."""

    def __init__(self, train, transform=coarse):
        """Takes the training images or heads, uint8 (P, ..., W), and what turns them into rows of features."""
        self.transform = transform
        self.features = transform(train), transform(train[..., ::-1])

    def nearest(self, pictures):
        """The `Nearest` of pictures, (N, ..., W)."""
        features = self.transform(pictures)
        both = np.stack([euclidean_distances(features, reference) for reference in self.features])
        distances = both.min(axis=0)
        indices = distances.argmin(axis=1)
        rows = np.arange(len(distances))
        mirrored = both[1, rows, indices] < both[0, rows, indices]
        first, second = np.partition(distances, 1, axis=1)[:, :2].T
        return Nearest(first, indices, mirrored, first / np.maximum(second, np.finfo(float).eps))


def frechet_distance(a, b):
    """The squared Fréchet distance of the Gaussians with the features' means and covariances.

    Args:
        a: float (N, F).
        b: float (M, F).

    Returns:
        ``|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))``, at least 0.

    References:
        Heusel et al.: GANs Trained by a Two Time-Scale Update Rule, 2017, equation 6. https://arxiv.org/abs/1706.08500
    """
    covariance_a, covariance_b = (np.atleast_2d(np.cov(features, rowvar=False)) for features in (a, b))
    # The eigenvalues of C_a C_b are those of a positive semi-definite matrix: their roots sum to the trace of its root.
    roots = np.sqrt(linalg.eigvals(covariance_a @ covariance_b).real.clip(0))
    shift = np.sum((a.mean(axis=0) - b.mean(axis=0)) ** 2)
    return float(max(0.0, shift + np.trace(covariance_a) + np.trace(covariance_b) - 2 * roots.sum()))


def kernel_distance(a, b):
    """The kernel distance (KID): unbiased squared maximum mean discrepancy under ``(x y / F + 1)^3``.

    Args:
        a: float (N, F).
        b: float (M, F).

    Returns:
        A float whose expectation is 0 for equal distributions; it may be negative.

    References:
        Binkowski, Sutherland, Arbel, Gretton: Demystifying MMD GANs, 2018, section 4. https://arxiv.org/abs/1801.01401
    """
    def mean_of_others(features):
        kernel = polynomial_kernel(features, degree=3, coef0=1)
        return (kernel.sum() - np.trace(kernel)) / (len(features) * (len(features) - 1))

    return float(mean_of_others(a) + mean_of_others(b) - 2 * polynomial_kernel(a, b, degree=3, coef0=1).mean())


def density_and_coverage(real, fake, k=NUM_NEIGHBOURS):
    """How many real neighbourhoods a fake lies in, and how many of these hold a fake.

    A real point's neighbourhood is the ball that reaches its k-th nearest real neighbour.

    Args:
        real: float (N, F), N > k.
        fake: float (M, F).
        k: neighbours.

    Returns:
        (density, near 1 if fakes are where reals are and above if they keep to the middle; coverage, from 0 to 1).

    References:
        Naeem, Oh, Uh, Choi, Yoo: Reliable Fidelity and Diversity Metrics for Generative Models, 2020, equations 5 and 6.
        https://arxiv.org/abs/2002.09797
    """
    radii = NearestNeighbors(n_neighbors=k).fit(real).kneighbors()[0][:, -1]
    inside = euclidean_distances(real, fake) < radii[:, np.newaxis]
    return float(inside.sum() / (k * len(fake))), float(inside.any(axis=1).mean())


def ms_ssim(first, second):
    """Multi-scale structural similarity of pairs of images (Wang, Simoncelli, Bovik 2003), by TensorFlow.

    Args:
        first: float (N, H, W) in [0, 1].
        second: float (N, H, W).

    Returns:
        float32 (N,). Images too small for all five scales get the finest that fit, their weights scaled to sum to 1.
    """
    scales = min(5, int(np.log2(min(first.shape[1:]) / 11)) + 1)
    weights = np.array(MS_SSIM_WEIGHTS[:scales]) / sum(MS_SSIM_WEIGHTS[:scales])
    compare = tf.function(lambda a, b: tf.image.ssim_multiscale(a, b, 1.0, power_factors=weights.tolist()))
    return in_chunks(compare, *(np.float32(images)[..., np.newaxis] for images in (first, second)), size=16)


def mean_pairwise_ms_ssim(images, positions, cases, seed=0):
    """The mean MS-SSIM of images at one slice position, from different people: the less, the more they differ.

    Args:
        images: float (N, H, W) in [0, 1].
        positions: int (N,).
        cases: int (N,), the person (or sample) of each.
        seed: of the draw of up to `PAIRS_PER_POSITION` pairs per position.

    Returns:
        A float; NaN if no position has images of two people.
    """
    rng, pairs = np.random.default_rng(seed), []
    for position in np.unique(positions):
        indices = np.flatnonzero(positions == position)
        first, second = indices[np.array(np.triu_indices(len(indices), 1))]
        different = np.flatnonzero(cases[first] != cases[second])
        choice = rng.choice(different, min(PAIRS_PER_POSITION, len(different)), replace=False)
        pairs += zip(first[choice], second[choice])
    if not pairs:
        return float("nan")
    first, second = np.array(pairs).T
    return float(ms_ssim(images[first], images[second]).mean())


def tissue_statistics(images):
    """Simple anatomical statistics of each image.

    Args:
        images: uint8, or float in [0, 1], (N, H, W).

    Returns:
        A dict of float64 (N,): `brain_area`, the share of the frame inside the brain's outline (the largest region brighter
        than 0.03, holes filled); `dark_fraction`, the share of the deep half of it (by distance from the outline) that is
        darker than half the brain's median: ventricles and the deepest fissures; `symmetry`, the correlation of the brain
        with its mirror image, left for right. An image without brain has 0 in all.
    """
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = np.array(list(pool.map(_tissue, images)))
    return dict(zip(("brain_area", "dark_fraction", "symmetry"), rows.T))


def _tissue(image):
    image = image / 255 if image.dtype == np.uint8 else image  # one by one: as floats, all would not fit into memory
    regions, count = ndimage.label(image > FOREGROUND)
    if not count:
        return 0.0, 0.0, 0.0
    largest = np.bincount(regions.ravel())[1:].argmax()
    # What lies beyond a black border of one pixel changes nothing below.
    box = tuple(slice(max(0, side.start - 1), side.stop + 1) for side in ndimage.find_objects(regions)[largest])
    size, image = image.size, image[box]
    outline = ndimage.binary_fill_holes(regions[box] == largest + 1)
    depth = ndimage.distance_transform_edt(outline)
    deep = outline & (depth >= np.median(depth[outline]))
    dark = (image[deep] < np.median(image[outline]) / 2).mean()
    columns = np.flatnonzero(outline.any(axis=0))
    brain, outline_box = (picture[:, columns[0]:columns[-1] + 1] for picture in (np.where(outline, image, 0), outline))
    either = outline_box | outline_box[:, ::-1]
    symmetry = np.corrcoef(brain[either], brain[:, ::-1][either])[0, 1] if np.ptp(brain[either]) else 1.0
    return outline.sum() / size, dark, symmetry


def copy_test(sample_distances, sample_positions, real_distances, real_positions):
    """The data-copying test: do samples lie nearer to the training set than held-out people do?

    In each slice position, where every image is another person's, the Mann-Whitney U of the two sets of distances to the nearest
    training image, as a z-score; averaged over positions by their number of held-out images.

    Args:
        sample_distances: float (N,), see `Neighbours`.
        sample_positions: int (N,).
        real_distances: float (M,), of held-out people.
        real_positions: int (M,).

    Returns:
        C_T: well below 0 (-3, say) if samples are copies, about 0 if they are as new as a new person, well above 0 if they lie
        away from where people are. NaN if no position has both.

    References:
        Meehan, Chaudhuri, Dasgupta: A Non-Parametric Test to Detect Data-Copying in Generative Models, 2020, equation 3.
        https://arxiv.org/abs/2004.05675
    """
    scores, weights = [], []
    for position in np.intersect1d(sample_positions, real_positions):
        samples, reals = sample_distances[sample_positions == position], real_distances[real_positions == position]
        m, n = len(samples), len(reals)
        u = stats.mannwhitneyu(samples, reals).statistic
        scores.append((u - m * n / 2) / np.sqrt(m * n * (m + n + 1) / 12))
        weights.append(n)
    return float(np.average(scores, weights=weights)) if scores else float("nan")


def evaluate_samples(samples, positions, splits, space):
    """Measures samples against people, each figure beside its floor: what other people score.

    Samples have passed through the decoder, so all people are compared as their reconstructions. The test people are the
    reference; the floor is what the validation people score against them.

    Args:
        samples: uint8 (N, H, W), at the positions of the test images or as many as them.
        positions: int (N,).
        splits: dict of `dataset.Split` with the reconstructions of train, validate and test.
        space: the `FeatureSpace` of the training split.

    Returns:
        (metrics, details). The metrics: `frechet`, `kid`, `density`, `coverage`, and `dark_fraction_ks`, `symmetry_ks`
        (Kolmogorov-Smirnov distances of the tissue statistics, from 0 to 1), each also as `..._floor`; `ms_ssim_samples`,
        `ms_ssim_real`; `nearest_samples`, `nearest_real` (median distance to the nearest training image, of samples and
        test images); `copy_test`, and `copy_test_says`, a sentence; `num_samples`. The details, for figures:
        `sample_distances` (N,) and `test_distances` (M,) to the nearest training image, and `tissue`, a dict of the
        `tissue_statistics` of "samples", "test" and "validate".
    """
    train, validate, test = (splits[name] for name in ("train", "validate", "test"))
    groups = {"samples": samples, "test": test.images, "validate": validate.images}
    features = {name: space.transform(images) for name, images in groups.items()}
    tissue = {name: tissue_statistics(images) for name, images in groups.items()}
    measured = {"num_samples": len(samples)}
    for suffix, name in (("", "samples"), ("_floor", "validate")):
        density, coverage = density_and_coverage(features["test"], features[name])
        measured |= {f"frechet{suffix}": frechet_distance(features["test"], features[name]),
                     f"kid{suffix}": kernel_distance(features["test"], features[name]),
                     f"density{suffix}": density, f"coverage{suffix}": coverage}
        for statistic in ("dark_fraction", "symmetry"):
            values = tissue[name][statistic], tissue["test"][statistic]
            measured[f"{statistic}_ks{suffix}"] = float(stats.ks_2samp(*values).statistic)
    measured["ms_ssim_samples"] = mean_pairwise_ms_ssim(samples / 255, positions, np.arange(len(samples)))
    measured["ms_ssim_real"] = mean_pairwise_ms_ssim(test.images / 255, test.positions, test.cases)
    neighbours = Neighbours(train.images, space.transform)
    distances, test_distances = (neighbours.nearest(images).distances for images in (samples, test.images))
    measured |= {"nearest_samples": float(np.median(distances)), "nearest_real": float(np.median(test_distances)),
                 "copy_test": copy_test(distances, positions, test_distances, test.positions)}
    measured["copy_test_says"] = say_copy_test(measured)
    return measured, {"sample_distances": distances, "test_distances": test_distances, "tissue": tissue}


def say_copy_test(measured, what="Samples"):
    """What the copy test says in words, from `copy_test`, `nearest_samples`, `nearest_real` and, if there, its interval."""
    score = measured["copy_test"]
    interval = "; 95 % interval {:.1f} to {:.1f}".format(*measured["copy_test_interval"]) if "copy_test_interval" in measured else ""
    verdict = ("nearer to the training people than new people do: copies, or all near to the average" if score < -3 else
               "somewhat nearer to the training people than new people do" if score < -1 else
               "about as near to the training people as new people do: no sign of copying" if score <= 1 else
               "further from the training people than new people do: no copies, but not quite where people are")
    return (f"{what} lie {verdict} (C_T = {score:.1f}{interval}; median distance {measured['nearest_samples']:.2f}, of test people "
            f"{measured['nearest_real']:.2f}).")


def with_interval(name, statistic, *groups, limits=(-np.inf, np.inf)):
    """A figure and its 95 % interval: the basic (pivotal) bootstrap over draws of people, with replacement, from each group.

    Args:
        name: of the figure.
        statistic: a function from as many arrays as there are groups to a float; faster if it takes an `axis`.
        groups: (N,), a value per person each.
        limits: what the figure can be at least and at most; the interval is cut off there.

    Returns:
        A dict of `name`, a float, and `NAME_interval`, (low, high); without the interval if a group has a single person.

    References:
        Davison, Hinkley: Bootstrap Methods and their Application, 1997, section 5.2.1.
    """
    value = {name: float(statistic(*groups))}
    if min(map(len, groups)) < 2:
        return value
    resampled = stats.bootstrap(groups, statistic, n_resamples=RESAMPLES, method="basic", random_state=0)
    return value | {f"{name}_interval": np.clip(resampled.confidence_interval, *limits).tolist()}

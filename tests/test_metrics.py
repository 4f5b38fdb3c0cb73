"""Quality of images beside formulas, baselines, code use, and code lengths counted by hand."""

import contextlib
import tracemalloc

import numpy as np
import pytest
from scipy import ndimage
import tensorflow as tf

import dataset
from support import metrics
from support.images import neighbours


@pytest.fixture
def pair():
    rng = np.random.default_rng(1)
    original = ndimage.gaussian_filter(rng.random((40, 36)), 1.5)
    original = np.pad((original - original.min()) / np.ptp(original) * 0.8 + 0.1, 6)
    return original, np.clip(original + rng.normal(0, 0.05, original.shape), 0, 1)


def test_ssim_is_the_published_formula_over_7x7_windows(pair):
    x, y = pair
    data_range = x.max() - x.min()
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    values = []
    for row, column in np.ndindex(x.shape[0] - 6, x.shape[1] - 6):
        a, b = (image[row:row + 7, column:column + 7].ravel() for image in (x, y))
        (va, cov), (_, vb) = np.cov(a, b)  # of the sample, as scikit-image's default
        ma, mb = a.mean(), b.mean()
        values.append((2 * ma * mb + c1) * (2 * cov + c2) / ((ma ** 2 + mb ** 2 + c1) * (va + vb + c2)))
    assert metrics.ssim(x, y) == pytest.approx(np.mean(values), abs=1e-9)
    assert metrics.ssim(255 * x, 255 * y) == pytest.approx(metrics.ssim(x, y))  # on any scale


def test_gaussian_ssim_is_wang_2004_and_its_foreground_the_brain(pair):
    def blur(image):
        return ndimage.gaussian_filter(image, 1.5, truncate=3.5)
    x, y = pair
    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx ** 2, blur(y * y) - my ** 2, blur(x * y) - mx * my
    ssim_map = (2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx ** 2 + my ** 2 + 1e-4) * (vx + vy + 9e-4))
    mean, foreground = metrics.ssim_gaussian(x, y)
    assert mean == pytest.approx(ssim_map[5:-5, 5:-5].mean(), abs=1e-9)
    assert foreground == pytest.approx(ssim_map[x > 0.03].mean(), abs=1e-9)


def test_reconstruction_metrics_are_means_over_images(pair):
    x, y = pair
    both = metrics.reconstruction_metrics(np.stack([x, x]), np.stack([y, x]))
    assert both["mse"] == pytest.approx(np.mean((x - y) ** 2) / 2)
    assert both["psnr"] == pytest.approx((-10 * np.log10(np.mean((x - y) ** 2)) + 100) / 2)
    assert both["ssim"] == pytest.approx((metrics.ssim(x, y) + 1) / 2)
    assert both["num_images"] == 2
    black = np.zeros((20, 20))
    assert metrics.image_quality(black, black) == (1, 1, 1, 100, 0)


def test_baselines_are_the_mean_and_the_blurred_image_and_take_images_one_by_one(tmp_path):
    rng = np.random.default_rng(0)
    train, test = (rng.integers(0, 256, (count, 48, 48), np.uint8) for count in (3000, 120))
    np.save(tmp_path / "train.npy", train)
    mapped = np.load(tmp_path / "train.npy", mmap_mode="r")  # what --cache-dir gives
    metrics.baselines(mapped[:2], test[:2])  # what is imported at the first call does not count
    tracemalloc.start()
    measured = metrics.baselines(mapped, test)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < test.nbytes * 8 / 2  # half of the test images as floats; the training images would be 55 MB
    originals = test / 255
    mean = np.broadcast_to(np.sum(train, axis=0, dtype=int) / 3000 / 255, originals.shape)
    blurred = ndimage.gaussian_filter(originals, (0, 48 / 128, 48 / 128))
    assert measured == {"mean_image": metrics.reconstruction_metrics(originals, mean),
                        "blurred_original": metrics.reconstruction_metrics(originals, blurred)}


def test_code_metrics():
    assert metrics.code_metrics([[0, 1], [2, 3]], 8) == {"code_entropy": 2, "perplexity": 4, "codes_used": 4}
    share = np.array([0.5, 0.25, 0.25])
    measured = metrics.code_metrics([7, 7, 7, 7, 1, 1, 2, 2], 8)
    assert measured["perplexity"] == pytest.approx(np.prod(share ** -share))


class Halves:
    """In place of both networks: image quarters are bright, code 1, for 3 bits, or dark, code 0, for 1.

    The slices right below and above add a tenth of theirs.
    """

    grid_size, num_embeddings, sees_neighbours = 2, 4, True
    full_float32 = staticmethod(contextlib.nullcontext)

    def decode_codes(self, codes, *around):
        bright = sum((0.1 * tf.cast(other, tf.float32) for other in around), 0.8 * tf.cast(codes, tf.float32))
        return tf.repeat(tf.repeat(2 * bright[..., tf.newaxis] - 1, 8, 1), 8, 2)

    def distribution(self, codes, positions, below=None, person=None):
        """A bit more at each position, two less for each slice below, one less for a person of ones."""
        assert codes.dtype == tf.int32
        shift = tf.cast(positions, tf.float32)
        if below is not None:
            assert below.dtype == tf.int32
            shift -= 2 * tf.reduce_sum(tf.cast(below[:, :, 0, 0] < self.num_embeddings, tf.float32), axis=1)
        if person is not None:
            shift -= tf.reduce_mean(person, axis=1)
        class Distribution:
            def log_prob(self, values):
                return -np.log(2) * (1.0 + 2 * tf.cast(values, tf.float32) + shift[:, tf.newaxis, tf.newaxis])
        return Distribution()


@pytest.fixture
def halves_coded():
    """70 images, seven slices of ten people, their codes for `Halves`, and code lengths by hand."""
    images = np.float32(np.random.default_rng(0).uniform(-1, 1, (70, 16, 16, 1)))
    codes = np.uint16(images[..., 0].reshape(70, 2, 8, 2, 8).mean(axis=(2, 4)) > 0)
    positions, cases = np.tile(np.arange(7, dtype=np.int32), 10), np.repeat(np.arange(10), 7)
    context = np.stack([np.where(positions >= step, np.arange(70) - step, 70) for step in (1, 3)], axis=1)
    persons = np.repeat(np.float32(cases[:, np.newaxis] % 2), 3, axis=1)
    other = 1 - codes  # a second version, which is not measured
    persons = np.stack([persons, 9 + persons])
    coded = dataset.CodedSplit(np.stack([codes, other]), positions, context, persons,
                               neighbours(cases, positions), np.zeros((4, 3), np.int32))
    alone = 1 + 2.0 * codes + positions[:, np.newaxis, np.newaxis]
    below = np.minimum(positions, 1) + (positions >= 3)
    return images, cases, coded, alone, alone - (2 * below + cases % 2)[:, np.newaxis, np.newaxis]


def test_code_lengths_are_those_of_version_0_in_any_order(halves_coded):
    _, _, coded, _, in_head = halves_coded
    indices = np.array([69, 3, 3, 0])
    np.testing.assert_allclose(metrics.bits_per_place(Halves(), coded, indices), in_head[indices], rtol=1e-6)
    lengths = metrics.code_lengths_of_heads(Halves(), coded, np.arange(70).reshape(10, 7)[::3])
    np.testing.assert_allclose(lengths, in_head.reshape(10, -1).mean(axis=1)[::3], rtol=1e-6)


def test_evaluate_measures_what_comes_back_through_the_codes(halves_coded):
    images, cases, coded, alone, conditional = halves_coded
    batches = [(images[i:i + 32], None) for i in range(0, 70, 32)]  # the last one is short
    measured, details = metrics.evaluate(Halves(), Halves(), batches, coded, cases)
    originals, (below, above) = (images[..., 0].astype(float) + 1) / 2, coded.neighbours
    bright = np.stack([coded.codes[0], coded.codes[0][below], coded.codes[0][above]]).astype(float)
    alone_expected, expected = (np.tensordot(shares, bright, 1).repeat(8, 1).repeat(8, 2)
                                for shares in ((0.8, 0, 0), (0.8, 0.1, 0.1)))
    qualities = np.array([metrics.image_quality(*pair) for pair in zip(originals, expected)])
    rows = dict(zip(metrics.QUALITY, qualities.T))
    lengths = conditional.mean(axis=(1, 2))
    for name, values in details["per_image"].items():
        np.testing.assert_allclose(values, {**rows, "bits_per_code": lengths}[name], rtol=1e-5)
    assert list(details["per_image"]) == ["ssim", "ssim_foreground", "psnr", "bits_per_code"]
    np.testing.assert_allclose(details["error_map"], np.abs(originals - expected).mean(axis=0), rtol=1e-5)
    bits = lengths.mean() + 3 * 8 / (7 * 4)  # with the person's, three numbers of 8 bits for seven slices
    spread = {f"{name}_sd": row.reshape(10, 7).mean(axis=1).std(ddof=1)
              for name, row in {**rows, "bits_per_code": lengths}.items()}
    by_themselves = metrics.reconstruction_metrics(originals, alone_expected)
    assert measured == pytest.approx({
        **metrics.reconstruction_metrics(originals, expected), **metrics.code_metrics(coded.codes[0], 4),
        **{f"{name}_alone": by_themselves[name] for name in metrics.QUALITY},
        **spread, "bits_per_code": bits, "bits_per_code_alone": alone.mean(),
        "bytes_per_image": bits * 4 / 8}, rel=1e-5)
    single, _ = metrics.evaluate(Halves(), Halves(), batches, coded, np.zeros(70, int))
    assert single.keys() == measured.keys() - spread.keys()
    assert single["bits_per_code"] == pytest.approx(lengths.mean() + 3 * 8 / (70 * 4))  # one to be paid for

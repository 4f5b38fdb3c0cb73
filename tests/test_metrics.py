import numpy as np
import pytest
from scipy import ndimage
from skimage.metrics import structural_similarity
import tensorflow as tf

import dataset
from support import judge, metrics
from support.images import in_chunks


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
    for row in range(x.shape[0] - 6):
        for column in range(x.shape[1] - 6):
            a, b = x[row:row + 7, column:column + 7].ravel(), y[row:row + 7, column:column + 7].ravel()
            covariance = np.cov(a, b)  # sample covariance, as scikit-image's default
            values.append((2 * a.mean() * b.mean() + c1) * (2 * covariance[0, 1] + c2)
                          / ((a.mean() ** 2 + b.mean() ** 2 + c1) * (covariance[0, 0] + covariance[1, 1] + c2)))
    assert metrics.ssim(x, y) == pytest.approx(np.mean(values), abs=1e-9)
    assert metrics.ssim(x, y) == pytest.approx(structural_similarity(x, y, data_range=data_range))


def test_ssim_does_not_depend_on_the_scale(pair):
    x, y = pair
    assert metrics.ssim(255 * x, 255 * y) == pytest.approx(metrics.ssim(x, y))
    assert metrics.ssim(x, x) == pytest.approx(1)


def test_gaussian_ssim_is_wang_2004_and_its_foreground_the_brain(pair):
    x, y = pair
    def blur(image):
        return ndimage.gaussian_filter(image, 1.5, truncate=3.5)
    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx ** 2, blur(y * y) - my ** 2, blur(x * y) - mx * my
    ssim_map = ((2 * mx * my + 1e-4) * (2 * cov + 9e-4)) / ((mx ** 2 + my ** 2 + 1e-4) * (vx + vy + 9e-4))
    mean, foreground = metrics.ssim_gaussian(x, y)
    assert mean == pytest.approx(ssim_map[5:-5, 5:-5].mean(), abs=1e-9)
    assert foreground == pytest.approx(ssim_map[x > 0.03].mean(), abs=1e-9)
    assert metrics.ssim_gaussian(x, 3 * y - 1) == metrics.ssim_gaussian(x, np.clip(3 * y - 1, 0, 1))


def test_constant_and_black_images_have_numbers():
    black = np.zeros((20, 20))
    assert metrics.ssim(black, black) == 1
    assert metrics.ssim_gaussian(black, black) == (1, 1)
    assert metrics.reconstruction_metrics([black], [black])["psnr"] == 100


def test_reconstruction_metrics_are_means_over_images(pair):
    x, y = pair
    both = metrics.reconstruction_metrics(np.stack([x, x]), np.stack([y, x]))
    assert both["mse"] == pytest.approx(np.mean((x - y) ** 2) / 2)
    assert both["psnr"] == pytest.approx((-10 * np.log10(np.mean((x - y) ** 2)) + 100) / 2)
    assert both["ssim"] == pytest.approx((metrics.ssim(x, y) + 1) / 2)
    assert both["num_images"] == 2
    for error, psnr in ((2e-5, 20 * np.log10(1 / 2e-5)), (0.5e-5, 100)):  # below 1e-10 of MSE, an image counts as exact
        assert metrics.reconstruction_metrics([x], [x + error])["psnr"] == pytest.approx(psnr)


def test_code_metrics():
    measured = metrics.code_metrics([[0, 1], [2, 3]], 8)
    assert measured == {"code_entropy": 2, "perplexity": 4, "codes_used": 4}
    share = np.array([0.5, 0.25, 0.25])
    measured = metrics.code_metrics([7, 7, 7, 7, 1, 1, 2, 2], 8)
    assert measured["perplexity"] == pytest.approx(np.prod(share ** -share))


def test_chunks_are_joined_in_order():
    numbers, sizes = np.arange(70), []
    def add(first, second):
        sizes.append(len(first))
        return tf.constant(first + second)
    np.testing.assert_array_equal(in_chunks(add, numbers, 2 * numbers), 3 * numbers)
    assert sizes == [32, 32, 6]


class Halves:
    """In place of both networks: a quarter of an image is bright, code 1, or dark, code 0, for 3 bits or 1."""

    grid_size, num_embeddings = 2, 4

    def decode_codes(self, codes):
        return tf.repeat(tf.repeat(2.0 * tf.cast(codes, tf.float32)[..., tf.newaxis] - 1, 8, 1), 8, 2)

    def distribution(self, codes, positions, below=None, person=None):
        """A bit more at each position; two bits less for each slice below that is there, one less for a person of ones."""
        shift = tf.cast(positions, tf.float32)
        if below is not None:
            shift -= 2 * tf.reduce_sum(tf.cast(below[:, :, 0, 0] < self.num_embeddings, tf.float32), axis=1)
        if person is not None:
            shift -= tf.reduce_mean(person, axis=1)

        class Distribution:
            def log_prob(self, values):
                return -np.log(2) * (1.0 + 2 * tf.cast(values, tf.float32) + shift[:, tf.newaxis, tf.newaxis])

        return Distribution()


@pytest.fixture
def halves_coded():
    """70 images of ten people, seven slices each, the codes that `Halves` decodes, and their code lengths by hand."""
    images = np.float32(np.random.default_rng(0).uniform(-1, 1, (70, 16, 16, 1)))
    codes = np.int32(images[..., 0].reshape(70, 2, 8, 2, 8).mean(axis=(2, 4)) > 0)
    positions, cases = np.tile(np.arange(7, dtype=np.int32), 10), np.repeat(np.arange(10), 7)
    indices = np.arange(70)
    context = np.stack([np.where(positions >= step, indices - step, 70) for step in (1, 3)], axis=1)
    persons = np.repeat(np.float32(cases[:, np.newaxis] % 2), 3, axis=1)
    other = 1 - codes  # a second version, which is not measured
    coded = dataset.CodedSplit(np.stack([codes, other]), positions, context, np.stack([persons, 9 + persons]), 4)
    alone = 1 + 2 * codes + positions[:, np.newaxis, np.newaxis]
    below = np.minimum(positions, 1) + (positions >= 3)
    return images, cases, coded, alone, alone - (2 * below + cases % 2)[:, np.newaxis, np.newaxis]


def test_code_lengths_are_those_of_version_0_with_its_context_or_without(halves_coded):
    _, _, coded, alone, conditional = halves_coded
    indices = np.array([69, 3, 3, 0])
    networks = Halves()
    np.testing.assert_allclose(metrics.bits_per_place(networks, coded, indices), conditional[indices], rtol=1e-6)
    np.testing.assert_allclose(metrics.bits_per_place(networks, coded, indices, conditional=False), alone[indices], rtol=1e-6)
    np.testing.assert_allclose(metrics.code_lengths(networks, coded), conditional.mean(axis=(1, 2)), rtol=1e-6)
    np.testing.assert_allclose(metrics.code_lengths(networks, coded, conditional=False), alone.mean(axis=(1, 2)), rtol=1e-6)
    slices_of_heads = np.arange(70).reshape(10, 7)
    expected = conditional.mean(axis=(1, 2))[slices_of_heads].mean(axis=1)
    np.testing.assert_allclose(metrics.code_lengths_of_heads(networks, coded, slices_of_heads, 40), expected, rtol=1e-6)
    four_heads = metrics.code_lengths_of_heads(networks, coded, slices_of_heads, 4)
    np.testing.assert_allclose(four_heads, expected[[0, 3, 6, 9]], rtol=1e-6)
    paid = 3 * 8 / (7 * 4)  # three numbers of 8 bits for each head's seven slices of four codes
    assert metrics.person_bits_per_code(coded) == pytest.approx(paid)


def test_evaluate_measures_what_comes_back_through_the_codes(halves_coded):
    images, cases, coded, alone, conditional = halves_coded
    batches = [(images[i:i + 32], None) for i in range(0, 70, 32)]  # the last one is short
    measured, details = metrics.evaluate(Halves(), Halves(), batches, coded, cases)
    originals, expected = (images[..., 0].astype(float) + 1) / 2, coded.codes[0].repeat(8, 1).repeat(8, 2)
    rows = dict(zip(metrics.QUALITY, np.array([metrics.image_quality(*pair) for pair in zip(originals, expected)]).T))
    lengths = conditional.mean(axis=(1, 2))
    for name in ("ssim", "ssim_foreground", "psnr"):
        np.testing.assert_allclose(details["per_image"][name], rows[name])
    np.testing.assert_allclose(details["per_image"]["bits_per_code"], lengths, rtol=1e-6)
    np.testing.assert_allclose(details["error_map"], np.abs(originals - expected).mean(axis=0))
    bits = lengths.mean() + 3 * 8 / (7 * 4)
    spread = {f"{name}_sd": row.reshape(10, 7).mean(axis=1).std(ddof=1)
              for name, row in {**rows, "bits_per_code": lengths}.items()}
    assert measured == pytest.approx({
        **metrics.reconstruction_metrics(originals, expected), **metrics.code_metrics(coded.codes[0], 4), **spread,
        "bits_per_code": bits, "bits_per_code_alone": alone.mean(), "bytes_per_image": bits * 4 / 8}, rel=1e-5)
    single, _ = metrics.evaluate(Halves(), Halves(), batches, coded, np.zeros(70, int))
    assert single == {name: value for name, value in measured.items() if name not in spread}


# Samples


@pytest.fixture
def two_sets():
    rng = np.random.default_rng(3)
    return rng.normal(size=(40, 5)), rng.normal(0.5, 1.5, size=(30, 5))


def test_tissue_statistics_of_drawn_heads():
    y, x = np.mgrid[-1:1:201j, -1:1:201j]
    head = np.where(np.hypot(x / 0.505, y / 0.705) < 1, 0.8, 0)
    ventricles = np.hypot(x / 0.105, y / 0.205) < 1
    with_ventricles = np.where(ventricles, 0.01, head)
    lopsided = with_ventricles * (1 - 0.5 * (x > 0) * (y > 0))
    measured = judge.tissue_statistics(np.stack([head, with_ventricles, lopsided, 0 * head]))
    area = np.pi * 0.505 * 0.705 / 4
    np.testing.assert_allclose(measured["brain_area"], [area, area, area, 0], rtol=0.02)
    # All of the ventricles lie in the deep half.
    np.testing.assert_allclose(measured["dark_fraction"][:2], [0, np.pi * 0.105 * 0.205 / 4 / (area / 2)], rtol=0.05)
    assert measured["symmetry"][1] == pytest.approx(1) and measured["symmetry"][2] < 0.9
    assert measured["symmetry"][3] == 0
    outline = head > 0
    expected = np.corrcoef(lopsided[outline], lopsided[:, ::-1][outline])[0, 1]
    assert measured["symmetry"][2] == pytest.approx(expected, abs=1e-6)
    assert measured["symmetry"][0] == 1  # a head without any contrast
    aside = np.roll(lopsided, 40, axis=1)
    aside[:3, :3] = 1.0  # and a bright speck, which is no brain
    for name, value in judge.tissue_statistics(aside[np.newaxis]).items():
        assert value[0] == pytest.approx(measured[name][2], abs=1e-6)
    # Darker than half the median is dark; what is not deep does not count.
    depth = ndimage.distance_transform_edt(outline)
    rim, half = np.where(outline & (depth < np.median(depth[outline])), 0.05, head), np.where(ventricles, 0.39, head)
    np.testing.assert_allclose(judge.tissue_statistics(np.stack([half, half + 0.02 * ventricles]))["dark_fraction"],
                               [measured["dark_fraction"][1], 0], atol=1e-9)
    assert judge.tissue_statistics(rim[np.newaxis])["dark_fraction"][0] == 0


def test_nearest_is_the_nearest_or_its_mirror_image():
    rng = np.random.default_rng(0)
    pictures, train = rng.random((20, 3, 4)), rng.random((30, 3, 4))
    pictures[:2] = train[4], train[7, :, ::-1]
    between = np.array([[[np.linalg.norm(picture - other) for other in (one, one[:, ::-1])] for one in train] for picture in pictures])
    nearest = judge.Neighbours(train, lambda images: images.reshape(len(images), -1)).nearest(pictures)
    people = between.min(axis=2)
    np.testing.assert_array_equal(nearest.indices, people.argmin(axis=1))
    np.testing.assert_allclose(nearest.distances, people.min(axis=1), atol=1e-7)
    np.testing.assert_array_equal(nearest.mirrored, [between[i, k].argmin() for i, k in enumerate(nearest.indices)])
    first, second = np.sort(people, axis=1)[:, :2].T
    np.testing.assert_allclose(nearest.over_second, first / second, atol=1e-7)
    assert nearest.indices[:2].tolist() == [4, 7] and nearest.mirrored[:2].tolist() == [False, True]


@pytest.mark.parametrize("score, verdict", ((-3.1, "copies, or all near to the average"), (-3, "somewhat nearer"), (-1.1, "somewhat nearer"),
                                            (-1, "no sign"), (1, "no sign"), (1.1, "further")))
def test_the_copy_test_in_words(score, verdict):
    said = judge.say_copy_test({"copy_test": score, "nearest_samples": 1.234, "nearest_real": 5.678})
    assert verdict in said and f"C_T = {score:.1f}; median distance 1.23, of test people 5.68" in said
    said = judge.say_copy_test({"copy_test": score, "copy_test_interval": [-4, 2], "nearest_samples": 1, "nearest_real": 5})
    assert f"C_T = {score:.1f}; 95 % interval -4.0 to 2.0; median" in said


def test_intervals_are_those_of_the_normal_distribution_for_means():
    values = np.random.default_rng(0).normal(3, 2, 200)
    measured = judge.with_interval("mean", np.mean, values)
    assert measured["mean"] == pytest.approx(values.mean())
    half = 1.96 * values.std() / np.sqrt(200)
    np.testing.assert_allclose(measured["mean_interval"], [values.mean() - half, values.mean() + half], atol=0.15 * half)
    cut = judge.with_interval("mean", np.mean, values, limits=(3, np.inf))["mean_interval"]
    assert cut == [3, measured["mean_interval"][1]]
    assert judge.with_interval("mean", np.mean, values[:1]) == {"mean": values[0]}

import numpy as np
import pytest
from scipy import linalg, ndimage
from skimage.metrics import structural_similarity
import tensorflow as tf

import dataset
from support import metrics, people


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
    np.testing.assert_array_equal(metrics.in_chunks(add, numbers, 2 * numbers), 3 * numbers)
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
    coded = people.CodedSplit(np.stack([codes, other]), positions, context, np.stack([persons, 9 + persons]), 4)
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


def test_features_are_whitened_principal_components():
    rng = np.random.default_rng(0)
    patterns = rng.normal(size=(200, 5)) * [50, 30, 20, 10, 5] @ rng.normal(size=(5, 128 * 128))
    images = np.uint8((128 + 0.2 * patterns + rng.normal(0, 1, patterns.shape)).clip(0, 255)).reshape(200, 128, 128)
    space = metrics.FeatureSpace(images)
    features = space.transform(images)
    assert features.shape == (200, 64)
    np.testing.assert_allclose(np.cov(features[:, :5], rowvar=False), np.eye(5), atol=1e-3)
    shrunk = images.reshape(200, 64, 2, 64, 2).mean(axis=(2, 4)).reshape(200, -1) / 255
    left, _, _ = np.linalg.svd(shrunk - shrunk.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(np.abs(features[:, :5]), np.abs(left[:, :5] * np.sqrt(199)), atol=1e-3)
    np.testing.assert_allclose(space.transform(images[:3] / 255), features[:3], atol=1e-9)
    heads = images.reshape(25, 8, 128, 128)
    np.testing.assert_allclose(metrics.coarse(heads), heads.reshape(25, 4, 2, 64, 2, 64, 2).mean(axis=(2, 4, 6)).reshape(25, -1) / 255)
    small = images[:10, :32, :32]  # too few for 64 components, too small to be averaged
    np.testing.assert_array_equal(*(metrics.FeatureSpace(small).transform(small) for _ in range(2)))
    left, _, _ = np.linalg.svd(small.reshape(10, -1) / 255 - small.reshape(10, -1).mean(axis=0) / 255, full_matrices=False)
    assert metrics.FeatureSpace(small).transform(small).shape == (10, 9)
    np.testing.assert_allclose(np.abs(metrics.FeatureSpace(small).transform(small)[:, :5]), np.abs(left[:, :5] * 3), atol=1e-6)


def test_frechet_distance_is_its_formula(two_sets):
    a, b = two_sets
    root = linalg.sqrtm(np.cov(a.T) @ np.cov(b.T))
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root.real)
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    one, other = a[:, :1], b[:, :1]  # in one dimension: squared differences of means and of standard deviations
    expected = (one.mean() - other.mean()) ** 2 + (one.std(ddof=1) - other.std(ddof=1)) ** 2
    assert metrics.frechet_distance(one, other) == pytest.approx(expected, rel=1e-9)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_kernel_distance_is_the_unbiased_sum_over_pairs(two_sets):
    a, b = two_sets
    def mean(first, second, skip_same):
        values = [(x @ y / 5 + 1) ** 3 for i, x in enumerate(first) for j, y in enumerate(second) if not (skip_same and i == j)]
        return np.mean(values)
    assert metrics.kernel_distance(a, b) == pytest.approx(mean(a, a, True) + mean(b, b, True) - 2 * mean(a, b, False))


def test_density_and_coverage_are_counts_over_balls(two_sets):
    real, fake = two_sets
    inside = np.zeros((len(real), len(fake)), bool)
    for i, centre in enumerate(real):
        radius = np.sort([np.linalg.norm(centre - other) for other in real])[5]  # 0 is the point itself
        inside[i] = [np.linalg.norm(centre - point) < radius for point in fake]
    density, coverage = metrics.density_and_coverage(real, fake)
    assert 0 < coverage < 1
    assert density == pytest.approx(inside.sum() / (5 * len(fake)))
    assert coverage == pytest.approx(inside.any(axis=1).mean())
    assert metrics.density_and_coverage(real, real + 0.0, k=1)[1] == 1  # every real point lies in its own ball
    assert metrics.density_and_coverage(real, fake, k=39)[1] > coverage


def test_ms_ssim_at_one_scale_is_scikit_images_ssim_and_drops_with_noise():
    rng = np.random.default_rng(0)
    a = ndimage.gaussian_filter(rng.random((3, 21, 21)), (0, 1, 1))
    b = np.clip(a + rng.normal(0, 0.03, a.shape), 0, 1)
    expected = [structural_similarity(*pair, data_range=1.0, gaussian_weights=True, use_sample_covariance=False)
                for pair in zip(a, b)]
    np.testing.assert_allclose(metrics.ms_ssim(a, b), expected, atol=1e-4)
    many = ndimage.gaussian_filter(rng.random((20, 44, 30)), (0, 1, 1))  # two scales, and more than one batch
    noisy = np.float32(many + rng.normal(0, 0.05, many.shape))
    weights = [0.0448 / (0.0448 + 0.2856), 0.2856 / (0.0448 + 0.2856)]
    expected = tf.image.ssim_multiscale(np.float32(many)[..., np.newaxis], noisy[..., np.newaxis], 1.0, weights)
    np.testing.assert_allclose(metrics.ms_ssim(many, noisy), expected, atol=1e-5)
    large = ndimage.gaussian_filter(rng.random((1, 256, 256)), (0, 3, 3))
    values = [metrics.ms_ssim(large, large + noise * rng.normal(size=large.shape))[0] for noise in (0, 0.05, 0.2)]
    expected = tf.image.ssim_multiscale(*(np.float32(image)[..., np.newaxis] for image in (large, large + 0.1)), 1.0)  # all five
    assert metrics.ms_ssim(large, large + 0.1)[0] == pytest.approx(float(expected[0]), abs=1e-4)
    assert values[0] == pytest.approx(1, abs=1e-5) and values[0] > values[1] > values[2]


def test_pairwise_ms_ssim_compares_different_people_at_one_position():
    rng = np.random.default_rng(0)
    two = rng.random((2, 24, 24))
    images = np.stack([two[0], two[1], two[0], two[0], two[0]])
    positions, cases = np.array([0, 0, 1, 1, 2]), np.array([7, 8, 7, 8, 7])
    expected = (metrics.ms_ssim(two[:1], two[1:])[0] + 1) / 2
    assert metrics.mean_pairwise_ms_ssim(images, positions, cases) == pytest.approx(expected, abs=1e-6)
    assert np.isnan(metrics.mean_pairwise_ms_ssim(images, np.arange(5), cases))


def test_pairwise_ms_ssim_draws_ten_pairs_per_position(monkeypatch):
    compared = []
    monkeypatch.setattr(metrics, "ms_ssim", lambda a, b: compared.extend(zip(a[:, 0, 0], b[:, 0, 0])) or np.zeros(len(a)))
    images = np.arange(33)[:, np.newaxis, np.newaxis] * np.ones((1, 2, 2))
    cases, positions = np.arange(33) % 11, np.arange(33) // 11  # three positions of eleven people
    for seed in (0, 0, 1):
        metrics.mean_pairwise_ms_ssim(images, positions, cases, seed)
    first, second, other = (compared[i:i + 30] for i in (0, 30, 60))
    assert first == second != other and len(compared) == 90 and len({frozenset(pair) for pair in first}) == 30
    assert all(a // 11 == b // 11 and a != b for a, b in compared)


def test_tissue_statistics_of_drawn_heads():
    y, x = np.mgrid[-1:1:201j, -1:1:201j]
    head = np.where(np.hypot(x / 0.505, y / 0.705) < 1, 0.8, 0)
    ventricles = np.hypot(x / 0.105, y / 0.205) < 1
    with_ventricles = np.where(ventricles, 0.01, head)
    lopsided = with_ventricles * (1 - 0.5 * (x > 0) * (y > 0))
    measured = metrics.tissue_statistics(np.stack([head, with_ventricles, lopsided, 0 * head]))
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
    for name, value in metrics.tissue_statistics(aside[np.newaxis]).items():
        assert value[0] == pytest.approx(measured[name][2], abs=1e-6)
    # Darker than half the median is dark; what is not deep does not count.
    depth = ndimage.distance_transform_edt(outline)
    rim, half = np.where(outline & (depth < np.median(depth[outline])), 0.05, head), np.where(ventricles, 0.39, head)
    np.testing.assert_allclose(metrics.tissue_statistics(np.stack([half, half + 0.02 * ventricles]))["dark_fraction"],
                               [measured["dark_fraction"][1], 0], atol=1e-9)
    assert metrics.tissue_statistics(rim[np.newaxis])["dark_fraction"][0] == 0


def test_nearest_is_the_nearest_or_its_mirror_image():
    rng = np.random.default_rng(0)
    pictures, train = rng.random((20, 3, 4)), rng.random((30, 3, 4))
    pictures[:2] = train[4], train[7, :, ::-1]
    between = np.array([[[np.linalg.norm(picture - other) for other in (one, one[:, ::-1])] for one in train] for picture in pictures])
    nearest = metrics.Neighbours(train, lambda images: images.reshape(len(images), -1)).nearest(pictures)
    people = between.min(axis=2)
    np.testing.assert_array_equal(nearest.indices, people.argmin(axis=1))
    np.testing.assert_allclose(nearest.distances, people.min(axis=1), atol=1e-7)
    np.testing.assert_array_equal(nearest.mirrored, [between[i, k].argmin() for i, k in enumerate(nearest.indices)])
    first, second = np.sort(people, axis=1)[:, :2].T
    np.testing.assert_allclose(nearest.over_second, first / second, atol=1e-7)
    assert nearest.indices[:2].tolist() == [4, 7] and nearest.mirrored[:2].tolist() == [False, True]


def test_copy_test_is_the_mean_z_score_of_u_and_finds_copies():
    rng = np.random.default_rng(0)
    positions = np.repeat(np.arange(4), 20)
    real = rng.normal(5, 1, 80)
    def by_hand(samples):
        scores = []
        for position in range(4):
            a, b = samples[positions == position], real[positions == position]
            u = sum(x > y for x in a for y in b)
            scores.append((u - 200) / np.sqrt(400 * 41 / 12))
        return np.mean(scores)
    for samples in (rng.normal(5, 1, 80), 0.1 * real, real + 9):
        assert metrics.copy_test(samples, positions, real, positions) == pytest.approx(by_hand(samples))
    assert metrics.copy_test(0.1 * real, positions, real, positions) < -3 < metrics.copy_test(real, positions, real, positions)
    assert np.isnan(metrics.copy_test(real, positions, real, positions + 9))
    near, far = np.full(20, -99.0), np.full(20, 99.0)  # copies at position 0, strangers at position 1; 5 and 15 held-out images
    samples, held_out = np.concatenate([near, far]), rng.normal(5, 1, 20)
    scores = [(u - 20 * n / 2) / np.sqrt(20 * n * (20 + n + 1) / 12) for u, n in ((0, 5), (20 * 15, 15))]
    score = metrics.copy_test(samples, np.repeat([0, 1], 20), held_out, np.repeat([0, 1], (5, 15)))
    assert score == pytest.approx((5 * scores[0] + 15 * scores[1]) / 20)


@pytest.mark.parametrize("score, verdict", ((-3.1, "copies, or all near to the average"), (-3, "somewhat nearer"), (-1.1, "somewhat nearer"),
                                            (-1, "no sign"), (1, "no sign"), (1.1, "further")))
def test_the_copy_test_in_words(score, verdict):
    said = metrics.say_copy_test({"copy_test": score, "nearest_samples": 1.234, "nearest_real": 5.678})
    assert verdict in said and f"C_T = {score:.1f}; median distance 1.23, of test people 5.68" in said
    said = metrics.say_copy_test({"copy_test": score, "copy_test_interval": [-4, 2], "nearest_samples": 1, "nearest_real": 5})
    assert f"C_T = {score:.1f}; 95 % interval -4.0 to 2.0; median" in said


def test_copies_are_told_from_new_people():
    rng = np.random.default_rng(0)
    def people(count):
        heads = ndimage.gaussian_filter(rng.random((8 * count, 64, 64)), (0, 6, 6))
        images = np.uint8(255 * (heads - heads.min()) / np.ptp(heads))
        return dataset.Split("", images, np.repeat(np.arange(count), 8), np.tile(np.arange(8), count))
    splits = {"train": people(30), "validate": people(8), "test": people(8)}
    space = metrics.FeatureSpace(splits["train"].images)
    positions = np.tile(np.arange(8), 8)
    copies, _ = metrics.evaluate_samples(splits["train"].images[:64], positions, splits, space)
    new, details = metrics.evaluate_samples(people(8).images, positions, splits, space)
    assert copies["copy_test"] < -3 and "copies" in copies["copy_test_says"] and copies["nearest_samples"] < 1e-6
    assert abs(new["copy_test"]) < 1 and "no sign of copying" in new["copy_test_says"]
    assert 0.5 < new["frechet"] / new["frechet_floor"] < 2
    assert new["nearest_samples"] == np.median(details["sample_distances"])
    assert new["nearest_real"] == np.median(details["test_distances"]) and new["num_samples"] == 64
    real, floor = (space.transform(splits[name].images) for name in ("test", "validate"))
    assert new["frechet_floor"] == metrics.frechet_distance(real, floor)
    assert new["kid_floor"] == metrics.kernel_distance(real, floor)
    assert (new["density_floor"], new["coverage_floor"]) == metrics.density_and_coverage(real, floor)
    for name, values in metrics.tissue_statistics(splits["test"].images / 255).items():
        np.testing.assert_array_equal(details["tissue"]["test"][name], values)
        samples = details["tissue"]["samples"][name]
        below = [abs((samples <= value).mean() - (values <= value).mean()) for value in (*samples, *values)]
        if name != "brain_area":
            assert new[f"{name}_ks"] == pytest.approx(max(below))
    dark, _ = metrics.evaluate_samples(np.uint8(0.3 * people(8).images), positions, splits, space)
    assert dark["frechet"] > 3 * dark["frechet_floor"] and dark["kid"] > new["kid"] and dark["coverage"] == 0


def test_intervals_are_those_of_the_normal_distribution_for_means():
    values = np.random.default_rng(0).normal(3, 2, 200)
    measured = metrics.with_interval("mean", np.mean, values)
    assert measured["mean"] == pytest.approx(values.mean())
    half = 1.96 * values.std() / np.sqrt(200)
    np.testing.assert_allclose(measured["mean_interval"], [values.mean() - half, values.mean() + half], atol=0.15 * half)
    cut = metrics.with_interval("mean", np.mean, values, limits=(3, np.inf))["mean_interval"]
    assert cut == [3, measured["mean_interval"][1]]
    assert metrics.with_interval("mean", np.mean, values[:1]) == {"mean": values[0]}

import numpy as np
import pytest
from scipy import ndimage
from skimage.metrics import structural_similarity

import metrics


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


def test_code_metrics():
    measured = metrics.code_metrics([[0, 1], [2, 3]], 8)
    assert measured == {"code_entropy": 2, "perplexity": 4, "codes_used": 4}
    share = np.array([0.5, 0.25, 0.25])
    measured = metrics.code_metrics([7, 7, 7, 7, 1, 1, 2, 2], 8)
    assert measured["perplexity"] == pytest.approx(np.prod(share ** -share))

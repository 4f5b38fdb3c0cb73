"""What benchmarks/codecs.py says of the model's side, and how it spends a codec's bytes."""

import math

import keras
from matplotlib.axes import Axes
import numpy as np
import pytest
import tensorflow as tf

from benchmarks import codecs
import dataset
import modules


@pytest.fixture
def models():
    keras.utils.set_random_seed(0)
    vqvae = modules.VQVAE(image_size=32, num_embeddings=16, embedding_dim=4)
    prior = modules.PixelCNN(4, 16, 6, num_filters=8, num_layers=3)
    rng = np.random.default_rng(0)
    for model in (vqvae, prior):  # no layer that starts at 0 stays there
        model.set_weights([weight + rng.normal(0, 0.3, weight.shape) for weight in model.get_weights()])
    return vqvae, prior, rng.integers(0, 256, (2, 6, 32, 32), np.uint8), np.float32(rng.normal(size=(2, prior.settings["person_size"])))


@pytest.mark.parametrize("weight", (0, 2))
def test_codes_of_a_head_are_chosen_given_those_below_as_chosen(models, weight):
    vqvae, prior, heads, persons = models
    codes, bits = codecs.choose_heads(vqvae, prior, heads, persons, weight)
    none = np.full((2, 4, 4), 16)
    for position in range(6):
        below = np.stack([codes[:, position - step] if step <= position else none for step in prior.steps_below], axis=1)
        positions = np.full(2, position)
        vectors = vqvae.encode(dataset.normalise(heads[:, position, ..., np.newaxis])).numpy()
        squares = np.sum((vectors[..., np.newaxis, :] - vqvae.quantizer.embeddings.numpy()) ** 2, axis=-1)
        if weight:
            noise = tf.constant(-squares / (weight * squares.min(axis=-1).mean()), tf.float32)
            expected = prior.sample_by_full_forwards(positions, noise, 1.0, below, persons)
        else:
            expected = squares.argmin(axis=-1)
        np.testing.assert_array_equal(codes[:, position], expected)
        nats = -prior.log_prob(codes[:, position], positions, below, persons).numpy()
        np.testing.assert_allclose(bits[:, position], nats / math.log(2), rtol=1e-5)
    nearest, dear = codecs.choose_heads(vqvae, prior, heads, persons, 0)
    assert not weight or (bits.sum() < dear.sum() and (codes != nearest).any())


def test_largest_that_fits_is_that_of_a_search_through_all():
    sizes = [3, 3, 5, 8, 13, 13, 21]
    for limit in range(2, 25):
        best = codecs.largest_that_fits(lambda quality: (quality, sizes[quality]), range(7), limit, lambda made: made[1])
        assert best[0] == max([quality for quality in range(7) if sizes[quality] <= limit], default=0)


def test_bytes_at_an_ssim_lie_between_the_points_next_to_it():
    points = [(400, 0.98), (100, 0.95), (50, 0.9)]
    assert codecs.bytes_at(points, 0.95) == pytest.approx(100)
    assert codecs.bytes_at(points, 0.965) == pytest.approx(200)  # half-way in the logarithm
    assert codecs.bytes_at(points, 0.99) is None and codecs.bytes_at(points, 0.8) is None


def test_a_codecs_points_beaten_by_smaller_files_are_left_out(tmp_path, monkeypatch):
    plotted = {}
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, *args, label, **kwargs: plotted.setdefault(label, (x, y)))
    monkeypatch.setattr(Axes, "legend", lambda *args, **kwargs: None)
    codecs.plot_rate_distortion({"JPEG": [(300, 0.9), (100, 0.7), (200, 0.6), (400, 0.85), (500, 0.95)]}, [(50, 0.9)], (60, 0.9),
                                tmp_path / "rates.png")
    assert plotted["JPEG"] == ((100, 300, 500), (0.7, 0.9, 0.95))

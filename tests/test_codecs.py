"""What benchmarks/codecs.py says of the model's side, and how it spends a codec's bytes."""

import math

import numpy as np
import pytest
import tensorflow as tf

from benchmarks import codecs
import dataset
from support.cli import UserError
from tests.small import small_prior, small_vqvae


@pytest.fixture(scope="module")
def models():
    """Both networks, two heads of six slices, and their persons; no layer that starts at 0 stays there."""
    vqvae, rng = small_vqvae(image_size=32), np.random.default_rng(0)
    vqvae.set_weights([weight + rng.normal(0, 0.3, weight.shape) for weight in vqvae.get_weights()])
    prior = small_prior(grid_size=4, num_embeddings=16, num_positions=6)
    persons = np.float32(rng.normal(size=(2, prior.person_size)))
    return vqvae, prior, rng.integers(0, 256, (2, 6, 32, 32), np.uint8), persons


@pytest.mark.parametrize("weight", (0, 2))
def test_codes_of_a_head_are_chosen_given_those_below_as_chosen(models, weight):
    vqvae, prior, heads, persons = models
    codes, bits = codecs.choose_heads(vqvae, prior, heads, persons, weight)
    below = np.pad(codes, ((0, 0), (8, 0), (0, 0), (0, 0)), constant_values=16)
    context = np.stack([below[:, 8 - step:14 - step] for step in prior.steps_below], axis=2)
    given = prior.distribution(codes.reshape(12, 4, 4), np.tile(range(6), 2), context.reshape(12, -1, 4, 4),
                               persons.repeat(6, axis=0))
    vectors = vqvae.encode(dataset.normalise(heads.reshape(12, 32, 32, 1))).numpy()
    squares = np.sum((vectors[..., np.newaxis, :] - vqvae.quantizer.embeddings.numpy()) ** 2, axis=-1)
    squares = squares.reshape(2, 6, 4, 4, 16)
    score = -squares
    if weight:  # the logits of a code depend on those before it alone: each is chosen given them if all are
        mean = squares.min(axis=-1).mean(axis=(0, 2, 3))[:, np.newaxis, np.newaxis, np.newaxis]
        score = given.logits.numpy().reshape(squares.shape) - squares / (weight * mean)
    np.testing.assert_array_equal(codes, np.argmax(score, axis=-1))
    nats = -tf.reduce_sum(given.log_prob(codes.reshape(12, 4, 4)), axis=(1, 2))
    np.testing.assert_allclose(bits.ravel(), nats / math.log(2), rtol=1e-5)
    nearest, nearest_bits = codecs.choose_heads(vqvae, prior, heads, persons, 0)
    assert not weight or (bits.sum() < nearest_bits.sum() and (codes != nearest).any())


def test_heads_are_taken_whole_with_their_persons():
    vqvae, prior = small_vqvae(image_size=32), small_prior(grid_size=4, num_positions=32)
    heads = np.random.default_rng(1).integers(0, 256, (4, 32, 32, 32), np.uint8)
    split = dataset.Split.from_heads(heads, range(32)).take(slice(1, None))  # one lacks a slice
    pictures, _ = dataset.head_pictures(split, 0, 32)
    prior.fit_people(pictures)
    whole, persons = codecs.take_heads(split, vqvae, prior, 2)
    np.testing.assert_array_equal(whole, heads[[1, 3]])
    np.testing.assert_array_equal(persons, prior.encode_people(pictures)[[1, 3]])
    with pytest.raises(UserError, match="all slices"):
        codecs.take_heads(split.take(slice(5)), vqvae, prior, 2)


def test_the_chain_of_bytes_counts_the_same_images_in_each_link(models, monkeypatch):
    monkeypatch.setattr(codecs, "RATE_WEIGHTS", ())
    vqvae, prior, heads, persons = models
    images = np.concatenate(heads)
    slices = codecs.model_curve(vqvae, prior, images, np.tile(np.int32(prior.slice_positions), 2))
    in_heads = codecs.head_curve(vqvae, prior, heads, persons)
    chain = codecs.chain_of_bytes(vqvae, prior, images, slices, in_heads)
    assert chain["num_images"] == slices[0]["num_images"] == in_heads[0]["num_images"] == 12
    codes = vqvae.encode_to_codes(dataset.normalise(images[..., np.newaxis])).numpy()
    shares = np.unique(codes, return_counts=True)[1] / codes.size
    assert chain["pixels"] == 1024 and chain["fixed_length"] == 16 * 4 / 8
    assert chain["by_frequency"] == pytest.approx(-(shares * np.log2(shares)).sum() * 16 / 8)
    bits = -prior.log_prob(codes, np.tile(range(6), 2)).numpy() / math.log(2)
    assert chain["slice_alone"] == pytest.approx(bits.mean() / 8, rel=1e-5)
    _, bits = codecs.choose_heads(vqvae, prior, heads, persons, 0)
    assert chain["slice_in_head"] == pytest.approx((bits.mean() + 8 * prior.person_size / 6) / 8, rel=1e-5)


@pytest.mark.parametrize("codec", codecs.CODECS)
def test_a_codec_is_measured_on_every_image_within_the_bytes(codec):
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    images = np.uint8(255 * np.clip(1 - np.hypot(x, y) * [[[1.0]], [[1.5]]], 0, 1))
    row = codecs.compare(images, codec, 700, 300)
    assert row["num_images"] == 2 and row["within_limit"] == 1 and 0 < row["bytes"] <= 700
    assert row["ssim"] > 0.8 and row["psnr"] > 25
    assert codecs.compare(images, codec, 1, 0)["within_limit"] == 0


def test_largest_that_fits_is_that_of_a_search_through_all():
    made = list(enumerate([3, 3, 5, 8, 13, 13, 21]))  # (quality, size)
    for limit in range(2, 25):
        best = codecs.largest_that_fits(made.__getitem__, range(7), limit, lambda file: file[1])
        assert best == max([file for file in made if file[1] <= limit], default=made[0])


def test_bytes_at_a_quality_lie_between_the_points_next_to_it():
    rows = [{"bytes": size, "psnr": value} for size, value in ((400, 0.98), (100, 0.95), (50, 0.9))]
    assert codecs.bytes_at(rows, "psnr", 0.95) == pytest.approx(100)
    assert codecs.bytes_at(rows, "psnr", 0.965) == pytest.approx(200)  # half-way in the logarithm
    assert codecs.bytes_at(rows, "psnr", 0.99) is None and codecs.bytes_at(rows, "psnr", 0.8) is None

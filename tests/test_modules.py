import os
import subprocess
import sys
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from scipy import stats
import tensorflow as tf

import modules
import prior as prior_module
from support import devices, metrics
import train


@pytest.fixture(autouse=True)
def seeded():
    keras.utils.set_random_seed(0)


def make_quantizer(num_embeddings=6, embedding_dim=3, **kwargs):
    quantizer = modules.VectorQuantizer(num_embeddings, embedding_dim, **kwargs)
    quantizer.build((None, embedding_dim))
    quantizer.embeddings.assign(np.random.default_rng(0).normal(size=(num_embeddings, embedding_dim)))
    return quantizer


def vectors_like(shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def small_vqvae(**kwargs):
    return modules.VQVAE(**{"image_size": 64, "num_embeddings": 16, "embedding_dim": 4, "width": 8,
                            "num_residual_blocks": 1, **kwargs})


def small_prior(**kwargs):
    """A prior with random weights throughout: those that start at zero would hide mistakes."""
    prior = modules.PixelCNN(**{"grid_size": 6, "num_embeddings": 11, "num_positions": 4, "num_filters": 8,
                                "num_layers": 3, "kernel_size": 3, **kwargs})
    rng = np.random.default_rng(2)
    for weight in prior.trainable_variables:
        weight.assign(weight + rng.normal(0, 0.4, weight.shape))
    for weight in prior.head.layers[-1].trainable_variables:
        weight.assign(0.1 * weight)  # else one code takes all
    for conv in prior.known_convs[1::2]:
        for weight in conv.trainable_variables:
            weight.assign(0.02 * weight)  # else they drown the codes
    prior.start_people(rng.uniform(size=(5, prior.num_positions, 16, 16)))
    return prior


def small_context(prior, count, seed=4):
    """Slices below and persons for a batch."""
    rng, size = np.random.default_rng(seed), prior.grid_size
    below = rng.integers(0, prior.num_embeddings, (count, len(prior.steps_below), size, size), np.int32)
    return below, rng.normal(size=(count, prior.person_size)).astype(np.float32)


# Vector quantiser


def test_codes_are_the_nearest_rows():
    quantizer, vectors = make_quantizer(), vectors_like((2, 5, 4, 3))
    result = quantizer(vectors)
    codebook = quantizer.embeddings.numpy()
    expected = np.linalg.norm(vectors[..., np.newaxis, :] - codebook, axis=-1).argmin(axis=-1)
    np.testing.assert_array_equal(result["codes"], expected)
    assert result["codes"].dtype == tf.int32
    np.testing.assert_allclose(result["quantized"], codebook[expected], atol=1e-6)
    share = np.bincount(expected.ravel(), minlength=6) / expected.size
    share = share[share > 0]
    assert float(result["perplexity"]) == pytest.approx(np.prod(share ** -share), rel=1e-5)
    assert float(result["loss"]) == pytest.approx(0.25 * np.mean((vectors - codebook[expected]) ** 2), rel=1e-5)


def test_gradient_passes_straight_through_and_commits():
    quantizer, vectors = make_quantizer(commitment_cost=0.0), tf.constant(vectors_like((7, 3)))
    weights = vectors_like((7, 3), seed=5)
    with tf.GradientTape() as tape:
        tape.watch(vectors)
        loss = tf.reduce_sum(quantizer(vectors)["quantized"] * weights)
    np.testing.assert_allclose(tape.gradient(loss, vectors), weights, rtol=1e-6)
    quantizer = make_quantizer(commitment_cost=0.25)
    with tf.GradientTape() as tape:
        tape.watch(vectors)
        result = quantizer(vectors)
    nearest = quantizer.embeddings.numpy()[result["codes"]]
    np.testing.assert_allclose(tape.gradient(result["loss"], vectors), 0.25 * 2 * (vectors - nearest) / 21, rtol=1e-4, atol=1e-6)


def test_codebook_follows_its_vectors_as_a_moving_average():
    quantizer = make_quantizer(decay=0.9, restart_below=0)
    counts, sums = np.ones(6), quantizer.embeddings.numpy().astype(float)
    quantizer.sums.assign(sums)
    for step in range(4):
        vectors = vectors_like((50, 3), seed=step)
        codes = quantizer(vectors, training=True)["codes"].numpy()
        one_hot = np.eye(6)[codes]
        counts = 0.9 * counts + 0.1 * one_hot.sum(axis=0)
        sums = 0.9 * sums + 0.1 * one_hot.T @ vectors
        np.testing.assert_allclose(quantizer.embeddings, sums / counts[:, np.newaxis], rtol=1e-4)
    before = quantizer.embeddings.numpy()
    quantizer(vectors, training=False)
    np.testing.assert_array_equal(quantizer.embeddings, before)


def test_dead_codes_restart_at_vectors_of_the_batch():
    vectors, drawn = vectors_like((60, 3)), []
    for seed in (0, 0, 1):
        quantizer = make_quantizer(decay=0.5, restart_below=0.5, seed=seed)
        codebook = quantizer.embeddings.numpy()
        codebook[[2, 4]] = 1e3  # never the nearest
        quantizer.embeddings.assign(codebook)
        quantizer.sums.assign(codebook)
        now = np.bincount(quantizer(vectors, training=True)["codes"], minlength=6)
        counts = 0.5 + 0.5 * now
        dead = counts < 0.5 * counts.mean()
        assert dead[[2, 4]].all() and not dead.all()
        np.testing.assert_allclose(quantizer.counts, np.where(dead, counts.mean(), counts), rtol=1e-6)
        np.testing.assert_allclose(quantizer.sums, quantizer.embeddings * quantizer.counts[:, np.newaxis], rtol=1e-5)
        restarted = quantizer.embeddings.numpy()[dead]
        distances = np.abs(vectors - restarted[:, np.newaxis]).max(axis=-1)
        assert (distances.min(axis=1) < 1e-6).all(), "a restarted code is no vector of the batch"
        assert len(np.unique(distances.argmin(axis=1))) > 1
        drawn.append(distances.argmin(axis=1).tolist())
    assert drawn[0] == drawn[1] != drawn[2]


def test_gradient_codebook_loss_is_that_of_2017():
    quantizer, vectors = make_quantizer(decay=None), vectors_like((20, 3))
    with tf.GradientTape() as tape:
        result = quantizer(vectors, training=True)
    codes = result["codes"].numpy()
    difference = quantizer.embeddings.numpy()[codes] - vectors
    assert float(result["loss"]) == pytest.approx(1.25 * np.mean(difference ** 2), rel=1e-5)
    expected = np.eye(6)[codes].T @ (2 * difference / difference.size)
    gradient = tf.convert_to_tensor(tape.gradient(result["loss"], quantizer.trainable_variables[0]))
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-7)


def test_k_means_start_finds_the_clusters():
    centres = np.array([[0, 0, 9], [0, 9, 0], [9, 0, 0], [0, 0, -9], [0, -9, 0], [-9, 0, 0]], np.float32)
    vectors = (centres[:, np.newaxis] + 0.01 * vectors_like((6, 40, 3))).reshape(-1, 3)
    quantizer = make_quantizer()
    quantizer.fit_codebook(vectors)
    found = np.linalg.norm(quantizer.embeddings.numpy() - centres[:, np.newaxis], axis=-1).min(axis=1)
    assert (found < 0.1).all()
    np.testing.assert_allclose(quantizer.sums / quantizer.counts[:, np.newaxis], quantizer.embeddings, rtol=1e-5)
    quantizer.fit_codebook(np.concatenate([vectors, np.repeat(vectors[:40], 2, axis=0)]))  # the first cluster thrice
    np.testing.assert_allclose(np.sort(quantizer.counts), 6 * np.array([40, 40, 40, 40, 40, 120]) / 320, rtol=1e-6)
    by_gradient = make_quantizer(decay=None)
    by_gradient.fit_codebook(vectors)
    found = np.linalg.norm(by_gradient.embeddings.numpy() - centres[:, np.newaxis], axis=-1).min(axis=1)
    assert (found < 0.1).all()
    with pytest.raises(ValueError, match="5 vectors cannot start 6 codes"):
        quantizer.fit_codebook(vectors[:5])


def test_a_new_codebook_is_uniform_and_its_averages_agree_with_it():
    quantizer = modules.VectorQuantizer(200, 10)
    quantizer.build((None, 10))
    codebook = quantizer.embeddings.numpy()
    assert np.abs(codebook).max() <= 1 / 200
    np.testing.assert_allclose([codebook.min(), codebook.mean(), codebook.max()], [-1 / 200, 0, 1 / 200], atol=2e-4)
    np.testing.assert_array_equal(quantizer.counts, np.ones(200))
    np.testing.assert_array_equal(quantizer.sums, codebook)
    assert not quantizer.trainable_variables
    settings = {"num_embeddings": 7, "embedding_dim": 5, "commitment_cost": 0.5, "decay": 0.8, "restart_below": 0.1, "seed": 3}
    kept = modules.VectorQuantizer.from_config(modules.VectorQuantizer(**settings).get_config()).get_config()
    assert {key: kept[key] for key in settings} == settings


def test_without_restarts_an_unused_code_stays_finite():
    quantizer = make_quantizer(decay=0.01, restart_below=0)
    for _ in range(12):  # its count falls to 0.01 ** 12
        quantizer(np.zeros((4, 3), np.float32) + quantizer.embeddings[0], training=True)
    assert np.isfinite(quantizer.embeddings).all() and float(tf.reduce_min(quantizer.counts)) < 1e-20


def test_quantizer_refuses_what_does_not_fit_and_takes_an_empty_batch():
    for channels in (2, 4):
        with pytest.raises(ValueError, match="embedding_dim=3"):
            modules.VectorQuantizer(6, 3)(np.zeros((2, channels)))
    for decay in (0, 1, 1.5):
        with pytest.raises(ValueError, match="decay"):
            modules.VectorQuantizer(decay=decay)
    for sizes in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="num_embeddings and embedding_dim must be at least 1"):
            modules.VectorQuantizer(*sizes)
    assert modules.VectorQuantizer(1, 1)(np.ones((2, 1)))["codes"].numpy().tolist() == [0, 0]
    empty = make_quantizer()(np.zeros((0, 2, 2, 3), np.float32))
    assert empty["quantized"].shape == (0, 2, 2, 3) and empty["codes"].shape == (0, 2, 2)


# Encoder, decoder, VQ-VAE


@pytest.mark.parametrize("downsample", (4, 8))
@pytest.mark.parametrize("margin", (0, 8, 16, 24))
def test_encoder_and_decoder_mirror_each_other(downsample, margin):
    shape = {"image_size": 64, "embedding_dim": 4, "downsample": downsample, "margin": margin, "width": 8}
    images = np.random.default_rng(0).uniform(-1, 1, (2, 64, 64, 1)).astype(np.float32)
    vectors = modules.build_encoder(**shape)(images)
    assert vectors.shape == (2, 64 // downsample, 64 // downsample, 4)
    decoded = modules.build_decoder(**shape)(vectors).numpy()
    assert decoded.shape == images.shape
    inside = np.zeros((64, 64), bool)
    inside[margin:64 - margin, margin:64 - margin] = True
    assert (decoded[:, ~inside] == -1).all()
    assert (decoded[:, inside] != -1).mean() > 0.99


def test_impossible_shapes_are_refused():
    with pytest.raises(ValueError, match="downsample must be 4 or 8, got 16"):
        modules.build_encoder(downsample=16)
    with pytest.raises(ValueError, match="got 64, 5"):
        modules.build_encoder(image_size=64, margin=5)
    with pytest.raises(ValueError, match="multiple of 8"):
        modules.build_decoder(image_size=60)
    for kernel_size in (1, 4):
        with pytest.raises(ValueError, match=f"odd and at least 3, got {kernel_size}"):
            small_prior(kernel_size=kernel_size)


def test_vqvae_is_encoder_quantizer_decoder():
    vqvae = small_vqvae(margin=8)
    images = np.random.default_rng(0).uniform(-1, 1, (2, 64, 64, 1)).astype(np.float32)
    codes = vqvae.encode_to_codes(images)
    assert codes.shape == (2, 8, 8) and codes.dtype == tf.int32
    np.testing.assert_allclose(vqvae.decode_codes(codes), vqvae(images), atol=1e-5)
    np.testing.assert_array_equal(codes, vqvae.quantize_vectors(vqvae.encode(images))["codes"])
    assert np.abs(vqvae(images)).max() <= 1


def test_losses_are_error_over_variance_and_black_is_black_enough():
    vqvae = small_vqvae(data_variance=0.5)
    vqvae.compile()
    images = np.random.default_rng(0).uniform(-1, 1, (3, 64, 64, 1)).astype(np.float32)
    images[:, :32] = -1
    vqvae.quantizer.embeddings.assign(vectors_like((16, 4)))
    for weight in vqvae.decoder.trainable_variables:
        weight.assign(weight * 4)  # so that an untrained decoder paints beyond black and white
    outputs = vqvae.decoder(vqvae.quantize_vectors(vqvae.encode(images))["quantized"]).numpy()
    assert (outputs[:, :32] < -1).any() and (outputs[:, :32] > -1).any()
    errors = outputs - images
    errors[(images == -1) & (outputs < -1)] = 0
    losses = vqvae.test_on_batch(images, np.zeros(3, np.int32), return_dict=True)
    assert losses["reconstruction_loss"] == pytest.approx(np.mean(errors ** 2) / 0.5, rel=1e-4)
    assert losses["loss"] == pytest.approx(losses["reconstruction_loss"] + losses["vq_loss"], rel=1e-5)


def test_training_lowers_the_loss_and_the_start_uses_the_codebook():
    rng = np.random.default_rng(0)
    images = np.clip(rng.normal(size=(16, 8, 8, 1)).repeat(8, 1).repeat(8, 2), -1, 1).astype(np.float32)
    batches = tf.data.Dataset.from_tensor_slices((images, np.zeros(16, np.int32))).batch(8).repeat()
    vqvae = small_vqvae()
    vqvae.compile(keras.optimizers.Adam(3e-3))
    vqvae.start_codebook(batches, warmup_steps=20)
    assert len(np.unique(vqvae.encode_to_codes(images))) >= 8
    history = vqvae.fit(batches, steps_per_epoch=20, epochs=3, verbose=0, shuffle=False).history
    assert history["loss"][-1] < 0.8 * history["loss"][0]
    assert int(vqvae.optimizer.iterations) == 80


def test_codebook_stays_float32_under_mixed_precision():
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        vqvae, prior = small_vqvae(), small_prior()
    finally:
        keras.mixed_precision.set_global_policy("float32")
    images = np.zeros((1, 64, 64, 1), np.float32)
    assert vqvae.encode(images).dtype == tf.bfloat16
    result = vqvae.quantize_vectors(vqvae.encode(images))
    assert {weight.dtype for weight in vqvae.quantizer.weights if "seed" not in weight.path} == {"float32"}
    assert result["quantized"].dtype == result["loss"].dtype == vqvae(images).dtype == tf.float32
    inputs = {"codes": np.zeros((1, 6, 6), np.int32), "positions": np.zeros(1, np.int32)}
    assert prior(inputs).dtype == tf.float32


def test_mixed_precision_gives_nearly_the_same_losses():
    images = np.random.default_rng(0).uniform(-1, 1, (4, 64, 64, 1)).astype(np.float32)
    codes, positions = np.random.default_rng(0).integers(0, 11, (4, 6, 6), np.int32), np.arange(4, dtype=np.int32)
    vqvae, prior = small_vqvae(), small_prior()
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        mixed_vqvae, mixed_prior = small_vqvae(), small_prior()
    finally:
        keras.mixed_precision.set_global_policy("float32")
    for model, mixed in ((vqvae, mixed_vqvae), (prior, mixed_prior)):
        mixed.set_weights(model.get_weights())
    losses = [[float(loss) for loss in model._batch_losses(images, training=False)[:2]] for model in (vqvae, mixed_vqvae)]
    np.testing.assert_allclose(*losses, rtol=0.02)
    np.testing.assert_allclose(mixed_prior.log_prob(codes, positions), prior.log_prob(codes, positions), rtol=0.02)


# PixelCNN


def test_each_code_depends_on_all_codes_before_it_and_on_none_after():
    prior, size = small_prior(grid_size=9, num_layers=4), 9  # 4 layers: the fewest whose windows span 9 codes
    rng = np.random.default_rng(0)
    codes, positions = rng.integers(0, 11, (1, size, size), np.int32), np.array([1], np.int32)
    logits = prior({"codes": codes, "positions": positions}).numpy().reshape(size * size, -1)
    for changed in range(size * size):
        other = codes.copy().reshape(-1)
        other[changed] = (other[changed] + 5) % 11
        moved = prior({"codes": other.reshape(codes.shape), "positions": positions}).numpy().reshape(size * size, -1)
        difference = np.abs(moved - logits).max(axis=1)
        assert (difference[:changed + 1] == 0).all(), "a code sees itself or its future"
        assert (difference[changed + 1:] > 0).all(), "a blind spot"


def test_prior_is_conditioned_on_the_slice_position():
    prior, codes = small_prior(), np.zeros((2, 6, 6), np.int32)
    logits = prior({"codes": codes, "positions": np.array([0, 3], np.int32)}).numpy()
    assert np.abs(logits[0] - logits[1]).min(axis=-1).max() > 0


def test_every_code_depends_on_all_that_is_known_of_the_head():
    prior, positions = small_prior(), np.array([2], np.int32)
    codes, (below, person) = np.zeros((1, 6, 6), np.int32), small_context(prior, 1)
    logits = prior({"codes": codes, "positions": positions, "below": below, "person": person}).numpy()
    for step in range(len(prior.steps_below)):
        for row, column in np.ndindex(6, 6):
            other = below.copy()
            other[0, step, row, column] = (other[0, step, row, column] + 5) % 11
            moved = prior({"codes": codes, "positions": positions, "below": other, "person": person}).numpy()
            assert np.abs(moved - logits)[0, row, column].max() > 0
    moved = prior({"codes": codes, "positions": positions, "below": below, "person": person + np.eye(prior.person_size)[:1]}).numpy()
    assert (np.abs(moved - logits).max(axis=-1) > 0).all()


def test_what_lies_below_is_seen_up_to_six_codes_away_by_three_residual_blocks():
    prior = small_prior(grid_size=9)
    below, person = small_context(prior, 1)
    other = below.copy()
    other[0, 0, 0, 0] = (other[0, 0, 0, 0] + 5) % 11
    one, two = (prior._places(tf.constant([2]), tf.constant(some), tf.constant(person)).numpy()[0] for some in (below, other))
    moved = (one != two).any(axis=-1)
    assert moved[:7, :7].mean() > 0.9 and moved[6, :7].any() and moved[:7, 6].any()
    assert not moved[7:].any() and not moved[:, 7:].any()


def test_unknown_is_the_none_code_and_the_average_person():
    prior, positions = small_prior(), np.array([0, 3], np.int32)
    codes = np.random.default_rng(0).integers(0, 11, (2, 6, 6), np.int32)
    none, average = np.full((2, len(prior.steps_below), 6, 6), 11, np.int32), np.zeros((2, prior.person_size), np.float32)
    expected = prior.log_prob(codes, positions, none, average)
    np.testing.assert_array_equal(prior.log_prob(codes, positions), expected)


def test_bits_of_places_add_up_to_the_code_length():
    prior, count = small_prior(), 40  # more than go through the network at once
    codes, positions = np.random.default_rng(0).integers(0, 11, (count, 6, 6), np.int32), np.arange(count, dtype=np.int32) % 4
    for some in (slice(0, 3), slice(0, count)):
        bits = metrics.bits_per_place(prior, codes[some], positions[some])
        assert bits.shape == codes[some].shape and bits.min() > 0
        np.testing.assert_allclose(bits.mean(axis=(1, 2)), metrics.code_lengths(prior, codes[some], positions[some]), rtol=1e-4)


@pytest.mark.parametrize("new_length", (5, 16, 40))
def test_pictures_are_resampled_linearly_over_the_same_extent(new_length):
    signal = np.random.default_rng(0).normal(size=16)
    places = (np.arange(new_length) + 0.5) * 16 / new_length - 0.5
    expected = np.interp(places, np.arange(16), signal)
    np.testing.assert_allclose(prior_module._linear_interpolation(16, new_length) @ signal, expected, atol=1e-6)


def test_log_prob_is_the_sum_of_log_softmax():
    prior = small_prior()
    codes, positions = np.random.default_rng(0).integers(0, 11, (3, 6, 6), np.int32), np.array([0, 1, 2], np.int32)
    logits = prior({"codes": codes, "positions": positions}).numpy().astype(float)
    log_softmax = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    expected = np.take_along_axis(log_softmax, codes[..., np.newaxis], axis=-1).sum(axis=(1, 2, 3))
    np.testing.assert_allclose(prior.log_prob(codes, positions), expected, rtol=1e-4)
    prior.compile()
    below, person = small_context(prior, 3)
    batch = {"codes": codes, "positions": positions, "below": below, "person": person}
    bits = prior.test_step({name: tf.constant(value) for name, value in batch.items()})
    assert float(bits["bits_per_code_alone"]) == pytest.approx(-expected.mean() / 36 / np.log(2), rel=1e-4)
    given = prior.log_prob(codes, positions, below, person)
    assert float(bits["bits_per_code"]) == pytest.approx(-np.mean(given) / 36 / np.log(2), rel=1e-4)
    assert prior.distribution(codes, positions).batch_shape == (3, 6, 6)


def test_training_counts_slices_with_and_without_one_below_apart():
    prior = small_prior(dropout=0.0)
    prior.compile(keras.optimizers.SGD(0.0))
    codes, positions = np.random.default_rng(0).integers(0, 11, (3, 6, 6), np.int32), np.array([0, 1, 2], np.int32)
    below, person = small_context(prior, 3)
    below[1] = 11
    batch = {"codes": codes, "positions": positions, "below": below, "person": person}
    bits = prior.train_step({name: tf.constant(value) for name, value in batch.items()})
    expected = -prior.log_prob(codes, positions, below, person).numpy() / 36 / np.log(2)
    assert float(bits["bits_per_code"]) == pytest.approx(expected[[0, 2]].mean(), rel=1e-4)
    assert float(bits["bits_per_code_alone"]) == pytest.approx(expected[1], rel=1e-4)


def test_the_whole_distribution_sums_to_one():
    prior = small_prior(grid_size=2, num_embeddings=3, num_layers=2)
    all_codes = np.array(list(np.ndindex(3, 3, 3, 3)), np.int32).reshape(-1, 2, 2)
    for below, person in ((None, None), small_context(prior, 1)):
        known = (None if one is None else np.repeat(one, 81, axis=0) for one in (below, person))
        total = np.exp(prior.log_prob(all_codes, np.zeros(81, np.int32), *known).numpy().astype(float)).sum()
        assert total == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("kernel_size", (3, 5))
@pytest.mark.parametrize("temperature", (1.0, 0.5))
def test_cached_sampling_equals_full_forwards_code_by_code(kernel_size, temperature):
    prior = small_prior(kernel_size=kernel_size)
    positions = tf.constant([0, 1, 3])
    noise, (below, person) = prior.gumbel_noise(7, tf.range(3)), small_context(prior, 3)
    slow = prior.sample_by_full_forwards(positions, noise, temperature, below, person)
    assert len(np.unique(slow)) > 4
    np.testing.assert_array_equal(tf.function(prior.sample_from_noise)(positions, noise, temperature, below, person), slow)
    drawn = prior.draw_persons(7, tf.range(3))
    alone = prior.sample_by_full_forwards(positions, noise, temperature, None, drawn)
    np.testing.assert_array_equal(prior.sample(positions, seed=7, temperature=temperature), alone)
    assert (alone != slow).any()


def test_heads_are_drawn_upwards_each_slice_given_those_drawn_below():
    prior = small_prior(num_positions=10)
    assert prior.steps_below == (1, 2, 4, 8)
    heads = prior.sample_heads(3, seed=5, temperature=0.9, batch_size=2)
    np.testing.assert_array_equal(prior.sample_heads(3, seed=5, temperature=0.9), heads)
    assert (prior.sample_heads(3, seed=6) != heads).any() and heads.shape == (3, 10, 6, 6) and heads.dtype == np.int32
    none, person = np.full((3, 6, 6), 11, np.int32), prior.draw_persons(5, tf.range(3))
    for position in range(10):
        below = np.stack([heads[:, position - step] if position >= step else none for step in (1, 2, 4, 8)], axis=1)
        noise = prior.gumbel_noise(5, tf.range(3) * 10 + position)
        slow = prior.sample_by_full_forwards(tf.fill([3], position), noise, 0.9, below, person)
        np.testing.assert_array_equal(heads[:, position], slow)


def test_heads_are_told_persons_shifted_and_stretched_or_as_they_are_given():
    prior = small_prior()
    prior.start_people(np.random.default_rng(0).uniform(size=(20, 4, 16, 16)))
    persons, heads = prior.draw_persons(5, tf.range(3)), prior.sample_heads(3, seed=5, batch_size=2)
    np.testing.assert_array_equal(prior.sample_heads(3, seed=5, batch_size=2, told=persons), heads)
    prior.shift.assign(np.linspace(-1, 1, 24))
    prior.scale.assign(np.linspace(1, 2, 24))
    stretched = prior.sample_heads(3, seed=5, batch_size=2)
    told = np.linspace(-1, 1, 24) + np.linspace(1, 2, 24) * persons.numpy()
    np.testing.assert_array_equal(prior.sample_heads(3, seed=5, told=np.float32(told)), stretched)
    assert (stretched != heads).any()
    np.testing.assert_array_equal(prior.sample_heads(3, seed=5, batch_size=2, told=persons), heads)


def test_calibrated_heads_show_persons_as_far_apart_as_people_are():
    prior, rng, count = small_prior(person_size=4), np.random.default_rng(0), 3000
    slope, offset, noise = np.array([0.9, 0.7, 0.8, 0.6]), np.array([0.4, -0.3, 0.0, 0.2]), np.array([0.3, 0.6, 0.1, 0.5])

    def show(told):
        return offset + slope * told + noise * rng.normal(size=told.shape)

    told = rng.normal(size=(count, 4))
    for _ in range(2):  # the second time from what the first one tells
        prior.calibrate(told, show(told))
        told = prior.shift.numpy() + prior.scale.numpy() * rng.normal(size=(count, 4))
        shown = show(told)
        np.testing.assert_allclose(shown.mean(axis=0), 0, atol=0.07)
        np.testing.assert_allclose(shown.std(axis=0), 1, atol=0.06)
    prior.calibrate(told, 10 + rng.normal(size=told.shape))  # of a prior that has not learned: no further than training went
    assert (prior.shift.numpy() == -1).all() and (prior.scale.numpy() == 1).all()
    prior.calibrate(told, 0.01 * told)
    np.testing.assert_allclose(prior.scale, 2, rtol=1e-4)
    for few in (told[:1], np.zeros((3, 4))):  # one head alone, or people who do not differ
        prior.calibrate(few, few)
        np.testing.assert_array_equal(prior.shift, 0)
        np.testing.assert_array_equal(prior.scale, 1)


def test_calibration_tells_the_second_heads_what_the_first_ones_taught(tmp_path, monkeypatch):
    prior, rounds = small_prior(person_size=4), []

    def shown(persons):
        return 0.2 + 0.6 * np.tanh(persons)

    def sample_heads(count, seed, told):
        return rounds.append(np.array(told)) or np.zeros((count, 2, 6, 6), np.int32)

    monkeypatch.setattr(prior, "sample_heads", sample_heads)
    monkeypatch.setattr(prior, "persons", lambda pictures: shown(rounds[-1]))
    vqvae = SimpleNamespace(decode_codes=lambda codes: tf.zeros((len(codes), 32, 32, 1)), settings={"margin": 0})
    (tmp_path / "backup").mkdir()
    train.calibrate(tmp_path, vqvae, prior, num_people=20)

    expected, drawn = small_prior(person_size=4), [prior.draw_persons(seed, tf.range(20)).numpy() for seed in (-1, -2)]
    expected.calibrate(drawn[0], shown(drawn[0]))
    told = drawn[0], expected.shift.numpy() + expected.scale.numpy() * drawn[1]
    np.testing.assert_allclose(rounds, told, rtol=1e-6)
    assert (expected.scale.numpy() > 1.2).all()  # so the second ones were told more
    expected.calibrate(np.concatenate(told), shown(np.concatenate(told)))
    saved = modules.load_model(tmp_path / "pixelcnn.keras")
    for name in ("shift", "scale"):
        np.testing.assert_allclose(getattr(saved, name), getattr(expected, name), rtol=1e-5, atol=1e-6)


def test_persons_are_whitened_and_new_ones_are_drawn_as_people_are_spread():
    rng = np.random.default_rng(0)
    hidden = rng.uniform(-1, 1, (60, 4)) ** 3  # far from normal
    pictures = np.einsum("np,pdhw->ndhw", hidden * [9, 6, 3, 1], rng.normal(size=(4, 4, 16, 16))) + rng.normal(size=(4, 16, 16))
    prior = small_prior(person_size=3)
    prior.start_people(pictures)
    persons = prior.persons(pictures)
    np.testing.assert_allclose(np.cov(persons.T), np.eye(3), atol=0.05)
    decoded = prior.mean_picture.numpy() + np.einsum("dhwp,np->ndhw", prior.components.numpy(), persons)
    assert ((decoded - pictures) ** 2).mean() < 0.1 * pictures.var(axis=0).mean()
    drawn = prior.draw_persons(3, tf.range(4000)).numpy()
    np.testing.assert_array_equal(prior.draw_persons(3, tf.range(2, 4)), drawn[2:4])
    np.testing.assert_allclose(np.cov(drawn.T), np.eye(3), atol=0.12)
    for component in range(3):
        assert stats.ks_2samp(drawn[:, component], persons[:, component]).statistic < 0.08
    gaps = pictures.copy()
    gaps[0, :3] = gaps[1, 0] = np.nan
    assert (prior.persons(gaps)[0] == 0).all() and (prior.persons(gaps)[1] != 0).all()
    pictures[:, 1:] = gaps[:, 1:] = np.nan  # of a cohort that has one slice of each head, that one is enough
    prior.start_people(pictures)
    assert (prior.persons(gaps)[:2] == 0).all() and (prior.persons(gaps)[2:] != 0).any(axis=1).all()


def test_one_person_alone_is_the_average_person():
    prior = small_prior()
    prior.start_people(np.random.default_rng(0).uniform(size=(1, 4, 16, 16)))
    assert (prior.draw_persons(0, tf.range(3)).numpy() == 0).all()
    assert np.isfinite(prior.log_prob(np.zeros((1, 6, 6), np.int32), np.array([1]))).all()


def test_embeddings_start_as_like_as_the_codebook():
    prior, codebook = modules.PixelCNN(4, 30, 2, num_filters=200, num_layers=1), vectors_like((30, 4))
    prior.start_embeddings(codebook)
    expected = np.linalg.norm(codebook[:, np.newaxis] - codebook, axis=-1)
    for started in (prior.code_embedding.embeddings.numpy(), prior.below_embeddings[1].embeddings.numpy()[:-1],
                    prior.head.layers[-1].kernel.numpy().T):
        between = np.linalg.norm(started[:, np.newaxis] - started, axis=-1)
        assert np.corrcoef(between.ravel(), expected.ravel())[0, 1] > 0.95


def test_samples_depend_on_the_seed_but_not_on_the_batch_size():
    prior, positions = small_prior(), [0, 1, 2, 3, 0]
    codes = prior.sample(positions, seed=1)
    np.testing.assert_array_equal(prior.sample(positions, seed=1, batch_size=2), codes)
    assert (prior.sample(positions, seed=2) != codes).any()
    assert (codes[0] != codes[4]).any()  # one position, other noise
    with pytest.raises(ValueError, match="positions must lie in 0 to 3"):
        prior.sample([4])


def test_samples_follow_the_distribution():
    prior = small_prior(grid_size=1, num_embeddings=4)
    noise = prior.gumbel_noise(0, tf.range(4000))
    codes = prior.sample_from_noise(tf.zeros(4000, tf.int32), noise, 1.0)
    share = np.bincount(np.ravel(codes), minlength=4) / 4000
    expected = prior.distribution(np.zeros((1, 1, 1), np.int32), np.zeros(1, np.int32)).probs_parameter().numpy().ravel()
    np.testing.assert_allclose(share, expected, atol=4 * np.sqrt(0.25 / 4000))
    assert prior.sample_from_noise(tf.constant([0]), noise[:1], 0.0).numpy().item() == expected.argmax()


def test_gumbel_noise_has_its_distribution():
    noise = small_prior(num_embeddings=500).gumbel_noise(0, tf.range(4)).numpy().ravel()
    quantiles = np.quantile(noise, (0.1, 0.5, 0.9))
    np.testing.assert_allclose(quantiles, -np.log(-np.log([0.1, 0.5, 0.9])), atol=0.02)


# Many devices


TWO_DEVICES = """
import keras, numpy as np, tensorflow as tf
import dataset, modules
from support import devices

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
rng = np.random.default_rng(0)
images = rng.integers(0, 256, (33, 8, 8)).astype(np.uint8).repeat(8, 1).repeat(8, 2)
split = dataset.Split("train", images, np.arange(33, dtype=np.int32), np.arange(33, dtype=np.int32) % 4)
codes = rng.integers(0, 13, (33, 8, 8))
one, two = tf.distribute.get_strategy(), tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
ends, restarts = [], []
for strategy in (one, two):
    keras.utils.set_random_seed(0)
    with strategy.scope():
        vqvae = modules.VQVAE(64, 16, 4, width=8)
        vqvae.quantizer.restart_below = 0.9  # so that many codes restart
        vqvae.compile(devices.Adam(1e-3, global_clipnorm=0.1))  # so small that it clips
        vqvae.start_codebook(dataset.training_batches(split, 8, 1), 4, 2)
    first = vqvae.quantizer.embeddings.numpy()
    settings = {"steps_per_epoch": 4, "epochs": 2, "verbose": 0, "shuffle": False}
    # Of 33 images in batches of 8, the second device gets none of the last one.
    seen = vqvae.fit(dataset.training_batches(split, 8, 0), validation_data=dataset.image_batches(split, 8), **settings).history
    with strategy.scope():
        prior = modules.PixelCNN(8, 16, 4, num_filters=8, num_layers=3, dropout=0.0)  # each device would drop out its own
        prior.compile(devices.Adam(1e-2, global_clipnorm=0.1))
    told = codes[np.newaxis], split.positions, dataset.slices_below(split, (1, 2, 4, 8)), np.ones((1, 33, 24)), 16, 8
    seen |= prior.fit(dataset.code_batches(*told, 0), validation_data=dataset.code_batches(*told), **settings).history
    seen.pop("val_perplexity")  # counts the black image in place of an empty part; train.py measures its own
    assert np.abs(vqvae.quantizer.embeddings.numpy() - first).max() > 1e-3
    restarts.append(16 - len(np.unique(vqvae.quantizer.counts)))  # what restarted in the last step has one count
    ends.append([*(seen[key] for key in sorted(seen)), vqvae.quantizer.embeddings.numpy(), prior.head.get_weights()[0]])
assert len(ends[0]) == 13 and restarts[0] == restarts[1] > 0
for alone, together in zip(*ends):
    np.testing.assert_allclose(together, alone, atol=1e-4)
"""


def test_two_devices_train_as_one_with_the_same_batches():
    # Without oneDNN, whose convolution on a CPU fails on an empty batch.
    environment = {**os.environ, "PYTHONPATH": ".", "TF_ENABLE_ONEDNN_OPTS": "0"}
    done = subprocess.run([sys.executable, "-c", TWO_DEVICES], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


# Files


def test_saved_models_load_in_a_new_process_and_say_the_same(tmp_path):
    vqvae, prior = small_vqvae(margin=8), small_prior()
    vqvae.compile(keras.optimizers.Adam())
    images = np.random.default_rng(0).uniform(-1, 1, (2, 64, 64, 1)).astype(np.float32)
    codes, positions = np.random.default_rng(0).integers(0, 11, (2, 6, 6), np.int32), np.array([1, 2], np.int32)
    vqvae.save(tmp_path / "vqvae.keras")
    prior.save(tmp_path / "prior.keras")
    np.savez(tmp_path / "expected.npz", images=images, reconstructions=vqvae(images), codes=codes, positions=positions,
             log_prob=prior.log_prob(codes, positions), counts=vqvae.quantizer.counts)
    script = """
import sys, keras, numpy as np, modules
folder = sys.argv[1]
vqvae, prior = (keras.models.load_model(f"{folder}/{name}.keras", safe_mode=True) for name in ("vqvae", "prior"))
expected = np.load(f"{folder}/expected.npz")
np.testing.assert_allclose(vqvae(expected["images"]), expected["reconstructions"], atol=1e-5)
np.testing.assert_allclose(prior.log_prob(expected["codes"], expected["positions"]), expected["log_prob"], rtol=1e-5)
np.testing.assert_array_equal(vqvae.quantizer.counts, expected["counts"])
"""
    subprocess.run([sys.executable, "-c", script, tmp_path], check=True, env={**os.environ, "PYTHONPATH": "."})


def test_no_flipped_bit_loads_as_other_weights(tmp_path):
    prior, path = small_prior(), tmp_path / "prior.keras"
    prior.compile(devices.Adam())
    prior.save(path)
    whole, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    for place in rng.integers(0, len(whole), 60):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            loaded = modules.load_model(path)
        except ValueError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error), place
        else:  # a date in the archive, say
            for one, other in zip(loaded.get_weights(), prior.get_weights(), strict=True):
                np.testing.assert_array_equal(one, other, err_msg=str(place))
    assert refused > 50


def test_exported_models_run_without_this_repository(tmp_path):
    vqvae, prior = small_vqvae(), small_prior(grid_size=8, num_embeddings=small_vqvae().quantizer.num_embeddings)
    rng = np.random.default_rng(0)
    images, positions = rng.uniform(-1, 1, (3, 64, 64, 1)).astype(np.float32), np.array([0, 3, 1], np.int32)
    codes = vqvae.encode_to_codes(images)
    np.savez(tmp_path / "expected.npz", images=images, codes=codes, decoded=vqvae.decode_codes(codes), positions=positions,
             sampled=prior.sample(positions, seed=5, temperature=0.9), heads=prior.sample_heads(2, seed=5, temperature=0.9))
    modules.export(vqvae, prior, tmp_path)
    script = """
import numpy as np, tensorflow as tf
encoder, decoder, sampler, head_sampler = (
    tf.saved_model.load(name) for name in ("encoder", "decoder", "sampler", "head_sampler"))
expected = np.load("expected.npz")
np.testing.assert_array_equal(encoder(expected["images"]), expected["codes"])
np.testing.assert_allclose(decoder(encoder(expected["images"])), expected["decoded"], atol=1e-5)
np.testing.assert_allclose(decoder(encoder(expected["images"][:1])), expected["decoded"][:1], atol=1e-5)
np.testing.assert_array_equal(sampler(expected["positions"], 5, 0.9), expected["sampled"])
np.testing.assert_array_equal(head_sampler(2, 5, 0.9), expected["heads"])
served = decoder.signatures["serving_default"](codes=tf.constant(expected["codes"]))
np.testing.assert_allclose(next(iter(served.values())), expected["decoded"], atol=1e-5)
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

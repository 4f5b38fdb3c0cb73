"""The networks: quantiser, encoder and decoder, VQ-VAE, PixelCNN as a network, and their files."""

import functools
from unittest import mock

import keras
import numpy as np
import pytest
from skimage.metrics import structural_similarity
import tensorflow as tf

import modules
from tests.small import random_conditions, random_vectors, small_prior, small_vqvae


@pytest.fixture(autouse=True)
def seeded():
    keras.utils.set_random_seed(0)


def make_quantizer(**kwargs):
    """A quantiser of 6 codes of length 3, and its codebook."""
    quantizer = modules.VectorQuantizer(6, 3, **kwargs)
    quantizer.build((None, 3))
    quantizer.start(np.random.default_rng(0).normal(size=(6, 3)), np.ones(6))
    return quantizer, quantizer.embeddings.numpy()


def random_images(count, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (count, 64, 64, 1)).astype(np.float32)


def random_codes(count):
    codes = np.random.default_rng(0).integers(0, 11, (count, 6, 6), np.int32)
    return codes, np.arange(count, dtype=np.int32) % 4


@pytest.fixture(scope="module")
def twins():
    """VQ-VAEs and priors, each in float32 and in mixed precision with the same weights."""
    keras.utils.set_random_seed(0)
    pairs = [(make(), make(dtype="mixed_bfloat16"))
             for make in (small_vqvae, functools.partial(small_prior, dropout=0.0))]
    for model, mixed in pairs:
        mixed.set_weights(model.get_weights())
    return pairs


@pytest.fixture(scope="module")
def prior(twins):
    return twins[1][0]


@pytest.mark.parametrize("decay", (0.99, None))
@pytest.mark.parametrize("shape", ((2, 5, 4, 3), (7, 3), (0, 2, 2, 3)))
def test_codes_are_the_nearest_rows_with_losses_and_gradients_of_2017(decay, shape):
    (quantizer, codebook), vectors = make_quantizer(decay=decay), tf.constant(random_vectors(shape))
    weights = random_vectors(shape, seed=5)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(vectors)
        result = quantizer(vectors)
        weighted = tf.reduce_sum(result["quantized"] * weights)
    codes = np.linalg.norm(vectors.numpy()[..., np.newaxis, :] - codebook, axis=-1).argmin(axis=-1)
    np.testing.assert_array_equal(result["codes"], codes)
    assert result["codes"].dtype == tf.int32
    np.testing.assert_allclose(result["quantized"], codebook[codes], atol=1e-6)
    np.testing.assert_allclose(tape.gradient(weighted, vectors), weights, rtol=1e-6)  # straight through
    if not codes.size:
        return
    share = np.unique(codes, return_counts=True)[1] / codes.size
    assert float(result["perplexity"]) == pytest.approx(np.prod(share ** -share), rel=1e-5)
    difference = vectors - codebook[codes]
    factor = 0.25 if decay else 1.25  # else the codebook is learnt by its gradient
    assert float(result["loss"]) == pytest.approx(factor * np.mean(difference ** 2), rel=1e-5)
    expected = 0.25 * 2 * difference / vectors.numpy().size
    np.testing.assert_allclose(tape.gradient(result["loss"], vectors), expected, rtol=1e-4, atol=1e-6)
    if not decay:
        gradient = tf.convert_to_tensor(tape.gradient(result["loss"], quantizer.trainable_variables[0]))
        expected = np.eye(6)[codes.ravel()].T @ (-4 * expected.numpy().reshape(-1, 3))
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-7)


def test_codebook_follows_its_vectors_as_a_moving_average():
    quantizer, sums = make_quantizer(decay=0.9, restart_below=0)
    counts = np.ones(6)
    for step in range(4):
        vectors = random_vectors((50, 3), seed=step)
        one_hot = np.eye(6)[quantizer(vectors, training=True)["codes"]]
        counts = 0.9 * counts + 0.1 * one_hot.sum(axis=0)
        sums = 0.9 * sums + 0.1 * one_hot.T @ vectors
        np.testing.assert_allclose(quantizer.embeddings, sums / counts[:, np.newaxis], rtol=1e-4)
    before = quantizer.embeddings.numpy()
    quantizer(vectors, training=False)
    np.testing.assert_array_equal(quantizer.embeddings, before)
    quantizer, _ = make_quantizer(decay=0.01, restart_below=0)
    for _ in range(12):  # without restarts the count of an unused code falls to 0.01 ** 12
        quantizer(np.zeros((4, 3), np.float32) + quantizer.embeddings[0], training=True)
    assert np.isfinite(quantizer.embeddings).all() and float(tf.reduce_min(quantizer.counts)) < 1e-20


def test_dead_codes_restart_at_vectors_of_the_batch():
    vectors, drawn = random_vectors((60, 3)), []
    for seed in (0, 0, 1):
        quantizer, codebook = make_quantizer(decay=0.5, restart_below=0.5, seed=seed)
        codebook[[2, 4]] = 1e3  # never the nearest
        quantizer.start(codebook, np.ones(6))
        counts = 0.5 + 0.5 * np.bincount(quantizer(vectors, training=True)["codes"], minlength=6)
        dead = counts < 0.5 * counts.mean()
        assert dead[[2, 4]].all() and not dead.all()
        np.testing.assert_allclose(quantizer.counts, np.where(dead, counts.mean(), counts), rtol=1e-6)
        sums = quantizer.embeddings * quantizer.counts[:, np.newaxis]
        np.testing.assert_allclose(quantizer.sums, sums, rtol=1e-5)
        distances = np.abs(vectors - quantizer.embeddings.numpy()[dead][:, np.newaxis]).max(axis=-1)
        assert (distances.min(axis=1) < 1e-6).all(), "a restarted code is no vector of the batch"
        drawn.append(distances.argmin(axis=1).tolist())
    assert drawn[0] == drawn[1] != drawn[2] and len(set(drawn[0])) > 1


@pytest.mark.parametrize("make, words", (
    (lambda: small_vqvae().encode(np.zeros((1, 64, 64, 1), np.uint8)), "must be floats"),
    (lambda: modules.build_encoder(image_size=64, margin=5), "0 to 3 whole eighths of image_size; got 5, 64"),
    (lambda: modules.build_decoder(image_size=60), "got 0, 60")))
def test_what_does_not_fit_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("downsample", (4, 8))
@pytest.mark.parametrize("margin", (0, 8, 24))
def test_encoder_and_decoder_mirror_each_other(downsample, margin):
    shape = {"image_size": 64, "embedding_dim": 4, "downsample": downsample, "margin": margin, "width": 8}
    images = random_images(2)
    vectors = modules.build_encoder(**shape)(images)
    assert vectors.shape == (2, 64 // downsample, 64 // downsample, 4)
    decoded = modules.build_decoder(**shape)(vectors).numpy()
    assert decoded.shape == images.shape
    inside = np.zeros((64, 64), bool)
    inside[margin:64 - margin, margin:64 - margin] = True
    assert (decoded[:, ~inside] == -1).all() and (decoded[:, inside] != -1).mean() > 0.99


def test_vqvae_is_encoder_quantizer_decoder_and_black_is_black_enough():
    vqvae, images = small_vqvae(margin=8, data_variance=0.5), random_images(3)
    images[:, :32] = -1
    vqvae.quantizer.embeddings.assign(random_vectors((16, 4)))
    for weight in vqvae.decoder.trainable_variables:
        weight.assign(weight * 4)  # so that an untrained decoder paints beyond black and white
    codes, result = vqvae.encode_to_codes(images), vqvae.quantizer(vqvae.encode(images))
    assert codes.shape == (3, 8, 8) and codes.dtype == tf.int32
    np.testing.assert_array_equal(codes, result["codes"])
    outputs = vqvae.decoder(result["quantized"]).numpy()
    assert (outputs[:, 8:32] < -1).any() and outputs.max() > 1
    np.testing.assert_allclose(vqvae.decode_codes(codes), outputs.clip(-1, 1), atol=1e-5)
    np.testing.assert_allclose(vqvae(images), outputs.clip(-1, 1), atol=1e-5)
    errors = np.where((images == -1) & (outputs < -1), 0, outputs - images)
    losses = {name: float(value) for name, value in vqvae.test_step((images, np.zeros(3, np.int32))).items()}
    assert losses["reconstruction_loss"] == pytest.approx(np.mean(errors ** 2) / 0.5, rel=1e-4)
    assert losses["loss"] == pytest.approx(losses["reconstruction_loss"] + losses["vq_loss"], rel=1e-5)


def test_a_decoder_that_sees_neighbours_learns_ssim_too():
    """SSIM by scikit-image, at every fourth place."""
    vqvae, images = small_vqvae(sees_neighbours=True, data_variance=0.5), random_images(3)
    for weight in vqvae.decoder.trainable_variables:
        weight.assign(weight * 4)  # beyond black and white
    codes = np.random.default_rng(0).integers(0, 16, (3, 3, 8, 8))
    outputs = vqvae.decode_codes(*codes.swapaxes(0, 1)).numpy()
    assert outputs.min() == -1 and outputs.max() == 1
    maps = [structural_similarity(*((pair[..., 0] + 1) / 2 for pair in pairs), data_range=1, full=True)[1]
            for pairs in zip(images, outputs)]
    losses = vqvae.batch_losses(images, codes)
    expected = losses["reconstruction_loss"] + 0.5 * (1 - np.mean([ssim[3:-3:4, 3:-3:4] for ssim in maps]))
    assert float(losses["loss"]) == pytest.approx(float(expected), rel=1e-4)


def test_codes_code_lengths_and_samples_are_of_full_float32_whatever_the_model_trained_in(twins, monkeypatch):
    """Also where they are traced; but there the flag of TensorFloat-32 is that of the process."""
    (vqvae, mixed_vqvae), (prior, mixed_prior) = twins
    codebook = vqvae.encode(random_images(4))[:, 0, :4].numpy().reshape(16, 4)
    for model in (vqvae, mixed_vqvae):
        model.quantizer.embeddings.assign(codebook)
    enabled, flags = tf.config.experimental.tensor_float_32_execution_enabled, []
    tf.config.experimental.enable_tensor_float_32_execution(True)
    def spy(call):
        return lambda *args, **kwargs: flags.append(enabled()) or call(*args, **kwargs)
    for part in (modules.VectorQuantizer, modules.PixelCNN):
        monkeypatch.setattr(part, "call", spy(part.call))
    images, given = random_images(16, seed=1), random_codes(4)
    expected = vqvae.encode_to_codes(images)
    np.testing.assert_array_equal(mixed_vqvae.encode_to_codes(images), expected)
    np.testing.assert_array_equal(mixed_prior.log_prob(*given), prior.log_prob(*given))
    monkeypatch.undo()
    assert flags == [False] * 4 and enabled()
    rounded = mixed_vqvae.quantizer(mixed_vqvae.encode(images))["codes"]
    assert (rounded.numpy() != expected.numpy()).any()  # what is avoided
    np.testing.assert_array_equal(tf.function(mixed_vqvae.encode_to_codes)(images), expected)
    assert enabled() and mixed_vqvae.encode(images).dtype == tf.bfloat16


def test_each_code_depends_on_all_codes_before_it_and_on_none_after():
    prior = small_prior(grid_size=9, num_layers=4)  # 4 layers: the fewest whose windows span 9 codes
    position, codes = tf.constant([1]), np.random.default_rng(0).integers(0, 11, 81, np.int32)
    forward = tf.function(lambda codes: prior({"codes": tf.reshape(codes, (1, 9, 9)), "positions": position}))
    logits = forward(codes).numpy()
    for changed in range(81):
        other = codes.copy()
        other[changed] = (other[changed] + 5) % 11
        difference = np.abs(forward(other) - logits).max(axis=-1).ravel()
        assert (difference[:changed + 1] == 0).all(), "a code depends on itself or its future"
        assert (difference[changed + 1:] > 0).all(), "a blind spot"


def test_every_code_depends_on_context_person_and_position(prior):
    context, person = random_conditions(prior, 1)
    changes = list(np.ndindex(len(prior.steps_below), 6, 6))
    count = len(changes) + 3  # then come another person, another position, and the one to compare with
    context, person = np.repeat(context, count, axis=0), np.repeat(person, count, axis=0)
    for item, place in enumerate(changes):
        context[item][place] = (context[item][place] + 5) % 11
    person[-3, 0] += 1
    positions = np.full(count, 2, np.int32)
    positions[-2] = 3
    logits = prior({"codes": np.zeros((count, 6, 6), np.int32), "positions": positions, "context": context,
                    "person": person}).numpy()
    difference = np.abs(logits - logits[-1]).max(axis=-1)
    assert all(difference[item, row, column] > 0 for item, (_, row, column) in enumerate(changes))
    assert (difference[-3:-1] > 0).all()


def test_movement_adds_the_products_of_codes_with_the_change_below():
    prior = small_prior()
    (codes, positions), (context, person) = random_codes(3), random_conditions(prior, 3)
    context[0, 0], context[1, 1, 2, 4] = 11, 11  # no slice, in all places and in one
    inputs = {"codes": codes, "positions": positions, "context": context, "person": person}
    vectors, logits = prior.code_vectors.numpy(), prior(inputs).numpy()
    prior.movement.assign(0.0)
    expected = np.zeros_like(logits)
    for item, row, column, code in np.ndindex(expected.shape):
        below, further = context[item, :2, row, column]
        if max(below, further) < 11:
            expected[item, row, column, code] = 0.7 * vectors[code] @ (vectors[below] - vectors[further])
    np.testing.assert_allclose(logits - prior(inputs).numpy(), expected, atol=1e-4)
    assert not expected[0].any() and expected[1].any()


def test_log_prob_is_the_sum_of_log_softmax_given_no_slices_and_the_average_person_if_none_are(prior):
    codes, positions = random_codes(3)
    none = np.full((3, len(prior.steps_below), 6, 6), 11, np.int32)
    logits = prior({"codes": codes, "positions": positions, "context": none,
                    "person": np.zeros((3, prior.person_size))}).numpy().astype(float)
    log_softmax = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    expected = np.take_along_axis(log_softmax, codes[..., np.newaxis], axis=-1).sum(axis=(1, 2, 3))
    np.testing.assert_allclose(prior.log_prob(codes, positions), expected, rtol=1e-4)
    np.testing.assert_array_equal(prior.no_context(3), none)


def test_training_logs_code_lengths_with_and_without_context_and_validation_those_of_slices_alone():
    prior = small_prior(dropout=0.0)
    prior.movement.assign(0.0)  # as it is in training, which makes no use of it
    prior.compile(keras.optimizers.SGD(0.0), run_eagerly=True)
    (codes, positions), (context, person) = random_codes(3), random_conditions(prior, 3)
    context[1] = 11
    batches = tf.data.Dataset.from_tensors(
        {"codes": codes, "positions": positions, "context": context, "person": person})
    logs = prior.fit(batches, validation_data=batches, shuffle=False, verbose=0).history
    bits, alone = (-prior.log_prob(codes, positions, *given).numpy() / 36 / np.log(2)
                   for given in ((context, person), ()))
    expected = {"bits_per_code": bits[[0, 2]].mean(), "bits_per_code_no_context": bits[1],
                "val_bits_per_code": bits.mean(), "val_bits_per_code_alone": alone.mean()}
    assert {name: value for name, (value,) in logs.items()} == pytest.approx(expected, rel=1e-4)


def assert_same_weights(one, other):
    for weight, twin in zip(one.weights, other.weights, strict=True):
        np.testing.assert_array_equal(weight, twin, err_msg=weight.path)


def test_a_saved_model_is_the_same_model_and_no_flipped_bit_loads_as_other_weights(tmp_path):
    path, rng, refused = tmp_path / "model.keras", np.random.default_rng(0), 0
    for model in (small_vqvae(margin=8, seed=3), small_prior(num_layers=1, slice_positions=[0, 2])):
        model.save(path)
        loaded = modules.load_model(path)
        assert type(loaded) is type(model) and loaded.settings == model.settings
        assert_same_weights(loaded, model)
    whole = path.read_bytes()
    for place in rng.integers(0, len(whole), 60):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            assert_same_weights(modules.load_model(path), model)  # the bit is of a date in the archive, say
        except ValueError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error), place
    assert refused > 50


def test_out_of_memory_is_no_damaged_file(tmp_path, monkeypatch):
    path, full = tmp_path / "model.keras", tf.errors.ResourceExhaustedError(None, None, "OOM when allocating")
    keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)]).save(path)
    monkeypatch.setattr(keras.models, "load_model", mock.Mock(side_effect=full))
    with pytest.raises(tf.errors.ResourceExhaustedError):
        modules.load_model(path)

"""The exact sampler against the whole network run once per code, its noise, slices and heads."""

import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from support import sampler
from support.cli import UserError
from tests.conftest import ROOT
from tests.small import random_conditions, sample_by_full_forwards, small_prior, small_vqvae


def test_gumbel_noise_has_its_distribution_and_its_items_are_their_own():
    prior = small_prior(num_embeddings=500)
    noise = sampler.gumbel_noise(prior, 0, "slices", tf.range(4)).numpy()
    quantiles = np.quantile(noise, (0.1, 0.5, 0.9))
    np.testing.assert_allclose(quantiles, -np.log(-np.log([0.1, 0.5, 0.9])), atol=0.02)
    np.testing.assert_array_equal(sampler.gumbel_noise(prior, 0, "slices", tf.range(2, 4)), noise[2:])


def test_streams_seeds_items_and_purposes_have_independent_noise():
    """Sample i and slice i of the first head: their noise has the same index, but is of another stream."""
    prior = small_prior(grid_size=8, num_embeddings=64)  # 4,096 numbers an item: correlations below 0.07
    streams = [("slices", 0), ("heads", 0), ("calibration 1", 0), ("slices", 1), ("heads", 1)]
    noise = [sampler.gumbel_noise(prior, seed, stream, tf.range(3)) for stream, seed in streams]
    items = np.reshape(noise, (15, -1))
    persons = [sampler.uniform(seed, f"{stream} people", tf.range(3), (4096,)) for stream, seed in streams]
    correlation = np.corrcoef(np.concatenate([items, *persons]))
    assert np.abs(correlation - np.eye(len(correlation))).max() < 0.07


@pytest.fixture(scope="module")
def prior():
    """A prior of ten positions, so that the slices of a head have contexts of no to all four slices."""
    return small_prior(num_positions=10)


@pytest.mark.parametrize("kernel_size, temperature, dtype", (
    (3, 1.0, "float32"), (5, 0.5, "float32"), (3, 1.0, "mixed_bfloat16")))
def test_cached_sampling_equals_full_forwards_code_by_code(kernel_size, temperature, dtype):
    prior, positions = small_prior(kernel_size=kernel_size, dtype=dtype), tf.constant([0, 1, 3])
    noise = sampler.gumbel_noise(prior, 7, "slices", tf.range(3))
    context, person = map(tf.constant, random_conditions(prior, 3))
    slow = sample_by_full_forwards(prior, positions, noise, temperature, context, person)
    assert len(np.unique(slow)) > 4
    fast = prior.compiled_sampler(positions, noise, tf.constant(temperature), context, person)
    np.testing.assert_array_equal(fast, slow)
    persons = sampler.sample_people(prior, 7, "slices", tf.range(3))
    alone = sample_by_full_forwards(prior, positions, noise, temperature, None, persons)
    np.testing.assert_array_equal(prior.sample(positions, seed=7, temperature=temperature), alone)
    assert (alone != slow).any()


def test_samples_do_not_depend_on_the_precision_of_training():
    prior, mixed = small_prior(), small_prior(dtype="mixed_bfloat16")
    mixed.set_weights(prior.get_weights())
    heads, flags, sample = prior.sample_heads(32, seed=1), [], mixed.compiled_sampler

    def spy(*arguments):
        flags.append(tf.config.experimental.tensor_float_32_execution_enabled())
        return sample(*arguments)

    mixed.compiled_sampler = spy
    np.testing.assert_array_equal(mixed.sample_heads(32, seed=1), heads)
    mixed.sample(np.zeros(32, int))
    assert flags == [False] * 5 and tf.config.experimental.tensor_float_32_execution_enabled()


def test_slices_depend_on_the_seed_but_not_on_the_batch_size(prior):
    positions = [0, 1, 2, 3, 0]
    codes = prior.sample(positions, seed=1)
    assert codes.shape == (5, 6, 6) and codes.dtype == np.int32
    np.testing.assert_array_equal(prior.sample(positions, seed=1, batch_size=3), codes)
    assert (prior.sample(positions, seed=2) != codes).any()
    assert (codes[0] != codes[4]).any()  # one position, other noise


def test_positions_that_training_people_lack_cannot_be_sampled():
    prior = small_prior(slice_positions=[1, 3])
    for position in (0, 4):
        with pytest.raises(ValueError, match=rf"positions must be among \[1, 3\], got \[3, {position}\]"):
            prior.sample([3, position])


def test_heads_are_sampled_upwards_each_slice_given_those_sampled_below(prior):
    assert prior.steps_below == (1, 2, 4, 8)
    prior.person_shift.assign(np.linspace(-1, 1, 24))
    prior.person_scale.assign(np.linspace(1, 2, 24))
    heads = prior.sample_heads(4, seed=5, temperature=0.9, batch_size=3)
    assert heads.shape == (4, 10, 6, 6) and heads.dtype == np.int32
    np.testing.assert_array_equal(prior.sample_heads(3, seed=5, temperature=0.9), heads[:3])
    assert (prior.sample_heads(3, seed=6, temperature=0.9) != heads[:3]).any()
    persons = sampler.sample_people(prior, 5, "heads", tf.range(3))
    persons = np.linspace(-1, 1, 24) + np.linspace(1, 2, 24) * persons
    none = np.full((3, 6, 6), 11, np.int32)
    for position in (0, 1, 9):
        below = [heads[:3, position - step] if position >= step else none for step in (1, 2, 4, 8)]
        noise = sampler.gumbel_noise(prior, 5, "heads", tf.range(3) * 10 + position)
        given = np.stack(below, axis=1), np.float32(persons)
        slow = sample_by_full_forwards(prior, tf.fill([3], position), noise, 0.9, *given)
        np.testing.assert_array_equal(heads[:3, position], slow)
    # Given persons are taken as they are.
    given = sampler.sample_heads(prior, 3, 5, 0.9, persons=persons)
    np.testing.assert_array_equal(given, heads[:3])
    assert (sampler.sample_heads(prior, 3, 5, 0.9, persons=persons - 1) != given).any()
    assert (sampler.sample_heads(prior, 3, 5, 0.9, persons=persons, stream="calibration 1") != given).any()


def test_heads_have_the_slices_that_training_people_have():
    prior = small_prior(num_positions=10, slice_positions=[2, 3, 7])
    heads = prior.sample_heads(1, seed=0)
    assert heads.shape == (1, 3, 6, 6)
    none = np.full((1, 6, 6), 11, np.int32)
    persons = sampler.calibrated_people(prior, 0, "heads", tf.range(1))
    context = np.stack([none, none, heads[:, 1], none], axis=1)  # slice 7: of 6, 5, 3 and -1 there is 3
    noise = sampler.gumbel_noise(prior, 0, "heads", tf.constant([7]))
    slow = sample_by_full_forwards(prior, tf.constant([7]), noise, 1.0, context, persons)
    np.testing.assert_array_equal(heads[:, 2], slow)


def test_steered_people_have_the_size_asked_for_and_else_stay_as_they_are(prior):
    prior.person_shift.assign(np.linspace(-1, 1, 24))
    weights = np.linspace(-0.3, 0.2, 24)
    uncorrected = sampler.sample_people(prior, 5, "heads", tf.range(3)).numpy()
    ventricles = {"weights": weights.tolist(), "offset": 3.0, "quantiles": [1, 2, 5]}
    for quantile, sizes in ((0.25, 1.5), (np.array([0, 0.5, 1]), [1, 2, 5])):
        persons = sampler.steered_people(prior, ventricles, 3, 5, quantile) - prior.person_shift.numpy()
        persons /= prior.person_scale.numpy()
        np.testing.assert_allclose(3 + persons @ weights, sizes, atol=1e-4)
        moves = persons - uncorrected
        np.testing.assert_allclose(moves, np.outer(moves @ weights / (weights @ weights), weights), atol=1e-4)
    with pytest.raises(UserError, match="ventricles do not follow from persons; leave out --ventricles"):
        sampler.steered_people(prior, {**ventricles, "weights": [0] * 24}, 3, 5, 0.5)


def test_samples_follow_the_distribution():
    prior = small_prior(grid_size=1, num_embeddings=4)
    noise = sampler.gumbel_noise(prior, 0, "slices", tf.range(4000))
    codes = sampler.sample_codes(prior, tf.zeros(4000, tf.int32), noise, 1.0)
    share = np.bincount(np.ravel(codes), minlength=4) / 4000
    distribution = prior.distribution(np.zeros((1, 1, 1), np.int32), np.zeros(1, np.int32))
    expected = distribution.probs_parameter().numpy().ravel()
    np.testing.assert_allclose(share, expected, atol=4 * np.sqrt(0.25 / 4000))
    assert sampler.sample_codes(prior, tf.constant([0]), noise[:1], 0.0).numpy().item() == expected.argmax()


# What one process exports or saves, another uses: the first half without this repository.
OTHER_PROCESS = """
import sys
import numpy as np, tensorflow as tf
encoder, decoder, sampler, head_sampler = (
    tf.saved_model.load(name) for name in ("encoder", "decoder", "sampler", "head_sampler"))
expected = np.load("expected.npz")
np.testing.assert_array_equal(encoder(expected["images"]), expected["codes"])
np.testing.assert_allclose(decoder(encoder(expected["images"])), expected["decoded"], atol=1e-5)
np.testing.assert_allclose(decoder(encoder(expected["images"][:1])), expected["decoded"][:1], atol=1e-5)
np.testing.assert_array_equal(sampler(expected["positions"], 5, 0.9), expected["slices"])
np.testing.assert_array_equal(head_sampler(2, 5, 0.9), expected["heads"])
served = decoder.signatures["serving_default"](codes=tf.constant(expected["codes"]))
np.testing.assert_allclose(next(iter(served.values())), expected["decoded"], atol=1e-5)

assert "modules" not in sys.modules
sys.path.insert(0, sys.argv[1])
import keras
import modules
vqvae, prior = (keras.models.load_model(f"{name}.keras", safe_mode=True) for name in ("vqvae", "prior"))
decoded = vqvae.decode_codes(vqvae.encode_to_codes(expected["images"]))
np.testing.assert_allclose(decoded, expected["decoded"], atol=1e-5)
log_prob = prior.log_prob(expected["codes"], expected["positions"])
np.testing.assert_allclose(log_prob, expected["log_prob"], rtol=1e-5)
"""


def test_exported_models_run_without_this_repository_and_saved_ones_with_it(tmp_path, capsys):
    vqvae, prior = small_vqvae(margin=8), small_prior(grid_size=8, num_embeddings=16)
    images = np.random.default_rng(0).uniform(-1, 1, (3, 64, 64, 1)).astype(np.float32)
    codes, positions = vqvae.encode_to_codes(images), np.array([0, 3, 1], np.int32)
    # Batches of 2 both, so that one sampler is compiled.
    np.savez(tmp_path / "expected.npz", images=images, codes=codes, decoded=vqvae.decode_codes(codes),
             positions=positions, slices=prior.sample(positions, seed=5, temperature=0.9, batch_size=2),
             log_prob=prior.log_prob(codes, positions), heads=prior.sample_heads(2, seed=5, temperature=0.9))
    sampler.export(vqvae, prior, tmp_path)
    printed = capsys.readouterr().out
    for part in ("encoder, 1 of 4", "decoder, 2 of 4", "sampler, 3 of 4", "head_sampler, 4 of 4"):
        assert f"Exporting {part}" in printed
    vqvae.save(tmp_path / "vqvae.keras")
    prior.save(tmp_path / "prior.keras")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", OTHER_PROCESS, ROOT], cwd=tmp_path, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

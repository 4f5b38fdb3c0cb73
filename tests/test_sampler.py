"""The exact sampler against the whole network, its noise, slices and heads."""

import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf

from support import sampler
from tests.conftest import ROOT
from tests.small import check_sampled, random_conditions, small_prior, small_vqvae


@pytest.fixture(scope="module")
def prior():
    """Ten positions: contexts have none to all four slices. Compiled for batches of 3 and 2 alone."""
    prior = small_prior(num_positions=10)
    prior.person_shift.assign(np.linspace(-1, 1, 24))
    prior.person_scale.assign(np.linspace(1, 2, 24))
    return prior


def test_noise_is_gumbel_noise_independent_between_streams_seeds_items_and_purposes():
    # All that is read of a prior. 4,096 numbers an item: correlations below 0.07.
    prior = SimpleNamespace(grid_size=8, num_embeddings=64)
    streams = [("slices", 0), ("heads", 0), ("calibration 1", 0), ("slices", 1), ("heads", 1)]
    noise = [sampler.gumbel_noise(prior, seed, stream, tf.range(3)) for stream, seed in streams]
    quantiles = np.quantile(noise, (0.1, 0.5, 0.9))
    np.testing.assert_allclose(quantiles, -np.log(-np.log([0.1, 0.5, 0.9])), atol=0.02)
    np.testing.assert_array_equal(sampler.gumbel_noise(prior, 0, "slices", tf.range(2, 3)), noise[0][2:])
    persons = [sampler.uniform(seed, f"{stream} people", tf.range(3), (4096,)) for stream, seed in streams]
    correlation = np.corrcoef(np.concatenate([np.reshape(noise, (15, -1)), *persons]))
    assert np.abs(correlation - np.eye(30)).max() < 0.07


@pytest.mark.parametrize("temperature, other", (
    (1.0, {}),
    (0.0, {"kernel_size": 5, "knows_noise": False, "embedding_dim": None, "dtype": "mixed_bfloat16"})))
def test_cached_sampling_gives_the_codes_of_the_whole_network(prior, temperature, other):
    prior, positions = small_prior(**other) if other else prior, tf.constant([0, 1, 3])
    noise = sampler.gumbel_noise(prior, 7, "slices", tf.range(3))
    context, person = map(tf.constant, random_conditions(prior, 3))
    codes = sampler.compiled_sampler(prior)(positions, noise, temperature, context, person).numpy()
    check_sampled(codes, prior, positions, noise, temperature, context, person)
    alone = prior.sample(positions, seed=7, temperature=temperature)
    persons = sampler.sample_people(prior, 7, "slices", tf.range(3))
    check_sampled(alone, prior, positions, noise, temperature, None, persons)
    assert (alone != codes).any() and len(np.unique(codes)) > 3


def test_samples_depend_on_seed_and_stream_but_not_on_the_batch_size(prior):
    codes, heads = prior.sample([0, 1, 0], seed=1), prior.sample_heads(3, seed=1)
    assert codes.shape == (3, 6, 6) and heads.shape == (3, 10, 6, 6)
    assert codes.dtype == heads.dtype == np.int32
    np.testing.assert_array_equal(prior.sample([0, 1, 0, 3, 2], seed=1, batch_size=3)[:3], codes)
    np.testing.assert_array_equal(prior.sample_heads(4, seed=1, batch_size=3)[:3], heads)
    assert [len(batch) for batch in sampler.heads_in_batches(prior, 3, seed=1, batch_size=2)] == [2, 1]
    assert prior.sample_heads(0).shape == (0, 10, 6, 6)
    assert (prior.sample([0, 1, 0], seed=2) != codes).any() and (prior.sample_heads(3, seed=2) != heads).any()
    assert (prior.sample_heads(3, seed=1, stream="calibration 1") != heads).any()
    assert (codes[0] != codes[2]).any()  # one position, other noise


@pytest.mark.parametrize("positions, contexts", (
    (range(10), {0: (None,) * 4, 1: (0, None, None, None), 9: (8, 7, 5, 1)}),
    ((2, 3, 7), {7: (None, None, 3, None)})))  # of 6, 5, 3 and -1 there is 3 alone
def test_heads_are_sampled_upwards_each_slice_given_those_below_that_training_people_have(
        prior, monkeypatch, positions, contexts):
    monkeypatch.setattr(prior, "slice_positions", positions)
    assert prior.steps_below == (1, 2, 4, 8)
    heads = prior.sample_heads(3, seed=5, temperature=0.9)
    persons = sampler.sample_people(prior, 5, "heads", tf.range(3))
    persons = np.float32(np.linspace(-1, 1, 24) + np.linspace(1, 2, 24) * persons)
    slices = dict(zip(positions, heads.swapaxes(0, 1))) | {None: np.full((3, 6, 6), 11, np.int32)}
    for position, below in contexts.items():
        context = np.stack([slices[other] for other in below], axis=1)
        noise = sampler.gumbel_noise(prior, 5, "heads", tf.range(3) * 10 + position)
        check_sampled(slices[position], prior, tf.fill([3], position), noise, 0.9, context, persons, 0.2)
    # Given persons are taken as they are.
    np.testing.assert_array_equal(prior.sample_heads(3, 5, 0.9, persons=persons), heads)
    assert (prior.sample_heads(3, 5, 0.9, persons=persons - 1) != heads).any()
    with pytest.raises(ValueError, match=rf"positions must be among \[.*{positions[-1]}\], got \[2, 11\]"):
        prior.sample([2, 11])


def test_steered_people_have_the_size_asked_for_and_else_stay_as_they_are(prior):
    weights = np.linspace(-0.3, 0.2, 24)
    uncorrected = sampler.sample_people(prior, 5, "heads", tf.range(3)).numpy()
    ventricles = {"weights": weights.tolist(), "offset": 3.0, "quantiles": [1, 2, 5]}
    for quantile, sizes in ((0.25, 1.5), (np.array([0, 0.5, 1]), [1, 2, 5])):
        persons = sampler.steered_people(prior, ventricles, 3, 5, quantile) - prior.person_shift.numpy()
        persons /= prior.person_scale.numpy()
        np.testing.assert_allclose(3 + persons @ weights, sizes, atol=1e-4)
        moves = persons - uncorrected
        np.testing.assert_allclose(moves, np.outer(moves @ weights / (weights @ weights), weights), atol=1e-4)


# What one process exports or saves, another uses: first without this repository, then as a notebook does.
OTHER_PROCESS = """
import os
import sys
from unittest.mock import patch
import numpy as np, tensorflow as tf
encoder, decoder, sampler, head_sampler = (
    tf.saved_model.load(name) for name in ("encoder", "decoder", "sampler", "head_sampler"))
expected = np.load("expected.npz")
np.testing.assert_array_equal(encoder(expected["images"]), expected["codes"])
np.testing.assert_allclose(decoder(encoder(expected["images"][:1])), expected["decoded"][:1], atol=1e-5)
np.testing.assert_array_equal(sampler(expected["positions"], 5, 0.9), expected["slices"])
np.testing.assert_array_equal(head_sampler(2, 5, 0.9), expected["heads"])
assert "modules" not in sys.modules
sys.path.insert(0, sys.argv[1])
import matplotlib.pyplot
import keras
try:
    with patch("keras.backend.backend", lambda: "jax"):
        import modules
except ImportError as error:
    print(error)
before = dict(os.environ)
import modules
assert dict(os.environ) == before
assert matplotlib.get_backend() == "svg" and "support.environment" not in sys.modules
vqvae, prior = (keras.models.load_model(f"{name}.keras", safe_mode=True) for name in ("vqvae", "prior"))
log_prob = prior.log_prob(vqvae.encode_to_codes(expected["images"]), expected["positions"])
np.testing.assert_allclose(log_prob, expected["log_prob"], rtol=1e-5)
"""


def test_exports_run_without_this_repository_and_a_notebook_keeps_its_environment(tmp_path, capsys):
    vqvae = small_vqvae(margin=8)
    prior = small_prior(grid_size=8, num_embeddings=16, num_positions=2, num_layers=2)
    images = np.random.default_rng(0).uniform(-1, 1, (2, 64, 64, 1)).astype(np.float32)
    codes, positions = vqvae.encode_to_codes(images), np.array([1, 0], np.int32)
    # Batches of 2 both, so that one sampler is compiled.
    np.savez(tmp_path / "expected.npz", images=images, codes=codes, decoded=vqvae.decode_codes(codes),
             positions=positions, slices=prior.sample(positions, seed=5, temperature=0.9),
             log_prob=prior.log_prob(codes, positions), heads=prior.sample_heads(2, seed=5, temperature=0.9))
    sampler.export(vqvae, prior, tmp_path)
    assert "Exporting head_sampler, 5 of 5 ..." in capsys.readouterr().out
    vqvae.save(tmp_path / "vqvae.keras")
    prior.save(tmp_path / "prior.keras")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment.update(MPLBACKEND="svg", KERAS_HOME=str(tmp_path), KERAS_BACKEND="tensorflow", KERAS_MINE="1")
    done = subprocess.run([sys.executable, "-c", OTHER_PROCESS, ROOT], cwd=tmp_path, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "backend tensorflow and image_data_format channels_last" in done.stdout

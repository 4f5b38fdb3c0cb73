"""Small networks with random weights, what checks their samples, and runs that train small networks."""

from pathlib import Path
from unittest import mock

import numpy as np

from benchmarks.tiny import TINY
import modules
from support import orientation
from support.files import write_json
import train

# Traced several times as fast as those that train.py makes
SMALL_VQVAE = {"width": 16, "num_residual_blocks": 1}
SMALL_PRIOR = {"num_filters": 16, "num_layers": 2}  # one with attention, one without


def small_vqvae(**kwargs):
    """A VQ-VAE of images of 64x64 pixels, 8x8 codes of 16."""
    return modules.VQVAE(**{"image_size": 64, "num_embeddings": 16, "embedding_dim": 4, "width": 8,
                            "num_residual_blocks": 1, **kwargs})


def small_prior(**kwargs):
    """A prior with random weights throughout: those that start at zero would hide mistakes."""
    prior = modules.PixelCNN(**{"grid_size": 6, "num_embeddings": 11, "num_positions": 4, "num_filters": 8,
                                "num_layers": 3, "knows_noise": True, "context_noise": 0.2,
                                "embedding_dim": 3, **kwargs})
    rng = np.random.default_rng(2)
    for weight in prior.trainable_variables:
        weight.assign(weight + rng.normal(0, 0.4, weight.shape))
    for weight in prior.logits.layers[-1].trainable_variables:
        weight.assign(0.1 * weight)  # else one code takes all
    convolutions = [layer for layer in prior.context_blocks.layers if layer.trainable_variables]
    for layer in convolutions[1::2]:
        for weight in layer.trainable_variables:
            weight.assign(0.02 * weight)  # else they drown the codes
    prior.fit_people(rng.uniform(size=(5, prior.num_positions, 16, 16)))
    if prior.settings["embedding_dim"]:
        prior.code_vectors.assign(rng.normal(size=prior.code_vectors.shape))
        prior.movement.assign(0.7)
    return prior


def random_vectors(shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def random_conditions(prior, count, seed=4):
    """A context, int32 (count, S, g, g), and persons, float32 (count, P)."""
    rng, size = np.random.default_rng(seed), prior.grid_size
    context = rng.integers(0, prior.num_embeddings, (count, len(prior.steps_below), size, size), np.int32)
    return context, rng.normal(size=(count, prior.person_size)).astype(np.float32)


def check_sampled(codes, prior, positions, noise, temperature, context=None, person=None, noise_share=0.0):
    """Asserts that codes are those of `sampler.sample_codes`, by the whole network.

    Its logits of a code depend on those before it alone: each is the right one if all before are.
    """
    noise_shares = np.full(len(codes), noise_share, np.float32)
    logits = prior.distribution(codes, positions, context, person, noise_shares).logits
    np.testing.assert_array_equal(codes, np.argmax(logits + temperature * noise, axis=-1))


def new_run(folder, data_dir, *options, settings=(), **prior):
    """Writes the config.json of a run of small networks, which train.py --resume trains; returns its folder.

    `options` are train.py's, `settings` those without one, `prior` arguments of `modules.PixelCNN`.
    """
    folder = Path(folder)
    arguments = train.parse_arguments(["--data-dir", str(data_dir), *TINY, *options])
    folder.mkdir(parents=True)
    with mock.patch.object(orientation, "match_template", lambda *_: orientation.Match(None, 0, 0, 0, 0)):
        run, _ = train.new_run(folder, arguments)  # it takes 2 s to find that drawn ellipses are no brains
    run.config["settings"].update({"decoder_epochs": 2, **dict(settings)})
    run.config["vqvae"].update(SMALL_VQVAE)
    run.config["pixelcnn"].update({**SMALL_PRIOR, **prior})
    write_json(folder / "config.json", run.config)
    return folder

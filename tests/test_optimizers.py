"""Adam against its published formula, Muon against the singular value decomposition."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from support import optimizers


def gradients_of(shapes, count):
    """Random gradients: a list of `count` lists."""
    rng = np.random.default_rng(0)
    return [[rng.normal(size=shape).astype(np.float32) for shape in shapes] for _ in range(count)]


def make_variables(shapes, names):
    rng = np.random.default_rng(1)
    return [keras.Variable(np.float32(rng.normal(size=size)), name=name) for size, name in zip(shapes, names)]


def test_adam_is_that_of_2015_with_the_whole_gradients_norm_clipped():
    """Kingma and Ba, algorithm 1, with epsilon beside the uncorrected root as in Keras (end of section 2)."""
    shapes = (4, 3), (5,)
    variables = make_variables(shapes, ("kernel", "bias"))
    values, first, second = [v.numpy().astype(float) for v in variables], [0, 0], [0, 0]
    optimizer = optimizers.Adam(0.1, beta_1=0.9, beta_2=0.99, epsilon=1e-3, global_clipnorm=1.0)
    for step, gradients in enumerate(gradients_of(shapes, 3), 1):
        optimizer.apply([tf.constant(gradient) for gradient in gradients], variables)
        norm = np.sqrt(sum((gradient ** 2).sum() for gradient in gradients))
        rate = 0.1 * np.sqrt(1 - 0.99 ** step) / (1 - 0.9 ** step)
        for index, gradient in enumerate(gradients):
            gradient = gradient / max(norm, 1)
            first[index] = 0.9 * first[index] + 0.1 * gradient
            second[index] = 0.99 * second[index] + 0.01 * gradient ** 2
            values[index] = values[index] - rate * first[index] / (np.sqrt(second[index]) + 1e-3)
            np.testing.assert_allclose(variables[index], values[index], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", ((3, 8, 5), (2, 4, 9)))
def test_orthogonalised_matrices_keep_their_singular_vectors_and_lose_their_singular_values(shape):
    matrices = gradients_of([shape], 1)[0][0]
    left, values, right = np.linalg.svd(matrices, full_matrices=False)
    between = np.einsum("nri,nrc,njc->nij", left, optimizers.orthogonalise(tf.constant(matrices)), right)
    # The polynomial of Jordan et al. takes singular values to about 1, not to it.
    expected = values / np.sqrt((values ** 2).sum(axis=1, keepdims=True))
    for _ in range(5):
        expected = 3.4445 * expected - 4.7750 * expected ** 3 + 2.0315 * expected ** 5
    assert (expected > 0.6).all() and (expected < 1.3).all()
    np.testing.assert_allclose(between, expected[..., np.newaxis] * np.eye(values.shape[1]), atol=1e-3)


def test_muon_moves_kernels_along_their_orthogonalised_momentum_and_decays_them_the_rest_as_adam():
    shapes = (6, 4), (6, 4), (3, 3, 2, 4), (7, 4), (4,), (4, 9)
    names = "kernel", "kernel", "kernel", "embeddings", "bias", "logits_kernel"
    variables, twins = make_variables(shapes, names), make_variables(shapes, names)
    values, momenta = [v.numpy().astype(float) for v in variables[:3]], [0, 0, 0]
    muon, adam = optimizers.Muon(0.01, beta_2=0.99, weight_decay=0.5), optimizers.Adam(0.01, beta_2=0.99)
    for gradients in gradients_of(shapes, 3):
        for optimizer, moved in (muon, variables), (adam, twins):
            optimizer.apply([tf.constant(gradient) for gradient in gradients], moved)
        for index in range(3):
            momenta[index] = 0.95 * momenta[index] + gradients[index]
            ahead = (gradients[index] + 0.95 * momenta[index]).reshape(-1, shapes[index][-1])
            direction = np.reshape(optimizers.orthogonalise(tf.constant(ahead[np.newaxis])), shapes[index])
            step = 0.2 * np.sqrt(max(ahead.shape)) * direction + 0.5 * values[index]
            values[index] = values[index] - 0.01 * step
            np.testing.assert_allclose(variables[index], values[index], atol=1e-5)
    for variable, twin in zip(variables[3:], twins[3:]):
        np.testing.assert_array_equal(variable, twin)

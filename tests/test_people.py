"""The space of persons: whitened, sampled as people are spread, and the calibration of sampled heads."""

import numpy as np
import pytest
from scipy import stats
import tensorflow as tf

from support import people


@pytest.fixture
def cohort_pictures():
    """Pictures of 60 heads of 4 slices, (60, 4, 16, 16), which 4 hidden numbers explain, not normal."""
    rng = np.random.default_rng(0)
    hidden = rng.uniform(-1, 1, (60, 4)) ** 3
    parts = np.einsum("np,pdhw->ndhw", hidden * [9, 6, 3, 1], rng.normal(size=(4, 4, 16, 16)))
    return parts + rng.normal(size=(4, 16, 16))


def test_persons_are_whitened_and_explain_the_pictures(cohort_pictures):
    mean, components, _ = people.fit(cohort_pictures, 3)
    persons = people.encode(cohort_pictures, mean, components)
    assert persons.dtype == np.float32
    np.testing.assert_allclose(np.cov(persons.T), np.eye(3), atol=0.05)
    decoded = mean + np.einsum("dhwp,np->ndhw", components, persons)
    assert ((decoded - cohort_pictures) ** 2).mean() < 0.1 * cohort_pictures.var(axis=0).mean()
    np.testing.assert_array_equal(persons * 32, np.round(persons * 32))  # rounded, so that 8 bits hold each
    far = people.encode(cohort_pictures * 1000, mean, components)
    assert far.min() == -128 / 32 and far.max() == 127 / 32


def test_new_persons_are_spread_as_people_are(cohort_pictures):
    *space, quantiles = people.fit(cohort_pictures, 3)
    persons = people.encode(cohort_pictures, *space)
    uniform = np.random.default_rng(1).uniform(size=(4000, 3)).astype(np.float32)
    sampled = people.sample(tf.constant(quantiles, tf.float32), uniform).numpy()
    np.testing.assert_allclose(sampled.mean(axis=0), 0, atol=0.06)
    np.testing.assert_allclose(np.cov(sampled.T), np.eye(3), atol=0.08)
    assert all(stats.ks_2samp(sampled[:, number], persons[:, number]).statistic < 0.08 for number in range(3))


def test_a_head_with_most_slices_missing_is_the_average_person(cohort_pictures):
    gaps = cohort_pictures.copy()
    gaps[0, :3] = gaps[1, 0] = np.nan
    persons = people.encode(gaps, *people.fit(cohort_pictures, 3)[:2])
    assert (persons[0] == 0).all() and (persons[1] != 0).all()


@pytest.mark.parametrize("count", (1, 3))
def test_numbers_beyond_the_number_of_people_are_0(cohort_pictures, count):
    *space, quantiles = people.fit(cohort_pictures[:count], 6)
    persons = people.encode(cohort_pictures, *space)
    assert (persons != 0).any(axis=0).tolist() == [True] * (count - 1) + [False] * (7 - count)
    assert np.isfinite(quantiles).all() and (quantiles[:, count - 1:] == 0).all()


def test_calibrated_heads_differ_as_much_as_people_do():
    rng = np.random.default_rng(0)
    slope, offset, noise = np.array([[0.9, 0.7, 0.8, 0.6], [0.4, -0.3, 0.0, 0.2], [0.3, 0.6, 0.1, 0.5]])

    def outcome(conditions):
        return offset + slope * conditions + noise * rng.normal(size=conditions.shape)

    conditions = rng.normal(size=(3000, 4))
    for _ in range(2):  # the second time from what the first one corrects
        shift, scale = people.calibrate(conditions, outcome(conditions))
        conditions = shift + scale * rng.normal(size=(3000, 4))
        outcomes = outcome(conditions)
        np.testing.assert_allclose(outcomes.mean(axis=0), 0, atol=0.07)
        np.testing.assert_allclose(outcomes.std(axis=0), 1, atol=0.06)


def test_a_calibration_goes_no_further_than_training_went():
    conditions = np.random.default_rng(0).normal(size=(3000, 4))
    untrained = 10 + np.random.default_rng(1).normal(size=(3000, 4))
    shift, scale = people.calibrate(conditions, untrained)
    assert (shift == -1).all() and (scale == 1).all()
    np.testing.assert_allclose(people.calibrate(conditions, 0.01 * conditions)[1], 2, rtol=1e-4)
    shift, scale = people.calibrate(conditions[:1], conditions[:1])  # of a head alone
    assert (shift == 0).all() and (scale == 1).all()


def test_pictures_are_resampled_linearly_over_the_same_extent(grid_size=40):
    signal = np.random.default_rng(0).normal(size=16)
    expected = np.interp((np.arange(grid_size) + 0.5) * 16 / grid_size - 0.5, np.arange(16), signal)
    np.testing.assert_allclose(people.picture_to_grid(grid_size) @ signal, expected, atol=1e-6)

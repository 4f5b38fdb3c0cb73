import numpy as np
import pytest
from scipy import ndimage, stats
from sklearn.metrics import roc_auc_score

from support import judge, metrics
from support.images import brain_box


def draw_people(count, seed=0, slices=12, size=64):
    """Smooth heads in a black frame that change slowly from slice to slice, each with a dark middle of its own width."""
    rng = np.random.default_rng(seed)
    heads = ndimage.gaussian_filter(rng.random((count, slices, size, size)), (0, 3, 3, 3))
    heads = 0.6 + 0.3 * (heads - heads.mean()) / heads.std() / 3
    y, x = np.mgrid[-1:1:size * 1j, -1:1:size * 1j]
    for head, width in zip(heads, rng.uniform(0.1, 0.3, count)):
        head[:, np.hypot(x, y) < width] = 0.1
    return np.uint8(255 * np.where(np.hypot(x / 0.7, y / 0.85) < 1, heads.clip(0.05, 1), 0))


# Told apart


def test_a_judge_finds_fakes_and_cannot_find_real_ones():
    real, fake, test = (draw_people(12, seed, slices=6, size=32) for seed in (1, 2, 3))
    dark = np.uint8(0.7 * fake)
    alike, = judge.judge_logits(real, dark, [np.concatenate([test, dark])], seeds=[0])
    assert alike.shape == (1, 24, 6)
    found = judge.told_apart("found", alike[:, :12], alike[:, 12:])
    assert found["found"] > 0.98
    new, = judge.judge_logits(real, fake, [np.concatenate([test, draw_people(12, 4, slices=6, size=32)])], seeds=[0])
    assert abs(judge.told_apart("found", new[:, :12], new[:, 12:])["found"] - 0.5) < 0.15


def test_the_head_judge_alone_sees_whether_slices_belong_together():
    real, test = draw_people(16, 1, slices=8, size=32), draw_people(16, 2, slices=8, size=32)
    fakes = judge.mix_people(real), judge.mix_people(test)
    auc = {}
    for channels, count in ((judge.SLICE_JUDGE, 8), (judge.HEAD_JUDGE, 4)):
        of_real, of_fake = judge.judge_logits(real, fakes[0], [test, fakes[1]], seeds=[0], channels=channels)
        assert of_real.shape == of_fake.shape == (1, 16, count)
        auc[channels] = judge.told_apart("auc", *(logits.mean(axis=2, keepdims=True) for logits in (of_real, of_fake)))["auc"]
    assert auc[judge.HEAD_JUDGE] > 0.95 and abs(auc[judge.SLICE_JUDGE] - 0.5) < 0.2


def test_judges_depend_on_their_seed_alone(monkeypatch):
    monkeypatch.setattr(judge, "JUDGE_STEPS", 5)
    real, fake, test = (draw_people(3, seed, slices=3, size=16) for seed in (1, 2, 3))
    both, = judge.judge_logits(real, fake, [test], seeds=[4, 5])
    alone, = judge.judge_logits(real, fake, [test], seeds=[5])  # no trace of the judge before it
    np.testing.assert_allclose(both[1], alone[0], atol=1e-5)
    assert np.abs(both[0] - both[1]).max() > 1e-3


def test_wins_are_the_area_under_the_roc_curve():
    rng = np.random.default_rng(0)
    real, fake = rng.integers(0, 9, (3, 4, 5)), rng.integers(3, 12, (3, 6, 5))  # with ties
    by_pair = judge.wins(real, fake)
    assert by_pair.shape == (3, 4, 6)
    expected = [roc_auc_score(np.repeat([0, 1], [20, 30]), np.concatenate([a.ravel(), b.ravel()])) for a, b in zip(real, fake)]
    np.testing.assert_allclose(by_pair.mean(axis=(1, 2)), expected)
    measured = judge.told_apart("auc", real, fake)
    assert measured["auc"] == pytest.approx(np.median(expected))
    np.testing.assert_allclose(measured["auc_range"], [min(expected), max(expected)])
    low, high = measured["auc_interval"]
    assert low < np.mean(expected) < high
    # Of heads that differ in their means alone, the interval is that of a mean over pairs.
    only = judge.told_apart("auc", np.zeros((1, 30, 1)), np.repeat([1.0, -1.0], [20, 20]).reshape(1, 40, 1))
    half = 1.96 * 0.5 / np.sqrt(40)
    np.testing.assert_allclose(only["auc_interval"], [0.5 - half, 0.5 + half], atol=0.15 * half)


def test_mixtures_draw_each_part_from_anyone_and_keep_its_place():
    heads = np.arange(5 * 6, dtype=np.uint8).reshape(5, 6, 1, 1).repeat(4, axis=3)
    stacks = judge.mix_people(heads)
    assert stacks.shape == heads.shape and stacks.dtype == heads.dtype
    np.testing.assert_array_equal(stacks % 6, heads % 6)  # each slice at its place
    assert (stacks == stacks[..., :1]).all()
    assert all(len(np.unique(stack // 6)) > 1 for stack in stacks)
    codes = judge.mix_people(heads, axes=3)
    np.testing.assert_array_equal(codes % 6, heads % 6)
    assert (codes != codes[..., :1]).any()


def test_the_box_holds_all_brains_and_no_more():
    heads = np.zeros((2, 3, 20, 30), np.uint8)
    heads[0, 1, 4:9, 7] = heads[1, 2, 6, 5:12] = 200
    heads[0, 0, 0, 0] = 7  # darker than brain
    box = brain_box(heads)
    assert heads[box].shape == (2, 3, 5, 7) and (heads[box] == 200).sum() == (heads == 200).sum()
    assert heads[brain_box(0 * heads)].shape == heads.shape


# Statistics


def test_slice_correlation_is_the_mean_over_pairs_inside_the_brain():
    head = draw_people(1)[0]
    for apart in (1, 4):
        correlations = []
        for k in range(len(head) - apart):
            a, b = head[k] / 255, head[k + apart] / 255
            brain = (a > 0.03) | (b > 0.03)
            correlations.append(stats.pearsonr(a[brain], b[brain]).statistic)
        assert judge.slice_correlation(head, apart) == pytest.approx(np.mean(correlations), abs=1e-6)
    assert judge.slice_correlation(np.repeat(head[:1], 5, axis=0)) == pytest.approx(1)
    blank_above = np.concatenate([head, 0 * head])  # says nothing about the head
    assert judge.slice_correlation(blank_above) == pytest.approx(judge.slice_correlation(head))
    assert judge.slice_correlation(0 * head) == 0


def test_head_statistics_are_means_over_slices():
    heads = draw_people(3)
    measured = judge.head_statistics(heads)
    tissue = [judge.tissue_statistics(head[[0, 2, 4, 6, 8, 10]] / 255) for head in heads]
    for name, of_slices in (("dark", "dark_fraction"), ("symmetry", "symmetry")):
        np.testing.assert_allclose(measured[name], [values[of_slices].mean() for values in tissue])
    np.testing.assert_allclose(measured["brightness"], [(head / 255)[head / 255 > 0.03].mean() for head in heads])


def test_the_floor_of_a_distance_is_kolmogorovs_distribution():
    floor = judge.ks_floor("d", 300, np.random.default_rng(0).normal(size=200))
    assert floor["d"] == pytest.approx(0.869 / np.sqrt(300), rel=0.1)
    np.testing.assert_allclose(floor["d_interval"], stats.kstwobign.ppf([0.025, 0.975]) / np.sqrt(300), rtol=0.25)


def test_a_statistic_is_compared_with_the_reconstructed_training_people():
    rng = np.random.default_rng(0)
    values = {"": rng.normal(0, 0.5, 40), "_reconstructed": rng.normal(0, 1, 50), "_test": rng.normal(0, 1, 10),
              "_originals": rng.normal(3, 1, 50)}
    measured = judge.compare_statistic("x", values)
    for suffix, column in values.items():
        assert measured[f"x_mean{suffix}"] == pytest.approx(column.mean())
        assert measured[f"x_sd{suffix}"] == pytest.approx(column.std(ddof=1))
    assert measured["x_sd_ratio"] == pytest.approx(measured["x_sd"] / measured["x_sd_reconstructed"])
    assert measured["x_sd_ratio_interval"][1] < 1 < measured["x_sd_ratio_test_interval"][1]
    for suffix in ("", "_test"):
        assert measured[f"x_ks{suffix}"] == stats.ks_2samp(values[suffix], values["_reconstructed"]).statistic
    assert measured["x_ks_test_floor"] > measured["x_ks_floor"]  # fewer people, more chance


# Copies


def test_membership_is_the_auc_of_code_lengths():
    rng = np.random.default_rng(0)
    train, test = rng.normal(2, 0.1, 30), rng.normal(2.1, 0.1, 20)
    measured = judge.membership(train, test)
    assert measured["membership"] == pytest.approx(roc_auc_score(np.repeat([0, 1], [30, 20]), np.concatenate([train, test])))
    low, high = measured["membership_interval"]
    assert 0.5 < low < measured["membership"] < high
    assert judge.membership(test, test)["membership"] == 0.5


def test_the_copy_score_is_the_copy_test_at_one_position():
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 9)), rng.random((2, 6))
    expected = [metrics.copy_test(one, np.zeros(9), other, np.zeros(6)) for one, other in zip(a, b)]
    np.testing.assert_allclose(judge.copy_score(a, b), expected)


def test_copies_are_counted_and_planted_copies_found():
    def draw_folds(count, seed):
        texture = ndimage.gaussian_filter(np.random.default_rng(seed).random((count, 8, 64, 64)), (0, 3, 5, 5))
        return np.uint8((128 + 40 * (texture - texture.mean()) / texture.std()).clip(20, 240))

    people = {name: draw_folds(count, seed) for seed, (name, count) in
              enumerate({"train": 40, "validate": 12, "test": 12}.items())}
    new, _ = judge.evaluate_copies(draw_folds(24, 7), people)
    assert new["copies"] == 0 and abs(new["copy_test"]) < 2 and "0 of 24 stand out" in new["copy_test_says"]
    low, high = new["copy_test_interval"]
    assert low < new["copy_test"] < high
    for change in ("mirrored", "shifted", "brightened"):
        assert new[f"copies_found_{change}"] == new[f"copies_planted_{change}"] == 5
        assert new["copy_test"] > new[f"copy_test_1_{change}"] > new[f"copy_test_5_{change}"]
    rng = np.random.default_rng(0)
    samples = draw_folds(24, 7)
    samples[:3] = people["train"][[9, 3, 30]] - rng.integers(0, 20, samples[:3].shape)
    samples[1] = samples[1, :, :, ::-1]
    copied, details = judge.evaluate_copies(samples, people)
    assert copied["copies"] == 3
    assert details["nearest"][:3].tolist() == [9, 3, 30] and details["mirrored"][:3].tolist() == [False, True, False]
    # Heads that all keep to the middle are near to many, and copies of none.
    middle = np.uint8(people["train"].mean(axis=0, keepdims=True).repeat(24, axis=0))
    blurred, _ = judge.evaluate_copies(middle, people)
    assert blurred["copy_test"] < -3 and blurred["copies"] == 0


# All of it


def test_heads_are_judged_by_head(monkeypatch):
    learned = []

    def brightness(real, fake, groups, seeds, channels):
        """In place of trained judges: logits of a slice are its brightness, the darker the more real."""
        learned.append((len(real), len(fake), tuple(map(len, groups)), tuple(seeds), channels))
        return [np.float32(group[:, :group.shape[1] - channels[-1]].mean(axis=(2, 3)))[np.newaxis].repeat(len(seeds), axis=0)
                for group in groups]

    monkeypatch.setattr(judge, "judge_logits", brightness)
    people = {name: draw_people(count, seed, slices=9, size=32) for seed, (name, count) in
              enumerate({"train": 20, "validate": 5, "test": 6}.items())}
    sampled = np.uint8(1.05 * draw_people(16, 7, slices=9, size=32))
    noise = np.maximum(judge.mix_people(people["train"][:8], axes=3), 200)
    new, details = judge.evaluate_heads(sampled, people, people["train"], noise)
    # Three quarters of the samples and of the noise are learned from, the rest is tried beside test and validation people.
    for channels, fakes in (((0,), (12, 6, 1)), ((0, 1, 4), (12, 6, 1, 20))):
        tried = [(6, count, 5) for count in (4, 2, 1, 6)]
        expected = [(20, fake, groups, (0, 1, 2) if fake == 12 else (0,), channels) for fake, groups in zip(fakes, tried)]
        assert [row for row in learned if row[4] == channels] == expected
    test, fake = (heads[brain_box(people["train"])].mean(axis=(2, 3)) for heads in (people["test"], sampled[:4]))
    def auc(real, fake):
        return roc_auc_score(np.repeat([0, 1], [real.size, fake.size]), np.concatenate([real.ravel(), fake.ravel()]))
    assert new["told_apart_slices"] == pytest.approx(auc(test, fake), abs=0.01)
    assert new["told_apart_slices_by_head"] == pytest.approx(auc(test.mean(axis=1), fake.mean(axis=1)), abs=0.01)
    assert new["told_apart_heads_by_slice"] == pytest.approx(auc(test[:, :5], fake[:, :5]), abs=0.01)
    assert new["told_apart_heads"] == pytest.approx(auc(test[:, :5].mean(axis=1), fake[:, :5].mean(axis=1)), abs=0.01)
    assert new["told_apart_slices_noise"] == new["told_apart_heads_noise"] == 1
    assert "told_apart_heads_stacked" in new and "told_apart_slices_stacked" not in new
    assert "told_apart_heads_floor_interval" in new
    assert new["correlation_8_apart_stacked"] < new["neighbour_correlation"]
    assert new["neighbour_correlation_originals"] == new["neighbour_correlation_reconstructed"]
    assert new["num_heads"] == 16 and new["num_people"] == {"train": 20, "validate": 5, "test": 6}
    assert details["distances"].shape == details["nearest"].shape == details["mirrored"].shape == (16,)
    rows = judge.head_table(new)
    assert len({len(row) for row in rows}) == 1 and rows[1][0] == "told_apart_slices"
    row = next(row for row in rows if row[0] == "told_apart_heads")
    assert row[4].startswith(f"{new['told_apart_heads_floor']:.3g} (") and "slices of different people: " in row[5]
    row = next(row for row in rows if row[0] == "dark_ks")
    assert row[1] == f"{new['dark_ks']:.3g}" and row[3] == f"{new['dark_ks_test']:.3g}"
    assert [row[0] for row in rows if row[0].endswith("_test")] == ["copy_test"]
    row = judge.head_table(new | {"membership": 0.875, "membership_interval": [0.75, 1.0]})[-1]  # which predict.py adds
    assert row[:2] == ("membership", "0.875 (0.75 to 1)")

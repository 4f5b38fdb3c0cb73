"""The judges, statistics and searches for copies on drawn heads, beside formulas and brute force."""

import numpy as np
import pytest
from scipy import ndimage, stats
from sklearn.metrics import roc_auc_score

from support import judge
from support.images import brain_box


def draw_people(count, seed=0, slices=12, size=64):
    """Smooth heads in a black frame that change slowly from slice to slice, dark in the middle."""
    rng = np.random.default_rng(seed)
    heads = ndimage.gaussian_filter(rng.random((count, slices, size, size)), (0, 3, 3, 3))
    heads = 0.6 + 0.3 * (heads - heads.mean()) / heads.std() / 3
    y, x = np.mgrid[-1:1:size * 1j, -1:1:size * 1j]
    for head, width in zip(heads, rng.uniform(0.1, 0.3, count)):
        head[:, np.hypot(x, y) < width] = 0.1
    return np.uint8(255 * np.where(np.hypot(x / 0.7, y / 0.85) < 1, heads.clip(0.05, 1), 0))


def auc(low, high):
    """The area under the ROC curve by scikit-learn."""
    labels = np.repeat([0, 1], [np.size(low), np.size(high)])
    return roc_auc_score(labels, np.concatenate([np.ravel(low), np.ravel(high)]))


@pytest.mark.parametrize("name, fake_of, low, high", (
    ("told_apart_slices", lambda heads: np.uint8(0.7 * heads), 0.98, 1),
    ("told_apart_slices", judge.mix_people, 0.3, 0.7),  # each slice is real; do they belong together?
    ("told_apart_heads", judge.mix_people, 0.95, 1)))
def test_judges_find_what_they_can_see(name, fake_of, low, high, monkeypatch):
    monkeypatch.setattr(judge, "JUDGE_STEPS", 150)
    real, test = (draw_people(16, seed, slices=8, size=32) for seed in (1, 2))
    channels = judge.JUDGES[name]
    of_test, of_fake = judge.judge_logits(real, fake_of(real), [test, fake_of(test)], [0], channels)
    assert of_test.shape == of_fake.shape == (1, 16, 8 - channels[-1])
    assert low <= auc(of_test.mean(axis=2), of_fake.mean(axis=2)) <= high


def test_judges_depend_on_their_seed_alone(monkeypatch):
    monkeypatch.setattr(judge, "JUDGE_STEPS", 5)
    real, fake, test = (draw_people(3, seed, slices=3, size=16) for seed in (1, 2, 3))
    (first, other, again), = judge.judge_logits(real, fake, [test], [5, 4, 5], (0,))
    np.testing.assert_allclose(first, again, atol=1e-5)  # no trace of the judge before it
    assert np.abs(first - other).max() > 1e-3


def test_told_apart_is_the_area_under_the_roc_curve():
    rng = np.random.default_rng(0)
    real, fake = rng.integers(0, 9, (3, 4, 5)), rng.integers(3, 12, (3, 6, 5))  # with ties
    expected = [auc(*pair) for pair in zip(real, fake)]
    measured = judge.told_apart("auc", real, fake)
    assert measured["auc"] == pytest.approx(np.median(expected))
    low, high = measured["auc_interval"]
    assert low < np.mean(expected) < high
    # Of heads that differ in their means alone, the interval is that of a mean over pairs.
    fake = np.repeat([1.0, -1.0], [20, 20]).reshape(1, 40, 1)
    measured, half = judge.told_apart("auc", np.zeros((1, 30, 1)), fake), 1.96 * 0.5 / np.sqrt(40)
    np.testing.assert_allclose(measured["auc_interval"], [0.5 - half, 0.5 + half], atol=0.15 * half)


def test_mixtures_draw_each_part_from_anyone_and_keep_its_place():
    heads = np.arange(5 * 6, dtype=np.uint8).reshape(5, 6, 1, 1).repeat(4, axis=3)
    stacks, codes = judge.mix_people(heads), judge.mix_people(heads, axes=3)
    assert stacks.shape == heads.shape and stacks.dtype == heads.dtype
    assert (stacks % 6 == heads % 6).all() and (codes % 6 == heads % 6).all()
    assert (stacks == stacks[..., :1]).all() and (codes != codes[..., :1]).any()
    assert all(len(np.unique(stack // 6)) > 1 for stack in stacks)


def test_the_box_holds_all_brains_and_no_more():
    heads = np.zeros((2, 3, 20, 30), np.uint8)
    heads[0, 1, 4:9, 7] = heads[1, 2, 6, 5:12] = 200
    heads[0, 0, 0, 0] = 7  # darker than brain
    box = brain_box(heads)
    assert heads[box].shape == (2, 3, 5, 7) and (heads[box] == 200).sum() == (heads == 200).sum()
    assert heads[brain_box(0 * heads)].shape == heads.shape


def test_intervals_are_those_of_the_normal_distribution_for_means():
    values = np.random.default_rng(0).normal(3, 2, 200)
    measured = judge.with_interval("mean", np.mean, values)
    assert measured["mean"] == pytest.approx(values.mean())
    half = 1.96 * values.std() / np.sqrt(200)
    expected = values.mean() - half, values.mean() + half
    np.testing.assert_allclose(measured["mean_interval"], expected, atol=0.15 * half)
    cut = judge.with_interval("mean", np.mean, values, limits=(3, np.inf))["mean_interval"]
    assert cut == [3, measured["mean_interval"][1]]
    assert judge.with_interval("mean", np.mean, values[:1]) == {"mean": values[0]}


def test_slice_correlation_is_the_mean_over_pairs_inside_the_brain():
    head = draw_people(1)[0]
    for apart in (1, 4):
        pairs = ((a[(a > 7) | (b > 7)], b[(a > 7) | (b > 7)]) for a, b in zip(head, head[apart:]))
        expected = np.mean([stats.pearsonr(*pair).statistic for pair in pairs])
        assert judge.slice_correlation(head, apart) == pytest.approx(expected, abs=1e-6)
    assert judge.slice_correlation(np.repeat(head[:1], 5, axis=0)) == pytest.approx(1)
    blank_above = np.concatenate([head, 0 * head])  # says nothing about the head
    assert judge.slice_correlation(blank_above) == pytest.approx(judge.slice_correlation(head))
    assert judge.slice_correlation(0 * head) == 0


def test_tissue_statistics_of_drawn_heads():
    y, x = np.mgrid[-1:1:201j, -1:1:201j]
    head = np.where(np.hypot(x / 0.505, y / 0.705) < 1, 0.8, 0)
    ventricles = np.hypot(x / 0.105, y / 0.205) < 1
    with_ventricles = np.where(ventricles, 0.01, head)
    lopsided = with_ventricles * (1 - 0.5 * (x > 0) * (y > 0))
    aside = np.roll(lopsided, 40, axis=1)
    aside[:3, :3] = 1.0  # a bright speck, which is no brain
    measured = judge.tissue_statistics(np.stack([head, with_ventricles, lopsided, 0 * head, aside]))
    share = 0.105 * 0.205 / (0.505 * 0.705 / 2)  # all of the ventricles lie in the deep half
    np.testing.assert_allclose(measured["dark_fraction"][:2], [0, share], rtol=0.05)
    outline = head > 0
    correlation = np.corrcoef(lopsided[outline], lopsided[:, ::-1][outline])[0, 1]
    np.testing.assert_allclose(measured["symmetry"], [1, 1, correlation, 0, correlation], atol=1e-6)
    assert measured["dark_fraction"][3] == 0 and correlation < 0.9
    assert measured["dark_fraction"][4] == pytest.approx(measured["dark_fraction"][2], abs=1e-6)
    # Darker than half the median is dark; what is not deep does not count.
    depth = ndimage.distance_transform_edt(outline)
    rim = np.where(outline & (depth < np.median(depth[outline])), 0.05, head)
    darker, brighter = np.where(ventricles, 0.39, head), np.where(ventricles, 0.41, head)
    dark = judge.tissue_statistics(np.stack([darker, brighter, rim]))["dark_fraction"]
    np.testing.assert_allclose(dark, [measured["dark_fraction"][1], 0, 0], atol=1e-9)
    # Beyond the edge of the picture there is no brain.
    cut_off = judge.tissue_statistics(darker[np.newaxis, 29:-29, 49:-49])["dark_fraction"]
    assert cut_off == measured["dark_fraction"][1]


def test_the_dark_share_is_compared_with_that_of_the_training_people():
    rng = np.random.default_rng(0)
    people, sampled, test = (rng.normal(0, sd, count) for sd, count in ((1, 200), (0.5, 300), (1, 10)))
    measured = judge.compare_dark({"": sampled, "_reconstructed": people, "_test": test})
    for suffix, values in (("", sampled), ("_test", test)):
        assert measured[f"dark_sd_ratio{suffix}"] == pytest.approx(values.std(ddof=1) / people.std(ddof=1))
        assert measured[f"dark_ks{suffix}"] == stats.ks_2samp(values, people).statistic
    assert measured["dark_sd_ratio_interval"][1] < 1 < measured["dark_sd_ratio_test_interval"][1]
    # Chance follows Kolmogorov's distribution: of fewer people, it is larger.
    assert measured["dark_ks_floor"] == pytest.approx(0.869 / np.sqrt(300), rel=0.1)
    interval = stats.kstwobign.ppf([0.025, 0.975]) / np.sqrt(300)
    np.testing.assert_allclose(measured["dark_ks_floor_interval"], interval, rtol=0.25)
    assert measured["dark_ks_test_floor"] > measured["dark_ks_floor"]


def test_nearest_is_the_nearest_or_its_mirror_image():
    rng = np.random.default_rng(0)
    heads, train = (rng.integers(0, 256, (count, 2, 3, 4), np.uint8) for count in (20, 30))
    heads[:2] = train[4], train[7, ..., ::-1]
    found = judge.find_nearest(heads, judge.coarse(train))
    rows, people = (group.mean(axis=1) / 255 for group in (heads, train))  # blocks of two slices
    both = np.stack([people, people[..., ::-1]])
    between = np.linalg.norm(rows[np.newaxis, :, np.newaxis] - both[:, np.newaxis], axis=(3, 4))
    first, second = np.sort(between.min(axis=0))[:, :2].T
    nearest = between.min(axis=0).argmin(axis=1)
    np.testing.assert_array_equal(found["nearest"], nearest)
    np.testing.assert_array_equal(found["mirrored"], between[:, np.arange(20), nearest].argmin(axis=0))
    np.testing.assert_allclose(found["distances"], first, atol=1e-7)
    np.testing.assert_allclose(found["over_second"], first / second, atol=1e-7)
    assert found["nearest"][:2].tolist() == [4, 7] and found["mirrored"][:2].tolist() == [False, True]


def test_membership_is_the_auc_of_code_lengths():
    rng = np.random.default_rng(0)
    train, test = rng.normal(2, 0.1, 30), rng.normal(2.1, 0.1, 20)
    measured = judge.membership(train, test)
    assert measured["membership"] == pytest.approx(auc(train, test))
    assert 0.5 < measured["membership_interval"][0] < measured["membership"]
    assert judge.membership(test, test)["membership"] == 0.5


def test_the_copy_score_is_that_of_the_rank_sum_test():
    rng = np.random.default_rng(0)
    heads, new = rng.random((2, 9)), rng.random((2, 6))
    expected = [stats.ranksums(*pair).statistic for pair in zip(heads, new)]  # another code, the same formula
    np.testing.assert_allclose(judge.copy_score(heads, new), expected)


def test_copies_are_counted_and_planted_copies_found(monkeypatch):
    monkeypatch.setattr(judge, "RESAMPLES", 200)

    def draw_folds(count):
        texture = np.random.default_rng(count).random((count, 8, 32, 32))
        texture = ndimage.gaussian_filter(texture, (0, 3, 3, 3))
        return np.uint8((128 + 40 * (texture - texture.mean()) / texture.std()).clip(20, 240))

    people = {name: draw_folds(count) for name, count in (("train", 40), ("validate", 13), ("test", 12))}
    samples = draw_folds(24)
    new, _ = judge.evaluate_copies(samples, people)
    assert new["copies"] == 0 and abs(new["copy_test"]) < 2
    low, high = new["copy_test_interval"]
    assert low < new["copy_test"] < high
    found = [new[f"copies_found_{kind}"] for kind in ("mirrored", "shifted", "brightened")]
    assert found == [new["copies_planted"]] * 3 == [5] * 3
    samples[:3] = people["train"][[9, 3, 30]] - np.random.default_rng(0).integers(0, 20, samples[:3].shape)
    samples[1] = samples[1, :, :, ::-1]
    copied, details = judge.evaluate_copies(samples, people)
    assert copied["copies"] == 3 and copied["copy_test"] < new["copy_test"]
    assert details["nearest"][:3].tolist() == [9, 3, 30]
    assert details["mirrored"][:3].tolist() == [False, True, False]
    # Heads that all keep to the middle are near to many, and copies of none.
    middle = np.uint8(people["train"].mean(axis=0, keepdims=True).repeat(24, axis=0))
    blurred, _ = judge.evaluate_copies(middle, people)
    assert blurred["copy_test"] < -3 and blurred["copies"] == 0


@pytest.fixture(scope="module")
def judged():
    """(people, sampled heads, what `evaluate_heads` returns, what its judges got), the judges replaced."""
    given = []

    def brightness(real, fake, groups, seeds, channels):
        """In place of trained judges: logits of a slice are its brightness, the darker the more real."""
        given.append((len(real), len(fake), tuple(map(len, groups)), tuple(seeds), channels))
        means = [np.float32(group[:, :group.shape[1] - channels[-1]].mean(axis=(2, 3))) for group in groups]
        return [mean[np.newaxis].repeat(len(seeds), axis=0) for mean in means]

    people = {name: draw_people(count, count, slices=9, size=32)
              for name, count in (("train", 20), ("validate", 5), ("test", 6))}
    sampled = np.uint8(1.05 * draw_people(16, 7, slices=9, size=32))
    noise = np.maximum(judge.mix_people(people["train"][:8], axes=3), 200)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge, "judge_logits", brightness)
        patch.setattr(judge, "RESAMPLES", 200)
        return people, sampled, judge.evaluate_heads(sampled, people, people["train"], noise), given


def test_heads_are_judged_by_head(judged):
    people, sampled, (measured, details), given = judged
    # Judges learn from three quarters of the samples and of the noise; the rest is tried beside new people.
    for channels, fakes in (((0,), (12, 6, 1)), ((0, 1, 4), (12, 6, 1, 20))):
        tried = [(6, count, 5) for count in (4, 2, 1, 6)]
        expected = [(20, fake, groups, (0, 1, 2) if fake == 12 else (0,), channels)
                    for fake, groups in zip(fakes, tried)]
        assert [row for row in given if row[4] == channels] == expected
    box = brain_box(people["train"])
    test, fake = (heads[box].mean(axis=(2, 3)) for heads in (people["test"], sampled[:4]))
    assert measured["told_apart_slices"] == pytest.approx(auc(test, fake), abs=0.01)
    by_head = auc(test[:, :5].mean(axis=1), fake[:, :5].mean(axis=1))
    assert measured["told_apart_heads"] == pytest.approx(by_head, abs=0.01)
    assert measured["told_apart_slices_fake_noise"] == measured["told_apart_heads_fake_noise"] == 1
    assert "told_apart_heads_fake_mixed_people" in measured
    assert "told_apart_slices_fake_mixed_people" not in measured
    assert measured["correlation_8_apart_fake_mixed_people"] < measured["correlation_1_apart"]
    assert measured["correlation_1_apart_originals"] == measured["correlation_1_apart_reconstructed"]
    every_second = judge.tissue_statistics(np.concatenate(sampled[:, ::2]))
    assert measured["symmetry"] == pytest.approx(every_second["symmetry"].mean())
    assert measured["num_heads"] == 16 and measured["num_people"] == {"train": 20, "validate": 5, "test": 6}
    assert {name: values.shape for name, values in details.items()} == dict.fromkeys(
        ("distances", "nearest", "mirrored"), (16,))


def test_the_table_shows_each_figure_once(judged, capsys):
    measured = judged[2][0] | {"membership": 0.875, "membership_interval": [0.75, 1.0]}
    table = judge.head_table(measured)
    assert [row[0] for row in table[1:]] == list(judge.ROWS) and {len(row) for row in table} == {6}
    rows = {row[0]: row for row in table}
    assert rows["told_apart_heads"][4].startswith(f"{measured['told_apart_heads_floor']:.3g} (")
    assert "slices of different people: " in rows["told_apart_heads"][5]
    assert rows["dark_ks"][3] == f"{measured['dark_ks_test']:.3g}"
    assert rows["membership"] == ("membership", "0.875 (0.75 to 1)", "", "", "", "")
    shown = [text for row in table[1:] for cell in row[1:] for text in cell.split("; ") if text]
    figures = [name for name in measured if not name.endswith("_interval") and not name.startswith("num_")]
    assert len(shown) == len(figures)  # nothing is measured that no table shows
    few_slices = judge.head_table({name: measured[name] for name in measured if "correlation_8" not in name})
    assert [row[0] for row in few_slices[1:]] == [name for name in judge.ROWS if "correlation_8" not in name]
    judge.print_heads(measured)
    assert capsys.readouterr().out.startswith("16 sampled heads beside 20 training people and 6 test people")

"""The judges, statistics and searches for copies on drawn heads, beside formulas and brute force."""

import numpy as np
import pytest
from scipy import ndimage
from sklearn.metrics import roc_auc_score

from support import judge
from support.images import brain_box


def draw_people(count, seed=0, slices=12, size=64):
    """Heads of one anatomy that change slowly from slice to slice, dark in the middle, black outside."""
    def texture(seed, count, width):
        noise = np.random.default_rng(seed).random((count, slices, size, size))
        smooth = ndimage.gaussian_filter(noise, (0, 2, width, width))
        return (smooth - smooth.mean()) / smooth.std()
    heads = 0.55 + 0.1 * texture(99, 1, 4) + 0.06 * texture(seed, count, 3)
    y, x = np.mgrid[-1:1:size * 1j, -1:1:size * 1j]
    for head, width in zip(heads, np.random.default_rng(seed).uniform(0.1, 0.3, count)):
        head[:, np.hypot(x, y) < width] = 0.1
    outline = ndimage.gaussian_filter(np.float64(np.hypot(x / 0.7, y / 0.85) < 1), 1)
    return np.uint8(255 * outline * heads.clip(0.05, 1))


def auc(low, high):
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
    of_test, of_fake = judge.judge_scores((real, fake_of(real)), (test, fake_of(test)), channels)
    assert of_test.shape == of_fake.shape == (16, 8 - channels[-1])
    assert low <= auc(of_test.mean(axis=1), of_fake.mean(axis=1)) <= high


def test_judges_depend_on_their_seed_alone(monkeypatch):
    monkeypatch.setattr(judge, "JUDGE_STEPS", 5)
    real, fake, test = (draw_people(3, seed, slices=3, size=32) for seed in (1, 2, 3))
    (first, _), (other, _), (again, _) = (judge.judge_scores((real, fake), (test, test), (0,), seed)
                                          for seed in (5, 4, 5))
    np.testing.assert_allclose(first, again, atol=1e-5)  # no trace of the judge before it
    assert np.abs(first - other).max() > 1e-3


def test_the_auc_is_the_median_over_judges_of_the_mean_over_folds():
    rng = np.random.default_rng(0)
    folds = [(rng.integers(0, 9, (3, people, 5)), rng.integers(3, 12, (3, heads, 5)))  # with ties
             for people, heads in ((4, 6), (5, 7))]
    by_judge = np.mean([[auc(*pair) for pair in zip(*fold)] for fold in folds], axis=0)
    measured = judge.area_under_curve("auc", *folds)
    assert measured["auc"] == pytest.approx(np.median(by_judge))
    assert measured["auc_range"] == pytest.approx([by_judge.min(), by_judge.max()])
    assert measured["auc_interval"][0] < measured["auc"] < measured["auc_interval"][1] < 1
    low, high = rng.normal(size=9), rng.normal(size=6)
    single = judge.area_under_curve("auc", (low, high))
    assert single["auc"] == pytest.approx(auc(low, high)) and single.keys() == {"auc", "auc_interval"}
    assert judge.area_under_curve("auc", (low, high[:1])).keys() == {"auc"}


@pytest.mark.parametrize("people, heads, shift", ((20, 32, 0), (20, 32, 2), (5, 10, 1), (2, 2, 1)))
def test_intervals_of_an_auc_cover_what_judges_reach_on_average(people, heads, shift):
    """Of simple judges, the difference of the means that they learn; a head has four slices, much alike."""
    rng, found = np.random.default_rng(0), []
    def draw(count, mean):
        of_heads, of_slices = rng.normal(size=(count, 1, 20)), rng.normal(size=(count, 4, 20))
        return mean * (np.arange(20) == 0) + np.sqrt(0.8) * of_heads + np.sqrt(0.2) * of_slices
    for _ in range(300):
        groups = [(draw(people, 0), draw(heads, shift)) for _ in range(2)]
        folds = []
        for learned, tried in (groups, groups[::-1]):
            direction = learned[1].mean(axis=(0, 1)) - learned[0].mean(axis=(0, 1))
            folds.append([(group @ direction)[np.newaxis] for group in tried])
        found.append(judge.area_under_curve("auc", *folds))
    true = np.mean([row["auc"] for row in found])
    assert np.mean([row["auc_interval"][0] <= true <= row["auc_interval"][1] for row in found]) >= 0.93


def test_the_interval_of_a_mean_is_about_that_of_the_normal_distribution():
    values = np.random.default_rng(0).normal(3, 2, 200)
    low, high = judge.with_interval("mean", np.mean, values)["mean_interval"]
    assert high - low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(200), rel=0.15)
    assert judge.with_interval("mean", np.mean, values[:1]) == {"mean": values[0]}


def test_mixtures_draw_each_part_from_anyone_and_keep_its_place():
    heads = np.arange(5 * 6, dtype=np.uint8).reshape(5, 6, 1, 1).repeat(4, axis=3)
    stacks, codes = judge.mix_people(heads), judge.mix_people(heads, axes=3)
    assert stacks.shape == heads.shape and stacks.dtype == heads.dtype
    assert (stacks % 6 == heads % 6).all() and (codes % 6 == heads % 6).all()
    assert (stacks == stacks[..., :1]).all() and (codes != codes[..., :1]).any()
    assert all(len(np.unique(stack // 6)) > 1 for stack in stacks)


def test_roughness_is_the_second_difference_inside_the_brain():
    head = np.int64(draw_people(1)[0])
    squares = [(head[k + 1] - 2 * head[k] + head[k - 1])[y, x] ** 2 for k in range(1, 11)
               for y, x in np.ndindex(64, 64) if head[k - 1:k + 2, y, x].min() > 7]
    assert judge.roughness(np.uint8(head)) == pytest.approx(np.sqrt(np.mean(squares)), rel=1e-5)
    assert judge.roughness(np.zeros((3, 8, 8), np.uint8)) == judge.roughness(np.uint8(head[:2])) == 0
    heads = np.uint8(draw_people(4).clip(40, 200))
    ratio = np.diff(np.float32(judge.rougher(heads)), axis=1).std() / np.diff(np.float32(heads), axis=1).std()
    assert ratio == pytest.approx(1.1, abs=0.01)


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
    # Darker than half the median is dark.
    darker, brighter = np.where(ventricles, 0.39, head), np.where(ventricles, 0.41, head)
    dark = judge.tissue_statistics(np.stack([darker, brighter]))["dark_fraction"]
    np.testing.assert_allclose(dark, [measured["dark_fraction"][1], 0], atol=1e-9)


def test_a_copy_is_nearest_where_it_was_moved_turned_or_mirrored():
    people = judge.coarse(draw_people(30, slices=16))
    search = judge.NearestPerson(people)
    rng, chosen = np.random.default_rng(0), [9, 3, 20]
    moved = np.stack([judge._move(people[i], rng.uniform(-2, 2, 5)) for i in chosen])
    moved[1] = moved[1, :, :, ::-1]
    distances, over_second = search.find(people)  # own ones left out
    assert search.find(moved)[1].max() < 0.7 < 0.8 < over_second.min()
    assert search.find(people[chosen])[0].max() < 1e-3 < distances.min()


@pytest.fixture(scope="module")
def judged():
    """(people, sampled heads, what `evaluate_heads` returns, what its judges got), the judges replaced."""
    given = []
    def brightness(learned, tried, channels, seed):
        """In place of a trained judge: the score of a slice is its brightness, the darker the more real."""
        given.append((*map(len, learned), *map(len, tried), channels, seed))
        return [np.float32(heads[:, :heads.shape[1] - channels[-1]].mean(axis=(2, 3))) for heads in tried]
    people = {name: draw_people(count, count, slices=9)
              for name, count in (("train", 40), ("validate", 5), ("test", 6))}
    sampled = np.uint8(1.05 * draw_people(16, 7, slices=9))
    sampled[:2] = ndimage.shift(people["train"][[9, 30]], (0, 1, 2, 2))  # copies
    noise = [np.maximum(judge.mix_people(people[name], axes=3), 200) for name in ("validate", "test")]
    train = people["train"].reshape(-1, 64, 64), np.arange(360).reshape(40, 9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge, "judge_scores", brightness)
        patch.setattr(judge, "RESAMPLES", 200)
        return people, sampled, judge.evaluate_heads(sampled, people, people, noise, train, 4.0), given


def test_heads_are_judged_by_head_and_both_ways(judged):
    people, sampled, measured, given = judged
    # Judges learn from half of the samples and one group of new people, and are tried on the others.
    for channels, fakes in (((0,), 3), ((0, 1, 4), 5)):
        rows = [row for row in given if row[4] == channels]
        assert [row for row in rows if 8 in row] == [(*counts, channels, seed) for counts in (
            (5, 8, 6, 8), (6, 8, 5, 8)) for seed in range(5)]
        assert (3, 2, 3, 3, channels, 0) in rows and len(rows) == 10 + 2 * fakes
    box = brain_box(np.concatenate([people["validate"], people["test"]]))
    real, fake = ([heads[box].mean(axis=(2, 3)) for heads in pair] for pair in (
        (people["test"], people["validate"]), (sampled[1::2], sampled[::2])))
    assert measured["told_apart_slices"] == pytest.approx(np.mean(list(map(auc, real, fake))))
    by_head = [[head[:, :5].mean(axis=1) for head in heads] for heads in (real, fake)]
    assert measured["told_apart_heads"] == pytest.approx(np.mean(list(map(auc, *by_head))))
    assert measured["told_apart_slices_fake_noise"] == measured["told_apart_heads_fake_noise"] == 1
    assert 0.2 < measured["told_apart_heads_floor"] < 0.8
    rough = [[judge.roughness(head) for head in heads] for heads in
             (np.concatenate([people["validate"], people["test"]]), sampled)]
    assert measured["roughness_auc"] == pytest.approx(auc(*rough))
    assert measured["roughness_new"] == pytest.approx(np.mean(rough[0]))
    dark = [[judge.tissue_statistics(head[::2])["dark_fraction"].mean() for head in heads]
            for heads in (sampled, people["train"])]
    assert measured["dark_sd_ratio"] == pytest.approx(np.std(dark[0], ddof=1) / np.std(dark[1], ddof=1))
    assert measured["membership_reconstruction"] == 0.5  # here reconstructions are the originals
    assert measured["num_heads"] == 16 and measured["num_people"] == {"train": 40, "validate": 5, "test": 6}
    assert measured["copies_heads"] == [0, 1] and measured["copies"] == 2
    assert measured["copies_found"] == measured["copies_planted"] == 5
    assert measured["copies_false_alarms"] == 1 / 52


def test_the_table_shows_each_figure_once(judged, capsys):
    measured = judged[2] | {name: 0.875 for name in ("membership", "membership_reference")}
    measured["membership_interval"] = [0.75, 1.0]
    table = judge.head_table(measured)
    assert [row[0] for row in table[1:]] == list(judge.ROWS) and {len(row) for row in table} == {6}
    rows = {row[0]: row for row in table}
    assert rows["told_apart_heads"][4].startswith(f"{measured['told_apart_heads_floor']:.3g} (")
    assert "slices of different people: " in rows["told_apart_heads"][5]
    assert rows["membership"] == ("membership", "0.875 (0.75 to 1)", "", "", "", "")
    shown = [text for row in table[1:] for cell in row[1:] for text in cell.split("; ") if text]
    figures = [name for name in measured if not name.endswith("_interval") and not name.startswith("num_")]
    assert len(shown) == len(figures) - 1  # nothing is measured that no table shows, but for the next line
    judge.print_heads(measured)
    printed = capsys.readouterr().out
    assert printed.startswith("16 sampled heads beside 40 training people and 5 + 6 new ")
    assert printed.endswith("Stand out as copies: the heads 0, 1\n")

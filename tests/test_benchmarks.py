"""The benchmarks: turns, ratios, processes that answer, what is counted, the record, the tables that it fills."""

import json
import sys

import numpy as np
import pytest
from scipy import stats
import tensorflow as tf

from benchmarks import (
    common,
    faults,
    gpu,
    loading,
    reconstruction,
    record,
    tables,
    training,
    utility,
    ventricles,
)
from benchmarks.tiny import draw_head, write_cohort
import dataset
import predict
from support import runs, sampler, synthetic, template
from support.cli import UserError
from support.runs import Run
from tests.conftest import check_refused
from tests.small import small_prior


def test_sides_take_turns_in_alternating_order():
    order = []
    sides = {name: lambda name=name: order.append(name) or len(order) for name in "ab"}
    assert common.interleave(sides, 3) == {"a": [1, 4, 5], "b": [2, 3, 6]}
    assert "".join(order) == "abbaab"


def test_ratio_is_the_median_of_the_rounds_ratios_with_their_range():
    """Not the ratio of the medians, which here would be 1.5, nor of the means."""
    ours, theirs = [10, 30, 90, 12], [5, 20, 30, 4]
    summary = common.ratio(ours, theirs)
    assert summary == {"median": 2.5, "min": 1.5, "max": 3.0, "rounds": 4}
    assert summary["median"] == np.median(np.divide(ours, theirs)) != np.median(ours) / np.median(theirs)
    assert common.in_words(summary) == "2.5 times (1.5 to 3 in 4 rounds)"


@pytest.mark.parametrize("ours, measurable", (([1.1, 1.2, 1.3], True), ([0.7, 0.8, 0.9], True), ([0.9, 1.5, 1.6], False),
                                              ([1.0, 1.5, 1.6], False), ([0.5, 0.6, 1.0], False)))
def test_noise_larger_than_the_effect_gets_no_number(ours, measurable):
    summary = common.ratio(ours, [1, 1, 1])
    assert ("median" in summary) == measurable == ("verdict" not in summary)
    if not measurable:
        assert summary == {"verdict": "no difference measurable", "rounds": 3}
        assert common.in_words(summary) == "no difference measurable in 3 rounds"


def test_rounds_that_do_not_pair_are_an_error():
    with pytest.raises(ValueError):
        common.ratio([1, 2], [1])


def test_a_side_answers_each_request_in_its_own_process(tmp_path):
    script = tmp_path / "side.py"
    script.write_text(f"""
import os, sys
sys.path.insert(0, {str(common.ROOT)!r})
from benchmarks import common
from support.images import empty_margin
from support import judge
for request in common.requests():
    if request == "die":
        sys.exit("out of order")
    common.answer([os.getpid(), sys.argv[1:], request])
""")
    with common.Side(script, "--steps", 3) as side:
        answers = [side.ask(), side.ask(0.5)]
        assert [answer[1:] for answer in answers] == [[["--steps", "3"], None], [["--steps", "3"], 0.5]]
        assert answers[0][0] == answers[1][0] == side.process.pid
        with pytest.raises(RuntimeError, match="out of order"):
            side.ask("die")
    with common.Side(script) as side:
        side.ask()
    assert side.process.returncode == 0  # it ended by itself when nothing more was asked


def test_finish_prints_the_last_line_and_records_it_with_its_origin(tmp_path, monkeypatch, capsys):
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"scaling": {"speed": 3}, "training": {"speed": 1}}))
    monkeypatch.setattr(common, "RESULTS", results)
    monkeypatch.setattr(sys, "argv", [str(common.ROOT / "benchmarks" / "training.py"), "--steps", "2", "--record"])
    parser = common.argument_parser("Training.\n\nMore.")
    parser.add_argument("--steps")
    common.finish("training", parser.parse_args(["--steps", "2"]), {"speed": 2})
    assert json.loads(capsys.readouterr().out) == {"speed": 2}
    assert json.loads(results.read_text())["training"] == {"speed": 1}
    common.finish("training", parser.parse_args(), {"speed": 2})
    recorded = json.loads(results.read_text())
    entry = recorded.pop("training")
    assert recorded == {"scaling": {"speed": 3}}
    assert entry.keys() == {"command", "commit", "date", "hardware", "machine", "speed"}
    assert entry["machine"] == runs.build_info() and entry["machine"]["packages"]["tensorflow"] == tf.__version__
    assert entry["command"] == "python benchmarks/training.py --steps 2" and entry["speed"] == 2
    assert " cores of " in entry["hardware"] and " GiB, " in entry["hardware"]


def test_a_run_is_described_by_its_own_files(tmp_path):
    (tmp_path / "predictions").mkdir()
    (tmp_path / "metrics.json").write_text('{"ssim": 0.9}')
    (tmp_path / "predictions" / "metrics.json").write_text('{"ssim": 0.9, "frechet": 13.0}')
    (tmp_path / "vqvae_history.csv").write_text("epoch,seconds\n0,60.5\n1,59.5\n")
    (tmp_path / "pixelcnn_history.csv").write_text("epoch,seconds\n0,30\n")
    config = {"git_commit": "abc", "machine": {"processor": "x"}, "pixelcnn": {"grid_size": 32, "num_embeddings": 512},
              "vqvae": {"image_size": 256}, "data": {"people": {"train": 3}}}
    entry = record.describe(Run(tmp_path, config))
    assert len(entry.pop("date")) == 10
    assert entry == {"commit": "abc", "machine": {"processor": "x"}, "people": {"train": 3}, "image_size": 256, "num_embeddings": 512,
                     "codes_per_image": 1024, "bits_fixed": 9216.0, "seconds": {"vqvae": 120.0, "pixelcnn": 30.0}, "ssim": 0.9,
                     "frechet": 13.0}


def test_heads_of_noise_have_the_border_that_is_asked_for():
    split = common.noise_split(2, 64, margin=8)
    assert split.images.shape == (64, 64, 64) and empty_margin(split.images, 1) == 8
    assert split.num_people == 2 and split.positions.tolist() == 2 * list(range(32))
    assert np.unique(split.images[:, 8:-8, 8:-8]).size == 256


def test_random_codes_lie_where_the_split_says():
    split, prior = common.noise_split(1, 32), small_prior(num_positions=32)
    coded = common.random_codes(split, prior)
    assert coded.codes.shape == (1, 32, 6, 6) and np.unique(coded.codes).tolist() == list(range(11))
    assert coded.context[20].tolist() == [19, 18, 16, 12] and coded.context[1].tolist() == [0, 32, 32, 32]


# Training -------------------------------------------------------------------------------------------------------------


def test_multiply_adds_are_those_of_the_formula():
    kernel, matrix = tf.zeros((3, 3, 4, 8)), tf.zeros((8, 5))
    images = tf.zeros((1, 16, 16, 4))
    convolution = 16 * 16 * 3 * 3 * 4 * 8
    assert training.multiply_adds(lambda x: tf.nn.conv2d(x, kernel, 1, "SAME"), images) == pytest.approx(convolution / 1e6)
    both = training.multiply_adds(lambda x: tf.reshape(tf.nn.conv2d(x, kernel, 1, "SAME"), (-1, 8)) @ matrix, images)
    assert both == pytest.approx((convolution + 16 * 16 * 8 * 5) / 1e6)


def test_the_share_of_the_peak_is_that_of_each_round():
    row = training.summarise([10, 20, 30], {"multiply_adds_million": 100, "peak_gigabytes": 1}, [6_000, 6_000, 10_000])
    assert row["share_of_peak"] == pytest.approx(np.median([0.5, 1, 0.9]))  # a step is three forward passes
    assert row["images_per_second"] == {"median": 20, "min": 10, "max": 30}


# Loading and reconstruction -------------------------------------------------------------------------------------------


def test_both_ways_of_loading_read_the_same_pixels(tmp_path, monkeypatch):
    folder = write_cohort(tmp_path / "cohort", people=(2, 1, 1), slices=2)
    ours, theirs = loading.load_ours(folder, tmp_path / "cache"), loading.load_theirs(folder, None)
    for images, floats in zip(ours, theirs, strict=True):
        assert images.dtype == np.uint8 and floats.dtype == np.float64 and images.shape == floats.shape
        np.testing.assert_array_equal(sorted(images.sum(axis=(1, 2))), np.round(sorted(255 * floats.sum(axis=(1, 2)))))
    rows = []
    monkeypatch.setattr(common, "requests", lambda: iter([None]))
    monkeypatch.setattr(common, "answer", rows.append)
    loading.measure_loading("ours", folder, tmp_path / "cache")
    row, = rows
    assert row["images"] == 8 and row["brightest"] == max(images.max() for images in ours)


def test_the_images_of_a_turn_are_those_of_its_batches(monkeypatch):
    monkeypatch.setattr(common, "requests", lambda: iter([1]))
    for num_images, batches in ((10, [4, 4, 2] * 3), (8, [4, 4] * 4), (None, [4] * 9)):
        turns = reconstruction.Turns(4, num_images)
        for steps in range(len(batches) + 1):
            assert turns._images(steps) == sum(batches[:steps])


# The worth of a synthetic data set ------------------------------------------------------------------------------------


def test_the_fewer_heads_are_the_first_of_the_many(tmp_path):
    run = Run(tmp_path, {"data": {"is_demo": False, "front": None, "geometry": {}, "fingerprints": {}}, "settings": {"limit": None}})
    heads = np.random.default_rng(0).integers(0, 256, (12, 2, 32, 32), np.uint8)
    synthetic.write_heads(tmp_path / "set", heads, synthetic.describe(run, run.geometry, 12, 0, 1.0, None, [3, 4]))
    assert template.split_people(12) == {"train": 8, "validate": 2, "test": 2}
    for count in (4, 10, 11, 12):
        split = utility.load_heads(tmp_path / "set", count)
        np.testing.assert_array_equal(split.images, heads[:count].reshape(-1, 32, 32))
        assert split.num_people == count and split.positions.tolist() == [3, 4] * count


def test_each_side_has_its_number_of_heads():
    assert utility.numbers_of_heads(13, 10, 1000) == {"real": 13, "as_many": 13, "more": 130}
    assert utility.numbers_of_heads(13, 10, 40) == {"real": 13, "as_many": 13, "more": 40}
    with pytest.raises(UserError, match="holds 13 heads, and there are 13 training people"):
        utility.numbers_of_heads(13, 10, 13)


def test_people_of_another_run_and_a_folder_of_no_heads_are_refused(tmp_path):
    folder = write_cohort(tmp_path / "cohort", people=(2, 1, 1), slices=2)
    fingerprints = dataset.fingerprints(dataset.load_splits(folder, front="down"))
    trained_on = {"front": "down", "limit": None, "fingerprints": fingerprints}
    splits = utility.load_people(folder, trained_on)
    assert splits["train"].num_people == 2 and "validate" not in splits
    limited = dataset.fingerprints(dataset.load_splits(folder, limit=1, front="down"))
    assert utility.load_people(folder, {**trained_on, "limit": 1, "fingerprints": limited})["train"].num_people == 1
    for name in ("train", "test"):
        with pytest.raises(UserError, match=f"The {name} people in .* are not those of the run"):
            utility.load_people(folder, {**trained_on, "fingerprints": {**fingerprints, name: "other"}})
    with pytest.raises(UserError, match="cohort is no data set of predict.py --write-dataset"):
        utility.read_description(folder)


# Faults ---------------------------------------------------------------------------------------------------------------


def test_a_killed_run_says_how_far_it_came(tmp_path):
    run, states = Run(tmp_path, None), []
    for path in (run.folder / "config.json", run.backup_path("vqvae"), run.backup_path("pixelcnn"), run.metrics_path):
        states.append(faults.state(run))
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert states == ["before config.json", "in the first epoch", "after backup/vqvae.keras", "after backup/pixelcnn.keras"]
    assert faults.state(run) == "after metrics.json"
    (run.folder / "events.out.tfevents.1").touch()
    assert faults.files_of(run) >= {"config.json", "metrics.json"} and "events.out.tfevents.1" not in faults.files_of(run)


# Ventricles -----------------------------------------------------------------------------------------------------------


def test_sizes_asked_for_and_shown_are_compared_by_rank_slope_and_quantile():
    rng, quantiles = np.random.default_rng(0), np.linspace(0.1, 0.3, 101) ** 2
    targets = (np.arange(64) + 0.5) / 64
    target_sizes = (0.1 + 0.2 * targets) ** 2
    measured = ventricles.compare(targets, np.quantile(quantiles, targets), quantiles)
    for number, group in enumerate(measured["groups"]):
        mean = target_sizes[16 * number:16 * number + 16].mean()
        assert group == {"target_size": pytest.approx(mean, abs=1e-5), "size": pytest.approx(mean, abs=1e-5)}
    assert measured["rank_correlation"] == pytest.approx(1) and measured["slope"] == pytest.approx(1)
    assert measured["quantile_error"] == pytest.approx(0, abs=1e-9)

    sizes = 0.02 + 0.5 * target_sizes + 0.01 * rng.normal(size=64)
    measured = ventricles.compare(targets, sizes, quantiles)
    ranks = np.argsort(np.argsort(sizes))  # no ties: Spearman is the correlation of ranks
    assert measured["rank_correlation"] == pytest.approx(np.corrcoef(ranks, np.arange(64))[0, 1])
    assert measured["slope"] == pytest.approx(np.polyfit(target_sizes, sizes, 1)[0], rel=1e-3)
    below = (np.sqrt(sizes) - 0.1) / 0.2
    assert measured["quantile_error"] == pytest.approx(np.abs(below.clip(0, 1) - targets).mean(), abs=1e-3)
    for name in ("rank_correlation", "slope"):
        low, high = measured[f"{name}_interval"]
        assert low < measured[name] < high <= 1
    # The interval of the slope is about that of the textbook, whose noise is as large everywhere.
    assert np.ptp(measured["slope_interval"]) == pytest.approx(2 * 1.96 * stats.linregress(target_sizes, sizes).stderr, rel=0.2)


def test_the_size_of_a_heads_ventricles_is_the_mean_over_its_slices():
    rng = np.random.default_rng(0)
    heads = np.array([[draw_head(rng, position) for position in positions] for positions in ((0, 1, 2), (4, 6, 8))])
    sizes = ventricles.sizes_of(heads)
    expected = [np.mean([judge.tissue_statistics(image[np.newaxis])["dark_fraction"][0] for image in head]) for head in heads]
    np.testing.assert_allclose(sizes, expected)
    assert 0.02 < sizes[0] < sizes[1]


def test_ventricles_of_sampled_heads_are_measured_and_drawn(trained, tmp_path, monkeypatch, capsys):
    """With the tests' run, whose heads follow nothing: so `main` gets sizes that do."""
    run = Run.load(trained / "runs" / "tiny")
    vqvae, prior = predict.load_models(run)
    targets = np.linspace(0, 1, 3)
    heads = ventricles.sample(run, vqvae, prior, 3, targets)
    assert heads.shape == (3, 8, 64, 64) and heads.dtype == np.uint8
    for index, quantile in enumerate(targets):  # what predict.py --heads 3 --ventricles QUANTILE has at this place
        persons = sampler.steered_people(run, prior, 3, 0, quantile)
        codes = sampler.sample_heads(prior, 3, persons=persons)
        np.testing.assert_array_equal(heads[index], predict.decode_heads(vqvae, codes)[index])
    monkeypatch.setattr(ventricles, "sample", lambda run, vqvae, prior, count, quantile: np.resize(heads, (count, *heads.shape[1:])))
    monkeypatch.setattr(sys, "argv", ["ventricles.py", "--run-dir", str(run.folder), "--heads", "12",
                                      "--figure", str(tmp_path / "x.png")])
    monkeypatch.setattr(ventricles, "sizes_of", lambda heads: np.linspace(0, 1, len(heads)))
    ventricles.main()
    said = capsys.readouterr().out.splitlines()
    assert "12 heads: rank correlation of asked and shown 1.00" in said[-3] and (tmp_path / "x.png").is_file()
    assert json.loads(said[-1]).keys() == {"settings", "num_heads", "rank_correlation", "rank_correlation_interval", "slope",
                                           "slope_interval", "quantile_error", "groups"}


# Tables ---------------------------------------------------------------------------------------------------------------

MACHINE = {"packages": {"numpy": "2.0"}, "python": "3.11", "vector_instructions": ["sse2", "avx", "fma"]}
ORIGIN = {"command": "python x.py", "commit": "abc", "date": "2026-01-01", "hardware": "2 cores", "machine": MACHINE}
KILLS = {"tried": 2, "survived": 2, "lost": 0, "differing": 0, "left_over": 0}


def test_a_table_of_measured_records_is_filled():
    text = tables.fill("<!-- results: faults -->\n\n<!-- results: origins -->\n", {"faults": {**ORIGIN, **KILLS}})
    assert "| 2 | 2 | 0 | 0 | 0 |" in text
    assert "| `faults` | `python x.py` | abc | 2026-01-01 | 2 cores | avx, fma | Python 3.11, numpy 2.0 |" in text


def test_the_table_of_ventricles_shows_intervals():
    record = {"num_heads": 64, "rank_correlation": 0.912, "rank_correlation_interval": [0.85, 0.95], "slope": 0.7,
              "slope_interval": [0.6, 0.8], "quantile_error": 0.081}
    text = tables.table("ventricles", {"ventricles": record})
    assert "| 64 | 0.91 (0.85 to 0.95) | 0.70 (0.60 to 0.80) | 0.08 |" in text


@pytest.mark.parametrize("name, record, reason", (
    ("origins", {**ORIGIN, "transcribed": "from a README"}, "faults was transcribed"),
    ("origins", {key: value for key, value in ORIGIN.items() if key != "machine"}, "no 'machine'"),
    ("origins", {**ORIGIN, "commit": ""}, "an empty cell"),
    ("faults", {key: value for key, value in KILLS.items() if key != "lost"}, "an empty cell")))
def test_what_was_not_measured_is_refused(name, record, reason):
    with pytest.raises(UserError, match=reason):
        tables.fill(f"<!-- results: {name} -->\n| old |\n", {"faults": record})


@pytest.mark.skipif(bool(tf.config.list_physical_devices("GPU")), reason="there is a GPU")
def test_a_machine_without_a_gpu_is_not_timed_as_one(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    check_refused(lambda arguments: gpu.main(*arguments), [], "TensorFlow sees no GPU", capsys)


def test_an_empty_table_is_refused():
    with pytest.raises(UserError, match="The table epochs cannot be filled.*no rows"):
        tables.fill("<!-- results: epochs -->\n", {"loading": {"epochs": []}})
    with pytest.raises(UserError, match="no 'epochs'"):
        tables.fill("<!-- results: epochs -->\n", {"loading": {}})

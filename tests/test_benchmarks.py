"""The benchmarks: turns, ratios, what is counted, kills, the record, and the tables that it fills."""

import json
import shutil
import signal
import sys

import keras
import numpy as np
import pytest
from scipy import ndimage
import tensorflow as tf

from benchmarks import common, faults, gpu, membership, record, tables, training, utility, ventricles
from benchmarks.loading import load_ours, load_theirs
from benchmarks.optimizers import compare, Trial
from benchmarks.tiny import write_cohort
import dataset
import predict
from support import runs, synthetic, template
from support.cli import UserError
from support.optimizers import Adam, Muon
from support.runs import Run


def test_sides_take_turns_in_alternating_order():
    order = []
    sides = {name: lambda name=name: order.append(name) or len(order) for name in "ab"}
    assert common.interleave(sides, 3) == {"a": [1, 4, 5], "b": [2, 3, 6]}


def test_ratio_is_the_median_of_the_rounds_ratios_and_none_if_noise_is_larger_than_the_effect():
    """Not the ratio of the medians, which here would be 1.5, nor of the means."""
    summary = common.ratio([10, 30, 90, 12], [5, 20, 30, 4])
    assert summary == {"median": 2.5, "min": 1.5, "max": 3.0, "rounds": 4}
    assert common.in_words(summary) == "2.5 times (1.5 to 3 in 4 rounds)"
    assert "median" in common.ratio([0.7, 0.8, 0.9], [1, 1, 1])
    for ours in ([0.9, 1.5, 1.6], [0.5, 0.6, 1.0]):
        assert common.ratio(ours, [1, 1, 1]) == {"verdict": "no difference measurable", "rounds": 3}


def test_finish_prints_the_last_line_and_records_it_with_its_origin(tmp_path, monkeypatch, capsys):
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"scaling": {"speed": 3}, "training": {"speed": 1}}))
    monkeypatch.setattr(common, "RESULTS", results)
    monkeypatch.setattr(sys, "argv", [f"{common.ROOT}/benchmarks/training.py", "--rounds", "4", "--record"])
    parser = common.argument_parser("Training.\n\nMore.", default_rounds=3)
    common.finish("training", parser.parse_args(), {"speed": 2})
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"speed": 2}
    recorded = json.loads(results.read_text())
    entry = recorded["training"]
    assert recorded == {"scaling": {"speed": 3}, "training": {
        "command": "python benchmarks/training.py --rounds 4", "machine": runs.build_info(), "speed": 2,
        **{name: entry[name] for name in ("commit", "date", "hardware")}}}
    assert " GiB, " in entry["hardware"]


def test_a_run_is_described_by_its_own_files(trained):
    run = Run.load(trained / "runs" / "tiny")
    entry, measured = record.describe(run), json.loads((run.folder / "metrics.json").read_text())
    assert entry["codes_per_image"] == 64 and entry["bits_fixed"] == 64 * 4
    assert measured.items() <= entry.items() and entry["seconds"].keys() == set(record.STAGES)


def test_multiply_adds_are_those_of_the_formula_and_the_share_of_the_peak_is_that_of_each_round():
    kernels = [tf.Variable(tf.ones(shape)) for shape in ((3, 3, 4, 8), (3, 3, 6, 8), (6, 5), (5, 7), (7, 2))]
    def forward():
        x = tf.nn.conv2d(tf.ones((1, 16, 16, 4)), kernels[0], 2, "SAME")
        x = tf.nn.conv2d_transpose(x, kernels[1], (1, 16, 16, 6), 2)
        x = tf.reshape(x @ kernels[2], (-1, 5)) @ kernels[3]
        return tf.einsum("ij,jk->ik", x, kernels[4]) ** 2
    first, *others = 8 * 8 * 9 * 4 * 8, 8 * 8 * 9 * 8 * 6, 16 * 16 * 6 * 5, 16 * 16 * 5 * 7, 16 * 16 * 7 * 2
    assert training.multiply_adds(forward) == pytest.approx((first + sum(others)) / 1e6)
    of_step = training.multiply_adds(lambda: training.gradients(forward, kernels))
    # Forward, the gradient of the kernels, and that of the inputs, which is not needed of the first layer
    assert of_step == pytest.approx((2 * first + 3 * sum(others)) / 1e6)
    last = {"multiply_adds_million": 100, "forward_passes_per_step": 2.5, "peak_gigabytes": 1}
    row = training.summarise([10, 20, 30], last, [5_000, 5_000, 10_000])
    assert row["share_of_peak"] == pytest.approx(np.median([0.5, 1, 0.75]))


def test_the_steps_that_keras_ran_are_counted(monkeypatch):
    """It takes 16 at a time here: 32 where 30 were asked for."""
    monkeypatch.setattr(gpu, "Clock", type("Clock", (keras.callbacks.Callback,), {"seconds": 2}))
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile("sgd", "mse", steps_per_execution=16)
    batches = tf.data.Dataset.from_tensors((tf.zeros((8, 1)), tf.zeros((8, 1)))).repeat()
    assert gpu.images_per_second(model, batches, 8, 30) == 32 * 8 / 2


def test_both_ways_of_loading_read_the_same_pixels(tmp_path):
    folder = write_cohort(tmp_path / "cohort", people=(2, 1, 1), slices=2)
    for ours, theirs in zip(load_ours(folder, tmp_path / "cache"), load_theirs(folder, None), strict=True):
        np.testing.assert_allclose(np.sort(ours, axis=None) / 255, np.sort(theirs, axis=None))


def test_each_side_of_utility_trains_on_what_it_says(tmp_path, monkeypatch):
    heads = np.random.default_rng(0).integers(0, 256, (12, 2, 32, 32), np.uint8)
    description = {"heads": template.split_people(12), "slice_positions": [3, 4], "geometry": {"lowest": 5},
                   "says": "", "front": None, "trained_on": {"is_simulated": False}}
    synthetic.write_png_heads(tmp_path / "set", heads, description)
    people = dataset.Split.from_heads(255 - heads[:11], [3, 4])
    def images_of(side):
        split = utility.train_split(side, people, tmp_path / "set", description)
        assert split.positions.tolist() == [3, 4] * split.num_people
        return split.images.reshape(-1, 2, 32, 32)
    np.testing.assert_array_equal(images_of("real"), 255 - heads[:11])
    np.testing.assert_array_equal(images_of("sampled"), heads[:11])  # the first, of two of the splits
    np.testing.assert_array_equal(images_of("few"), 255 - heads[:10])
    assert utility.BLUR == 1 / 128  # as in `metrics.baselines`; more here, where a pixel is a large one
    monkeypatch.setattr(utility, "BLUR", 1 / 16)
    blurred = ndimage.gaussian_filter(255.0 - heads[:11], (0, 0, 2, 2))
    np.testing.assert_allclose(images_of("blurred"), blurred, atol=0.501)
    halves = heads.reshape(-1, 16, 2, 16, 2).mean(axis=(2, 4))
    small = utility.shrink(dataset.Split.from_heads(heads, [3, 4]), 16)
    np.testing.assert_allclose(small.images.reshape(halves.shape), halves, atol=0.501)
    with pytest.raises(UserError, match="simulated at 128 or 256 pixels"):
        images_of("simulated")
    def write(folder, people, image_size, geometry, num_slices):
        assert (image_size, geometry.lowest, num_slices) == (128, 5, 5)
        write_cohort(folder, people.values(), num_slices, image_size)
    monkeypatch.setattr(template, "write_cohort", write)
    simulated = utility.simulate(4, 128, description, tmp_path / "simulated")
    assert simulated.positions.tolist() == [3, 4] * 4


def test_adam_trains_at_the_best_of_its_rates_and_else_as_muon_does(monkeypatch):
    monkeypatch.setattr(Trial, "fit", lambda trial, num_steps: num_steps)
    stages = [common.vqvae_stage(common.noise_split(1, 64), autoencoder_steps=0) for _ in range(2)]
    muon, adam = (Trial(*pair, 50).model.optimizer for pair in zip(stages, ("Muon", "Adam")))
    assert type(muon) is Muon and type(adam) is Adam and adam.get_config() == muon.get_config()
    calls = []
    def train_trial(make_stage, optimizer, steps, seed=0, factor=1.0):
        calls.append((optimizer, steps, seed, factor))
        return calls[-1], {"seconds": 1, "bits_per_code": abs(factor - 2.5)}
    monkeypatch.setattr("benchmarks.optimizers.train_trial", train_trial)
    monkeypatch.setattr("benchmarks.optimizers.steps_per_second", lambda make_stage: {"Muon": 3, "Adam": 6})
    model, search, rows = compare(None, 10, 2)
    assert calls == [("Adam", 20, 0, 1 / 3), ("Adam", 20, 0, 1), ("Adam", 20, 0, 3),
                     ("Muon", 30, 0, 1), ("Adam", 60, 0, 3), ("Adam", 60, 1, 3), ("Muon", 30, 1, 1)]
    assert model == calls[-1] and list(search) == [1 / 3, 1, 3]
    assert rows["Adam"] == {"steps": 60, "factor": 3, "seconds": [1, 1], "bits_per_code": [0.5, 0.5]}


def test_people_of_another_run_are_refused(tmp_path):
    folder = write_cohort(tmp_path / "cohort", people=(2, 1, 1), slices=2)
    fingerprints = dataset.fingerprints(dataset.load_splits(folder, limit=1, front="down"))
    trained_on = {"front": "down", "limit": 1, "fingerprints": fingerprints}
    assert utility.load_people(folder, trained_on)["train"].num_people == 1
    for name in ("train", "test"):
        with pytest.raises(UserError, match=f"The {name} people in .* are not those of the run"):
            utility.load_people(folder, {**trained_on, "fingerprints": {**fingerprints, name: "other"}})


@pytest.mark.parametrize("status, files, counts", ((-9, 3, 1), (-9, 4, 0), (0, 4, 0)))
def test_only_kills_within_the_training_count(tmp_path, monkeypatch, status, files, counts):
    def train_until_killed(cohort, run, kill_after=None):
        for name in faults.MILESTONES[:files if kill_after else 4]:
            (run / name).parent.mkdir(parents=True, exist_ok=True)
            (run / name).touch()
        return status if kill_after else 0, 1
    monkeypatch.setattr(faults, "train", train_until_killed)
    monkeypatch.setattr(faults, "assert_same_run", lambda run, whole: (run / "left").touch())
    row = faults.training_trial(tmp_path, tmp_path / "run", tmp_path / "nothing", 1)
    reached = ["nothing", *faults.MILESTONES][files]
    expected = {"after": 1, "state": reached, "lost": False, "differing": False,
                "left_over": sorted([*faults.MILESTONES, "left"])}
    assert row == (expected if counts else None)


@pytest.mark.parametrize("left, state", (("aa", "all old"), ("bb", "all new"), ("ba", "mixed")))
def test_results_of_a_killed_prediction_are_all_old_or_all_new(tmp_path, monkeypatch, left, state):
    def predict_until_killed(run, folder, seed, kill_after=None):
        folder.mkdir(exist_ok=True)
        for name, content in zip("xy", left if kill_after else 2 * "ab"[seed]):
            (folder / name).write_text(content)
        return -signal.SIGKILL if kill_after else 0, 1
    monkeypatch.setattr(faults, "predict", predict_until_killed)
    predict_until_killed(None, tmp_path / "results", 0)
    references = {seed: dict.fromkeys("xy", letter) for seed, letter in enumerate((b"a", b"b"))}
    row = faults.prediction_trial(None, tmp_path / "results", references, 1)
    assert row == {"after": 1, "state": state, "lost": False, "differing": left == "ba"}
    assert faults.contents(tmp_path / "results") in references.values()  # whole again


def test_sizes_asked_for_and_shown_are_compared_by_rank_slope_and_quantile():
    quantiles, targets = np.linspace(0.1, 0.3, 101) ** 2, (np.arange(64) + 0.5) / 64
    target_sizes = (0.1 + 0.2 * targets) ** 2
    sizes = 0.02 + 0.5 * target_sizes + 0.01 * np.random.default_rng(0).normal(size=64)
    measured = ventricles.compare(targets, sizes, quantiles)
    ranks = np.argsort(np.argsort(sizes))  # no ties: Spearman is the correlation of ranks
    assert measured["rank_correlation"] == pytest.approx(np.corrcoef(ranks, np.arange(64))[0, 1])
    assert measured["slope"] == pytest.approx(np.polyfit(target_sizes, sizes, 1)[0], rel=1e-3)
    below = (np.sqrt(sizes) - 0.1) / 0.2
    assert measured["quantile_error"] == pytest.approx(np.abs(below.clip(0, 1) - targets).mean(), abs=1e-3)
    means = np.mean([np.split(target_sizes, 4), np.split(sizes, 4)], axis=2).T
    np.testing.assert_allclose([list(group.values()) for group in measured["groups"]], means, atol=1e-5)


def test_the_attack_takes_the_reference_off_and_adds_to_the_evaluation(trained, tmp_path, monkeypatch):
    run = Run.load(shutil.copytree(trained / "runs" / "tiny", tmp_path / "run"))
    (run.folder / "evaluation.json").write_text('{"heads": {"copies": 0}}')
    _, prior = predict.load_models(run)
    def reference(run, vqvae, splits, epochs):
        assert np.unique(splits["train"].cases).tolist() == [2, 4] and epochs == 1
        return prior  # the same: the difference says nothing
    monkeypatch.setattr(membership, "train_reference", reference)
    monkeypatch.setattr(sys, "argv", ["membership.py", "--run-dir", str(run.folder), "--epochs", "1"])
    membership.main()
    judged = json.loads((run.folder / "evaluation.json").read_text())["heads"]
    assert judged["copies"] == 0 and judged["membership_reference"] == 0.5
    # A member costs less under the prior that saw it, whatever it costs under both.
    monkeypatch.setattr(membership, "code_lengths", lambda vqvae, prior, split: prior[split])
    of_run = {"in": np.array([1, 3, 8]), "out": np.array([2, 4])}
    of_others = {"in": np.array([2, 4, 9]), "out": np.array([2, 4])}
    assert membership.attack(None, of_run, of_others, "in", "out")["membership_reference"] == 1


MACHINE = {"packages": {"numpy": "2.0"}, "python": "3.11", "vector_instructions": ["sse2", "avx", "fma"]}
ORIGIN = {"command": "python x.py", "commit": f"{40 * 'a'}, judged at {20 * '0b'}", "date": "2026-01-01",
          "hardware": "2 cores", "machine": MACHINE}
KILLS = {"tried": 2, "survived": 2, "lost": 0, "differing": 0, "left_over": 0}


def test_a_table_of_measured_records_is_filled():
    results = {"faults": {**ORIGIN, "training": KILLS, "prediction": KILLS}, "x": ORIGIN,
               "gpu": {**ORIGIN, "hardware": "a GPU"}}
    kills, origins, machines = (tables.table(name, results) for name in ("faults", "origins", "machines"))
    assert "| `predict.py` | all old or all new results | 2 | 2 | 0 | 0 | 0 |" in kills
    assert "| `x` | `python x.py` | aaaaaaaaaa, judged at 0b0b0b0b0b | 2026-01-01 |" in origins
    assert "| all others | 2 cores | avx, fma | Python 3.11, numpy 2.0 |\n| `gpu` | a GPU |" in machines


@pytest.mark.parametrize("name, entry, reason", (
    ("origins", {**ORIGIN, "transcribed": "from a README"}, "x was transcribed"),
    ("origins", {**ORIGIN, "commit": ""}, "an empty cell"),
    ("epochs", {"epochs": []}, "The table epochs cannot be filled.*no rows"),
    ("epochs", {}, "no 'epochs'")))
def test_what_was_not_measured_is_refused(name, entry, reason):
    with pytest.raises(UserError, match=reason):
        tables.fill(f"<!-- results: {name} -->\n| old |\n", {"loading" if name == "epochs" else "x": entry})

"""The benchmarks: turns, ratios, what is counted, kills, the record, and the tables that it fills."""

import io
import json
import signal
import sys

import keras
import numpy as np
import pytest
from scipy import stats
import tensorflow as tf

from benchmarks import common, faults, gpu, reconstruction, record, tables, training, utility, ventricles
from benchmarks.loading import load_ours, load_theirs
from benchmarks.memory import run_watched
from benchmarks.tiny import draw_head, write_cohort
import dataset
import predict
from support import judge, runs, sampler, synthetic, template
from support.cli import UserError
from support.images import empty_margin
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
    summary = common.ratio([10, 30, 90, 12], [5, 20, 30, 4])
    assert summary == {"median": 2.5, "min": 1.5, "max": 3.0, "rounds": 4}
    assert common.in_words(summary) == "2.5 times (1.5 to 3 in 4 rounds)"
    assert "median" in common.ratio([0.7, 0.8, 0.9], [1, 1, 1])
    with pytest.raises(ValueError):
        common.ratio([1, 2], [1])


@pytest.mark.parametrize("ours", ([0.9, 1.5, 1.6], [1.0, 1.5, 1.6], [0.5, 0.6, 1.0]))
def test_noise_larger_than_the_effect_gets_no_number(ours):
    summary = common.ratio(ours, [1, 1, 1])
    assert summary == {"verdict": "no difference measurable", "rounds": 3}
    assert common.in_words(summary) == "no difference measurable in 3 rounds"


def test_a_side_answers_each_request_in_its_own_process(tmp_path, monkeypatch, capsys):
    script = tmp_path / "side.py"
    script.write_text("""
import json, os, sys
for line in sys.stdin:
    if line == '"die"\\n':
        sys.exit("out of order")
    print(json.dumps([os.getpid(), sys.argv[1:], json.loads(line)]), flush=True)
""")
    with common.Side(script, "--steps", 3) as side:
        assert side.ask(0.5) == [side.process.pid, ["--steps", "3"], 0.5]
        with pytest.raises(RuntimeError, match="out of order"):
            side.ask("die")
    measured = common.ask_in_turn(script, {"a": ["x"], "b": ["y"]}, 2)
    assert [[answer[1] for answer in measured[name]] for name in "ab"] == [[["x"], ["x"]], [["y"], ["y"]]]
    assert measured["a"][0] == measured["a"][1] != measured["b"][0]
    monkeypatch.setattr(sys, "stdin", io.StringIO('null\n"die"\n'))
    assert list(common.requests()) == [None, "die"]
    common.answer([1, None])
    assert capsys.readouterr().out == "[1, null]\n"


def test_finish_prints_the_last_line_and_records_it_with_its_origin(tmp_path, monkeypatch, capsys):
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"scaling": {"speed": 3}, "training": {"speed": 1}}))
    monkeypatch.setattr(common, "RESULTS", results)
    monkeypatch.setattr(sys, "argv", [f"{common.ROOT}/benchmarks/training.py", "--rounds", "4", "--record"])
    parser = common.argument_parser("Training.\n\nMore.", default_rounds=3)
    common.finish("training", parser.parse_args([]), {"speed": 2})
    assert json.loads(capsys.readouterr().out) == {"speed": 2}
    assert json.loads(results.read_text())["training"] == {"speed": 1}
    common.finish("training", parser.parse_args(), {"speed": 2})
    recorded = json.loads(results.read_text())
    entry = recorded["training"]
    assert recorded == {"scaling": {"speed": 3}, "training": {
        "command": "python benchmarks/training.py --rounds 4", "machine": runs.build_info(), "speed": 2,
        **{name: entry[name] for name in ("commit", "date", "hardware")}}}
    assert " GiB, " in entry["hardware"]


def test_a_run_is_described_by_its_own_files(tmp_path):
    files = {"metrics.json": '{"ssim": 0.9}', "evaluation.json": '{"ssim": 0.9, "heads": {"copies": 0}}',
             "vqvae_history.csv": "epoch,seconds\n0,60.5\n1,59.5\n",
             "pixelcnn_history.csv": "epoch,seconds\n0,30\n"}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    config = {"git_commit": "abc", "build": {"processor": "x"}, "settings": {"seed": 0},
              "vqvae": {"image_size": 256}, "pixelcnn": {"grid_size": 32, "num_embeddings": 512},
              "data": {"people": {"train": 3}}}
    entry = record.describe(Run(tmp_path, config))
    assert len(entry.pop("date")) == 10
    assert entry == {
        "commit": "abc", "machine": {"processor": "x"}, "people": {"train": 3}, "image_size": 256,
        "num_embeddings": 512, "codes_per_image": 1024, "bits_fixed": 9216.0, "ssim": 0.9,
        "heads": {"copies": 0}, "seconds": {"vqvae": 120.0, "pixelcnn": 30.0}}


def test_noise_has_the_border_and_random_codes_the_places_that_are_asked_for():
    split = common.noise_split(2, 64, margin=8)
    assert split.images.shape == (64, 64, 64) and empty_margin(split.images, 1) == 8
    assert split.num_people == 2 and split.positions.tolist() == 2 * list(range(32))
    coded = common.random_codes(common.noise_split(1, 32), small_prior(num_positions=32))
    assert coded.codes.shape == (1, 32, 6, 6) and np.unique(coded.codes).tolist() == list(range(11))
    assert coded.context[20].tolist() == [19, 18, 16, 12] and coded.context[1].tolist() == [0, 32, 32, 32]


def test_multiply_adds_are_those_of_the_formula_and_the_share_of_the_peak_is_that_of_each_round():
    def forward(x):
        return tf.reshape(tf.nn.conv2d(x, tf.zeros((3, 3, 4, 8)), 1, "SAME"), (-1, 8)) @ tf.zeros((8, 5))

    expected = 16 * 16 * (3 * 3 * 4 * 8 + 8 * 5) / 1e6
    assert training.multiply_adds(forward, tf.zeros((1, 16, 16, 4))) == pytest.approx(expected)
    last = {"multiply_adds_million": 100, "peak_gigabytes": 1}
    row = training.summarise([10, 20, 30], last, [6_000, 6_000, 10_000])
    assert row["share_of_peak"] == pytest.approx(np.median([0.5, 1, 0.9]))  # a step is three forward passes
    assert row["images_per_second"] == {"median": 20, "min": 10, "max": 30}


def test_the_steps_that_keras_ran_are_counted(monkeypatch):
    """It takes 16 at a time here: 32 where 30 were asked for."""
    monkeypatch.setattr(gpu, "Clock", type("Clock", (keras.callbacks.Callback,), {"seconds": 2}))
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile("sgd", "mse", steps_per_execution=16)
    batches = tf.data.Dataset.from_tensors((tf.zeros((8, 1)), tf.zeros((8, 1)))).repeat()
    assert gpu.images_per_second(model, batches, 8, 30) == 32 * 8 / 2


def test_both_ways_of_loading_read_the_same_pixels(tmp_path):
    folder = write_cohort(tmp_path / "cohort", people=(2, 1, 1), slices=2)
    ours, theirs = load_ours(folder, tmp_path / "cache"), load_theirs(folder, None)
    for images, floats in zip(ours, theirs, strict=True):
        assert images.dtype == np.uint8 and floats.dtype == np.float64 and images.shape == floats.shape
        sums = np.round(255 * floats.sum(axis=(1, 2)))
        np.testing.assert_array_equal(sorted(images.sum(axis=(1, 2))), sorted(sums))


def test_the_images_of_a_turn_are_those_of_its_batches(monkeypatch):
    monkeypatch.setattr(common, "requests", lambda: iter([1]))
    for num_images, batches in ((10, [4, 4, 2] * 3), (8, [4, 4] * 4), (None, [4] * 9)):
        turns = reconstruction.Turns(4, num_images)
        for steps in range(len(batches) + 1):
            assert turns._images(steps) == sum(batches[:steps])


def test_memory_within_a_limit_is_watched(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "ROOT", tmp_path)
    (tmp_path / "hold.py").write_text("import sys, time; held = bytearray(int(sys.argv[1])); time.sleep(0.2)")
    free = run_watched("hold.py", 0)
    held = run_watched("hold.py", 10 ** 8, limit=free + 2 * 10 ** 8)
    assert held == pytest.approx(free + 1e8, rel=0.1)
    with pytest.raises(RuntimeError, match="MemoryError"):
        run_watched("hold.py", 10 ** 8, limit=free + 5 * 10 ** 7)


def test_the_fewer_heads_are_the_first_of_the_many(tmp_path):
    heads = np.random.default_rng(0).integers(0, 256, (12, 2, 32, 32), np.uint8)
    description = {"heads": template.split_people(12), "slice_positions": [3, 4],
                   "says": "", "prior_says": "", "trained_on": {"is_simulated": False}}
    synthetic.write_png_heads(tmp_path / "set", heads, description)
    for count in (4, 10, 11, 12):
        split = utility.load_heads(tmp_path / "set", count)
        np.testing.assert_array_equal(split.images, heads[:count].reshape(-1, 32, 32))
        assert split.num_people == count and split.positions.tolist() == [3, 4] * count


def test_each_side_has_its_number_of_heads():
    for available, more in ((1000, 130), (40, 40)):
        assert utility.numbers_of_heads(13, 10, available) == {"real": 13, "as_many": 13, "more": more}
    with pytest.raises(UserError, match="holds 13 heads, and there are 13 training people"):
        utility.numbers_of_heads(13, 10, 13)


def test_people_of_another_run_and_a_folder_of_no_heads_are_refused(tmp_path):
    folder = write_cohort(tmp_path / "cohort", people=(2, 1, 1), slices=2)
    for limit, count in ((None, 2), (1, 1)):
        fingerprints = dataset.fingerprints(dataset.load_splits(folder, limit=limit, front="down"))
        trained_on = {"front": "down", "limit": limit, "fingerprints": fingerprints}
        splits = utility.load_people(folder, trained_on)
        assert splits["train"].num_people == count and "validate" not in splits
    for name in ("train", "test"):
        with pytest.raises(UserError, match=f"The {name} people in .* are not those of the run"):
            utility.load_people(folder, {**trained_on, "fingerprints": {**fingerprints, name: "other"}})
    with pytest.raises(UserError, match="cohort is no data set of predict.py --write-dataset"):
        utility.read_description(folder)


def test_a_script_is_killed_after_its_beginning_and_not_after_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "ROOT", tmp_path)
    begun = tmp_path / "begun"
    script = "import sys, time; open(sys.argv[1], 'w'); time.sleep(int(sys.argv[2]))"
    (tmp_path / "sleep.py").write_text(script)
    status, _ = faults.run_script("sleep.py", begun, 60, begun=begun.exists, kill_after=0.1)
    assert status == -signal.SIGKILL and begun.exists()
    assert faults.run_script("sleep.py", begun, 0, kill_after=60)[0] == 0


@pytest.mark.parametrize("status, files, counts", ((-9, 0, 1), (-9, 3, 1), (-9, 4, 0), (0, 4, 0)))
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
    low, high = measured["rank_correlation_interval"]
    assert low < measured["rank_correlation"] < high <= 1
    # The interval of the slope is about that of the textbook, whose noise is as large everywhere.
    textbook = 2 * 1.96 * stats.linregress(target_sizes, sizes).stderr
    assert np.ptp(measured["slope_interval"]) == pytest.approx(textbook, rel=0.2)


def test_the_size_of_a_heads_ventricles_is_the_mean_over_its_slices():
    rng = np.random.default_rng(0)
    slices = np.array([draw_head(rng, position) for position in (0, 1, 2, 4, 6, 8)])
    sizes = ventricles.sizes_of(slices.reshape(2, 3, *slices.shape[1:]))
    expected = np.mean(np.split(judge.tissue_statistics(slices)["dark_fraction"], 2), axis=1)
    np.testing.assert_allclose(sizes, expected)
    assert 0.02 < sizes[0] < sizes[1]


def test_ventricles_of_sampled_heads_are_measured_and_drawn(trained, tmp_path, monkeypatch, capsys):
    """With the tests' run, whose heads follow nothing: so `main` gets sizes that do."""
    run, figure = Run.load(trained / "runs" / "tiny"), tmp_path / "x.png"
    vqvae, prior = predict.load_models(run)
    targets, measure = np.linspace(0, 1, 3), run.read_ventricles()
    heads = ventricles.sample(vqvae, prior, measure, 3, targets)
    assert heads.shape == (3, 8, 64, 64) and heads.dtype == np.uint8
    # What predict.py --heads 3 --ventricles QUANTILE has at the last place.
    persons = sampler.steered_people(prior, measure, 3, 0, targets[-1])
    codes = sampler.sample_heads(prior, 3, persons=persons)
    np.testing.assert_array_equal(heads[-1], predict.decode_heads(vqvae, codes)[-1])
    monkeypatch.setattr(predict, "load_models", lambda run: (vqvae, prior))
    monkeypatch.setattr(ventricles, "sample", lambda *arguments: np.resize(heads, (arguments[3], 8, 64, 64)))
    monkeypatch.setattr(ventricles, "sizes_of", lambda heads: np.linspace(0, 1, len(heads)))
    options = ["--run-dir", str(run.folder), "--heads", "12", "--figure", str(figure)]
    monkeypatch.setattr(sys, "argv", ["ventricles.py", *options])
    ventricles.main()
    said = capsys.readouterr().out.splitlines()
    assert "12 heads: rank correlation of asked and shown 1.00" in said[-3] and figure.is_file()
    assert json.loads(said[-1])["num_heads"] == 12


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
    ("machines", {key: value for key, value in ORIGIN.items() if key != "machine"}, "no 'machine'"),
    ("origins", {**ORIGIN, "commit": ""}, "an empty cell"),
    ("epochs", {"epochs": []}, "The table epochs cannot be filled.*no rows"),
    ("epochs", {}, "no 'epochs'")))
def test_what_was_not_measured_is_refused(name, entry, reason):
    with pytest.raises(UserError, match=reason):
        tables.fill(f"<!-- results: {name} -->\n| old |\n", {"loading" if name == "epochs" else "x": entry})


def test_a_machine_without_a_gpu_is_not_timed_as_one(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    check_refused(lambda arguments: gpu.main(*arguments), [], "TensorFlow sees no GPU", capsys)

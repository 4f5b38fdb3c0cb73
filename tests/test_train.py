"""Training: both stages, stopped and resumed, on a full disk, and what is refused."""

import dataclasses
import json
import shutil
import signal
import types

import imageio.v3 as imageio
import keras
import numpy as np
from PIL import Image
import pytest
import tensorflow as tf

from benchmarks.tiny import assert_same_run, TINY, write_cohort
import dataset
import modules
from support import judge, people, runs, sampler, stages, template
from support.files import UNFINISHED, write_json
from support.runs import Run
from tests.conftest import check_refused
from tests.small import new_run, random_vectors, small_prior, small_vqvae
import train


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_training_leaves_a_whole_run_folder(trained):
    run = Run.load(trained / "runs" / "tiny")
    assert names(run.folder) == runs.OURS - {"backup"}
    assert names(run.folder / "figures") == {"losses.png", "ssim.png", "prior.png", "reconstructions.png"}
    assert run.settings["num_embeddings"] == 16 and run.settings["batch_size"] == 8
    assert run.config["data"]["people"] == {"train": 4, "validate": 2, "test": 2}
    history = run.read_history("vqvae")
    assert history["epoch"].tolist() == [0, 1]
    assert {"val_ssim", "test_ssim", "perplexity", "val_codes_used", "seconds"} <= {*history.dtype.names}
    assert history["reconstruction_loss"][1] < history["reconstruction_loss"][0]
    in_head = run.read_history("decoder")["val_reconstruction_loss"]
    assert in_head.min() < history["val_reconstruction_loss"].min()
    assert len(imageio.imread(run.folder / "progress.gif")) == 3  # before the first epoch, and after each
    vqvae, prior = (modules.load_model(run.model_path(name)) for name in ("vqvae", "pixelcnn"))
    modules.check_match(vqvae, prior)
    assert not vqvae.compiled and not prior.compiled  # no optimiser: that would be two thirds of the file
    shift, scale = prior.person_shift.numpy(), prior.person_scale.numpy()
    assert (shift != 0).any() and np.abs(shift).max() <= 1 and scale.min() >= 1 and scale.max() <= 2
    movement = float(prior.movement)
    train.fit_movement(prior, dataset.encode_split(vqvae, prior, splits_of(run)["validate"]))
    assert float(prior.movement) == pytest.approx(movement, abs=1e-6) and movement != 0
    assert json.loads((run.folder / "metrics.json").read_text())["movement"] == movement
    assert train.DecoderStage.monitor == "val_loss"  # what it trains on


def test_ventricles_of_training_people_follow_from_their_persons(trained):
    run = Run.load(trained / "runs" / "tiny")
    vqvae, prior = modules.load_models(run)
    ventricles, split = run.read_ventricles(), splits_of(run)["train"]
    persons = prior.encode_people(dataset.head_pictures(split, vqvae.margin, prior.num_positions)[0])
    sizes = judge.tissue_statistics(split.images)["dark_fraction"].reshape(4, 8).mean(axis=1)
    fitted = ventricles["offset"] + persons @ ventricles["weights"]
    assert fitted.mean() == pytest.approx(sizes.mean()) and np.corrcoef(fitted, sizes)[0, 1] > 0.8
    np.testing.assert_allclose(ventricles["quantiles"][::50], np.quantile(sizes, [0, 0.5, 1]))


def test_the_codebook_starts_at_the_clusters_of_the_encoders_vectors(monkeypatch):
    centers = 9 * np.concatenate([np.eye(3), -np.eye(3)]).astype(np.float32)
    vectors = centers[:, np.newaxis] + 0.01 * random_vectors((6, 40, 3))
    # The first cluster thrice
    batches = [(vectors[:, index], None) for index in range(40)] + 2 * [(vectors[0], None)]
    encoded, vqvae = [], small_vqvae(num_embeddings=6, embedding_dim=3)
    monkeypatch.setattr(vqvae, "encode", lambda batch: encoded.append(batch) or batch)
    train.start_codebook(vqvae, batches, autoencoder_steps=0, fit_batches=42)
    distances = np.linalg.norm(vqvae.quantizer.embeddings.numpy() - centers[:, np.newaxis], axis=-1)
    assert (distances.min(axis=1) < 0.1).all()
    counts = vqvae.quantizer.counts.numpy()[distances.argmin(axis=1)]
    np.testing.assert_allclose(counts, 6 * np.array([120, 40, 40, 40, 40, 40]) / 320, rtol=1e-6)
    encoded.clear()
    train.start_codebook(vqvae, [(pair, None) for pair in vectors[:, 0].reshape(3, 2, 3)], 0, fit_batches=1)
    assert len(encoded) == 3  # one batch of two vectors is too few for six codes
    vectors[0, 0, 0] = np.nan
    with pytest.raises(train.UserError, match="diverged at its start"):
        train.start_codebook(vqvae, batches, autoencoder_steps=0, fit_batches=42)


def test_embeddings_start_as_like_as_the_codebook():
    prior = modules.PixelCNN(4, 30, 2, num_filters=200, num_layers=1, embedding_dim=4)
    codebook = random_vectors((30, 4))
    train.start_embeddings(prior, codebook, seed=0)
    standardised = (codebook - codebook.mean(axis=0)) / codebook.std()
    np.testing.assert_allclose(prior.code_vectors, standardised, rtol=1e-5)
    expected = np.linalg.norm(codebook[:, np.newaxis] - codebook, axis=-1)
    for started in (prior.code_embedding.embeddings.numpy(), prior.logits.layers[-1].kernel.numpy().T,
                    prior.context_embeddings[1].embeddings.numpy()[:-1]):
        between = np.linalg.norm(started[:, np.newaxis] - started, axis=-1)
        assert np.corrcoef(between.ravel(), expected.ravel())[0, 1] > 0.95


def test_movement_is_that_of_the_largest_likelihood():
    """By the log-likelihood of the same slices, those without two below left out, at 41 other values."""
    prior, rng = small_prior(num_positions=6), np.random.default_rng(0)
    prior.noise_embedding.kernel.assign(30 * prior.noise_embedding.kernel)  # so that the share told matters
    codes = rng.integers(0, 11, (1, 12, 6, 6), np.uint16)  # of two heads
    numbers = np.arange(12)
    below = numbers[:, np.newaxis] - np.array(prior.steps_below)
    context = np.where(below >= numbers[:, np.newaxis] // 6 * 6, below, 12)
    persons = rng.normal(size=(1, 12, prior.person_size)).astype(np.float32)
    coded = dataset.CodedSplit(codes, np.int32(numbers % 6), context, persons, None, np.zeros((11, 1)))
    # Codes that go on as those below do: without them the largest likelihood is at about 0.
    vectors = prior.code_vectors.numpy()
    for row in (2, 3, 4, 5, 8, 9, 10, 11):
        ahead = 2 * vectors[codes[0, row - 1]] - vectors[codes[0, row - 2]]
        codes[0, row] = ((ahead[..., np.newaxis, :] - vectors) ** 2).sum(axis=-1).argmin(axis=-1)
    train.fit_movement(prior, coded)
    rows = np.flatnonzero(numbers % 6 >= 2)
    def log_likelihood(movement):
        prior.movement.assign(movement)
        return prior.log_prob(coded.slices(rows), coded.positions[rows], coded.slices(context[rows]),
                              persons[0, rows], np.full(8, prior.context_noise, np.float32)).numpy().sum()
    fitted = float(prior.movement)
    values = fitted + np.linspace(-0.2, 0.2, 41)
    best = values[np.argmax([log_likelihood(value) for value in values])]
    assert fitted > 0.3 and best == pytest.approx(fitted, abs=0.011)
    coded = dataclasses.replace(coded, context=np.full_like(context, 12))
    train.fit_movement(prior, coded)  # nobody has two slices below another
    assert float(prior.movement) == 0


@pytest.mark.parametrize("share", (0.9, 0.99, 0.999))
def test_the_movement_of_a_prior_that_is_too_sure_has_the_largest_likelihood_too(share):
    """Newton's method alone would leave it: where one code is nearly certain the likelihood bends little."""
    prior, rng = small_prior(num_positions=3), np.random.default_rng(0)
    for weight in prior.logits.layers[-1].trainable_variables:
        weight.assign(tf.zeros_like(weight))
    prior.logits.layers[-1].bias.assign(np.log([share, *10 * [(1 - share) / 10]]))
    codes = np.zeros((1, 3, 6, 6), np.uint16)
    codes[0, :2] = rng.integers(0, 11, (2, 6, 6))
    vectors = prior.code_vectors.numpy()
    going_on = ((vectors[codes[0, 1]] - vectors[codes[0, 0]]) @ vectors.T).argmax(axis=-1)
    codes[0, 2] = np.where(rng.random((6, 6)) < 0.2, going_on, 0)
    context = np.array([[3, 3, 3, 3], [0, 3, 3, 3], [1, 0, 3, 3]])
    coded = dataset.CodedSplit(codes, np.arange(3, dtype=np.int32), context, np.zeros((1, 3, 24), np.float32),
                               None, np.zeros((11, 1)))
    train.fit_movement(prior, coded)
    fitted, likelihoods = float(prior.movement), []
    for offset in (-0.02, 0, 0.02):
        prior.movement.assign(fitted + offset)
        likelihoods.append(float(prior.log_prob(codes[0, 2:].astype(np.int32), np.array([2], np.int32),
                                                coded.slices(context[2:]))[0]))
    assert 0 < fitted < 2 and np.argmax(likelihoods) == 1


def test_a_run_that_starts_from_another_begins_where_that_ended(trained, tmp_path):
    """How it goes on and resumes: test_recipes.py."""
    tiny = Run.load(trained / "runs" / "tiny")
    vqvae, _ = modules.load_models(tiny)
    arguments = ["--data-dir", trained / "cohort", "--run-dir", tmp_path / "run", "--start-from", tiny.folder]
    with train.open_run(train.parse_arguments(list(map(str, arguments)))) as (run, splits):
        assert run.start_from == {"folder": str(tiny.folder), "data": tiny.config["data"], "start_from": None}
        assert run.settings["num_embeddings"] == 16 and run.settings["autoencoder_steps"] == 0
        started, stage = train.VQVAEStage(run, splits).begin(), train.PixelCNNStage(run, splits, vqvae)
        prior = stage.begin()
        decoder = train.DecoderStage(run, splits, vqvae).build()
        assert [model.optimizer.weight_decay for model in (started, decoder, prior)] == [None, None, 0.1]
        assert prior.context_noise == run.settings["context_noise"]
        bits = prior.evaluate(stage.batches(prior, "validate", 32), verbose=0, return_dict=True)
    images = dataset.normalise(splits["test"].images)[..., np.newaxis]
    np.testing.assert_allclose(started(images), vqvae(images), atol=1e-5)
    np.testing.assert_array_equal(started.quantizer.counts, vqvae.quantizer.counts)
    best = tiny.read_history("pixelcnn")["val_bits_per_code"].min()
    assert bits["bits_per_code"] == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("simulated, all_simulated", (((), False), (("cohort",), False), (("run",), False),
                                                      (("cohort", "run"), True)))
def test_all_people_are_simulated_only_if_the_start_runs_are_too(
        simulated, all_simulated, trained, cohort, tmp_path):
    tiny = Run.load(shutil.copytree(trained / "runs" / "tiny", tmp_path / "tiny"))
    tiny.config["data"]["is_simulated"] = "run" in simulated
    write_json(tiny.folder / "config.json", tiny.config)
    if "cohort" in simulated:
        (cohort / template.SIMULATED_NOTE).touch()
    run = Run.load(new_run(tmp_path / "run", cohort, "--start-from", str(tiny.folder)))
    assert run.is_simulated == all_simulated and bool(run.notice) == all_simulated


@pytest.mark.parametrize("changed, expected", (
    ({"spacing": 3.0}, "slices lie 1.4 mm apart from -8 mm, front unknown, but those of .* 3 mm apart"),
    ({"lowest": -8.8}, " lie 1.4 mm apart from -8.8 mm, front unknown; leave out --start-from"),
    ({"axes_known": True}, " lie 1.4 mm apart from -8 mm, front known; leave out"),
    ({"spacing": 1.9, "lowest": -8.5}, None)))
def test_slices_that_lie_elsewhere_are_refused(changed, expected, trained, tmp_path):
    tiny = Run.load(shutil.copytree(trained / "runs" / "tiny", tmp_path / "tiny"))
    geometry = tiny.geometry
    tiny.config["data"]["geometry"].update(changed)
    write_json(tiny.folder / "config.json", tiny.config)
    arguments = train.parse_arguments(["--start-from", str(tiny.folder)])
    settings = train.Settings()
    vqvae, pixelcnn = train.model_arguments(splits_of(tiny), settings)
    def take_shapes():
        return train.take_shapes(arguments, geometry, settings, vqvae, {**pixelcnn, "context_noise": 0.25})
    if expected:
        with pytest.raises(train.UserError, match=expected):
            take_shapes()
    else:
        run, _, _, pixelcnn = take_shapes()
        assert run.folder == tiny.folder and pixelcnn["context_noise"] == 0.25  # not that of the old run


@pytest.mark.parametrize("variety", (1, 50))
def test_a_person_acts_as_before_in_the_space_of_other_people(variety):
    rng = np.random.default_rng(0)
    pictures, mixing = rng.uniform(size=(5, 4, 16, 16)), np.eye(5) + 0.4 * rng.normal(size=(5, 5))
    mixing += (1 - mixing.sum(axis=1, keepdims=True)) / 5  # so that these people vary in the same directions
    others = variety * np.einsum("ij,j...->i...", mixing, pictures)
    before, after = (modules.PixelCNN(4, 30, 4, num_filters=8, num_layers=1, person_size=4) for _ in range(2))
    before.fit_people(pictures)
    after.fit_people(others)
    after.copy_from(before)
    first, *_ = np.linalg.lstsq(before.components.numpy().reshape(-1, 4),
                                (others - others.mean(axis=0)).reshape(5, -1).T, rcond=None)
    first = first.T @ before.person_embedding.kernel.numpy()
    second = after.encode_people(others) @ after.person_embedding.kernel.numpy()
    np.testing.assert_allclose(second, first, atol=0.1 * variety)
    assert first.std() > 0.4 * variety


def test_a_second_round_of_calibration_starts_from_what_the_first_corrected(monkeypatch):
    """Against `people.calibrate`, round by round, for heads that follow their person by a known curve."""
    prior, conditions = small_prior(person_size=4, slice_positions=[0, 1]), []
    def sample_heads(prior, count, seed, persons, stream):
        conditions.append(persons)
        return np.zeros((count, 2, 6, 6), np.int32)
    def outcome(persons):
        return 0.2 + 0.6 * np.tanh(persons)
    monkeypatch.setattr(sampler, "sample_heads", sample_heads)
    monkeypatch.setattr(prior, "encode_people", lambda pictures: outcome(conditions[-1]))
    vqvae = types.SimpleNamespace(decode_head=lambda codes, _: np.zeros((len(codes), 32, 32, 1)), margin=0)
    run = Run("", {"settings": dataclasses.asdict(train.Settings(seed=3))})
    train.calibrate_prior(run, vqvae, prior, num_people=20)
    first, second = (sampler.sample_people(prior, 3, f"calibration {number}", tf.range(20)).numpy()
                     for number in (1, 2))
    shift, scale = people.calibrate(first, outcome(first))
    assert (scale > 1.2).all()  # so the second round's persons lie further out
    np.testing.assert_allclose(conditions, [first, shift + scale * second], rtol=1e-5, atol=1e-6)
    expected = people.calibrate(np.concatenate(conditions), outcome(np.concatenate(conditions)))
    np.testing.assert_allclose([prior.person_shift, prior.person_scale], expected, rtol=1e-4, atol=1e-6)


def test_odd_but_valid_data_a_finer_grid_and_mixed_precision(tmp_path, monkeypatch):
    """One person per split, a slice missing, a constant image."""
    monkeypatch.chdir(tmp_path)
    folder = write_cohort(tmp_path / "odd", people=(1, 1, 1)) / "keras_png_slices_test"
    (folder / "case_441_slice_2.nii.png").unlink()
    Image.new("L", (64, 64), 128).save(folder / "case_441_slice_6.nii.png")
    epoch_each = "--epochs", "1", "--prior-epochs", "1"
    new_run("runs/odd", "odd", *epoch_each, "--downsample", "4", "--mixed-precision", num_layers=1)
    train.main(["--run-dir", "runs/odd", "--resume"])
    assert keras.config.dtype_policy().name == "float32"  # that of the process stays
    measured = json.loads((tmp_path / "runs" / "odd" / "metrics.json").read_text())
    assert measured["num_images"] == 7 and measured["codes_used"] > 1
    assert np.isfinite([*measured.pop("baselines")["mean_image"].values(), *measured.values()]).all()
    assert measured["bytes_per_image"] == pytest.approx(measured["bits_per_code"] * 16 * 16 / 8)
    assert modules.load_model("runs/odd/vqvae.keras").encoder.compute_dtype == "bfloat16"


@pytest.fixture
def begun(trained, tmp_path):
    """A `Run` that has begun, with the settings of the trained one."""
    (tmp_path / "run").mkdir()
    shutil.copy(trained / "runs" / "tiny" / "config.json", tmp_path / "run")
    return Run.load(tmp_path / "run")


@pytest.fixture
def finished(trained, tmp_path):
    run = Run.load(shutil.copytree(trained / "runs" / "tiny", tmp_path / "run"))
    run.backup_path("vqvae").parent.mkdir()
    return run


def resume(run):
    return ["--run-dir", str(run.folder), "--resume"]


def splits_of(run):
    return train.matching_splits(run, train.parse_arguments([]))


def test_a_run_that_is_stopped_in_every_stage_resumes_to_the_same_bits(trained, begun, monkeypatch, capsys):
    save = stages.Checkpoints.on_epoch_end
    for name in ("vqvae", "decoder", "pixelcnn"):
        def save_and_stop(self, epoch, logs, name=name):
            save(self, epoch, logs)
            if self.stage.name == name:
                signal.raise_signal(signal.SIGTERM)
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr(stages.Checkpoints, "on_epoch_end", save_and_stop)
            train.main(resume(begun))
        assert stop.value.code == 130 and begun.finished_epochs(name, 4) == 1
        command = f"python train.py --run-dir {begun.folder} --resume"
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.endswith(f": Stopped; finished epochs are saved; {command} goes on.")
        assert begun.backup_path("vqvae").exists() == (name == "vqvae")  # a finished stage needs none
    train.main(resume(begun))
    assert_same_run(begun.folder, trained / "runs" / "tiny")
    assert names(begun.folder) == names(trained / "runs" / "tiny")


def test_a_finished_run_that_lost_its_metrics_is_measured_again(finished, trained):
    (finished.folder / "metrics.json").unlink()
    train.main(resume(finished))
    assert_same_run(finished.folder, trained / "runs" / "tiny")


def test_a_full_disk_is_one_sentence_and_loses_nothing(begun, small_files, capsys):
    check_refused(train.main, resume(begun), f"File too large; finished epochs are saved; python train.py "
                  f"--run-dir {begun.folder} --resume", capsys)
    assert not list(begun.folder.rglob("*.keras"))


@pytest.mark.parametrize("arguments, expected", [
    (["--data-dir", "nowhere"], "--data-dir names nowhere"),
    (["--data-dir", "cohort", "--learning-rate", "nan"], "--learning-rate: expected a number"),
    (["--data-dir", "cohort", "--run-dir", "runs/tiny"], "no run can begin there; give another --run-dir"),
    (["--data-dir", "cohort", "--run-dir", "/proc/run"], "/proc/run: No such file"),
    (["--run-dir", "BARE", "--resume"], "BARE holds vqvae.keras, so no run can begin there"),
    (["--data-dir", "cohort", "--start-from", "BEGUN"], "run, which holds no finished run"),
    (["--data-dir", "OTHER", "--start-from", "runs/tiny"], "has num_positions 8, but the data or options"),
    (["--run-dir", "BEGUN", "--resume", "--start-from", "runs/tiny"], "tiny differs from None, with which"),
    (["--resume"], "--resume needs --run-dir"),
    (["--run-dir", "BEGUN", "--resume", "--num-embeddings", "99"], "--num-embeddings 99 differs from 16"),
    (["--run-dir", "BEGUN", "--resume", "--data-dir", "OTHER"], "are not those")])
def test_bad_input_is_refused_and_nothing_is_written(
        trained, begun, tmp_path, arguments, expected, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    if "OTHER" in arguments:
        write_cohort(tmp_path / "OTHER", people=(2, 1, 1), slices=9)
    (tmp_path / "BARE").mkdir()
    (tmp_path / "BARE" / "vqvae.keras").touch()
    replaced = {"BEGUN": str(begun.folder), **{name: str(tmp_path / name) for name in ("OTHER", "BARE")}}
    before = sorted(trained.rglob("*"))
    check_refused(train.main, [replaced.get(word, word) for word in arguments], expected, capsys)
    assert sorted(trained.rglob("*")) == before


def test_one_command_serves_the_first_start_a_restart_and_the_end(trained, tmp_path, capsys):
    run = tmp_path / "run"
    (run / f".config.json-{UNFINISHED}").mkdir(parents=True)  # the rest of an interrupted start
    (run / "queue.log").touch()
    command = ["--data-dir", str(trained / "cohort"), "--run-dir", str(run), *TINY, "--resume"]
    arguments = train.parse_arguments(command)
    with train.open_run(arguments) as (begun, _):
        assert begun.settings.keys() == vars(train.Settings()).keys() and begun.settings["epochs"] == 2
        # Those too that no option sets
        assert begun.config["vqvae"]["width"] == 64 and begun.config["pixelcnn"]["num_layers"] == 8
    with train.open_run(arguments) as (resumed, _):
        assert resumed.config == begun.config
    train.main(["--run-dir", str(trained / "runs" / "tiny"), "--resume"])
    assert "tiny is finished; there is nothing to resume" in capsys.readouterr().out


def test_a_run_of_another_version_is_not_resumed(begun, capsys):
    begun.config["condition_dropout"].update(person=0.9)
    write_json(begun.folder / "config.json", begun.config)
    check_refused(train.main, resume(begun), "began with other settings than this version", capsys)


def test_a_prior_of_another_codebook_is_not_resumed(finished):
    shutil.copy(finished.model_path("pixelcnn"), finished.backup_path("pixelcnn"))
    vqvae = modules.load_model(finished.model_path("vqvae"))
    stage = train.PixelCNNStage(finished, splits_of(finished), vqvae)
    vqvae.quantizer.embeddings.assign(vqvae.quantizer.embeddings + 0.001)
    for load in (lambda: stage.resume(1), lambda: stage.read(finished.model_path("pixelcnn"))):
        with pytest.raises(train.UserError, match="pixelcnn.keras cannot .*another codebook.*; remove"):
            load()

"""Training: both stages, stopped and resumed, on a full disk, and what is refused."""

import csv
import dataclasses
import json
from pathlib import Path
import shutil
import signal
import subprocess
import sys
import time
import types
import zipfile

import imageio.v3 as imageio
import keras
import numpy as np
from PIL import Image
import pytest
import tensorflow as tf

from benchmarks.tiny import assert_same_run, TINY, write_cohort
import modules
from support import optimizers, people, runs, sampler, stages
from support.runs import Run
from tests.conftest import check_refused, ROOT, script_environment
from tests.small import new_run, random_vectors, small_prior, small_vqvae
import train

# The stages


def test_training_leaves_a_whole_run_folder(trained):
    run = trained / "runs" / "tiny"
    assert {path.name for path in run.iterdir()} == {
        "config.json", "vqvae.keras", "pixelcnn.keras", "vqvae_history.csv", "pixelcnn_history.csv", "metrics.json",
        "ventricles.json", "figures", "progress.gif", "logs"}
    assert {path.name for path in (run / "figures").iterdir()} == {
        "losses.png", "ssim.png", "prior.png", "reconstructions.png"}
    config = json.loads((run / "config.json").read_text())
    assert config["settings"]["num_embeddings"] == 16 and config["settings"]["batch_size"] == 8
    assert config["data"]["people"] == {"train": 4, "validate": 2, "test": 2}
    assert config["vqvae"]["downsample"] == 8 and config["pixelcnn"]["kernel_size"] == 3  # those too that no option sets
    with open(run / "vqvae_history.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1"]
    for row in rows:
        assert float(row["loss"]) == pytest.approx(float(row["reconstruction_loss"]) + float(row["vq_loss"]), rel=1e-4)
        assert {"val_ssim", "test_ssim", "perplexity", "val_codes_used", "seconds"} <= row.keys()
    assert float(rows[1]["reconstruction_loss"]) < float(rows[0]["reconstruction_loss"])
    assert len(imageio.imread(run / "progress.gif")) == 3  # before the first epoch, and after each
    assert list((run / "logs").glob("*/train/*tfevents*"))
    vqvae, prior = (modules.load_model(run / f"{name}.keras") for name in ("vqvae", "pixelcnn"))
    modules.check_match(vqvae, prior)
    assert not vqvae.compiled and not prior.compiled  # no optimiser: that would be two thirds of the file
    shift, scale = prior.person_shift.numpy(), prior.person_scale.numpy()
    assert (shift != 0).any() and np.abs(shift).max() <= 1 and scale.min() >= 1 and scale.max() <= 2


def test_the_codebook_starts_at_the_clusters_of_the_encoders_vectors(monkeypatch):
    centers = np.array([[0, 0, 9], [0, 9, 0], [9, 0, 0], [0, 0, -9], [0, -9, 0], [-9, 0, 0]], np.float32)
    vectors = centers[:, np.newaxis] + 0.01 * random_vectors((6, 40, 3))
    batches = [(vectors[:, index], None) for index in range(40)] + 2 * [(vectors[0], None)]  # the first cluster thrice
    for decay in (0.99, None):
        vqvae = small_vqvae(num_embeddings=6, embedding_dim=3, decay=decay)
        vqvae.compile()
        monkeypatch.setattr(vqvae, "encode", lambda batch: batch)
        train.start_codebook(vqvae, batches, autoencoder_steps=0, fit_batches=42)
        distances = np.linalg.norm(vqvae.quantizer.embeddings.numpy() - centers[:, np.newaxis], axis=-1)
        assert (distances.min(axis=1) < 0.1).all()
        if decay:
            counts = vqvae.quantizer.counts.numpy()[distances.argmin(axis=1)]
            np.testing.assert_allclose(counts, 6 * np.array([120, 40, 40, 40, 40, 40]) / 320, rtol=1e-6)
    encoded = []
    monkeypatch.setattr(vqvae, "encode", lambda batch: encoded.append(batch) or batch)
    train.start_codebook(vqvae, [(pair, None) for pair in vectors[:, 0].reshape(3, 2, 3)], autoencoder_steps=0, fit_batches=1)
    assert len(encoded) == 3  # one batch of two vectors is too few for six codes
    vectors[0, 0, 0] = np.nan
    with pytest.raises(train.UserError, match="diverged at its start"):
        train.start_codebook(vqvae, batches, autoencoder_steps=0, fit_batches=42)


def test_training_lowers_the_loss_and_the_start_uses_the_codebook():
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    images = np.clip(rng.normal(size=(16, 8, 8, 1)).repeat(8, 1).repeat(8, 2), -1, 1).astype(np.float32)
    batches = tf.data.Dataset.from_tensor_slices((images, np.zeros(16, np.int32))).batch(8).repeat()
    vqvae = small_vqvae()
    vqvae.compile(optimizers.Muon(1e-2))
    train.start_codebook(vqvae, batches, autoencoder_steps=20)
    assert len(np.unique(vqvae.encode_to_codes(images))) >= 8
    history = vqvae.fit(batches, steps_per_epoch=20, epochs=3, verbose=0, shuffle=False).history
    assert history["loss"][-1] < 0.8 * history["loss"][0]
    assert int(vqvae.optimizer.iterations) == 80


def test_the_learning_rate_rises_then_falls_along_a_cosine():
    optimizer = stages.new_optimizer(train.Settings(), 2.0, 1100)
    variable = keras.Variable(np.zeros(3))
    optimizer.build([variable])
    rates = []
    for step in (0, 50, 100, 600, 1100, 2000):
        optimizer.iterations.assign(step)
        rates.append(float(optimizer.learning_rate))
    np.testing.assert_allclose(rates, [0.02, 1.01, 2, 1.02, 0.04, 0.04], rtol=1e-3)


def test_embeddings_start_as_like_as_the_codebook():
    prior, codebook = modules.PixelCNN(4, 30, 2, num_filters=200, num_layers=1), random_vectors((30, 4))
    train.start_embeddings(prior, codebook, seed=0)
    expected = np.linalg.norm(codebook[:, np.newaxis] - codebook, axis=-1)
    for started in (prior.code_embedding.embeddings.numpy(), prior.context_embeddings[1].embeddings.numpy()[:-1],
                    prior.logits.layers[-1].kernel.numpy().T):
        between = np.linalg.norm(started[:, np.newaxis] - started, axis=-1)
        assert np.corrcoef(between.ravel(), expected.ravel())[0, 1] > 0.95


def test_a_second_round_of_calibration_starts_from_what_the_first_corrected(monkeypatch):
    """Against `people.calibrate`, round by round, for heads that follow their person through a known curve."""
    prior, conditions = small_prior(person_size=4), []

    def outcome(persons):
        return 0.2 + 0.6 * np.tanh(persons)

    def sample_heads(prior, count, seed, persons, stream):
        conditions.append(persons)
        return np.zeros((count, 2, 6, 6), np.int32)

    monkeypatch.setattr(sampler, "sample_heads", sample_heads)
    monkeypatch.setattr(prior, "encode_people", lambda pictures: outcome(conditions[-1]))
    vqvae = types.SimpleNamespace(decode_codes=lambda codes: tf.zeros((len(codes), 32, 32, 1)), margin=0)
    prior.slice_positions = 0, 1
    run = Run("", {"settings": dataclasses.asdict(train.Settings(seed=3))})
    train.calibrate_prior(run, vqvae, prior, num_people=20)

    first, second = (sampler.sample_people(prior, 3, f"calibration {number}", tf.range(20)).numpy() for number in (1, 2))
    shift, scale = people.calibrate(first, outcome(first))
    assert (scale > 1.2).all()  # so the second round's persons lie further out
    np.testing.assert_allclose(conditions, [first, shift + scale * second], rtol=1e-5, atol=1e-6)
    shift, scale = people.calibrate(np.concatenate(conditions), outcome(np.concatenate(conditions)))
    np.testing.assert_allclose(prior.person_shift, shift, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(prior.person_scale, scale, rtol=1e-4)


def test_odd_but_valid_data_a_finer_grid_and_mixed_precision(tmp_path, monkeypatch):
    """One person per split, a slice missing, a constant image."""
    monkeypatch.chdir(tmp_path)
    folder = write_cohort(tmp_path / "odd", people=(1, 1, 1)) / "keras_png_slices_test"
    (folder / "case_441_slice_2.nii.png").unlink()
    Image.new("L", (64, 64), 128).save(folder / "case_441_slice_6.nii.png")
    new_run("runs/odd", "odd", "--epochs", "1", "--prior-epochs", "1", "--downsample", "4", "--mixed-precision", num_layers=4)
    train.main(["--run-dir", "runs/odd", "--resume"])
    assert keras.config.dtype_policy().name == "float32"  # that of the process stays
    measured = json.loads((tmp_path / "runs" / "odd" / "metrics.json").read_text())
    assert measured["num_images"] == 7 and measured["codes_used"] > 1 and np.isfinite(list(measured.values())).all()
    assert measured["bytes_per_image"] == pytest.approx(measured["bits_per_code"] * 16 * 16 / 8)
    assert modules.load_model("runs/odd/vqvae.keras").encoder.compute_dtype == "bfloat16"


# Stopped, starved


@pytest.fixture
def begun(trained, tmp_path):
    """The folder of a run that has begun, with the settings of the trained one."""
    (tmp_path / "run").mkdir()
    return Path(shutil.copy(trained / "runs" / "tiny" / "config.json", tmp_path / "run")).parent


def wait_for(path, process):
    """Waits until a file is there."""
    while not path.exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.005)


def test_a_killed_and_a_stopped_run_resume_to_the_same_bits(trained, begun, tmp_path, monkeypatch, capsys):
    resume = ["--run-dir", str(begun), "--resume"]
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *resume], cwd=tmp_path, env=script_environment(), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_for(begun / "backup" / "vqvae.keras", process)  # the first epoch's
    process.kill()
    assert process.wait() == -signal.SIGKILL

    save = stages.Checkpoints.on_epoch_end
    with monkeypatch.context() as patch:
        def save_and_stop(self, epoch, logs):
            save(self, epoch, logs)
            if self.backup_path.stem == "pixelcnn":
                signal.raise_signal(signal.SIGTERM)

        patch.setattr(stages.Checkpoints, "on_epoch_end", save_and_stop)
        with pytest.raises(SystemExit) as stop:
            train.main(resume)
    assert stop.value.code == 130
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said == f"Stopped. All finished epochs are saved; python train.py --run-dir {begun} --resume goes on."
    assert Run.load(begun).finished_epochs("pixelcnn") == 1

    train.main(resume)
    assert_same_run(begun, trained / "runs" / "tiny")
    assert {path.name for path in begun.iterdir()} == {path.name for path in (trained / "runs" / "tiny").iterdir()}


FILES_OF_100_KB = """
import resource, sys
import train
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
train.main(sys.argv[1:])
"""


def test_a_full_disk_is_one_sentence_and_loses_nothing(trained, tmp_path):
    """A limit on the size of files stands for the full disk: it fails at the same call."""
    run = tmp_path / "run"
    failed = subprocess.run([sys.executable, "-c", FILES_OF_100_KB, "--data-dir", trained / "cohort", "--run-dir", run, *TINY],
                            cwd=tmp_path, env=script_environment(), text=True, capture_output=True)
    assert failed.returncode == 2
    said = failed.stderr.strip().splitlines()[-1]
    assert f"train.py: {run}" in said.replace("-c: ", "train.py: ") and "File too large; finished epochs are saved" in said
    assert "--resume goes on" in said
    assert "Traceback" not in failed.stderr
    assert not list(run.rglob("*.keras"))
    config = json.loads((run / "config.json").read_text())
    assert config["settings"]["epochs"] == 2 and config["settings"].keys() == vars(train.Settings()).keys()
    assert config["vqvae"]["width"] == 64 and config["pixelcnn"]["num_layers"] == 8  # those that no option sets


def test_a_start_that_diverges_stops_with_advice(trained, tmp_path, capsys):
    run = tmp_path / "run"
    check_refused(train.main, ["--data-dir", str(trained / "cohort"), "--run-dir", str(run), *TINY, "--learning-rate", "1e30"],
                  "lower --learning-rate", capsys)
    assert not (run / "vqvae.keras").exists()


@pytest.mark.parametrize("error, expected", (
    (tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor with shape[8,64]"),
     "Out of memory (OOM when allocating tensor with shape[8,64]); give a smaller --batch-size"),
    (MemoryError(), "Out of memory (MemoryError)")))
def test_out_of_memory_is_one_sentence(begun, monkeypatch, capsys, error, expected):
    monkeypatch.setattr(train, "run_stages", lambda *_: (_ for _ in ()).throw(error))
    check_refused(train.main, ["--run-dir", str(begun), "--resume"], expected, capsys)


def test_any_other_tensorflow_error_stays_itself(begun, monkeypatch):
    def fail(*_, **__):
        raise tf.errors.InvalidArgumentError(None, None, "must be a compile-time constant")

    monkeypatch.setattr(train, "run_stages", fail)
    with pytest.raises(tf.errors.InvalidArgumentError, match="compile-time constant"):
        train.main(["--run-dir", str(begun), "--resume"])


# Refused


@pytest.mark.parametrize("arguments, expected", [
    (["--data-dir", "nowhere"], "--data-dir names nowhere"),
    (["--data-dir", "cohort", "--limit", "0"], "--limit: expected an integer of at least 1, got 0"),
    (["--data-dir", "cohort", "--epochs", "many"], "--epochs: expected an integer"),
    (["--data-dir", "cohort", "--learning-rate", "nan"], "--learning-rate: expected a number"),
    (["--data-dir", "cohort", "--downsample", "5"], "--downsample"),
    (["--data-dir", "cohort", "--run-dir", "runs/tiny"], "runs/tiny is not empty"),
    (["--data-dir", "cohort", "--run-dir", "/proc/run"], "/proc/run: No such file"),
    (["--data-dir", "runs"], "keras_png_slices_train is missing"),
    (["--data-dir", "nowhere", "--run-dir", "none", "--resume"], "--data-dir names nowhere"),
    (["--run-dir", "cohort", "--resume"], "cohort holds no run, but other files"),
    (["--resume"], "--resume needs --run-dir"),
    (["--run-dir", "BEGUN", "--resume", "--num-embeddings", "99"], "--num-embeddings 99 differs from 16, with which"),
    (["--run-dir", "BEGUN", "--resume", "--data-dir", "OTHER"], "are not those"),
])
def test_bad_input_is_refused_and_nothing_is_written(trained, tmp_path, arguments, expected, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    if "BEGUN" in arguments:
        (tmp_path / "BEGUN").mkdir()
        shutil.copy("runs/tiny/config.json", tmp_path / "BEGUN")
        write_cohort(tmp_path / "OTHER", people=(2, 1, 1))
        arguments = [str(tmp_path / argument) if argument in ("BEGUN", "OTHER") else argument for argument in arguments]
    before = sorted(trained.rglob("*"))
    check_refused(train.main, arguments, expected, capsys)
    assert sorted(trained.rglob("*")) == before


def test_one_command_serves_the_first_start_a_restart_and_the_end(trained, tmp_path, capsys):
    """As a queue needs it: --resume begins where nothing is, and ends at once where all is done."""
    run = tmp_path / "run"
    run.mkdir()
    (run / ".config.json").write_text('{"settings": {"ep')  # the rest of an interrupted start
    arguments = train.parse_arguments(["--data-dir", str(trained / "cohort"), "--run-dir", str(run), *TINY, "--resume"])
    with train.open_run(arguments) as (begun, _):
        pass
    with train.open_run(arguments) as (resumed, _):
        assert resumed.config == begun.config
    with train.open_run(arguments), pytest.raises(train.UserError, match="Another training is at work"):
        with train.open_run(arguments):
            pass
    finished = trained / "runs" / "tiny"
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    train.main(["--run-dir", str(finished), "--resume"])
    assert "tiny is finished; there is nothing to resume" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


@pytest.mark.parametrize("part, change", (("settings", {"new_setting": 3}), ("condition_dropout", {"person": 0.9})))
def test_a_run_of_another_version_is_not_resumed(trained, tmp_path, capsys, part, change):
    config = json.loads((trained / "runs" / "tiny" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, part: {**config[part], **change}}))
    check_refused(train.main, ["--run-dir", str(tmp_path), "--resume"], "began with other settings than this version", capsys)


@pytest.mark.parametrize("name", ("vqvae", "pixelcnn"))
def test_a_finished_stage_needs_no_backup(trained, tmp_path, name):
    """Its weights lie in the result; a damaged backup of it must not stop what follows."""
    run = Run.load(shutil.copytree(trained / "runs" / "tiny", tmp_path / "run"))
    run.backup_path(name).parent.mkdir()
    with zipfile.ZipFile(run.backup_path(name), "w") as archive:
        archive.writestr(runs.EPOCHS_FILE, "2")
        archive.writestr("model.weights.h5", "damaged")
    splits = train.matching_splits(run, train.parse_arguments([]))
    stage = (train.VQVAEStage(run, splits) if name == "vqvae" else
             train.PixelCNNStage(run, splits, modules.load_model(run.model_path("vqvae"))))
    stage.frames_dir = None
    model = train.Stage.train(stage) if name == "pixelcnn" else train.Stage.load_best(stage)
    for weight, saved in zip(model.weights, modules.load_model(run.model_path(name)).weights, strict=True):
        np.testing.assert_array_equal(weight, saved)


def test_few_people_are_told_before_training_what_will_not_be_possible(trained, capsys):
    run = Run.load(trained / "runs" / "tiny")
    splits = train.matching_splits(run, train.parse_arguments([]))
    train.say_what_begins(run, splits, "CPU")
    assert "--evaluate" not in capsys.readouterr().out
    test = splits["test"]
    train.say_what_begins(run, {**splits, "test": test.take(np.flatnonzero(test.cases == test.cases[0]))}, "CPU")
    assert "predict.py --evaluate will not be possible" in capsys.readouterr().out


def test_a_prior_of_another_codebook_is_not_resumed(trained, tmp_path):
    run = Run.load(shutil.copytree(trained / "runs" / "tiny", tmp_path / "run"))
    run.backup_path("pixelcnn").parent.mkdir()
    shutil.copy(run.model_path("pixelcnn"), run.backup_path("pixelcnn"))
    vqvae = modules.load_model(run.model_path("vqvae"))
    stage = train.PixelCNNStage(run, train.matching_splits(run, train.parse_arguments([])), vqvae)
    stage.check_codebook()
    vqvae.quantizer.embeddings.assign(vqvae.quantizer.embeddings + 0.001)
    with pytest.raises(train.UserError, match="pixelcnn.keras does not go with .*vqvae.keras .*another codebook.* remove it"):
        stage.check_codebook()

"""Kill it, starve it, feed it rubbish: benchmarks/faults.py has what takes longer."""

import json
import os
import shutil
import signal
import struct
import zipfile
import zlib

import keras
import numpy as np
from PIL import Image
import pytest

from benchmarks.tiny import assert_same_run
from tests.conftest import check_refused, ROOT, run_script, TINY, write_cohort
from support import cli
import dataset
import modules
import predict
import train


# Training: killed, starved, locked out


STOP_AFTER_FIRST_EPOCH = """
import os, signal, sys
import train
save = train.Checkpoints.on_epoch_end
def save_and_stop(self, epoch, logs):
    save(self, epoch, logs)
    if epoch == 0:
        os.kill(os.getpid(), getattr(signal, sys.argv[1]))
train.Checkpoints.on_epoch_end = save_and_stop
train.main(sys.argv[2:])
"""


def test_a_stopped_run_resumes_to_the_same_bits(trained, tmp_path):
    run = tmp_path / "run"
    new, resumed = ["--data-dir", "cohort", "--run-dir", str(run), *TINY], ["--run-dir", str(run), "--resume"]
    killed = run_script(trained, "-c", STOP_AFTER_FIRST_EPOCH, "SIGKILL", *new)
    assert killed.returncode == -signal.SIGKILL
    stopped = run_script(trained, "-c", STOP_AFTER_FIRST_EPOCH, "SIGTERM", *resumed)  # in stage 2
    assert stopped.returncode == 130
    said = stopped.stderr.strip().splitlines()[-1]
    assert said == f"Stopped. All finished epochs are saved; python train.py --run-dir {run} --resume goes on."
    assert "Traceback" not in stopped.stderr
    assert run_script(trained, ROOT / "train.py", *resumed).returncode == 0
    assert_same_run(run, trained / "runs" / "tiny")
    assert {path.name for path in run.iterdir()} == {path.name for path in (trained / "runs" / "tiny").iterdir()} - {"predictions"}


FILES_OF_100_KB = """
import resource, sys
import train
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
train.main(sys.argv[1:])
"""


def test_a_full_disk_is_one_sentence_and_loses_nothing(trained, tmp_path):
    """A limit on the size of files stands for the full disk: it fails at the same call."""
    run = tmp_path / "run"
    failed = run_script(trained, "-c", FILES_OF_100_KB, "--data-dir", "cohort", "--run-dir", str(run), *TINY)
    assert failed.returncode == 2
    said = failed.stderr.strip().splitlines()[-1]
    assert f"{run} cannot be written (File too large)" in said and "--resume" in said
    assert "Traceback" not in failed.stderr
    assert not list(run.rglob("*.keras"))
    assert json.loads((run / "config.json").read_text())["settings"]["epochs"] == 2


def test_a_run_folder_that_vanishes_is_one_sentence(trained, tmp_path, monkeypatch, capsys):
    run, save = tmp_path / "run", train.Checkpoints.on_epoch_end

    def vanish_and_save(self, epoch, logs):
        shutil.rmtree(run)
        save(self, epoch, logs)

    monkeypatch.chdir(trained)
    monkeypatch.setattr(train.Checkpoints, "on_epoch_end", vanish_and_save)
    check_refused(train.main, ["--data-dir", "cohort", "--run-dir", str(run), *TINY], f"{run} cannot be written (No such file", capsys)
    assert not run.exists()


def test_folders_that_cannot_be_made(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    check_refused(train.main, ["--data-dir", "cohort", "--run-dir", "/proc/run"], "/proc/run cannot be written", capsys)
    check_refused(predict.main, ["--output-dir", "/proc/out"], "/proc/out cannot be written", capsys)


def test_two_trainings_cannot_share_a_folder(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    with train.locked("runs/tiny"):
        check_refused(train.main, ["--run-dir", "runs/tiny", "--resume"], "Another training is at work in runs/tiny", capsys)
    check_refused(train.main, ["--run-dir", "runs/tiny", "--resume"], "runs/tiny is finished", capsys)


def test_a_start_that_is_no_number_stops_with_advice(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    check_refused(train.main, ["--data-dir", "cohort", "--run-dir", str(tmp_path / "run"), *TINY, "--learning-rate", "1e30"],
                  "lower --learning-rate", capsys)
    assert not (tmp_path / "run" / "vqvae.keras").exists()


@pytest.mark.parametrize("loss", (float("nan"), float("inf"), 1e9))
def test_an_exploding_loss_names_epoch_and_step_and_keeps_the_best(tmp_path, loss):
    best = tmp_path / "vqvae.keras"
    best.write_bytes(b"good")
    explosions = train.Explosions(best)
    explosions.on_epoch_begin(3)
    explosions.on_train_batch_end(5, {"loss": 0.3})
    with pytest.raises(cli.InputError, match=f"vqvae went astray in epoch 4, step 7.*best model before is in {best}"):
        explosions.on_train_batch_end(6, {"loss": loss})
    assert best.read_bytes() == b"good"


def test_the_rest_of_an_interrupted_start_is_no_obstacle(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    run = tmp_path / "run"
    run.mkdir()
    (run / ".config.json").write_text('{"settings": {"ep')
    check_refused(train.main, ["--run-dir", str(run), "--resume"], "holds no run to resume", capsys)
    check_refused(train.main, ["--data-dir", "nowhere", "--run-dir", str(run)], "--data-dir names nowhere", capsys)
    (run / "config.json").write_text('{"settings": {"ep')
    check_refused(train.main, ["--run-dir", str(run), "--resume"], "config.json is damaged", capsys)


def test_odd_but_valid_data(tmp_path, monkeypatch):
    """One person per split, a slice missing, a constant image."""
    monkeypatch.chdir(tmp_path)
    folder = write_cohort(tmp_path / "odd", people=(1, 1, 1)) / "keras_png_slices_test"
    next(folder.iterdir()).unlink()
    Image.new("L", (64, 64), 128).save(folder / "case_441_slice_6.nii.png")
    train.main(["--data-dir", "odd", "--run-dir", "run", "--epochs", "1", "--prior-epochs", "1", "--num-embeddings", "8"])
    measured = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert measured["num_images"] == 7 and np.isfinite(list(measured.values())).all()


# Model files


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of the trained run, to be spoilt."""
    run = tmp_path / "run"
    shutil.copytree(trained / "runs" / "tiny", run)
    return run


def swap_config(path, change):
    """Rewrites the config.json inside a .keras file."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["config.json"] = json.dumps(change(json.loads(members["config.json"]))).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def spoil_truncate(run):
    path = run / "vqvae.keras"
    path.write_bytes(path.read_bytes()[:20_000])
    return "vqvae.keras cannot be loaded"


def spoil_flip(run):
    path = run / "pixelcnn.keras"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return "pixelcnn.keras cannot be loaded"


def spoil_exchange(run):
    shutil.copy(run / "vqvae.keras", run / "pixelcnn.keras")
    return "holds the other's model"


def spoil_other_codebook(run):
    vqvae = modules.load_model(run / "vqvae.keras")
    vqvae.quantizer.embeddings.assign(vqvae.quantizer.embeddings + 0.001)
    vqvae.save(run / "vqvae.keras")
    return "pixelcnn.keras was trained on the codes of another codebook"


def spoil_config(run):
    config = json.loads((run / "config.json").read_text())
    config["vqvae"]["embedding_dim"] = 5
    (run / "config.json").write_text(json.dumps(config))
    return "vqvae.keras is not the model that config.json describes"


def spoil_code(run):
    """A layer that would run code when it is loaded, and a class of a module that would when it is imported."""
    marker = run / "has_run"
    keras.Sequential([keras.Input((1,)), keras.layers.Lambda(lambda x, marker=str(marker): open(marker, "w") and x)]
                     ).save(run / "vqvae.keras")
    return "vqvae.keras cannot be loaded"


def spoil_import(run):
    (run / "payload.py").write_text(f"open({str(run / 'has_run')!r}, 'w')\nclass Model: pass\n")
    swap_config(run / "vqvae.keras", lambda config: {**config, "module": "payload", "class_name": "Model", "registered_name": None})
    return "vqvae.keras cannot be loaded"


@pytest.mark.parametrize("spoil", (spoil_truncate, spoil_flip, spoil_exchange, spoil_other_codebook, spoil_config, spoil_code,
                                   spoil_import))
def test_model_files_that_cannot_be_trusted_are_named_and_run_no_code(trained, copied, spoil, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    monkeypatch.syspath_prepend(str(copied))
    expected = spoil(copied)
    marker = copied / "has_run"
    marker.unlink(missing_ok=True)
    check_refused(predict.main, ["--run-dir", str(copied)], expected, capsys)
    assert not marker.exists()

"""What both stages share: learning rate, seeds, divergence, the line of an epoch, checkpoints."""

import shutil
import types
import zipfile

import keras
import numpy as np
import pytest

import modules
from support import cli, runs, stages
from support.runs import Run
from tests.small import small_vqvae


@pytest.fixture
def stage(tmp_path):
    """What the callbacks ask of a stage, and its run folder."""
    (tmp_path / "backup").mkdir()
    return types.SimpleNamespace(
        run=Run(tmp_path, {"settings": {"seed": 0}}), name="vqvae", monitor="score", better=max, epochs=12,
        steps_per_epoch=5, line="SSIM {val_ssim:.3f}", advice="start again with a lower --learning-rate")


def callback(kind, *arguments, model=None):
    made = kind(*arguments)
    made.set_model(model or types.SimpleNamespace(variables=[]))
    return made


def test_the_learning_rate_rises_then_falls_along_a_cosine():
    optimizer = stages.new_optimizer(100, 1100, 2.0)
    optimizer.build([keras.Variable(np.zeros(3))])
    rates = []
    for step in (0, 50, 100, 600, 1100, 2000):
        optimizer.iterations.assign(step)
        rates.append(float(optimizer.learning_rate))
    np.testing.assert_allclose(rates, [0.02, 1.01, 2, 1.02, 0.04, 0.04], rtol=1e-3)


def test_a_diverged_loss_names_epoch_and_step_and_the_best_model(stage):
    best, epochs = stage.run.model_path("vqvae"), callback(stages.Epochs, stage)
    epochs.on_epoch_begin(3)
    epochs.on_train_batch_end(5, {"loss": 0.3})
    best.write_bytes(b"good")
    for loss in (float("nan"), 2e6):
        with pytest.raises(cli.UserError, match=f"vqvae diverged in epoch 4, step 7: .* before is in {best}. "
                                                "To do: start again with a lower --learning-rate"):
            epochs.on_train_batch_end(6, {"loss": loss})


@pytest.mark.parametrize("better, values, best_epochs", (
    (max, (0.5, 0.7, 0.6, 0.8), [0, 1, 1, 3]), (min, (0.8, 0.9, 0.7, 0.75), [0, 0, 2, 2])))
def test_the_best_epoch_is_kept_and_the_last_is_the_backup(stage, better, values, best_epochs):
    """By what a file says of its epochs, and the count of the first code, which says here the same."""
    model, run, stage.better = small_vqvae(), stage.run, better
    checkpoints = callback(stages.Checkpoints, stage, model=model)
    for epoch, (value, best_epoch) in enumerate(zip(values, best_epochs)):
        model.quantizer.counts.assign(np.full(16, epoch))
        if epoch == 3:  # a resumed run knows the best value before
            checkpoints = callback(stages.Checkpoints, stage, better(values[:3]), model=model)
        checkpoints.on_epoch_end(epoch, {"score": value})
        saved = [int(zipfile.ZipFile(path).read(runs.EPOCHS_FILE)) - 1
                 for path in (run.model_path("vqvae"), run.backup_path("vqvae"))]
        assert saved == [best_epoch, epoch] and run.finished_epochs("vqvae", 9) == epoch + 1
    assert modules.load_model(run.model_path("vqvae"), compile=False).quantizer.counts[0] == best_epochs[-1]
    assert {path.name for path in (run.folder / "backup").iterdir()} == {"vqvae.keras"}
    shutil.rmtree(run.folder)
    with pytest.raises(FileNotFoundError):
        checkpoints.on_epoch_end(4, {"score": 0})
    assert not run.folder.exists()  # a folder that vanishes is not made again


def test_an_epoch_is_one_line_with_all_its_seconds_and_the_time_that_is_left(stage, monkeypatch, capsys):
    clock = iter((10.0, 110.0, 200.0, 340.0))
    monkeypatch.setattr(stages, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    epochs = callback(stages.Epochs, stage)
    for epoch, seconds in enumerate((100.0, 140.0)):
        logs = {"val_ssim": 0.5 + epoch / 10}
        epochs.on_epoch_begin(epoch)
        epochs.on_epoch_end(epoch, logs)
        assert logs["seconds"] == seconds
    assert capsys.readouterr().out.splitlines() == ["  epoch  1/12   100 s, 18:20 left: SSIM 0.500",
                                                    "  epoch  2/12   140 s, 20:00 left: SSIM 0.600"]

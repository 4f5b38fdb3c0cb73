"""What both stages share: learning rate, seeds, divergence, the line of an epoch, checkpoints."""

import shutil
import types

import keras
import numpy as np
import pytest

import modules
from support import cli, stages
from support.runs import Run
from tests.small import small_prior, small_vqvae


@pytest.fixture
def stage(tmp_path):
    """What the callbacks ask of a stage, and its run folder."""
    (tmp_path / "backup").mkdir()
    return types.SimpleNamespace(
        run=Run(tmp_path, {"settings": {"seed": 0}}), name="vqvae", monitor="score", better=max, epochs=12,
        steps_per_epoch=5, line="SSIM {val_ssim:.3f}", advice="start again with a lower --learning-rate")


def test_the_learning_rate_rises_then_falls_along_a_cosine():
    optimizer = stages.new_optimizer(2.0, 100, 1100)
    optimizer.build([keras.Variable(np.zeros(3))])
    rates = []
    for step in (0, 50, 100, 600, 1100, 2000):
        optimizer.iterations.assign(step)
        rates.append(float(optimizer.learning_rate))
    np.testing.assert_allclose(rates, [0.02, 1.01, 2, 1.02, 0.04, 0.04], rtol=1e-3)


@pytest.mark.parametrize("loss", (float("nan"), float("inf"), 2e6))
def test_a_diverged_loss_names_epoch_and_step_and_the_best_model(stage, loss):
    best, lines = stage.run.model_path("vqvae"), stages.EpochLines(stage)
    lines.on_epoch_begin(3)
    lines.on_train_batch_end(5, {"loss": 0.3})
    with pytest.raises(cli.UserError, match="vqvae diverged in epoch 4, step 7.* lower --learn") as error:
        lines.on_train_batch_end(6, {"loss": loss})
    assert "best model" not in str(error.value)
    best.write_bytes(b"good")
    with pytest.raises(cli.UserError, match=f"The best model before is in {best}"):
        lines.on_train_batch_end(6, {"loss": loss})
    assert best.read_bytes() == b"good"


def test_dropout_depends_on_seed_and_epoch_alone():
    inputs = {"codes": np.zeros((2, 6, 6), np.int32), "positions": np.array([0, 1], np.int32)}
    prior, outputs = small_prior(dropout=0.5, num_layers=1), []
    for seed, epoch in ((1, 0), (1, 1), (2, 0), (1, 0)):
        seeds = stages.EpochSeeds(seed)
        seeds.set_model(prior)
        seeds.on_epoch_begin(epoch)
        outputs.append(prior(inputs, training=True).numpy())
    np.testing.assert_array_equal(outputs[0], outputs[3])
    assert (outputs[0] != outputs[1]).any() and (outputs[0] != outputs[2]).any()


def first_count(path):
    """The use of the first code in a saved VQ-VAE, by which the test below tells the epochs."""
    return float(modules.load_model(path, compile=False).quantizer.counts[0])


@pytest.mark.parametrize("better, values, best_epochs, later, best_after", (
    (max, (0.5, 0.7, 0.6), [0, 1, 1], 0.8, 3), (min, (0.8, 0.9, 0.7), [0, 0, 2], 0.75, 2)))
def test_the_best_epoch_is_kept_and_the_last_is_the_backup(
        stage, better, values, best_epochs, later, best_after):
    """Under other batches than before, the optimiser's steps do not tell the epoch: the backup says it."""
    model, run, stage.better = small_vqvae(), stage.run, better

    def save(checkpoints, epoch, value):
        checkpoints.set_model(model)
        model.quantizer.counts.assign(np.full(16, epoch))
        checkpoints.on_epoch_end(epoch, {"score": value})

    checkpoints = stages.Checkpoints(stage)
    for epoch, (value, best_epoch) in enumerate(zip(values, best_epochs)):
        save(checkpoints, epoch, value)
        assert first_count(run.model_path("vqvae")) == best_epoch
        assert run.finished_epochs("vqvae", 9) == epoch + 1
    assert first_count(run.backup_path("vqvae")) == epoch
    assert {path.name for path in (run.folder / "backup").iterdir()} == {"vqvae.keras"}
    save(stages.Checkpoints(stage, better(values)), 3, later)  # a resumed run knows the best value before
    assert first_count(run.model_path("vqvae")) == best_after


def test_a_run_folder_that_vanishes_is_not_made_again(stage):
    checkpoints = stages.Checkpoints(stage)
    checkpoints.set_model(small_vqvae())
    shutil.rmtree(stage.run.folder)
    with pytest.raises(FileNotFoundError) as error:
        checkpoints.on_epoch_end(0, {"score": 0})
    assert error.value.filename == str(stage.run.backup_path("vqvae")) and not stage.run.folder.exists()


def test_an_epoch_is_one_line_with_all_its_seconds_and_the_time_that_is_left(stage, monkeypatch, capsys):
    clock = iter((10.0, 110.0, 200.0, 340.0))
    monkeypatch.setattr(stages, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    lines = stages.EpochLines(stage)
    for epoch, seconds in enumerate((100.0, 140.0)):
        logs = {"val_ssim": 0.5 + epoch / 10}
        lines.on_epoch_begin(epoch)
        lines.on_train_batch_end(4, {"loss": 0.1})
        lines.on_epoch_end(epoch, logs)
        assert logs["seconds"] == seconds
    assert capsys.readouterr().out.splitlines() == ["  epoch  1/12   100 s, 18 min left: SSIM 0.500",
                                                    "  epoch  2/12   140 s, 20 min left: SSIM 0.600"]


def test_durations_are_said_in_words():
    words = [stages.duration(seconds) for seconds in (0.4, 99.4, 100, 5900, 6000, 12010)]
    assert words == ["0 s", "99 s", "2 min", "98 min", "1 h 40 min", "3 h 20 min"]

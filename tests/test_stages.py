"""What both stages share: seeds, divergence, the line of an epoch, checkpoints."""

import shutil
import types

import numpy as np
import pytest

import modules
from support import cli, stages
from support.runs import Run
from tests.small import small_prior, small_vqvae


@pytest.fixture
def run(tmp_path):
    """A run folder with what checkpoints need of it."""
    (tmp_path / "backup").mkdir()
    return Run(tmp_path, {"settings": {"seed": 0}})


@pytest.mark.parametrize("loss", (float("nan"), float("inf"), 2e6))
def test_a_diverged_loss_names_epoch_and_step_and_the_best_model(tmp_path, loss):
    best = tmp_path / "vqvae.keras"
    stop = stages.EpochLines(9, 20, None, best, "start again with a lower --learning-rate")
    stop.on_epoch_begin(3)
    stop.on_train_batch_end(5, {"loss": 0.3})
    with pytest.raises(cli.UserError, match="vqvae diverged in epoch 4, step 7.* lower --learning-rate") as error:
        stop.on_train_batch_end(6, {"loss": loss})
    assert "best model" not in str(error.value)
    best.write_bytes(b"good")
    with pytest.raises(cli.UserError, match=f"The best model before is in {best}"):
        stop.on_train_batch_end(6, {"loss": loss})
    assert best.read_bytes() == b"good"


def test_dropout_depends_on_seed_and_epoch_alone():
    inputs = {"codes": np.zeros((2, 6, 6), np.int32), "positions": np.array([0, 1], np.int32)}
    prior, outputs = small_prior(dropout=0.5), []
    for seed, epoch in ((1, 0), (1, 1), (2, 0), (1, 0)):
        seeds = stages.EpochSeeds(seed)
        seeds.set_model(prior)
        seeds.on_epoch_begin(epoch)
        outputs.append(prior(inputs, training=True).numpy())
    np.testing.assert_array_equal(outputs[0], outputs[3])
    assert (outputs[0] != outputs[1]).any() and (outputs[0] != outputs[2]).any()


def test_the_best_epoch_is_kept_and_the_last_is_the_backup(run):
    """Under other batches than before, the optimiser's steps do not tell the epoch: the backup says it."""
    model = small_vqvae()
    model.compile()
    for better, values, best_epochs in ((max, (0.5, 0.7, 0.6), [0, 1, 1]), (min, (0.8, 0.9, 0.7), [0, 0, 2])):
        checkpoints = stages.Checkpoints(run, "vqvae", "score", better)
        checkpoints.set_model(model)
        for epoch, (value, best_epoch) in enumerate(zip(values, best_epochs)):
            model.quantizer.counts.assign(np.full(16, epoch))
            checkpoints.on_epoch_end(epoch, {"score": value})
            best, last = (modules.load_model(path("vqvae"), compile=False) for path in (run.model_path, run.backup_path))
            assert (float(best.quantizer.counts[0]), float(last.quantizer.counts[0])) == (best_epoch, epoch)
            assert run.finished_epochs("vqvae") == epoch + 1
    assert {path.name for path in (run.folder / "backup").iterdir()} == {"vqvae.keras"}
    # A resumed run knows the best value before.
    checkpoints = stages.Checkpoints(run, "vqvae", "score", min, best=0.7)
    checkpoints.set_model(model)
    checkpoints.on_epoch_end(3, {"score": 0.75})
    assert float(modules.load_model(run.model_path("vqvae"), compile=False).quantizer.counts[0]) == 2


def test_a_run_folder_that_vanishes_is_not_made_again(run):
    checkpoints = stages.Checkpoints(run, "vqvae", "score", max)
    checkpoints.set_model(small_vqvae())
    shutil.rmtree(run.folder)
    with pytest.raises(FileNotFoundError) as error:
        checkpoints.on_epoch_end(0, {"score": 0})
    assert error.value.filename == str(run.backup_path("vqvae")) and not run.folder.exists()


def test_an_epoch_is_one_line_with_all_its_seconds_and_the_time_that_is_left(monkeypatch, capsys, tmp_path):
    clock = iter((10.0, 110.0, 200.0, 340.0))
    monkeypatch.setattr(stages, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    lines = stages.EpochLines(12, 5, "SSIM {val_ssim:.3f}", tmp_path / "vqvae.keras", "")
    for epoch, seconds in enumerate((100.0, 140.0)):
        logs = {"val_ssim": 0.5 + epoch / 10}
        lines.on_epoch_begin(epoch)
        lines.on_train_batch_end(4, {"loss": 0.1})
        lines.on_epoch_end(epoch, logs)
        assert logs["seconds"] == seconds
    said = capsys.readouterr().out.splitlines()
    assert said == ["  epoch  1/12   100 s, 18 min left: SSIM 0.500", "  epoch  2/12   140 s, 20 min left: SSIM 0.600"]


@pytest.mark.parametrize("seconds, words", ((0.4, "0 s"), (99.4, "99 s"), (100, "2 min"), (5900, "98 min"), (6000, "1 h 40 min"),
                                            (12010, "3 h 20 min")))
def test_durations_are_said_in_words(seconds, words):
    assert stages.duration(seconds) == words

"""Runs of any number of slices: trained, stopped and resumed, sampled, written."""

import signal

import nibabel
import numpy as np
from PIL import Image
import pytest

from benchmarks.tiny import write_cohort
import predict
from support.runs import Run
from tests.small import new_run
import train


@pytest.mark.parametrize("count", (20, 32, 76))
def test_a_run_has_as_many_slices_as_its_data(count, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cohort = write_cohort(tmp_path / "cohort", (2, 1, 1), slices=count, size=32)
    run = Run.load(new_run("run", cohort, "--epochs", "1", "--prior-epochs", "1", num_layers=1,
                           settings={"decoder_epochs": 1, "calibration_rounds": 1}))
    assert run.num_positions == count
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train.PixelCNNStage, "begin", lambda _: signal.raise_signal(signal.SIGTERM))
        train.main(["--run-dir", "run", "--resume"])
    train.main(["--run-dir", "run", "--resume"])
    # As many slices as heads: one compiled sampler makes both.
    predict.main(["--run-dir", "run", "--heads", "2", "--num-samples", "2", "--slice", str(count - 1)])
    assert nibabel.load("run/predictions/head_001.nii.gz").shape == (32, 32, count)
    sample = np.asarray(Image.open(run.folder / "predictions" / f"sample_0000_slice_{count - 1}.png"))
    assert sample.shape == (32, 32) and sample.any()

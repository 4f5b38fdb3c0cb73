"""Runs of any number of slices: trained, stopped and resumed, sampled, written; one judged, exported."""

import json
import signal

import nibabel
import numpy as np
from PIL import Image
import pytest
import tensorflow as tf

from benchmarks.tiny import write_cohort
import modules
import predict
from support import judge
from support.runs import Run
from tests.conftest import check_refused
from tests.small import new_run
import train


@pytest.mark.parametrize("count", (20, 32, 76))
def test_a_run_has_as_many_slices_as_its_data(count, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    is_judged = count == 20
    people = (3, 2, 2) if is_judged else (2, 1, 1)
    cohort = write_cohort(tmp_path / "cohort", people, slices=count, size=32)
    run = Run.load(new_run("run", cohort, "--epochs", "1", "--prior-epochs", "1", num_layers=1,
                           settings={"decoder_epochs": 1, "calibration_rounds": 1}))
    assert run.num_positions == count
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train.PixelCNNStage, "begin", lambda _: signal.raise_signal(signal.SIGTERM))
        train.main(["--run-dir", "run", "--resume"])
    train.main(["--run-dir", "run", "--resume"])

    for name, value in {"JUDGE_STEPS": 5, "SEEDS": (0,), "RESAMPLES": 20}.items():
        monkeypatch.setattr(judge, name, value)
    # As many slices as heads: one compiled sampler makes both.
    predict.main(["--run-dir", "run", "--heads", str(people[0]), "--num-samples", str(people[0]),
                  "--slice", str(count - 1), *(["--evaluate", "--export", "exported"] if is_judged else [])])
    head = nibabel.load("run/predictions/head_001.nii.gz")
    assert head.shape == (32, 32, count)
    sample = np.asarray(Image.open(run.folder / "predictions" / f"sample_0000_slice_{count - 1}.png"))
    assert sample.shape == (32, 32) and sample.any()
    if not is_judged:
        return
    heads = json.loads((run.folder / "predictions" / "metrics.json").read_text())["heads"]
    assert heads["num_heads"] == 3 and 0 <= heads["told_apart_slices"] <= 1
    exported = tf.saved_model.load("exported/head_sampler").signatures["serving_default"]  # it runs in
    shapes = [output.shape.as_list() for output in exported.structured_outputs.values()]  # test_sampler.py
    assert shapes == [[None, count, 4, 4]]
    codes = np.random.default_rng(0).integers(0, 16, (count, 4, 4), np.int32)
    expected = modules.load_model(run.model_path("vqvae")).decode_head(codes)
    np.testing.assert_allclose(tf.saved_model.load("exported/head_decoder")(codes), expected, atol=1e-5)
    # People with more slices than the run knows are refused, those with fewer are measured.
    write_cohort(tmp_path / "more", people=(1, 1, 1), slices=count + 1, size=32)
    capsys.readouterr()
    check_refused(predict.main, ["--run-dir", "run", "--data-dir", "more"], "has slices 0 to", capsys)

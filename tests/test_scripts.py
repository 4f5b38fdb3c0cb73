"""train.py and predict.py as a user runs them, at a tiny size."""

import csv
import json
from pathlib import Path

import imageio.v3 as imageio
import keras
import nibabel
import numpy as np
from PIL import Image
import pytest

from tests.conftest import check_refused, TINY, write_cohort
import modules
import predict
import train


def test_train_leaves_a_whole_run_folder(trained):
    run = trained / "runs" / "tiny"
    assert {path.name for path in run.iterdir()} == {
        "config.json", "vqvae.keras", "pixelcnn.keras", "vqvae_history.csv", "pixelcnn_history.csv", "metrics.json",
        "figures", "progress.gif", "logs"}
    assert {path.name for path in (run / "figures").iterdir()} == {
        "architecture.png", "losses.png", "ssim.png", "prior.png", "reconstructions.png"}
    config = json.loads((run / "config.json").read_text())
    assert config["settings"]["num_embeddings"] == 16 and config["settings"]["batch_size"] == 8
    assert config["data"]["people"] == {"train": 4, "validate": 2, "test": 2}
    assert config["packages"]["tensorflow"].startswith("2.21")
    with open(run / "vqvae_history.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1"]
    for row in rows:
        assert float(row["loss"]) == pytest.approx(float(row["reconstruction_loss"]) + float(row["vq_loss"]), rel=1e-4)
        assert {"val_ssim", "test_ssim", "perplexity", "val_codes_used"} <= row.keys()
    assert float(rows[1]["reconstruction_loss"]) < float(rows[0]["reconstruction_loss"])
    assert len(imageio.imread(run / "progress.gif")) == 3  # before the first epoch, and after each
    assert list((run / "logs").glob("*/train/*tfevents*"))
    prior = modules.load_model(run / "pixelcnn.keras")
    assert (prior.shift.numpy() != 0).any() and np.abs(prior.shift).max() <= 1 and (prior.scale.numpy() >= 1).all()


def test_predict_writes_pictures_and_the_same_metrics(trained, monkeypatch):
    monkeypatch.chdir(trained)
    predict.main(["--num-examples", "3", "--num-samples", "5"])
    folder = trained / "runs" / "tiny" / "predictions"
    assert {path.name for path in folder.iterdir()} == {
        "reconstructions.png", "errors.png", "samples.png", "head_000.nii.gz", "head.png", "metrics.json", "report.html",
        *(f"sample_{i:04d}.png" for i in range(5)),
        *(f"original_vs_reconstructed_{i:04d}.png" for i in range(3))}
    measured, by_train = (json.loads((path / "metrics.json").read_text()) for path in (folder, folder.parent))
    assert measured.keys() == {"ssim", "ssim_gaussian", "ssim_foreground", "psnr", "mse", "num_images", "code_entropy",
                               "perplexity", "codes_used", "bits_per_code", "bits_per_code_alone", "bytes_per_image"}
    assert measured == pytest.approx(by_train, rel=1e-4)
    assert measured["num_images"] == 16
    assert measured["bytes_per_image"] == pytest.approx(measured["bits_per_code"] * 64 / 8)
    assert 0 < measured["bits_per_code"] < 4.5
    pair = np.asarray(Image.open(folder / "original_vs_reconstructed_0000.png"))
    files = (trained / "cohort" / "keras_png_slices_test").iterdir()
    assert pair.shape == (64, 128)
    assert any((np.asarray(Image.open(path)) == pair[:, :64]).all() for path in files)


def test_evaluate_judges_samples_beside_people(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    predict.main(["--evaluate", "--num-samples", "3", "--output-dir", str(tmp_path)])
    measured = json.loads((tmp_path / "metrics.json").read_text())
    assert {"frechet", "frechet_floor", "kid", "kid_floor", "density", "coverage", "coverage_floor", "ms_ssim_samples",
            "ms_ssim_real", "bits_per_code_train", "copy_test", "copy_test_says", "symmetry_ks_floor", "bits_per_code"} <= measured.keys()
    assert measured["num_samples"] == 16
    # Two epochs on drawn heads teach nobody to sample: the judge has to see that.
    assert measured["frechet"] > measured["frechet_floor"] and measured["symmetry_ks"] > measured["symmetry_ks_floor"]
    heads = measured["heads"]
    assert heads["num_heads"] == 4 and heads["num_people"] == {"train": 4, "validate": 2, "test": 2}
    table = capsys.readouterr().out.split("4 sampled heads")[1]
    assert f" dark_sd_ratio {heads['dark_sd_ratio']:.3g} (" in " ".join(table.split()) and heads["copy_test_says"] in table
    assert {"neighbours.png", "distances.png", "tissue.png"} <= {path.name for path in tmp_path.iterdir()}
    few = tmp_path / "few"
    for name in ("train", "validate", "test"):
        (few / f"keras_png_slices_{name}").mkdir(parents=True)
        for path in sorted((trained / "cohort" / f"keras_png_slices_{name}").iterdir())[:5]:
            (few / path.parent.name / path.name).write_bytes(path.read_bytes())
    check_refused(predict.main, ["--evaluate", "--data-dir", str(few)], "more than 5 images in each split, but train", capsys)
    write_cohort(tmp_path / "lone", people=(2, 1, 1))
    check_refused(predict.main, ["--evaluate", "--data-dir", str(tmp_path / "lone")],
                  "two people with all their slices in each split, but validate", capsys)


def test_sampling_options(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(trained)
    for name, options in (("a", []), ("b", []), ("c", ["--seed", "1"])):
        predict.main(["--slice", "3", "--num-samples", "2", "--heads", "0", "--output-dir", str(tmp_path / name), *options])
    samples = {name: [(tmp_path / name / f"sample_{i:04d}.png").read_bytes() for i in range(2)] for name in "abc"}
    assert samples["a"] == samples["b"] != samples["c"]
    predict.main(["--slice", "all", "--heads", "0", "--output-dir", str(tmp_path / "all"), "--export", str(tmp_path / "exported")])
    assert {path.name for path in (tmp_path / "exported").iterdir()} == {"encoder", "decoder", "sampler", "head_sampler"}
    assert not list((tmp_path / "all").glob("head*"))
    assert len(list((tmp_path / "all").glob("sample_*.png"))) == 32
    assert predict.sample_positions(None, 3).tolist() == [0, 16, 31]


def test_heads_are_volumes_of_the_sampled_codes(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(trained)
    for count in (1, 3):
        predict.main(["--heads", str(count), "--num-samples", "1", "--seed", "5", "--output-dir", str(tmp_path / str(count))])
    assert len(list((tmp_path / "3").glob("head_*.nii.gz"))) == 3
    first, second = (nibabel.load(tmp_path / "3" / f"head_00{number}.nii.gz") for number in (0, 1))
    alone = nibabel.load(tmp_path / "1" / "head_000.nii.gz")
    # The first head is the same, however many follow; the next is another person.
    np.testing.assert_array_equal(first.dataobj, alone.dataobj)
    assert (np.asarray(first.dataobj) != np.asarray(second.dataobj)).mean() > 0.01
    _, vqvae, prior = predict.load_run(Path("runs/tiny"))
    decoded = vqvae.decode_codes(prior.sample_heads(1, seed=5)[0]).numpy()[..., 0]
    # RAS: x to the right, y to the front, z up; the image's rows run backwards, its columns to the right.
    assert nibabel.aff2axcodes(alone.affine) == ("R", "A", "S") and alone.header.get_zooms() == pytest.approx((1, 1, 1.4))
    np.testing.assert_allclose(np.asarray(alone.dataobj).transpose(2, 1, 0)[:, ::-1] / 127.5 - 1, decoded, atol=0.5 / 127.5 + 1e-4)


def test_finer_grid_and_mixed_precision(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(trained)
    run = str(tmp_path / "run")
    try:
        train.main(["--data-dir", "cohort", "--run-dir", run, *TINY, "--downsample", "4", "--mixed-precision", "--limit", "1"])
        predict.main(["--run-dir", run, "--num-samples", "2", "--heads", "0"])
    finally:
        keras.mixed_precision.set_global_policy("float32")
    measured = json.loads((tmp_path / "run" / "predictions" / "metrics.json").read_text())
    assert measured["num_images"] == 8
    assert measured["bytes_per_image"] == pytest.approx(measured["bits_per_code"] * 16 * 16 / 8)
    assert measured["ssim"] > 0.3


@pytest.mark.parametrize("arguments, expected", [
    (["--data-dir", "nowhere"], "--data-dir names nowhere"),
    (["--data-dir", "cohort", "--limit", "0"], "--limit: expected an integer of at least 1, got 0"),
    (["--data-dir", "cohort", "--epochs", "many"], "--epochs: expected an integer"),
    (["--data-dir", "cohort", "--learning-rate", "nan"], "--learning-rate: expected a number"),
    (["--data-dir", "cohort", "--downsample", "5"], "--downsample"),
    (["--data-dir", "cohort", "--run-dir", "runs/tiny"], "runs/tiny is not empty"),
    (["--data-dir", "runs"], "keras_png_slices_train is missing"),
    (["--data-dir", "cohort", "--run-dir", "none", "--resume"], "none holds no run to resume"),
    (["--resume"], "--resume needs --run-dir"),
    (["--run-dir", "runs/tiny", "--resume", "--num-embeddings", "99"], "--num-embeddings 99 differs from the 16"),
    (["--run-dir", "runs/tiny", "--resume", "--data-dir", "other"], "are not those"),
    (["--run-dir", "runs/tiny", "--resume"], "runs/tiny is finished"),
])
def test_train_refuses_bad_input_and_writes_nothing(trained, arguments, expected, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    if not Path("other").exists():
        write_cohort(Path("other"), people=(2, 1, 1))
    before = sorted(path for path in trained.rglob("*"))
    check_refused(train.main, arguments, expected, capsys)
    assert sorted(path for path in trained.rglob("*")) == before


def test_train_refuses_images_that_no_model_fits(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_cohort(tmp_path / "odd", size=50)
    check_refused(train.main, ["--data-dir", "odd"], "50x50 pixels", capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["odd"]


@pytest.mark.parametrize("arguments, expected", [
    (["--run-dir", "nowhere"], "nowhere holds no trained run"),
    (["--data-dir", "larger"], "64x64; give --data-dir or --run-dir to match"),
    (["--slice", "32"], "--slice: 32 is past the last slice, 31"),
    (["--slice", "some"], "--slice: expected an integer"),
    (["--temperature", "-1"], "--temperature"),
    (["--seed", "2147483648"], "less than 2147483648"),
    (["--run-dir", "damaged"], "The run in damaged cannot be loaded"),
])
def test_predict_refuses_bad_input_and_writes_nothing(trained, arguments, expected, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    if not Path("larger").exists():
        write_cohort(Path("larger"), people=(1, 1, 1), size=96)
        Path("damaged").mkdir()
        for name in ("config.json", "vqvae.keras", "pixelcnn.keras"):
            (Path("damaged") / name).write_bytes((Path("runs/tiny") / name).read_bytes()[:5000])
    before = sorted(path for path in trained.rglob("*"))
    check_refused(predict.main, arguments, expected, capsys)
    assert sorted(path for path in trained.rglob("*")) == before


def test_predict_without_any_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    check_refused(predict.main, [], "run train.py first", capsys)

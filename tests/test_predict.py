"""predict.py: the test people, samples and heads, the judgement, one's own images, and what is refused."""

import csv
import hashlib
import io
import json
import os
from pathlib import Path
import re
import shutil
import zipfile

import keras
import nibabel
import numpy as np
from PIL import Image
import pytest
from skimage.transform import downscale_local_mean
import tensorflow as tf

from benchmarks.tiny import write_cohort
import dataset
import modules
import predict
from support import cli, metrics, own_images, runs, sampler, volumes
from support.images import to_uint8
from support.runs import Run
from support.template import cut_axial, load_mni152
from tests.conftest import check_refused

SLICE = "cohort/keras_png_slices_test/case_441_slice_3.nii.png"


def pixels(path):
    return np.asarray(Image.open(path))


@pytest.fixture
def in_trained(trained, monkeypatch):
    """The tests' folder is the trained one."""
    monkeypatch.chdir(trained)


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of the trained run, to be spoilt."""
    return Path(shutil.copytree(trained / "runs" / "tiny", tmp_path / "run"))


@pytest.fixture(scope="module")
def models(trained):
    """The trained VQ-VAE and prior."""
    return predict.load_models(Run.load(trained / "runs" / "tiny"))


@pytest.fixture
def quick(models, monkeypatch):
    """The models are loaded, and their sampler compiled, once for all tests."""
    monkeypatch.setattr(predict, "load_models", lambda run: models)


# The test people


def test_predict_writes_pictures_and_the_metrics_that_training_wrote(copied, monkeypatch):
    monkeypatch.chdir(copied)
    predict.main(["--run-dir", ".", "--num-samples", "3", "--heads", "3"])
    folder = copied / "predictions"
    names = {path.name for path in folder.iterdir()}
    pairs = sorted(name for name in names if name.startswith("original_vs_reconstructed_case_"))
    assert len(pairs) == 10 and names - set(pairs) == {
        "reconstructions.png", "errors.png", "samples.png", "head.png", "metrics.json", "report.html",
        "per_image.csv", "files.json", *(f"head_{number:03d}.nii.gz" for number in range(3)),
        *(f"sample_{number:04d}_slice_{position}.png" for number, position in enumerate((0, 4, 7)))}
    measured, by_train = (json.loads((path / "metrics.json").read_text()) for path in (folder, copied))
    assert measured == pytest.approx(by_train, rel=1e-4)
    assert measured["num_images"] == 16 and 0 < measured["bits_per_code"] < 6
    assert measured["bytes_per_image"] == pytest.approx(measured["bits_per_code"] * 64 / 8)
    case, position = pairs[0].removesuffix(".png").split("_")[-3::2]
    data = Run.load(copied).config["data"]["folder"]
    original = pixels(f"{data}/keras_png_slices_test/case_{case}_slice_{position}.nii.png")
    np.testing.assert_array_equal(pixels(folder / pairs[0])[:, :64], original)
    with open(folder / "per_image.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["slice"]) for row in rows] == [
        (case, str(k)) for case in ("441", "442") for k in range(8)]
    ssim = np.array([float(row["ssim"]) for row in rows])
    assert ssim.mean() == pytest.approx(measured["ssim"], rel=1e-4)
    assert np.std(ssim.reshape(2, 8).mean(axis=1), ddof=1) == pytest.approx(measured["ssim_sd"], rel=1e-3)
    page = (folder / "report.html").read_text()  # made to be shared
    assert "VQ-VAE and PixelCNN: run" in page and str(copied.parent) not in page and data not in page


def test_samples_and_heads_are_those_of_seed_temperature(in_trained, models, quick, tmp_path, capsys):
    vqvae, prior = models
    out = tmp_path / "out"
    predict.main(["--slice", "all", "--heads", "8", "--seed", "5", "--temperature", "0.8",
                  "--output-dir", str(out), "--export", str(tmp_path / "exported"),
                  "--cache-dir", str(tmp_path / "cache")])
    assert (tmp_path / "exported" / "encoder" / "saved_model.pb").is_file()
    assert "Exporting encoder, decoder and both samplers to" in capsys.readouterr().out
    assert len(list((tmp_path / "cache").glob("slices-*.npy"))) == 1  # of the test split
    samples = to_uint8(vqvae.decode_codes(prior.sample(range(8), seed=5, temperature=0.8))[..., 0])
    heads = prior.sample_heads(8, seed=5, temperature=0.8)
    assert len(list(out.glob("sample_*.png"))) == 8 and len(list(out.glob("head_*.nii.gz"))) == 8
    for position in range(8):
        written = pixels(out / f"sample_{position:04d}_slice_{position}.png").astype(int)
        assert np.abs(written - samples[position]).max() <= 1
    volume = nibabel.load(out / "head_001.nii.gz")
    # x to the right, y to the front, z up: the image's rows run backwards, its columns to the right.
    slices = np.asarray(volume.dataobj).transpose(2, 1, 0)[:, ::-1]
    decoded = to_uint8(vqvae.decode_codes(heads[1])[..., 0])
    assert np.abs(slices.astype(int) - decoded).max() <= 1
    assert volume.header.get_zooms()[:2] == (4, 4)  # 256 mm over 64 pixels


# Whose files the results may replace


def bytes_below(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


OURS = "head_000.nii.gz", "metrics.json", "report.html", "samples.png", "sample_0000_slice_0.png", "head.png"


@pytest.mark.parametrize("command", ([], ["--images", SLICE]))
def test_a_folder_of_foreign_files_is_refused_whatever_they_are_called(in_trained, tmp_path, command, capsys):
    for name in (*OURS, "head_patient7.nii.gz", "case_441_slice_3_codes.npy", "notes.txt"):
        (tmp_path / name).write_text(f"mine: {name}")
    before = bytes_below(tmp_path)
    check_refused(predict.main, [*command, "--output-dir", str(tmp_path)], "holds files", capsys)
    assert bytes_below(tmp_path) == before


def test_the_folder_of_a_run_is_refused(copied, in_trained, capsys):
    before = bytes_below(copied)
    for run in ("runs/tiny", str(copied)):
        check_refused(predict.main, ["--run-dir", run, "--output-dir", str(copied)], "holds files", capsys)
    assert bytes_below(copied) == before


def test_a_later_call_replaces_what_the_earlier_wrote_and_nothing_else(in_trained, quick, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--output-dir", str(out), "--num-samples", "2"]
    predict.main([*options, "--heads", "2"])
    (out / "head_patient7.nii.gz").write_text("mine")
    (out / "more").mkdir()
    (out / "more" / "metrics.json").write_text("mine too")
    predict.main([*options, "--heads", "1", "--slice", "3"])
    names = {path.name for path in out.iterdir()}
    assert {name for name in names if name.startswith(("head_", "sample_"))} == {
        "head_000.nii.gz", "head_patient7.nii.gz", "sample_0000_slice_3.png", "sample_0001_slice_3.png"}
    assert (out / "head_patient7.nii.gz").read_text() == "mine"
    assert (out / "more" / "metrics.json").read_text() == "mine too"
    (out / "head_001.nii.gz").write_text("mine, of a name that the next call needs")
    before = bytes_below(out)
    check_refused(predict.main, [*options, "--heads", "2"], "head_001.nii.gz", capsys)
    assert bytes_below(out) == before and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("stop", (KeyboardInterrupt, OSError(28, "No space left on device")))
@pytest.mark.parametrize("where", ("fill_gaps", "write_json"))
def test_what_stops_in_the_middle_leaves_old_results(in_trained, quick, tmp_path, monkeypatch, stop, where):
    def fail(*_):
        raise stop

    options = ["--output-dir", str(tmp_path / "out"), "--num-samples", "2"]
    predict.main([*options, "--seed", "1"])
    before = bytes_below(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(predict, where, fail)
        predict.main([*options, "--seed", "2"])
    assert bytes_below(tmp_path) == before
    predict.main([*options, "--seed", "2"])
    after = bytes_below(tmp_path)
    assert after[Path("out/samples.png")] != before[Path("out/samples.png")]


def test_results_and_export_need_folders_apart(in_trained, quick, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--output-dir", str(out), "--export"]
    for export in (out, out / "export", tmp_path):
        check_refused(predict.main, [*options, str(export)], "need folders apart", capsys)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.pb").touch()
    check_refused(predict.main, [*options, str(tmp_path / "mine")], "another --export", capsys)
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "model.pb"]


# Samples and heads


def test_evaluate_judges_heads_and_later_calls_keep_that(copied, in_trained, models, quick, capsys):
    options = ["--run-dir", str(copied), "--num-samples", "4"]
    predict.main([*options, "--evaluate"])
    assert "4 sampled heads" in capsys.readouterr().out
    heads = json.loads((copied / "predictions" / "metrics.json").read_text())["heads"]
    assert heads["num_heads"] == 4 and heads["num_people"] == {"train": 4, "validate": 2, "test": 2}
    assert (copied / "predictions" / "neighbours.png").is_file()
    bits = {}  # of each head, person by person
    for name, split in dataset.load_splits("cohort", ["train", "test"]).items():
        lengths = metrics.code_lengths(models[1], dataset.encode_split(*models, split))
        bits[name] = [lengths[split.cases == case].mean() for case in np.unique(split.cases)]
    assert heads["bits_per_code_train"] == pytest.approx(np.mean(bits["train"]), rel=1e-5)
    assert heads["membership"] == np.mean([[new > old for old in bits["train"]] for new in bits["test"]])
    predict.main(options)
    assert "heads" not in json.loads((copied / "predictions" / "metrics.json").read_text())
    assert json.loads((copied / "evaluation.json").read_text()) == {"heads": heads}
    assert heads["seed"] == 0 and heads["temperature"] == 1
    predict.main(["--run-dir", str(copied), "--write-dataset", str(copied / "set"), "--heads", "3"])
    assert json.loads((copied / "set" / "dataset.json").read_text())["prior"]["heads"] == heads


def test_evaluate_refuses_people_who_are_too_few_or_others(in_trained, quick, tmp_path, capsys):
    for name, people, expected in (
            ("lone", (2, 1, 1), "two people with all their slices in each split, but validate"),
            ("other", (3, 2, 2), "are not those that runs/tiny was trained on")):
        write_cohort(tmp_path / name, people=people)
        arguments = ["--evaluate", "--data-dir", str(tmp_path / name), "--output-dir", str(tmp_path / "out")]
        check_refused(predict.main, arguments, expected, capsys)


def change_config(run, **data):
    config = json.loads((run / "config.json").read_text())
    config["data"].update(data)
    config.pop("git_commit", None)  # as of code that is no clone
    (run / "config.json").write_text(json.dumps(config))


def test_a_run_without_its_data_samples_all_the_same(copied, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    change_config(copied, folder="/gone")
    options = ["--run-dir", str(copied), "--num-samples", "2", "--heads", "0"]
    check_refused(predict.main, [*options, "--evaluate"], "/gone, are not here; say with --data-dir", capsys)
    predict.main(options)
    assert "not measured and nothing is reconstructed" in capsys.readouterr().out
    assert {path.name for path in (copied / "predictions").iterdir()} == {
        "samples.png", "sample_0000_slice_0.png", "sample_0001_slice_7.png", "report.html", "files.json"}


def test_ventricles_of_a_size_are_those_of_persons_steered_there(copied, models, quick):
    prior, measure = models[1], {"weights": [0.5, -0.25, *[0] * 22], "offset": 2.0, "quantiles": [0, 2, 6]}
    (copied / "ventricles.json").write_text(json.dumps(measure))
    predict.main(["--run-dir", str(copied), "--heads", "2", "--ventricles", "0.25", "--num-samples", "1"])
    persons = sampler.steered_people(prior, measure, 2, 0, 0.25)
    uncalibrated = (persons - prior.person_shift.numpy()) / prior.person_scale.numpy()
    np.testing.assert_allclose(2 + uncalibrated @ np.array(measure["weights"]), 1, rtol=1e-5)
    expected = predict.decode_heads(models[0], sampler.sample_heads(prior, 2, 0, persons=persons))
    written, _ = volumes.read_slices(copied / "predictions" / "head_001.nii.gz")
    assert np.abs(written.astype(int) - expected[1]).max() <= 1


def test_a_data_set_holds_the_heads_of_the_seed(copied, models, quick, tmp_path, monkeypatch, capsys):
    change_config(copied, folder="/gone")
    monkeypatch.setattr(sampler, "samples_at_once", lambda bytes_each: 2)
    predict.main(["--run-dir", str(copied), "--write-dataset", str(tmp_path / "set"), "--heads", "5",
                  "--seed", "4", "--temperature", "0.7"])
    assert "5 heads in" in capsys.readouterr().out and not (copied / "predictions").exists()
    vqvae, prior = models
    codes = prior.sample_heads(5, seed=4, temperature=0.7).reshape(-1, 8, 8)
    expected = to_uint8(vqvae.decode_codes(codes).numpy()[..., 0])
    splits = dataset.load_splits(tmp_path / "set")
    images = np.concatenate([split.images for split in splits.values()])
    assert images.shape == expected.shape and np.abs(images.astype(int) - expected).max() <= 1
    assert [split.num_people for split in splits.values()] == [3, 1, 1]
    assert json.loads((tmp_path / "set" / "dataset.json").read_text())["seed"] == 4


def test_a_data_set_that_cannot_be_written_is_refused(in_trained, quick, tmp_path, capsys):
    target = ["--write-dataset", str(tmp_path / "set")]
    for heads in ([], ["--heads", "2"]):
        check_refused(predict.main, [*target, *heads], "needs --heads: how many to sample, at least", capsys)
    target = ["--heads", "3", "--write-dataset", str(tmp_path)]
    check_refused(predict.main, target, "exists already; give another", capsys)
    assert not list(tmp_path.iterdir())


def test_ctrl_c_leaves_no_data_set(in_trained, quick, tmp_path, monkeypatch, capsys):
    def stop(vqvae, codes):
        raise KeyboardInterrupt

    monkeypatch.setattr(predict, "decode_heads", stop)
    with pytest.raises(SystemExit) as ended:
        predict.main(["--heads", "8", "--write-dataset", str(tmp_path / "set")])
    assert ended.value.code == cli.EXIT_INTERRUPTED and "set was not written" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# One's own images


def test_a_test_slice_gives_what_the_test_split_gives(in_trained, models, quick, tmp_path, capsys):
    predict.main(["--images", SLICE, "--output-dir", str(tmp_path / "out")])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "case_441_slice_3_original.png", "case_441_slice_3_reconstruction.png", "case_441_slice_3_codes.npy",
        "reconstructions.png", "metrics.json", "files.json"}
    row, = json.loads((tmp_path / "out" / "metrics.json").read_text())["images"]
    vqvae, prior = models
    test = dataset.load_splits("cohort", ["test"])["test"]
    coded = dataset.encode_split(vqvae, prior, test)
    _, details = metrics.evaluate(vqvae, prior, dataset.image_batches(test, 32), coded, test.cases)
    index = int(np.flatnonzero((test.cases == 441) & (test.positions == 3))[0])
    assert row["ssim"] == pytest.approx(details["per_image"]["ssim"][index], abs=1e-6)
    nats = -float(prior.log_prob(coded.codes[0, index:index + 1], np.array([3]))[0])
    assert row["bytes"] == pytest.approx(nats / np.log(2) / 8, rel=1e-4)
    assert row["slice"] == 3 and row["file"] == SLICE
    codes = np.load(tmp_path / "out" / "case_441_slice_3_codes.npy")
    np.testing.assert_array_equal(codes, coded.codes[0, index])
    np.testing.assert_array_equal(pixels(tmp_path / "out" / "case_441_slice_3_original.png"), pixels(SLICE))
    assert "taken as it is" in capsys.readouterr().out
    out = tmp_path / "out"
    codes = str(out / "case_441_slice_3_codes.npy")
    predict.main(["--codes", codes, "--output-dir", str(tmp_path / "decoded")])
    decoded = pixels(tmp_path / "decoded" / "case_441_slice_3_codes_0000.png")
    assert np.abs(decoded.astype(int) - pixels(out / "case_441_slice_3_reconstruction.png")).max() <= 1
    assert len(list((tmp_path / "decoded").glob("*.png"))) == 1


def test_images_of_any_size_depth_and_number(in_trained, quick, tmp_path, capsys):
    rng = np.random.default_rng(0)
    original = pixels(SLICE)
    Image.fromarray(rng.integers(0, 255, (512, 512), np.uint8)).save(tmp_path / "large.png")
    Image.fromarray(original[4:60, 8:56]).save(tmp_path / "small.png")
    Image.fromarray(original.astype(np.uint16) * 16).save(tmp_path / "deep.png")
    Image.fromarray(original).convert("RGB").save(tmp_path / "rgb.png")
    (tmp_path / "other").mkdir()
    Image.fromarray(original).save(tmp_path / "other" / "rgb.png")
    names = "large", "small", "deep", "rgb", "rgb_2"
    files = [str(tmp_path / f"{name}.png") for name in (*names[:4], "other/rgb")]
    predict.main(["--images", *files, "--output-dir", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "large.png: resampled from 512x512 to 64x64 pixels." in said
    assert "small.png: padded with black from 48x56 to 64x64 pixels." in said
    assert f"deep.png: 16 bits scaled to 8 (its brightest, {int(original.max()) * 16}, becomes 255)." in said
    assert "rgb.png: mode RGB turned to gray" in said
    found = {name: pixels(tmp_path / "out" / f"{name}_original.png") for name in names}
    # Smoothing before sampling: by a factor of 8 the noise all but averages out, as in means over blocks.
    assert np.abs(found["large"] - downscale_local_mean(pixels(tmp_path / "large.png"), (8, 8))).mean() < 6
    np.testing.assert_array_equal(found["small"], np.pad(original[4:60, 8:56], ((4, 4), (8, 8))))
    np.testing.assert_allclose(found["deep"], original * (255 / original.max()), atol=0.51)
    np.testing.assert_array_equal(found["rgb"], original)
    rows = json.loads((tmp_path / "out" / "metrics.json").read_text())["images"]
    assert [row["image"] for row in rows] == list(names)
    assert all(row["slice"] is row["bytes"] is None for row in rows)  # which slices they are is unknown
    assert re.search(r"^rgb_2 +0\.\d{3} +-  unknown$", said, re.M)
    for row in rows:
        pair = (pixels(tmp_path / "out" / f"{row['image']}_{kind}.png") / 255
                for kind in ("original", "reconstruction"))
        assert row["ssim"] == pytest.approx(metrics.ssim(*pair), abs=0.01)  # those are rounded to 8 bits


def draw_volume(path):
    y, x, z = np.mgrid[-88:88, -70:70, -60:60]
    radius = np.sqrt((x / 60) ** 2 + (y / 75) ** 2 + (z / 55) ** 2)
    volume = np.where(radius < 1, 0.5 + 0.3 * np.cos(x / 9) * np.cos(y / 8), 0).transpose(1, 0, 2)
    nibabel.save(nibabel.Nifti1Image(np.float32(volume), np.eye(4)), path)
    return volumes.read_slices(path)[0]


def test_a_volume_gives_the_slices_that_training_people_have(copied, models, quick, tmp_path, capsys):
    slices = draw_volume(tmp_path / "head.nii.gz")
    change_config(copied, geometry={"spacing": 1.4}, front=None)
    predict.main(["--run-dir", str(copied), "--images", str(tmp_path / "head.nii.gz"),
                  "--output-dir", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "head.nii.gz: 8 axial slices, which side is the front in the run's own slices is unknown" in said
    assert "resampled from 256x256 to 64x64 pixels." in said
    rows = json.loads((tmp_path / "out" / "metrics.json").read_text())["images"]
    assert [row["slice"] for row in rows] == list(range(8))  # the lowest 8 of 32
    codes = np.load(tmp_path / "out" / "head_codes.npy")
    assert codes.shape == (8, 8, 8)
    vqvae, prior = models
    images = np.stack([pixels(tmp_path / "out" / f"head_slice_{k}_original.png") for k in range(8)])
    small = downscale_local_mean(slices[:8], (1, 4, 4))
    assert np.abs(images - small).mean() < 3
    head = dataset.Split("head", images, np.zeros(8, np.int32), np.arange(8, dtype=np.int32))
    lengths = metrics.code_lengths(prior, dataset.encode_split(vqvae, prior, head))
    # 64 codes a slice; 24 numbers of a byte each tell the person, once for 8 slices.
    assert [row["bytes"] for row in rows] == pytest.approx(lengths * 64 / 8 + 24 / 8, rel=1e-4)
    predict.main(["--run-dir", str(copied), "--codes", str(tmp_path / "out" / "head_codes.npy"),
                  "--output-dir", str(tmp_path / "decoded")])
    assert len(list((tmp_path / "decoded").glob("head_codes_*.png"))) == 8


@pytest.mark.parametrize("run_positions, given, expected", (
    ([0, 1, 2, 6], 7, [0, 1, 2, 6]),  # a head of this run, whose gaps are black
    ([4, 8, 12], 3, [4, 8, 12]), ([4, 8, 12], 32, [4, 8, 12]), (list(range(32)), 32, list(range(32))),
    ([4, 8, 12], 5, None)))  # another run's
def test_slices_of_a_volume_lie_where_the_run_has_some(copied, monkeypatch, run_positions, given, expected):
    images = np.arange(given, dtype=np.uint8)[:, np.newaxis, np.newaxis] * np.ones((1, 8, 8), np.uint8)
    monkeypatch.setattr(volumes, "read_slices", lambda path, geometry: (images, []))
    (copied / "head.nii").touch()
    file, = own_images.read_own_files([copied / "head.nii"], Run.load(copied), 8, run_positions)
    assert file.positions == expected
    first, step = run_positions[0], run_positions[1] - run_positions[0]
    chosen = range(given) if expected is None else expected if given == 32 else [
        (position - first) // step for position in expected]
    assert file.images[:, 0, 0].tolist() == list(chosen)


# Refused


@pytest.fixture
def bad(tmp_path):
    """Files that are no images, and files that hold no codes of the tiny run."""
    rng = np.random.default_rng(0)
    (tmp_path / "empty.png").touch()
    (tmp_path / "empty.nii.gz").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.png").write_text("no image")
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (64, 64), np.uint8)).save(file, "PNG")
    (tmp_path / "cut.png").write_bytes(file.getvalue()[:2000])
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / "colour.png")
    Image.fromarray(np.full((64, 64, 4), 100, np.uint8)).save(tmp_path / "clear.png")
    Image.fromarray(np.zeros((1, 9000), np.uint8)).save(tmp_path / "wide.png")
    np.save(tmp_path / "far.npy", np.full((8, 8), 16))
    np.save(tmp_path / "shape.npy", np.zeros((8, 9), int))
    np.save(tmp_path / "none.npy", np.zeros((0, 8, 8), int))
    np.save(tmp_path / "float.npy", np.zeros((8, 8)))
    np.save(tmp_path / "object.npy", np.full((8, 8), None), allow_pickle=True)
    return tmp_path


@pytest.mark.parametrize("option, name, expected", [
    ("--images", "empty.png", "empty.png is not a PNG image"),
    ("--images", "empty.nii.gz", "cannot be used as a volume"),
    ("--images", "folder", "folder is not a file"), ("--images", "missing.png", "missing.png is not a file"),
    ("--images", "text.png", "text.png is not a PNG image"),
    ("--images", "cut.png", "cut.png cannot be read"),
    ("--images", "colour.png", "is in colour"), ("--images", "clear.png", "partly transparent"),
    ("--images", "wide.png", "the largest side allowed is 8192"),
    ("--codes", "far.npy", "holds numbers from 16 to 16; codes here are integers from 0 to 15 of shape"),
    ("--codes", "shape.npy", "of shape (8, 9)"), ("--codes", "none.npy", "of shape (0, 8, 8)"),
    ("--codes", "float.npy", "holds float64"), ("--codes", "object.npy", "is not a .npy file of codes"),
    ("--codes", "empty.png", "is not a .npy file of codes"),
    ("--codes", "folder", "is not a .npy file of codes"),
])
def test_bad_files_are_refused_and_nothing_is_written(trained, in_trained, quick, bad, option, name, expected,
                                                      capsys):
    before = sorted(path for folder in (trained, bad) for path in folder.rglob("*"))
    good = [SLICE] if option == "--images" else []
    arguments = [option, *good, str(bad / name), "--output-dir", str(bad / "out")]
    check_refused(predict.main, arguments, expected, capsys)
    assert sorted(path for folder in (trained, bad) for path in folder.rglob("*")) == before


@pytest.mark.parametrize("arguments, expected", [
    (["--run-dir", "nowhere"], "nowhere holds no trained run"),
    (["--data-dir", "LARGER"], "64x64; give --data-dir or --run-dir to match"),
    (["--slice", "32"], "--slice: 32 is past the last slice, 31"),
    (["--slice", "9"], "--slice 9: the training people have the slices 0, 1, 2, 3, 4, 5, 6, 7 only"),
    (["--slice", "some"], "--slice: expected an integer"),
    (["--temperature", "-1"], "--temperature"),
    (["--seed", "2147483648"], "less than 2147483648"),
    (["--output-dir", "/proc/out"], "No such file or directory"),
])
def test_bad_input_is_refused_and_nothing_written(trained, in_trained, tmp_path, arguments, expected, capsys):
    if "LARGER" in arguments:
        arguments = ["--data-dir", str(write_cohort(tmp_path / "larger", people=(1, 1, 1), size=96))]
    before = sorted(trained.rglob("*"))
    check_refused(predict.main, arguments, expected, capsys)
    assert sorted(trained.rglob("*")) == before


def test_a_run_that_is_not_finished_is_used_only_by_name(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "PRETRAINED", tmp_path / "nowhere")
    check_refused(predict.main, [], "run train.py first", capsys)
    monkeypatch.setattr(runs, "PRETRAINED", trained / "runs" / "tiny")
    shutil.copytree(trained / "runs" / "tiny", "runs/half")
    Path("runs/half/metrics.json").unlink()  # what is written last
    run = predict.find_run(None)
    said = capsys.readouterr().out
    assert "runs/half is not finished" in said and "pretrained weights, of simulated people" in said
    assert run.folder == runs.PRETRAINED and trained not in run.results_path("images").absolute().parents
    assert predict.find_run("runs/half").folder == Path("runs/half")
    assert "runs/half is not finished" in capsys.readouterr().out
    shutil.copytree(trained / "runs" / "tiny", "runs/whole")
    os.utime("runs/whole/config.json", (0, 0))  # older than the unfinished one
    assert predict.find_run(None).folder == Path("runs/whole") and not capsys.readouterr().out


def test_the_weights_to_start_with_are_those_of_their_card_and_of_simulated_people():
    card = (runs.PRETRAINED / "README.md").read_text()
    hashes = dict(re.findall(r"^\| `([\w.]+)` \| `([0-9a-f]{64})` \|$", card, re.M))
    assert hashes == {name: hashlib.sha256((runs.PRETRAINED / name).read_bytes()).hexdigest()
                      for name in ("config.json", "vqvae.keras", "pixelcnn.keras", "ventricles.json")}
    assert sum((runs.PRETRAINED / name).stat().st_size for name in runs.MODEL_FILES) <= 8e6
    run = Run.load(runs.PRETRAINED)
    assert run.is_simulated
    vqvae, prior = predict.load_models(run)
    images = vqvae.decode_codes(prior.sample([10, 20], seed=0)).numpy()[..., 0]
    heights = run.geometry.lowest + run.geometry.spacing * np.array([10, 20])
    expected = cut_axial(*load_mni152(), heights, vqvae.image_size, run.geometry.pixel_size)
    for image, average_brain in zip(images, expected):
        assert np.corrcoef(image.ravel(), average_brain.ravel())[0, 1] > 0.8  # a brain, front up


def test_other_data_that_do_not_fit_are_left_alone(trained, models, tmp_path, monkeypatch, capsys):
    run, vqvae = Run.load(trained / "runs" / "tiny"), models[0]
    run.config["data"] |= {"folder": str(tmp_path / "elsewhere"), "is_demo": False}
    monkeypatch.setenv("OASIS_DIR", str(write_cohort(tmp_path / "larger", people=(1, 1, 1), size=96)))
    assert predict.load_data(predict.parse_arguments([]), run, vqvae) is None
    assert "it samples only" in capsys.readouterr().out
    with pytest.raises(cli.UserError, match="96x96 pixels but"):
        predict.load_data(predict.parse_arguments(["--evaluate"]), run, vqvae)


def test_any_other_tensorflow_error_stays_itself(in_trained, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise tf.errors.InvalidArgumentError(None, None, "must be a compile-time constant")

    monkeypatch.setattr(modules.VQVAE, "decode_codes", fail)
    with pytest.raises(tf.errors.InvalidArgumentError, match="compile-time constant"):
        predict.main(["--output-dir", str(tmp_path / "out")])


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
    return "was trained on the codes of another codebook"


def spoil_config(run):
    config = json.loads((run / "config.json").read_text())
    config["vqvae"]["embedding_dim"] = 5
    (run / "config.json").write_text(json.dumps(config))
    return "vqvae.keras is not the model that config.json describes"


def spoil_code(run):
    """A layer that would run code when it is loaded."""
    marker = run / "has_run"
    layer = keras.layers.Lambda(lambda x, marker=str(marker): open(marker, "w") and x)
    keras.Sequential([keras.Input((1,)), layer]).save(run / "vqvae.keras")
    return "vqvae.keras cannot be loaded"


def spoil_import(run):
    (run / "payload.py").write_text(f"open({str(run / 'has_run')!r}, 'w')\nclass Model: pass\n")
    payload = {"module": "payload", "class_name": "Model", "registered_name": None}
    swap_config(run / "vqvae.keras", lambda config: {**config, **payload})
    return "vqvae.keras cannot be loaded"


@pytest.mark.parametrize("spoil", (spoil_truncate, spoil_flip, spoil_exchange, spoil_other_codebook,
                                   spoil_config, spoil_code, spoil_import))
def test_model_files_that_cannot_be_trusted_are_named_and_run_no_code(copied, spoil, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(copied))
    expected = spoil(copied)
    marker = copied / "has_run"
    marker.unlink(missing_ok=True)
    check_refused(predict.main, ["--run-dir", str(copied)], expected, capsys)
    assert not marker.exists()

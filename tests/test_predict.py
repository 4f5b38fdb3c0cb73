"""predict.py: the test people, samples and heads, the judgement, one's own images, and what is refused."""

import csv
import hashlib
import io
import json
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
from support import cli, metrics, runs, sampler
from support.images import to_uint8
from support.runs import Run
from support.template import template_slices
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


# The test people, samples and heads


def test_predict_writes_pictures_and_the_metrics_that_training_wrote(copied):
    predict.main(["--run-dir", str(copied), "--num-examples", "3", "--num-samples", "3", "--heads", "3"])
    folder = copied / "predictions"
    names = {path.name for path in folder.iterdir()}
    pairs = sorted(name for name in names if name.startswith("original_vs_reconstructed_case_"))
    assert len(pairs) == 3 and names - set(pairs) == {
        "reconstructions.png", "errors.png", "samples.png", "head.png", "metrics.json", "report.html", "per_image.csv",
        *(f"head_{number:03d}.nii.gz" for number in range(3)),
        *(f"sample_{number:04d}_slice_{position}.png" for number, position in enumerate((0, 4, 7)))}
    measured, by_train = (json.loads((path / "metrics.json").read_text()) for path in (folder, copied))
    assert measured == pytest.approx(by_train, rel=1e-4)
    assert measured["num_images"] == 16 and 0 < measured["bits_per_code"] < 6
    assert measured["bytes_per_image"] == pytest.approx(measured["bits_per_code"] * 64 / 8)
    case, position = pairs[0].removesuffix(".png").split("_")[-3::2]
    original = pixels(Run.load(copied).config["data"]["folder"] + f"/keras_png_slices_test/case_{case}_slice_{position}.nii.png")
    np.testing.assert_array_equal(pixels(folder / pairs[0])[:, :64], original)
    with open(folder / "per_image.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["slice"]) for row in rows] == [(case, str(k)) for case in ("441", "442") for k in range(8)]
    ssim = np.array([float(row["ssim"]) for row in rows])
    assert ssim.mean() == pytest.approx(measured["ssim"], rel=1e-4)
    assert np.std(ssim.reshape(2, 8).mean(axis=1), ddof=1) == pytest.approx(measured["ssim_sd"], rel=1e-3)


def test_samples_and_heads_are_those_of_seed_temperature_and_positions(in_trained, models, tmp_path, monkeypatch):
    vqvae, prior = models
    monkeypatch.setattr(predict, "load_models", lambda run: models)  # whose sampler, for batches of 8, is compiled once
    exported = []
    monkeypatch.setattr(predict.sampler, "export", lambda *arguments: exported.append(arguments))
    predict.main(["--slice", "all", "--heads", "8", "--seed", "5", "--temperature", "0.8", "--output-dir", str(tmp_path / "out"),
                  "--export", str(tmp_path / "exported")])
    assert exported == [(vqvae, prior, str(tmp_path / "exported"))]
    samples = to_uint8(vqvae.decode_codes(prior.sample(range(8), seed=5, temperature=0.8))[..., 0])
    heads = prior.sample_heads(8, seed=5, temperature=0.8)
    assert len(list((tmp_path / "out").glob("sample_*.png"))) == 8 and len(list((tmp_path / "out").glob("head_*.nii.gz"))) == 8
    for position in range(8):
        written = pixels(tmp_path / "out" / f"sample_{position:04d}_slice_{position}.png").astype(int)
        assert np.abs(written - samples[position]).max() <= 1
    volume = nibabel.load(tmp_path / "out" / "head_001.nii.gz")
    # x to the right, y to the front, z up: the image's rows run backwards, its columns to the right.
    slices = np.asarray(volume.dataobj).transpose(2, 1, 0)[:, ::-1]
    decoded = to_uint8(vqvae.decode_codes(heads[1])[..., 0])
    assert np.abs(slices.astype(int) - decoded).max() <= 1
    assert volume.header.get_zooms()[:2] == (4, 4)  # 256 mm over 64 pixels


@pytest.mark.parametrize("slice_, count, expected", ((None, 3, [0, 16, 31]), ("all", 3, list(range(32))), (7, 2, [7, 7])))
def test_positions_are_spread_over_all_or_the_one_asked_for(slice_, count, expected):
    assert predict.sample_positions(slice_, count, list(range(32))).tolist() == expected


def test_evaluate_judges_samples_beside_people(in_trained, models, tmp_path, capsys):
    predict.main(["--evaluate", "--with-neighbours", "--num-samples", "4", "--output-dir", str(tmp_path)])
    measured = json.loads((tmp_path / "metrics.json").read_text())
    assert {"frechet", "frechet_floor", "kid", "kid_floor", "density", "coverage", "coverage_floor",
            "copy_test", "copy_test_says", "bits_per_code"} <= measured.keys()
    assert measured["num_samples"] == 16
    # Two epochs on drawn heads teach nobody to sample: the judge has to see that.
    assert measured["frechet"] > measured["frechet_floor"]
    heads = measured["heads"]
    assert heads["num_heads"] == 4 and heads["num_people"] == {"train": 4, "validate": 2, "test": 2}
    assert heads["copy_test_says"] in capsys.readouterr().out.split("4 sampled heads")[1]
    assert {"neighbours.png", "distances.png", "tissue.png"} <= {path.name for path in tmp_path.iterdir()}
    bits = {}  # of each head, person by person
    for name, split in dataset.load_splits("cohort", ["train", "test"]).items():
        lengths = metrics.code_lengths(models[1], dataset.encode_split(*models, split))
        bits[name] = [lengths[split.cases == case].mean() for case in np.unique(split.cases)]
    assert heads["bits_per_code_train"] == pytest.approx(np.mean(bits["train"]), rel=1e-5)
    assert heads["membership"] == np.mean([[new > old for old in bits["train"]] for new in bits["test"]])


def test_evaluate_refuses_people_who_are_too_few(in_trained, tmp_path, capsys):
    write_cohort(tmp_path / "few", people=(1, 1, 1), slices=5)
    write_cohort(tmp_path / "lone", people=(2, 1, 1))
    for name, expected in (("few", "more than 5 images in each split, but train"),
                           ("lone", "two people with all their slices in each split, but validate")):
        check_refused(predict.main, ["--evaluate", "--data-dir", str(tmp_path / name)], expected, capsys)


def test_people_on_whom_the_run_was_not_trained_cannot_tell_copies(in_trained, tmp_path, capsys):
    other = write_cohort(tmp_path / "other", people=(3, 2, 2))
    for option in ("--evaluate", "--with-neighbours"):
        check_refused(predict.main, [option, "--data-dir", str(other)], "are not those that runs/tiny was trained on", capsys)


def change_config(run, **data):
    config = json.loads((run / "config.json").read_text())
    config["data"].update(data)
    (run / "config.json").write_text(json.dumps(config))


def test_a_run_without_its_data_samples_all_the_same(copied, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    change_config(copied, folder="/gone")
    options = ["--run-dir", str(copied), "--num-samples", "2", "--heads", "0"]
    check_refused(predict.main, [*options, "--evaluate"], "/gone, are not here; say with --data-dir where", capsys)
    predict.main(options)
    assert "not measured and nothing is reconstructed" in capsys.readouterr().out
    assert {path.name for path in (copied / "predictions").iterdir()} == {
        "samples.png", "sample_0000_slice_0.png", "sample_0001_slice_7.png", "report.html"}


def test_ventricles_of_a_size_are_those_of_persons_steered_there(copied, models):
    run, prior = Run.load(copied), models[1]
    assert sampler.steered_people(run, prior, 3, 5, None) is None
    measure = {"weights": [0.5, -0.25, *[0] * 22], "offset": 2.0, "quantiles": [0, 2, 6]}
    run.ventricles_path.write_text(json.dumps(measure))
    for quantile, target in ((0.25, 1), (1, 6)):
        persons = sampler.steered_people(run, prior, 3, 5, quantile)
        uncalibrated = (persons - prior.person_shift.numpy()) / prior.person_scale.numpy()
        np.testing.assert_allclose(2 + uncalibrated @ np.array(measure["weights"]), target, rtol=1e-5)
    one_by_one = [sampler.steered_people(run, prior, 3, 5, quantile)[i] for i, quantile in enumerate((0.1, 0.5, 0.9))]
    np.testing.assert_allclose(sampler.steered_people(run, prior, 3, 5, np.array([0.1, 0.5, 0.9])), one_by_one)
    for text, expected in ((json.dumps({**measure, "weights": [0] * 24}), "does not follow from persons; leave out --ventricles"),
                           ('{"weights": [1', "ventricles.json is missing or damaged")):
        run.ventricles_path.write_text(text)
        with pytest.raises(predict.UserError, match=expected):
            sampler.steered_people(run, prior, 3, 5, 0.5)


def test_a_data_set_holds_the_heads_of_the_seed_however_few_are_sampled_at_once(copied, models, tmp_path, monkeypatch, capsys):
    change_config(copied, folder="/gone")
    monkeypatch.setattr(predict, "load_models", lambda run: models)
    monkeypatch.setattr(sampler, "samples_at_once", lambda bytes_each: 2)
    predict.main(["--run-dir", str(copied), "--write-dataset", str(tmp_path / "set"), "--heads", "5", "--seed", "4",
                  "--temperature", "0.7"])
    assert "5 heads in" in capsys.readouterr().out and not (copied / "predictions").exists()
    vqvae, prior = models
    expected = to_uint8(vqvae.decode_codes(prior.sample_heads(5, seed=4, temperature=0.7).reshape(-1, 8, 8)).numpy()[..., 0])
    splits = dataset.load_splits(tmp_path / "set")
    images = np.concatenate([split.images for split in splits.values()])
    assert images.shape == expected.shape and np.abs(images.astype(int) - expected).max() <= 1
    assert [split.num_people for split in splits.values()] == [3, 1, 1]
    assert json.loads((tmp_path / "set" / "dataset.json").read_text())["seed"] == 4


def test_a_data_set_that_cannot_be_written_is_refused(in_trained, models, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(predict, "load_models", lambda run: models)
    target = ["--write-dataset", str(tmp_path / "set")]
    for option, expected in (([], "needs --heads: how many to sample, at least 3"), (["--heads", "2"], "at least 3"),
                             (["--heads", "3", "--evaluate"], "--evaluate is of no use with --write-dataset"),
                             (["--heads", "3", "--output-dir", "x"], "--output-dir is of no use with --write-dataset"),
                             (["--heads", "3", "--codes", "a.npy"], "not allowed with argument")):
        check_refused(predict.main, [*target, *option], expected, capsys)
    check_refused(predict.main, ["--heads", "3", "--write-dataset", str(tmp_path)], "exists already; give another", capsys)
    assert not list(tmp_path.iterdir())


def test_ctrl_c_leaves_no_data_set(in_trained, models, tmp_path, monkeypatch, capsys):
    def stop(vqvae, codes):
        raise KeyboardInterrupt

    monkeypatch.setattr(predict, "load_models", lambda run: models)
    monkeypatch.setattr(predict, "decode_to_bytes", stop)
    with pytest.raises(SystemExit) as ended:
        predict.main(["--heads", "8", "--write-dataset", str(tmp_path / "set")])
    assert ended.value.code == cli.EXIT_INTERRUPTED and "set was not written" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# One's own images


def test_a_test_slice_gives_what_the_test_split_gives(in_trained, models, tmp_path, capsys):
    predict.main(["--images", SLICE, "--output-dir", str(tmp_path / "out")])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "case_441_slice_3_original.png", "case_441_slice_3_reconstruction.png", "case_441_slice_3_codes.npy",
        "reconstructions.png", "metrics.json"}
    row, = json.loads((tmp_path / "out" / "metrics.json").read_text())["images"]
    vqvae, prior = models
    test = dataset.load_splits("cohort", ["test"])["test"]
    coded = dataset.encode_split(vqvae, prior, test)
    _, details = metrics.evaluate(vqvae, prior, dataset.image_batches(test, 32), coded, test.cases)
    index = int(np.flatnonzero((test.cases == 441) & (test.positions == 3))[0])
    assert row["ssim"] == pytest.approx(details["per_image"]["ssim"][index], abs=1e-6)
    nats = -float(prior.log_prob(coded.codes[0, index:index + 1], np.array([3]))[0])
    assert row["bytes"] == pytest.approx(nats / np.log(2) / 8, rel=1e-4)
    assert row["slice"] == 3 and row["slice_known"] and row["file"] == SLICE
    codes = np.load(tmp_path / "out" / "case_441_slice_3_codes.npy")
    np.testing.assert_array_equal(codes, coded.codes[0, index])
    np.testing.assert_array_equal(pixels(tmp_path / "out" / "case_441_slice_3_original.png"), pixels(SLICE))
    assert "taken as it is" in capsys.readouterr().out
    out = tmp_path / "out"
    predict.main(["--codes", str(out / "case_441_slice_3_codes.npy"), "--output-dir", str(tmp_path / "decoded")])
    decoded = pixels(tmp_path / "decoded" / "case_441_slice_3_codes_0000.png")
    assert np.abs(decoded.astype(int) - pixels(out / "case_441_slice_3_reconstruction.png")).max() <= 1
    assert len(list((tmp_path / "decoded").iterdir())) == 1


def test_images_of_any_size_depth_and_number(in_trained, models, tmp_path, capsys):
    rng = np.random.default_rng(0)
    original = pixels(SLICE)
    Image.fromarray(rng.integers(0, 255, (512, 512), np.uint8)).save(tmp_path / "large.png")
    Image.fromarray(original[4:60, 8:56]).save(tmp_path / "small.png")
    Image.fromarray(original.astype(np.uint16) * 16).save(tmp_path / "deep.png")
    Image.fromarray(original).convert("RGB").save(tmp_path / "rgb.png")
    (tmp_path / "other").mkdir()
    Image.fromarray(original).save(tmp_path / "other" / "rgb.png")
    files = [str(tmp_path / name) for name in ("large.png", "small.png", "deep.png", "rgb.png", "other/rgb.png")]
    predict.main(["--images", *files, "--output-dir", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "large.png: resampled from 512x512 to 64x64 pixels." in said
    assert "small.png: padded with black from 48x56 to 64x64 pixels." in said
    assert f"deep.png: 16 bits scaled to 8 (its brightest, {int(original.max()) * 16}, becomes 255)." in said
    assert "rgb.png: mode RGB turned to gray" in said
    found = {name: pixels(tmp_path / "out" / f"{name}_original.png") for name in ("large", "small", "deep", "rgb", "rgb_2")}
    # Smoothing before sampling: by a factor of 8 the noise all but averages out, as in means over blocks.
    assert np.abs(found["large"] - downscale_local_mean(pixels(tmp_path / "large.png"), (8, 8))).mean() < 6
    np.testing.assert_array_equal(found["small"], np.pad(original[4:60, 8:56], ((4, 4), (8, 8))))
    np.testing.assert_allclose(found["deep"], original * (255 / original.max()), atol=0.51)
    np.testing.assert_array_equal(found["rgb"], original)
    rows = json.loads((tmp_path / "out" / "metrics.json").read_text())["images"]
    assert [row["image"] for row in rows] == ["large", "small", "deep", "rgb", "rgb_2"]
    assert not any(row["slice_known"] for row in rows) and "of the fewest bytes" in said
    codes = np.load(tmp_path / "out" / "rgb_codes.npy")
    nats = -models[1].log_prob(np.repeat(codes[np.newaxis], 8, axis=0), np.arange(8)).numpy()  # the slices of training people
    assert rows[3]["slice"] == int(np.argmin(nats))
    assert rows[3]["bytes"] == pytest.approx((nats.min() / np.log(2) + 3) / 8, rel=1e-4)  # and 3 bits for which of 8 it is
    for row in rows:
        pair = (pixels(tmp_path / "out" / f"{row['image']}_{kind}.png") / 255 for kind in ("original", "reconstruction"))
        assert row["ssim"] == pytest.approx(metrics.ssim(*pair), abs=0.01)  # the written one is rounded to 8 bits


def test_a_volume_gives_its_slices(in_trained, models, tmp_path, capsys):
    y, x, z = np.mgrid[-88:88, -70:70, -60:60]
    radius = np.sqrt((x / 60) ** 2 + (y / 75) ** 2 + (z / 55) ** 2)
    volume = np.where(radius < 1, 0.5 + 0.3 * np.cos(x / 9) * np.cos(y / 8), 0).transpose(1, 0, 2).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / "head.nii.gz")
    predict.main(["--images", str(tmp_path / "head.nii.gz"), SLICE, "--output-dir", str(tmp_path / "out")])
    assert "head.nii.gz: 32 axial slices, resampled from 256x256 to 64x64 pixels." in capsys.readouterr().out
    rows = json.loads((tmp_path / "out" / "metrics.json").read_text())["images"]
    assert [row["slice"] for row in rows] == [*range(32), 3] and all(row["slice_known"] for row in rows)
    codes = np.load(tmp_path / "out" / "head_codes.npy")
    assert codes.shape == (32, 8, 8)
    vqvae, prior = models
    images = np.stack([np.asarray(Image.open(tmp_path / "out" / f"head_slice_{position}_original.png")) for position in range(32)])
    head = dataset.Split("head", images, np.zeros(32, np.int32), np.arange(32, dtype=np.int32))
    lengths = metrics.code_lengths(prior, dataset.encode_split(vqvae, prior, head))
    # 64 codes a slice; 24 numbers of a byte each tell the person, once for 32 slices.
    assert [row["bytes"] for row in rows[:32]] == pytest.approx(lengths * 64 / 8 + 24 / 32, rel=1e-4)
    assert len(list((tmp_path / "out").glob("head_slice_*_reconstruction.png"))) == 32
    predict.main(["--codes", str(tmp_path / "out" / "head_codes.npy"), "--output-dir", str(tmp_path / "decoded")])
    assert len(list((tmp_path / "decoded").glob("head_codes_*.png"))) == 32


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
    ("--images", "empty.png", "empty.png is not a PNG image"), ("--images", "empty.nii.gz", "cannot be used as a volume"),
    ("--images", "folder", "folder is not a file"), ("--images", "missing.png", "missing.png is not a file"),
    ("--images", "text.png", "text.png is not a PNG image"), ("--images", "cut.png", "cut.png cannot be read"),
    ("--images", "colour.png", "is in colour"), ("--images", "clear.png", "partly transparent"),
    ("--images", "wide.png", "the largest side allowed is 8192"),
    ("--codes", "far.npy", "holds numbers from 16 to 16; codes of this run are integers from 0 to 15 of shape (8, 8)"),
    ("--codes", "shape.npy", "of shape (8, 9)"), ("--codes", "none.npy", "of shape (0, 8, 8)"),
    ("--codes", "float.npy", "holds float64"), ("--codes", "object.npy", "is not a .npy file of codes"),
    ("--codes", "empty.png", "is not a .npy file of codes"), ("--codes", "folder", "is not a .npy file of codes"),
])
def test_bad_files_are_refused_in_one_sentence_and_nothing_is_written(trained, in_trained, models, bad, option, name, expected, monkeypatch,
                                                                       capsys):
    monkeypatch.setattr(predict, "load_models", lambda run: models)
    before = sorted(path for folder in (trained, bad) for path in folder.rglob("*"))
    good = [SLICE] if option == "--images" else []
    arguments = [option, *good, str(bad / name), "--output-dir", str(bad / "out")]
    check_refused(predict.main, arguments, expected, capsys)
    assert sorted(path for folder in (trained, bad) for path in folder.rglob("*")) == before


def test_options_of_the_test_split_are_refused_beside_images(in_trained, capsys):
    for option in (["--evaluate"], ["--slice", "0"], ["--data-dir", "cohort"]):
        check_refused(predict.main, ["--images", SLICE, *option], f"{option[0]} is of no use with --images", capsys)
    check_refused(predict.main, ["--images", SLICE, "--codes", "a.npy"], "not allowed with argument", capsys)


@pytest.mark.parametrize("arguments, expected", [
    (["--run-dir", "nowhere"], "nowhere holds no trained run"),
    (["--data-dir", "LARGER"], "64x64; give --data-dir or --run-dir to match"),
    (["--slice", "32"], "--slice: 32 is past the last slice, 31"),
    (["--slice", "9"], "--slice 9: the training people have the slices 0, 1, 2, 3, 4, 5, 6, 7 only"),
    (["--slice", "some"], "--slice: expected an integer"),
    (["--temperature", "-1"], "--temperature"),
    (["--seed", "2147483648"], "less than 2147483648"),
    (["--output-dir", "/proc/out"], "/proc/out cannot be written"),
])
def test_bad_input_is_refused_and_nothing_is_written(trained, in_trained, tmp_path, arguments, expected, capsys):
    if "LARGER" in arguments:
        arguments = ["--data-dir", str(write_cohort(tmp_path / "larger", people=(1, 1, 1), size=96))]
    before = sorted(trained.rglob("*"))
    check_refused(predict.main, arguments, expected, capsys)
    assert sorted(trained.rglob("*")) == before


def test_without_any_run_the_pretrained_one_is_taken_or_there_is_advice(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "PRETRAINED", tmp_path / "nowhere")
    check_refused(predict.main, [], "run train.py first", capsys)
    monkeypatch.setattr(runs, "PRETRAINED", trained / "runs" / "tiny")
    run = predict.find_run(None)
    assert "pretrained weights, of simulated people" in capsys.readouterr().out
    assert run.results_folder("images") == Path("runs/pretrained/images")  # not among the files of the repository
    monkeypatch.chdir(trained)
    assert runs.Run.load("runs/tiny").results_folder("images") == Path("runs/pretrained/images")
    monkeypatch.setattr(runs, "PRETRAINED", tmp_path / "nowhere")
    assert run.results_folder("images") == trained / "runs" / "tiny" / "images"


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
    template = template_slices(vqvae.image_size, run.geometry)[[10, 20]]
    for image, expected in zip(images, template):
        assert np.corrcoef(image.ravel(), expected.ravel())[0, 1] > 0.8  # a brain, front up


def test_data_found_in_place_of_the_own_that_do_not_fit_are_left_alone(trained, tmp_path, monkeypatch, capsys):
    run, vqvae = Run.load(trained / "runs" / "tiny"), modules.load_model(trained / "runs" / "tiny" / "vqvae.keras", compile=False)
    run.config["data"] |= {"folder": str(tmp_path / "elsewhere"), "is_demo": False}
    monkeypatch.setenv("OASIS_DIR", str(write_cohort(tmp_path / "larger", people=(1, 1, 1), size=96)))
    assert predict.load_data(predict.parse_arguments([]), run, vqvae) is None
    assert "it samples only" in capsys.readouterr().out
    with pytest.raises(cli.UserError, match="96x96 pixels but"):
        predict.load_data(predict.parse_arguments(["--evaluate"]), run, vqvae)


def test_any_other_tensorflow_error_stays_itself(in_trained, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise tf.errors.InvalidArgumentError(None, None, "must be a compile-time constant")

    monkeypatch.setattr(modules.VQVAE, "encode_to_codes", fail)
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
def test_model_files_that_cannot_be_trusted_are_named_and_run_no_code(copied, spoil, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(copied))
    expected = spoil(copied)
    marker = copied / "has_run"
    marker.unlink(missing_ok=True)
    check_refused(predict.main, ["--run-dir", str(copied)], expected, capsys)
    assert not marker.exists()

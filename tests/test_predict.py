"""predict.py: the test people, samples and heads, the judgement, one's own images, and what is refused."""

import hashlib
import json
from pathlib import Path
import re
import shutil
from types import SimpleNamespace
from unittest import mock

import keras
import nibabel
import numpy as np
from PIL import Image
import pytest
from skimage.transform import downscale_local_mean

from benchmarks.tiny import write_cohort
import dataset
import modules
import predict
from support import cli, judge, metrics, own_images, runs, sampler, slices, volumes
from support.runs import Run
from support.template import cut_axial, load_mni152
from tests.conftest import check_refused

SLICE = "cohort/keras_png_slices_test/case_441_slice_3.nii.png"
LOAD_MODELS = predict.load_models


def pixels(path):
    return np.asarray(Image.open(path))


def names_in(folder):
    return {path.name for path in folder.iterdir()}


def read_json(path):
    return json.loads(path.read_text())


def bytes_below(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def models(trained):
    return LOAD_MODELS(Run.load(trained / "runs" / "tiny"))


@pytest.fixture(scope="module", autouse=True)
def quick(trained, models):
    """In the trained folder; models are loaded and samplers compiled once, for batches of 2."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(trained)
        patch.setattr(predict, "load_models", lambda run: models)
        patch.setattr(sampler, "samples_at_once", lambda bytes_each: 2)
        yield


@pytest.fixture(scope="module")
def evaluated(trained, quick, tmp_path_factory):
    """A copy of the trained run whose heads predict.py judged, briefly."""
    run = Path(shutil.copytree(trained / "runs" / "tiny", tmp_path_factory.mktemp("evaluated") / "run"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(run)
        Path("evaluation.json").write_text('{"heads": {"membership_reference": 0.75}}')  # of another prior
        for name, value in {"JUDGE_STEPS": 5, "SEEDS": (0,), "RESAMPLES": 20}.items():
            patch.setattr(judge, name, value)
        predict.main(["--run-dir", ".", "--evaluate", "--num-samples", "3", "--heads", "3",
                      "--cache-dir", "../cache"])
    return run


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of the trained run, to be spoilt."""
    return Path(shutil.copytree(trained / "runs" / "tiny", tmp_path / "run"))


def change_config(run, part, **values):
    config = read_json(run / "config.json")
    config[part].update(values)
    config.pop("git_commit", None)  # as of code that is no clone
    (run / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("argv, expected", (
    ("--images file --heads 1", "--heads is of no use with --images"),  # even its default
    ("--codes file --data-dir x", "--data-dir is of no use with --codes"),
    ("--write-dataset x --heads 3 --evaluate", "--evaluate is of no use with --write-dataset"),
    ("--write-dataset x --heads 2", "--write-dataset needs --heads: how many to sample, at least"),
    ("--slice all --num-samples 3", "--num-samples is of no use with --slice all"),
    ("--evaluate --ventricles 0.5", "--ventricles is of no use with --evaluate"),
    ("--ventricles 1.5", "--ventricles: expected a number from 0 to 1, got 1.5"),
    (f"--slice {slices.MAX_POSITIONS}", "--slice: expected an integer of at least 0 and less than"),
    ("--slice some", "--slice: expected an integer")))
def test_options_that_would_be_ignored_contradict_or_hold_no_number_are_refused(argv, expected):
    with pytest.raises(cli.UserError, match=expected):
        predict.parse_arguments(argv.split())


@pytest.mark.parametrize("positions, volume, step", (
    ([0, 1, 2, 6, 7], [1, 2, 3, 0, 0, 0, 4, 5], 1), ([2, 6, 10], [1, 2, 3], 4), ([5], [1], 1)))
def test_gaps_between_the_slices_of_heads_are_black_at_the_true_distance(positions, volume, step):
    heads = np.ones((2, len(positions), 3, 3), np.uint8) * np.arange(1, 1 + len(positions))[:, None, None]
    geometry = volumes.SliceGeometry(spacing=1.5, lowest=-8)
    filled, filled_positions, geometry = predict.fill_gaps(heads, positions, geometry)
    assert filled[1, :, 0, 0].tolist() == volume
    assert list(filled_positions) == list(range(positions[0], positions[-1] + 1, step))
    assert geometry.spacing == 1.5 * step and geometry.lowest == -8 + 1.5 * positions[0]


def test_predict_writes_pictures_and_the_metrics_that_training_wrote(evaluated, trained):
    folder, names = evaluated / "predictions", names_in(evaluated / "predictions")
    assert len(list((evaluated.parent / "cache").glob("slices-*.npy"))) == 3
    pairs = sorted(name for name in names if name.startswith("original_vs_reconstructed_case_"))
    assert len(pairs) == 10 and names - set(pairs) == {
        "reconstructions.png", "errors.png", "samples.png", "head.png", "metrics.json", "report.html",
        "per_image.csv", "files.json", "head_000.nii.gz", "head_001.nii.gz", "head_002.nii.gz",
        "sample_0000_slice_0.png", "sample_0001_slice_4.png", "sample_0002_slice_7.png"}
    measured = read_json(folder / "metrics.json")
    del measured["heads"]
    trained_on = read_json(evaluated / "metrics.json")
    beside = trained_on.pop("baselines")
    assert trained_on.pop("movement") != 0
    assert measured == pytest.approx(trained_on, rel=1e-4)
    assert measured["num_images"] == 16 and 0 < measured["bits_per_code"] < 6
    assert measured["bytes_per_image"] == pytest.approx(measured["bits_per_code"] * 64 / 8)
    name = pairs[0].removeprefix("original_vs_reconstructed_").replace(".png", ".nii.png")
    original = pixels(trained / "cohort" / "keras_png_slices_test" / name)
    np.testing.assert_array_equal(pixels(folder / pairs[0])[:, :64], original)
    rows = np.genfromtxt(folder / "per_image.csv", delimiter=",", names=True)
    assert list(zip(rows["case"], rows["slice"])) == [(case, k) for case in (441, 442) for k in range(8)]
    assert rows["ssim"].mean() == pytest.approx(measured["ssim"], rel=1e-4)
    page = (folder / "report.html").read_text()  # made to be shared
    assert "Run run: brain slices, reconstructed and sampled" in page
    assert all(f"{scores['psnr']:.4g}" in page for scores in beside.values())
    assert str(evaluated.parent) not in page and str(trained) not in page


def test_evaluate_judges_heads_and_a_later_call_keeps_that_and_what_is_not_ours(evaluated, models, tmp_path):
    run = Path(shutil.copytree(evaluated, tmp_path / "run"))
    heads = read_json(run / "predictions" / "metrics.json")["heads"]
    assert heads["num_heads"] == 4 and heads["num_people"] == {"train": 4, "validate": 2, "test": 2}
    bits = [metrics.code_lengths(models[1], dataset.encode_split(*models, split)).reshape(-1, 8).mean(axis=1)
            for split in dataset.load_splits("cohort", ["train", "test"]).values()]
    assert heads["bits_per_code_train"] == pytest.approx(np.mean(bits[0]), rel=1e-5)
    assert heads["membership"] == np.mean(np.subtract.outer(bits[1], bits[0]) > 0)
    out = run / "predictions"
    (out / "head_patient7.nii.gz").write_text("mine")
    predict.main(["--run-dir", str(run), "--num-samples", "2", "--heads", "2", "--slice", "3"])
    assert not (out / "head_002.nii.gz").exists() and (out / "sample_0001_slice_3.png").exists()
    assert (out / "head_patient7.nii.gz").read_text() == "mine"
    assert "heads" not in read_json(out / "metrics.json")
    assert read_json(run / "evaluation.json") == {"heads": heads}
    predict.main(["--run-dir", str(run), "--write-dataset", str(run / "set"), "--heads", "3"])
    assert read_json(run / "set" / "dataset.json")["prior"]["heads"] == heads


def test_a_run_without_its_data_samples_all_the_same(copied, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    change_config(copied, "data", folder="/gone")
    # Whatever else lies where train.py would look is left alone if it does not fit.
    for found in ("", str(write_cohort(tmp_path / "larger", people=(1, 1, 1), size=96))):
        monkeypatch.setenv("OASIS_DIR", found)
        options = ["--run-dir", str(copied), "--num-samples", "2", "--heads", "0"]
        expected = "/gone, are not here; say with --data-dir"
        check_refused(predict.main, [*options, "--evaluate"], expected, capsys)
        predict.main(options)
        assert "not measured and nothing is reconstructed" in capsys.readouterr().out
        assert names_in(copied / "predictions") == {"samples.png", "sample_0000_slice_0.png", "files.json",
                                                    "sample_0001_slice_7.png", "report.html"}


def test_ventricles_asked_for_are_told_beside_those_shown(copied, capsys):
    measure = {"weights": [0.5, -0.25, *[0] * 22], "offset": 2.0, "quantiles": [0, 2, 6]}
    (copied / "ventricles.json").write_text(json.dumps(measure))
    change_config(copied, "data", folder="/gone")
    predict.main(["--run-dir", str(copied), "--heads", "2", "--ventricles", "0.25", "--num-samples", "2"])
    written = [volumes.read_slices(path).slices for path in (copied / "predictions").glob("head_*.nii.gz")]
    shown = judge.tissue_statistics(np.concatenate(written))["dark_fraction"].mean()
    assert f"asked for 0.25, shown by the heads in the mean {shown / 4:.2f}." in capsys.readouterr().out


def test_a_data_set_is_written_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(predict, "decode_heads", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(SystemExit) as ended:
        predict.main(["--heads", "4", "--write-dataset", str(tmp_path / "set")])
    assert ended.value.code == cli.EXIT_INTERRUPTED and "set was not written" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_of_foreign_files_is_refused_whatever_they_are_called(copied, tmp_path, capsys):
    mine = tmp_path / "mine"
    mine.mkdir()
    for name in ("head_000.nii.gz", "metrics.json", "report.html", "case_441_slice_3_codes.npy", "notes.txt"):
        (mine / name).write_text(f"mine: {name}")
    before = bytes_below(tmp_path)
    for arguments in (["--output-dir"], ["--images", SLICE, "--output-dir"], ["--export"]):
        for folder in (mine, copied):  # the folder of a run holds foreign files too
            check_refused(predict.main, [*arguments, str(folder)], "holds files", capsys)
    assert bytes_below(tmp_path) == before


@pytest.mark.parametrize("module, name, stop", ((predict, "fill_gaps", KeyboardInterrupt),
                                                (predict.report, "write_report", OSError(28, "No space"))))
def test_what_stops_in_the_middle_leaves_old_results(evaluated, tmp_path, monkeypatch, module, name, stop):
    out = shutil.copytree(evaluated / "predictions", tmp_path / "out")
    before = bytes_below(tmp_path)
    monkeypatch.setattr(predict, "load_data", lambda *_: None)
    monkeypatch.setattr(module, name, mock.Mock(side_effect=stop))
    with pytest.raises(SystemExit):
        predict.main(["--output-dir", str(out), "--num-samples", "2", "--heads", "2"])
    assert bytes_below(tmp_path) == before


def test_a_test_slice_gives_what_the_test_split_gives(models, tmp_path, capsys):
    out, stem = tmp_path / "out", "case_441_slice_3"
    predict.main(["--images", SLICE, "--output-dir", str(out)])
    assert "taken as it is" in capsys.readouterr().out
    row, = read_json(out / "metrics.json")["images"]
    assert (row["slice"], row["file"]) == (3, SLICE)
    vqvae, prior = models
    image = dataset.load_splits("cohort", ["test"])["test"].take([3])  # case 441 is the first
    codes = np.int32(dataset.encode(vqvae, image))
    np.testing.assert_array_equal(np.load(out / f"{stem}_codes.npy"), codes[0])
    decoded = vqvae.decode_codes(codes).numpy()[0, ..., 0]
    assert row["ssim"] == pytest.approx(metrics.ssim(image.images[0] / 255, (decoded + 1) / 2), abs=1e-6)
    nats = -float(prior.log_prob(codes, np.array([3]))[0])
    assert row["bytes"] == pytest.approx(nats / np.log(2) / 8, rel=1e-4)
    before = bytes_below(out)
    for option, name in (("--images", f"{stem}_original.png"), ("--codes", f"{stem}_codes.npy")):
        check_refused(predict.main, [option, str(out / name), "--output-dir", str(out)],
                      f"{name} lies in {out}, whose old results will go", capsys)
    assert bytes_below(out) == before


def test_a_png_named_like_the_data_lies_as_in_training(tmp_path, front="left"):
    path, run = tmp_path / "case_001_slice_0.png", SimpleNamespace(config={"data": {"front": front}})
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (51, 47), np.uint8)).save(path)
    file, = own_images.read_own_files([path], run, 64, [0])
    np.testing.assert_array_equal(file.images, slices.read_images([path], "test", path, front))


def test_images_of_any_size_depth_and_number(tmp_path, capsys):
    original, out = pixels(SLICE), tmp_path / "out"
    noise = np.random.default_rng(0).integers(0, 255, (512, 512), np.uint8)
    pictures = {"large": noise, "small": original[4:60, 8:56], "deep": original.astype(np.uint16) * 16,
                "rgb": np.stack([original] * 3, axis=-1), "other/rgb": original,
                "line": np.full((1, 900), 200, np.uint8), "tiny": np.full((31, 20), 200, np.uint8)}
    (tmp_path / "other").mkdir()
    for name, picture in pictures.items():
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
    names = ["large", "small", "deep", "rgb", "rgb_2", "line", "tiny"]
    predict.main(["--images", *(f"{tmp_path}/{name}.png" for name in pictures), "--output-dir", str(out)])
    said = capsys.readouterr().out
    for words in ("large.png: resampled from 512x512 to 64x64 pixels.", "rgb.png: mode RGB turned to gray",
                  "small.png: padded with black from 48x56 to 64x64 pixels.",
                  f"deep.png: 16 bits scaled to 8 (its brightest, {int(original.max()) * 16}, becomes 255)."):
        assert words in said
    found = {name: pixels(out / f"{name}_original.png") for name in names}
    # Smoothing before sampling: by a factor of 8 the noise all but averages out, as in means over blocks.
    assert np.abs(found["large"] - downscale_local_mean(noise, (8, 8))).mean() < 6
    np.testing.assert_array_equal(found["small"], np.pad(original[4:60, 8:56], ((4, 4), (8, 8))))
    np.testing.assert_allclose(found["deep"], original * (255 / original.max()), atol=0.51)
    np.testing.assert_array_equal(found["rgb"], original)
    for name, (height, width) in {"line": (1, 64), "tiny": (64, 41)}.items():  # the longer side as it is fed
        inked = np.argwhere(found[name] == 200)
        assert len(inked) == height * width and (np.abs(inked.mean(axis=0) - 31.5) <= 0.5).all()
    rows = read_json(out / "metrics.json")["images"]
    assert [row["image"] for row in rows] == names
    assert all(row["slice"] is row["bytes"] is None for row in rows)  # which slices they are is unknown
    assert re.search(r"^rgb_2 +0\.\d{3} +-  unknown$", said, re.M)


def test_a_volume_gives_the_slices_that_training_people_have(copied, models, tmp_path, capsys):
    path, out, (y, x, z) = tmp_path / "head.nii.gz", tmp_path / "out", np.mgrid[-88:88, -70:70, -60:60]
    radius = np.sqrt((x / 60) ** 2 + (y / 75) ** 2 + (z / 55) ** 2)
    volume = np.where(radius < 1, 0.5 + 0.3 * np.cos(x / 9) * np.cos(y / 8), 0).transpose(1, 0, 2)
    nibabel.save(nibabel.Nifti1Image(np.float32(volume), np.eye(4)), path)
    cut = volumes.read_slices(path, num_slices=8)
    change_config(copied, "data", geometry={"spacing": 1.4}, front=None)
    predict.main(["--run-dir", str(copied), "--images", str(path), "--output-dir", str(out)])
    said = capsys.readouterr().out
    assert "head.nii.gz: 8 axial slices, which side is the front in the run's own slices is unknown" in said
    assert "resampled from 256x256 to 64x64 pixels." in said
    rows = read_json(out / "metrics.json")["images"]
    assert [row["slice"] for row in rows] == list(range(8))
    images = np.stack([pixels(out / f"head_slice_{k}_original.png") for k in range(8)])
    assert np.abs(images - downscale_local_mean(cut.slices, (1, 4, 4))).mean() < 3
    head = dataset.Split("head", images, np.zeros(8, np.int32), np.arange(8, dtype=np.int32))
    lengths = metrics.code_lengths(models[1], dataset.encode_split(*models, head))
    # 64 codes a slice; 24 numbers of a byte each tell the person, once for 8 slices.
    assert [row["bytes"] for row in rows] == pytest.approx(lengths * 64 / 8 + 24 / 8, rel=1e-4)
    mean = np.mean([row["ssim"] for row in rows])
    assert read_json(out / "metrics.json")["volumes"] == [{"file": str(path), "ssim": pytest.approx(mean)}]
    assert re.search(rf"^head, mean +{mean:.3f}$", said, re.M)
    decoded = (models[0].decode_head(np.load(out / "head_codes.npy"))[..., 0] + 1) / 2
    volumes.write_in_input_frame(cut, decoded, tmp_path / "expected.nii.gz")
    back, expected = (nibabel.load(file) for file in (out / "head_reconstruction.nii.gz",
                                                      tmp_path / "expected.nii.gz"))
    np.testing.assert_allclose(back.get_fdata(), expected.get_fdata(), atol=1e-3)


@pytest.mark.parametrize("run_positions, given, spacing, known", (
    ([0, 1, 2, 6], range(7), 1.4, {0: 0, 1: 1, 2: 2, 6: 6}),  # a head of this run, whose gaps are black
    ([4, 8, 12], range(4, 13, 4), 1.4, {4: 0, 8: 1, 12: 2}),
    ([4, 8, 12], range(32), 1.4, {4: 4, 8: 8, 12: 12}),
    ([0, 4, 8], range(32), 1.0, {})))  # of another run
def test_slices_of_a_volume_lie_where_the_run_has_some(copied, run_positions, given, spacing, known):
    images = np.repeat(np.arange(len(given), dtype=np.uint8), 64).reshape(1, -1, 8, 8)
    volumes.write_nifti_heads(images, given, volumes.SliceGeometry(32.0, spacing), copied)
    change_config(copied, "data", geometry={"spacing": 1.4})
    change_config(copied, "pixelcnn", num_positions=32)
    file, = own_images.read_own_files([copied / "head_000.nii.gz"], Run.load(copied), 8, run_positions)
    expected = list(known.items()) or [(None, index) for index in range(32)]
    assert list(zip(file.positions, file.images[:, 0, 0])) == expected


@pytest.fixture
def bad(tmp_path):
    """Files that are no images, and files that hold no codes of the tiny run."""
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    (tmp_path / "empty.nii.gz").touch()
    (tmp_path / "text.png").write_text("no image")
    for name, picture in {"colour": noise, "clear": np.full((64, 64, 4), 100, np.uint8), "cut": noise[..., 0],
                          "wide": np.zeros((1, 9000), np.uint8)}.items():
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:2000])
    for name, codes in {"far": np.full((8, 8), 16), "shape": np.zeros((8, 9), int), "float": np.zeros((8, 8)),
                        "none": np.zeros((0, 8, 8), int), "object": np.full((8, 8), None)}.items():
        np.save(tmp_path / f"{name}.npy", codes, allow_pickle=True)
    np.savez(tmp_path / "several.npz", np.zeros((8, 8), int))
    return tmp_path


NO_CODES = "holds no codes of this run; give a .npy file of integers from 0 to 15 of shape (8, 8) or (N, 8"


@pytest.mark.parametrize("option, name, expected", (
    ("--images", "empty.nii.gz", "cannot be used as a volume"), ("--images", "missing.png", "is not a file"),
    ("--images", "text.png", "is not a PNG image"), ("--images", "cut.png", "cannot be read"),
    ("--images", "colour.png", "is in colour"), ("--images", "clear.png", "partly transparent"),
    ("--images", "wide.png", "side allowed is 8192"), ("--codes", "missing.npy", "No such file"),
    *(("--codes", name, NO_CODES) for name in ("far.npy", "shape.npy", "none.npy", "float.npy", "object.npy",
                                               "several.npz", "text.png"))))
def test_bad_files_are_refused_and_nothing_is_written(trained, bad, option, name, expected, capsys):
    before = sorted(path for folder in (trained, bad) for path in folder.rglob("*"))
    files = [*([SLICE] if option == "--images" else []), str(bad / name)]
    check_refused(predict.main, [option, *files, "--output-dir", str(bad / "out")], expected, capsys)
    assert sorted(path for folder in (trained, bad) for path in folder.rglob("*")) == before


def test_bad_input_is_refused_and_nothing_written(trained, tmp_path, capsys):
    def cohort(name, *shape):
        return ["--data-dir", str(write_cohort(tmp_path / name, *shape))]
    before = sorted(trained.rglob("*"))
    for arguments, expected in (
            (["--run-dir", "nowhere"], "nowhere holds no trained run"),
            (cohort("larger", (1, 1, 1), 8, 96), "of 96x96 pixels, but runs/tiny knows 0 to 7 of 64x64"),
            (cohort("longer", (1, 1, 1), 9), "has slices 0 to 8 of 64x64 pixels, but"),
            (["--evaluate", *cohort("few", (2, 1, 1))], "two people with all their slices in each split"),
            (["--evaluate", *cohort("others", (3, 2, 2))], "are not those that runs/tiny was trained on"),
            (["--slice", "9"], "--slice 9: the training people have the slices 0, 1, 2, 3, 4, 5, 6, 7 only"),
            (["--output-dir", "/proc/out"], ": /proc/: No such file or directory.")):
        check_refused(predict.main, arguments, expected, capsys)
    assert sorted(trained.rglob("*")) == before


def test_a_run_that_is_not_finished_is_used_only_by_name(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "PRETRAINED", trained / "runs" / "tiny")
    shutil.copytree(trained / "runs" / "tiny", "runs/half")
    Path("runs/half/metrics.json").unlink()  # what is written last
    run = predict.find_run(None)
    assert "pretrained weights, of simulated people" in capsys.readouterr().out
    assert run.folder == runs.PRETRAINED and trained not in run.results_path("images").absolute().parents
    assert predict.find_run("runs/half").folder == Path("runs/half")
    assert "runs/half is not finished" in capsys.readouterr().out


def test_the_weights_to_start_with_are_those_of_their_card_and_of_simulated_people():
    card = (runs.PRETRAINED / "README.md").read_text()
    hashes = dict(re.findall(r"^\| `([\w.]+)` \| `([0-9a-f]{64})` \|$", card, re.M))
    assert hashes == {name: hashlib.sha256((runs.PRETRAINED / name).read_bytes()).hexdigest()
                      for name in ("config.json", "vqvae.keras", "pixelcnn.keras", "ventricles.json")}
    assert sum((runs.PRETRAINED / name).stat().st_size for name in runs.MODEL_FILES) <= 9e6
    run = Run.load(runs.PRETRAINED)
    assert run.is_simulated
    vqvae, prior = LOAD_MODELS(run)
    images = vqvae.decode_codes(prior.sample([10, 20], seed=0)).numpy()[..., 0]
    heights = run.geometry.lowest + run.geometry.spacing * np.array([10, 20])
    expected = cut_axial(*load_mni152(), heights, vqvae.image_size, run.geometry.pixel_size)
    for image, average_brain in zip(images, expected):
        assert np.corrcoef(image.ravel(), average_brain.ravel())[0, 1] > 0.8  # a brain, front up


def take_another_codebook(run):
    vqvae = modules.load_model(run / "vqvae.keras")
    vqvae.quantizer.embeddings.assign(vqvae.quantizer.embeddings + 0.001)
    vqvae.save(run / "vqvae.keras")


def add_code(run):
    """A layer that would run code when it is loaded."""
    layer = keras.layers.Lambda(lambda x, marker=str(run / "has_run"): open(marker, "w") and x)
    keras.Sequential([keras.Input((1,)), layer]).save(run / "vqvae.keras")
    (run / "has_run").unlink(missing_ok=True)


@pytest.mark.parametrize("spoil, expected", (
    (lambda run: shutil.copy(run / "vqvae.keras", run / "pixelcnn.keras"), "holds another model"),
    (take_another_codebook, "was trained on the codes of another codebook"),
    (add_code, "vqvae.keras cannot be loaded")))
def test_model_files_that_do_not_belong_here_are_named_and_run_no_code(
        copied, spoil, expected, monkeypatch, capsys):
    monkeypatch.setattr(predict, "load_models", LOAD_MODELS)
    spoil(copied)
    check_refused(predict.main, ["--run-dir", str(copied)], expected, capsys)
    assert not (copied / "has_run").exists()

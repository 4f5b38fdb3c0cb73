"""predict.py on one's own images, and from codes back to images."""

import io
import json
from pathlib import Path

import nibabel
import numpy as np
from PIL import Image
import pytest
from skimage.transform import downscale_local_mean

from tests.conftest import check_refused
import dataset
from support import metrics
import modules
import predict

SLICE = "cohort/keras_png_slices_test/case_441_slice_3.nii.png"


def pixels(path):
    return np.asarray(Image.open(path))


def test_a_test_slice_gives_what_the_test_split_gives(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    predict.main(["--images", SLICE, "--output-dir", str(tmp_path / "out")])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "case_441_slice_3_original.png", "case_441_slice_3_reconstruction.png", "case_441_slice_3_codes.npy",
        "reconstructions.png", "metrics.json"}
    row, = json.loads((tmp_path / "out" / "metrics.json").read_text())["images"]
    vqvae, prior = (modules.load_model(f"runs/tiny/{name}.keras", compile=False) for name in ("vqvae", "pixelcnn"))
    test = dataset.load_splits("cohort", ["test"])["test"]
    batches = dataset.image_batches(test, 32)
    context = dataset.head_context(test, prior, vqvae.settings["margin"])
    _, details = metrics.evaluate(vqvae, prior, batches, test.positions, *context)
    index = int(np.flatnonzero((test.cases == 441) & (test.positions == 3))[0])
    assert row["ssim"] == pytest.approx(details["ssim"][index], abs=1e-6)
    nats = -float(prior.log_prob(details["codes"][index:index + 1], np.array([3]))[0])
    assert row["bytes"] == pytest.approx(nats / np.log(2) / 8, rel=1e-4)
    assert row["slice"] == 3 and row["slice_known"] and row["file"] == SLICE
    codes = np.load(tmp_path / "out" / "case_441_slice_3_codes.npy")
    np.testing.assert_array_equal(codes, details["codes"][index])
    np.testing.assert_array_equal(pixels(tmp_path / "out" / "case_441_slice_3_original.png"), pixels(SLICE))
    assert "taken as it is" in capsys.readouterr().out


def test_codes_decode_to_the_reconstruction(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(trained)
    out = tmp_path / "out"
    predict.main(["--images", SLICE, "--output-dir", str(out)])
    predict.main(["--codes", str(out / "case_441_slice_3_codes.npy"), "--output-dir", str(tmp_path / "decoded")])
    decoded = pixels(tmp_path / "decoded" / "case_441_slice_3_codes_0000.png")
    assert np.abs(decoded.astype(int) - pixels(out / "case_441_slice_3_reconstruction.png")).max() <= 1
    assert len(list((tmp_path / "decoded").iterdir())) == 1


def test_images_of_any_size_depth_and_number(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(trained)
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
    prior = modules.load_model("runs/tiny/pixelcnn.keras", compile=False)
    codes = np.load(tmp_path / "out" / "rgb_codes.npy")
    nats = -prior.log_prob(np.repeat(codes[np.newaxis], 32, axis=0), np.arange(32)).numpy()
    assert rows[3]["slice"] == int(np.argmin(nats))
    assert rows[3]["bytes"] == pytest.approx((nats.min() / np.log(2) + 5) / 8, rel=1e-4)  # and 5 bits for which of 32 it is
    for row in rows:
        pair = (pixels(tmp_path / "out" / f"{row['image']}_{kind}.png") / 255 for kind in ("original", "reconstruction"))
        assert row["ssim"] == pytest.approx(metrics.ssim(*pair), abs=0.01)  # the written one is rounded to 8 bits


@pytest.mark.parametrize("size, result, told", [
    ((64, 64), (64, 64), []), ((40, 64), (40, 64), ["padded"]), ((64, 128), (32, 64), ["resampled", "padded"]),
    ((31, 20), (64, 41), ["resampled", "padded"]), ((32, 32), (32, 32), ["padded"]), ((1, 900), (1, 64), ["resampled", "padded"])])
def test_bring_to_size_pads_and_resamples(size, result, told):
    images, done = predict.bring_to_size(np.full((2, *size), 200, np.uint8), 64)
    assert images.shape == (2, 64, 64) and images.dtype == np.uint8
    assert [text.split()[0] for text in done] == told
    inked = np.argwhere(images[0] > 0)
    assert tuple(np.ptp(inked, axis=0) + 1) == result
    assert (np.abs(inked.mean(axis=0) - 31.5) <= 0.5).all()  # in the middle
    assert set(np.unique(images)) <= {0, 200}


def test_a_volume_gives_its_slices(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(trained)
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
    _, vqvae, prior = predict.load_run(Path("runs/tiny"))
    images = np.stack([np.asarray(Image.open(tmp_path / "out" / f"head_slice_{position}_original.png")) for position in range(32)])
    head = dataset.Split("given", images, np.zeros(32, np.int32), np.arange(32, dtype=np.int32))
    lengths = metrics.code_lengths(prior, codes, head.positions, *dataset.head_context(head, prior, vqvae.settings["margin"]))
    # 64 codes a slice; 24 numbers of a byte each tell the person, once for 32 slices.
    assert [row["bytes"] for row in rows[:32]] == pytest.approx(lengths * 64 / 8 + 24 / 32, rel=1e-4)
    assert len(list((tmp_path / "out").glob("head_slice_*_reconstruction.png"))) == 32
    predict.main(["--codes", str(tmp_path / "out" / "head_codes.npy"), "--output-dir", str(tmp_path / "decoded")])
    assert len(list((tmp_path / "decoded").glob("head_codes_*.png"))) == 32


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
def test_bad_files_are_refused_in_one_sentence_and_nothing_is_written(trained, bad, option, name, expected, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    before = sorted(path for folder in (trained, bad) for path in folder.rglob("*"))
    good = [SLICE] if option == "--images" else []
    arguments = [option, *good, str(bad / name), "--output-dir", str(bad / "out")]
    check_refused(predict.main, arguments, expected, capsys)
    assert sorted(path for folder in (trained, bad) for path in folder.rglob("*")) == before


def test_options_of_the_test_split_are_refused_beside_images(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    for option in (["--evaluate"], ["--slice", "0"], ["--data-dir", "cohort"]):
        check_refused(predict.main, ["--images", SLICE, *option], f"{option[0]} is of no use with --images", capsys)
    check_refused(predict.main, ["--images", SLICE, "--codes", "a.npy"], "not allowed with argument", capsys)

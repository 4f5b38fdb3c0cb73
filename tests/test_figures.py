import re
import shutil
import subprocess

import imageio.v3 as imageio
import numpy as np
from PIL import Image
import pytest
from scipy import ndimage

import figures
import modules


def test_progress_gif_keeps_every_frame_and_its_pixels(tmp_path):
    rng = np.random.default_rng(0)
    originals = rng.integers(0, 255, (3, 32, 32), np.uint8)
    paths = []
    for epoch in range(4):
        frame = figures.progress_frame(originals, originals // (epoch + 1), f"epoch {epoch + 1}")
        assert frame.shape == (64 + 24, 96)
        np.testing.assert_array_equal(frame[24:56], np.hstack(originals))
        np.testing.assert_array_equal(frame[56:], np.hstack(originals // (epoch + 1)))
        assert frame[:24].max() > 200  # the title is written
        paths.append(tmp_path / f"{epoch}.png")
        Image.fromarray(frame).save(paths[-1])
    figures.write_gif(paths, tmp_path / "progress.gif")
    frames = imageio.imread(tmp_path / "progress.gif")
    assert len(frames) == 4
    gray = frames[2][..., 0] if frames[2].ndim == 3 else frames[2]
    np.testing.assert_allclose(gray, imageio.imread(paths[2]), atol=2)


def test_grids_draw_pictures_in_gray_and_unstretched(tmp_path):
    figures.sample_grid(np.full((3, 32, 32), 0.5), [0, 5, 31], tmp_path / "samples.png")
    picture = np.asarray(Image.open(tmp_path / "samples.png").convert("RGB")).astype(int)
    assert np.ptp(picture, axis=-1).max() == 0
    regions, count = ndimage.label(np.abs(picture[..., 0] - 127.5) < 1)
    boxes = [(rows.stop - rows.start, columns.stop - columns.start) for rows, columns in ndimage.find_objects(regions)]
    pictures = [box for box in boxes if min(box) > 20]  # the rest are bits of letters
    assert len(pictures) == 3
    assert all(abs(height - width) <= 1 for height, width in pictures)


@pytest.fixture
def report(tmp_path):
    """A report of bright originals, dark reconstructions and grey samples, with and without neighbours."""
    size = 32
    shown = (np.full((2, size, size), 1.0), np.zeros((2, size, size)), np.arange(2 * 16).reshape(2, 4, 4) % 8, [0.5, 0.25])
    for name, neighbours in (("plain", None), ("near", np.full((3, size, size), 200, np.uint8))):
        figures.write_report(tmp_path / f"{name}.html", "A <title>", {"ssim": 0.87654, "copy_test_says": "no & sign"}, *shown,
                             shown[2], 8, np.full((3, size, size), 0.5), ["slice 0", "slice 16", "slice 31"], neighbours)
    return tmp_path


def test_report_is_whole_and_needs_no_network(report):
    plain, near = ((report / f"{name}.html").read_text("utf-8") for name in ("plain", "near"))
    assert not re.search(r"https?://|src=\"(?!data:)|href=", plain)
    assert "A &lt;title&gt;" in plain and "0.8765" in plain and "no &amp; sign" in plain and "SSIM 0.250" in plain
    count = len(re.findall('src="data:image/png;base64,', plain))
    assert count == 2 * 3 + 3 + 1  # original, reconstruction, codes; samples; use of the codebook
    assert near.count("data:image/png") == count + 3 and "nearest training image" not in plain
    assert [caption for caption in re.findall("slice (\\d+)<", plain)] == ["0", "16", "31"]


def test_report_opens_in_a_browser(report):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no Chromium here to open the report in")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
               f"--user-data-dir={report / 'profile'}", "--window-size=800,1000", f"--screenshot={report / 'shot.png'}",
               (report / "plain.html").as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    shot = np.asarray(Image.open(report / "shot.png").convert("L"))
    # The slider stands in the middle: of a pair, the left half is the white original, the right half the black reconstruction.
    regions, count = ndimage.label(shot == 0)
    boxes = [(rows.stop - rows.start, columns.stop - columns.start) for rows, columns in ndimage.find_objects(regions)]
    halves = [(height, width) for height, width in boxes if height > 100 and abs(height - 2 * width) <= 4]
    assert len(halves) == 2


def test_outline_tells_every_step_and_shape():
    vqvae, prior = modules.VQVAE(margin=32), modules.PixelCNN()
    steps, prior_steps = figures.outline(vqvae, prior)
    assert steps[:3] == [("image", "256x256x1"), ("less the black margin", "192x192x1"), ("convolution 6x6, stride 3", "64x64x32")]
    assert ("nearest of 512 codes", "32x32") in steps
    assert steps[-3:] == [("residual block", "64x64x32"), ("transposed convolution 6x6, stride 3", "192x192x1"),
                          ("black margin", "256x256x1")]
    assert sum(step == "residual block" for step, _ in steps) == 2 + 3
    assert sum(step.startswith("gated block") for step, _ in prior_steps) == 8
    assert prior_steps[-1] == ("softmax: p(code | codes before)", "32x32x512")

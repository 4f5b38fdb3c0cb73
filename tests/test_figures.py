import base64
import io
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


def draw_marked_head():
    """Slices whose gray tells their number; left, front and right are marked by gray 30, 60 and 90; a frame of 3 pixels."""
    head = np.zeros((8, 40, 30), np.uint8)
    head[:, 3:-3, 3:-3] = np.arange(100, 180, 10)[:, np.newaxis, np.newaxis]
    head[:, 3:-3, 3], head[:, 3, 3:-3], head[:, 3:-3, -4] = 30, 60, 90
    return head


def test_cuts_of_a_head_have_top_and_front_where_they_are_said_to_be():
    head = draw_marked_head()
    np.testing.assert_array_equal(figures.crop_to_brain(head[np.newaxis])[0], head[:, 1:-1, 1:-1])  # two pixels are kept
    coronal, sagittal = figures.head_cuts(head)
    assert coronal.shape == (8, 30) and sagittal.shape == (8, 40)
    np.testing.assert_array_equal(coronal[:, 15], np.arange(170, 90, -10))  # the highest slice on top
    assert (coronal[:, 3] == 30).all() and (coronal[:, -4] == 90).all()  # left on the left
    np.testing.assert_array_equal(sagittal[:, 20], np.arange(170, 90, -10))
    assert (sagittal[:, 3] == 60).all() and (sagittal[:, -4] != 60).all()  # front on the left


def test_head_figure_keeps_proportions(tmp_path):
    head = np.zeros((8, 60, 60), np.uint8)
    head[:, 10:50, 15:45] = 200
    figures.head_figure(np.stack([head, head]), 1.4, tmp_path / "head.png")
    picture = np.asarray(Image.open(tmp_path / "head.png").convert("L")).astype(int)
    regions, _ = ndimage.label(np.abs(picture - 200) < 2)
    boxes = [(rows.stop - rows.start, columns.stop - columns.start) for rows, columns in ndimage.find_objects(regions)]
    boxes = [box for box in boxes if min(box) > 60]  # the rest are bits of letters
    slices = [box for box in boxes if box[0] > box[1]]
    assert len(slices) == 2 * 5 and len(boxes) == 2 * 7
    for height, width in slices:
        assert height / width == pytest.approx(40 / 30, rel=0.03)
    lengths = sorted(width / height for height, width in boxes if width > height)
    np.testing.assert_allclose(lengths, [30 / (8 * 1.4)] * 2 + [40 / (8 * 1.4)] * 2, rtol=0.05)


def test_report_shows_heads_slice_by_slice(tmp_path):
    head, shown = draw_marked_head(), (np.zeros((1, 8, 8)), np.zeros((1, 8, 8)), np.zeros((1, 2, 2), int), [1.0])
    figures.write_report(tmp_path / "report.html", "t", {}, *shown, shown[2], 8, np.zeros((1, 8, 8)), ["slice 0"], None,
                         [head], 1.4, [("", "sampled"), ("dark & deep", "0.1")])
    page = (tmp_path / "report.html").read_text("utf-8")
    assert not re.search(r"https?://|src=\"(?!data:)|href=", page)
    viewer = page[page.index('<div class="head"'):page.index("<table><tr><td></td>")]
    assert 'max="7" value="4"' in viewer and "<output>slice 4</output>" in viewer and "<td>dark &amp; deep</td>" in page
    found = [np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data in re.findall("base64,([^\"]+)", viewer)]
    cropped = head[:, 1:-1, 1:-1]
    np.testing.assert_array_equal(found[0].reshape(cropped.shape), cropped)
    for picture, cut in zip(found[1:], figures.head_cuts(cropped)):
        np.testing.assert_array_equal(picture, cut)


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

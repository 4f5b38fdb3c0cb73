import base64
from html.parser import HTMLParser
import io
import re

import imageio.v3 as imageio
from matplotlib import pyplot as plt
import numpy as np
from PIL import Image
import pytest
from scipy import ndimage

from support import figures
import modules


def test_progress_frame_shows_original_reconstruction_and_error_without_margin():
    rng = np.random.default_rng(0)
    originals = rng.integers(0, 255, (3, 48, 48), np.uint8)
    frame = figures.progress_frame(originals, originals // 2, 8, "epoch 1")
    factor = 8  # 3 pictures of 32 pixels, enlarged to about 800
    assert frame.shape == (24 + 3 * 32 * factor, 24 + 3 * 32 * factor)
    assert frame[:24].max() > 200 and frame[24:, :24].max() > 200  # title and labels are written
    rows = frame[24::factor, 24::factor].reshape(3, 32, 3, 32).swapaxes(1, 2)
    inner = originals[:, 8:40, 8:40].astype(int)
    np.testing.assert_array_equal(rows[0], inner)
    np.testing.assert_array_equal(rows[1], inner // 2)
    np.testing.assert_array_equal(rows[2], np.minimum(255, 3 * (inner - inner // 2)))


def test_progress_gif_keeps_first_last_and_early_frames_and_rests(tmp_path):
    rng = np.random.default_rng(0)
    paths = []
    for number in range(30):
        paths.append(tmp_path / f"{number:04d}.png")
        Image.fromarray(rng.integers(0, 255, (24, 40), np.uint8)).save(paths[-1])
    figures.write_gif(paths, tmp_path / "progress.gif")
    shown, durations = [], []
    with Image.open(tmp_path / "progress.gif") as gif:
        for index in range(gif.n_frames):
            gif.seek(index)
            frame = np.asarray(gif.convert("L"), int)
            errors = [np.abs(frame - imageio.imread(path)).max() for path in paths]
            assert min(errors) <= 5  # half a step of 32 levels of gray
            shown.append(int(np.argmin(errors)))
            durations.append(gif.info["duration"])
    assert shown[0] == 0 and shown[-1] == 29 and shown == sorted(set(shown)) and shown[1] == 1 and 5 < len(shown) <= 10
    assert durations[-1] > durations[0] > durations[1]
    figures.write_gif(paths[:1], tmp_path / "one.gif")
    assert Image.open(tmp_path / "one.gif").n_frames == 1


def test_samples_are_gray_unstretched_four_in_a_row_and_without_margin(tmp_path):
    images = np.pad(np.full((5, 32, 32), 0.5), ((0, 0), (8, 8), (8, 8)), constant_values=1.0)
    figures.sample_grid(images, [0, 5, 16, 30, 31], 8, tmp_path / "samples.png")
    picture = np.asarray(Image.open(tmp_path / "samples.png").convert("RGB")).astype(int)
    assert np.ptp(picture, axis=-1).max() == 0
    regions, count = ndimage.label(np.abs(picture[..., 0] - 127.5) < 1)
    boxes = [(rows.stop - rows.start, columns.stop - columns.start) for rows, columns in ndimage.find_objects(regions)]
    pictures = [box for box in boxes if min(box) > 100]  # the rest are bits of letters
    assert len(pictures) == 5
    assert all(abs(height - width) <= 1 and width > 200 for height, width in pictures)
    assert 800 < picture.shape[1] < 860 and 400 < picture.shape[0] < 430


def test_like_codes_have_like_colours():
    rng = np.random.default_rng(0)
    codebook = rng.normal(size=(30, 3)) * (3, 2, 1)  # three dimensions: their principal components lose nothing
    colours = figures.code_colours(codebook)
    assert colours.shape == (30, 3) and 0 <= colours.min() <= colours.max() <= 1
    free = ((colours > 0) & (colours < 1)).all(axis=1)  # those that are not clipped
    distances = [np.linalg.norm(points[free][:, None] - points[free], axis=-1) for points in (codebook, colours)]
    ratio = distances[1][distances[0] > 0] / distances[0][distances[0] > 0]
    assert free.sum() > 20 and np.ptp(ratio) < 1e-9
    for few in (codebook[:2], codebook[:, :1]):
        colours = figures.code_colours(few)
        assert colours.shape == (len(few), 3) and np.isfinite(colours).all()


def test_reconstructions_show_the_signed_difference_inside_the_margin(tmp_path):
    originals = np.full((4, 32, 32), 0.5)
    reconstructions = np.full((4, 32, 32), 0.5)
    reconstructions[:, 8:24, 8:24] = 0.75  # too bright by the end of the scale, inside; only there a margin of 8 leaves
    codes = np.zeros((4, 4, 4), int)
    figures.reconstruction_grid(originals, reconstructions, codes, "abcd", np.array([[0.0, 1.0, 0.0]]), 8, tmp_path / "grid.png")
    picture = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB"))
    expected = {"original": (128, 128, 128), "reconstruction": (191, 191, 191),
                "difference": np.round(255 * np.array(plt.get_cmap("RdBu_r")(1.0)[:3])), "codes": (0, 255, 0)}
    for name, colour in expected.items():
        regions, _ = ndimage.label((np.abs(picture.astype(int) - colour) <= 2).all(axis=-1))
        assert sum(min(rows.stop - rows.start, columns.stop - columns.start) > 150
                   for rows, columns in ndimage.find_objects(regions)) == 4, name


def test_a_codecs_points_beaten_by_smaller_files_are_left_out(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(plt.Axes, "plot", lambda _, x, y, *__, label, **___: drawn.update({label: (np.ravel(x), np.ravel(y))}))
    monkeypatch.setattr(plt.Axes, "legend", lambda *_, **__: None)
    figures.plot_rate_distortion({"JPEG": [(300, 0.9), (100, 0.7), (200, 0.6), (400, 0.85), (500, 0.95)]}, [(50, 0.9)], (60, 0.9),
                                 tmp_path / "rates.png")
    np.testing.assert_array_equal(drawn["JPEG"], [(100, 300, 500), (0.7, 0.9, 0.95)])


@pytest.fixture
def report(tmp_path):
    """A report of bright originals, dark reconstructions and grey samples, with and without neighbours."""
    size = 32
    shown = (np.full((2, size, size), 1.0), np.zeros((2, size, size)), np.arange(2 * 16).reshape(2, 4, 4) % 8,
             ["slice <3>, SSIM 0.500", "slice 9, SSIM 0.250"])
    bits = np.zeros((2, 4, 4))
    bits[1, 2, 3] = 6.5
    for name, neighbours in (("plain", None), ("near", np.full((3, size, size), 200, np.uint8))):
        figures.write_report(tmp_path / f"{name}.html", "A <title>", {"ssim": 0.87654, "copy_test_says": "no & sign"}, shown,
                             bits, shown[2], figures.code_colours(np.arange(8.0)[:, None]), 4, np.full((3, size, size), 0.5),
                             ["slice 0", "slice 16", "slice 31"], neighbours)
    return tmp_path


class Page(HTMLParser):
    """What a browser would find in a page: its tags, the pictures' pixels by their description, and the script."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.pictures, self.script = [], [], {}, ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag == "img":
            kind, data = attributes["src"].split(",")
            assert kind == "data:image/png;base64"
            self.pictures.setdefault(attributes["alt"], []).append(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))))
        if tag not in ("img", "input", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.script += data


def test_report_is_whole_and_needs_no_network(report):
    plain, near = ((report / f"{name}.html").read_text("utf-8") for name in ("plain", "near"))
    page, with_neighbours = Page(plain), Page(near)
    assert not page.open
    for text in (plain, near):  # nothing that a browser would fetch
        assert not re.search(r"(?i)//|url\(|@import|fetch|XMLHttpRequest|import\(", re.sub(r"base64,[\w+/=]+", "", text))
        assert all(value.startswith("data:") for _, attributes in Page(text).tags for name, value in attributes.items()
                   if name in ("src", "href", "srcset", "data", "action"))
    assert "A &lt;title&gt;" in plain and "0.8765" in plain and "no &amp; sign" in plain and "slice &lt;3&gt;, SSIM 0.500" in plain
    assert {name: len(pictures) for name, pictures in page.pictures.items()} == {
        "original": 2, "reconstruction": 2, "codes": 2, "bits per code": 2, "sample": 3, "use of the codes": 1}
    assert len(with_neighbours.pictures["nearest training image"]) == 3 and "nearest training image" not in plain
    assert re.findall("slice (\\d+)<", plain) == ["0", "16", "31"]


def test_report_shows_what_it_was_given(report):
    page = Page((report / "near.html").read_text("utf-8"))
    assert page.pictures["original"][0].shape == (24, 24) and (page.pictures["original"][0] == 255).all()  # the margin is off
    assert (page.pictures["reconstruction"][1] == 0).all() and (page.pictures["nearest training image"][2] == 200).all()
    np.testing.assert_array_equal(page.pictures["codes"][0][0, 0], page.pictures["codes"][1][2, 0])  # code 0 in both
    first, second = page.pictures["bits per code"]
    assert (first == first[0, 0]).all() and second[2, 3].sum() > 400
    assert (np.delete(second.reshape(16, 3), 11, axis=0) == first[0, 0]).all()
    # Each pair has its slider, and the script turns all of them.
    assert sum(tag == "input" and attributes["type"] == "range" for tag, attributes in page.tags) == 2
    assert sum("over" in attributes.get("class", "") for tag, attributes in page.tags) == 2
    assert '".pair"' in page.script and '"input"' in page.script and '".over"' in page.script and "clipPath" in page.script


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
    head, shown = draw_marked_head(), (np.zeros((1, 8, 8)), np.zeros((1, 8, 8)), np.zeros((1, 2, 2), int), ["slice 0"])
    figures.write_report(tmp_path / "report.html", "t", {}, shown, np.zeros((1, 2, 2)), shown[2], np.zeros((8, 3)), 0,
                         np.zeros((1, 8, 8)), ["slice 0"], None, [head], 1.4, [("", "sampled"), ("dark & deep", "0.1")])
    page = (tmp_path / "report.html").read_text("utf-8")
    assert not Page(page).open and page.count("</output>") == 1
    viewer = page[page.index('<div class="head"'):page.index("<table><tr><td></td>")]
    assert 'max="7" value="4"' in viewer and "<output>slice 4</output>" in viewer and "<td>dark &amp; deep</td>" in page
    found = [np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data in re.findall("base64,([^\"]+)", viewer)]
    cropped = head[:, 1:-1, 1:-1]
    np.testing.assert_array_equal(found[0].reshape(cropped.shape), cropped)
    for picture, cut in zip(found[1:], figures.head_cuts(cropped)):
        np.testing.assert_array_equal(picture, cut)


def test_outline_is_read_from_the_models(tmp_path):
    vqvae = modules.VQVAE(margin=32, num_embeddings=64)
    told = figures.outline(vqvae, modules.PixelCNN(num_embeddings=64))
    assert (told["image"], told["vectors"], told["codebook"], told["codes"], told["logits"]) == (
        "256 x 256 x 1", "32 x 32 x 16", "64 x 16", "32 x 32", "32 x 32 x 64")
    assert told["encoder"] == ["less 32 black pixels", "convolution 6 x 6, stride 3", "convolution 4 x 4, stride 2",
                               "residual block", "residual block", "convolution 1 x 1"]
    assert told["decoder"][-2:] == ["up-convolution 6 x 6, stride 3", "plus 32 black pixels"]
    assert told["decoder"].count("residual block") == 3
    assert told["told"] == [("codes above and to the left", "32 x 32"), ("codes of the slices below", "4 x 32 x 32"),
                            ("person", "24"), ("slice position", "1 of 32")]
    assert "8 gated blocks, 1 row up," in told["prior"] and "2 axial attentions" in told["prior"]
    assert "dense 128, 64" in told["prior"] and "3 residual blocks for the slices below" in told["prior"]
    assert figures.outline(modules.VQVAE(downsample=4), modules.PixelCNN())["encoder"][0] == "convolution 8 x 8, stride 4"
    figures.plot_architecture(told, tmp_path / "architecture.png")
    picture = np.asarray(Image.open(tmp_path / "architecture.png").convert("L"))
    assert picture.shape[1] < 1000 and np.mean(picture < 250) > 0.1
    assert (picture[:, [0, -1]] > 250).all() and (picture[[0, -1]] > 250).all()  # nothing is cut off

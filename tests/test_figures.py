"""The pictures of support/figures.py, read back from their files."""

import imageio.v3 as imageio
import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
import numpy as np
from PIL import Image
import pytest
from scipy import ndimage

from benchmarks import architecture, ventricles
from support import figures
from support.volumes import SliceGeometry
from tests.small import small_prior, small_vqvae


def boxes_of(mask, least):
    """(top, left, height, width) of a mask's regions with sides over `least`; the rest is bits of letters."""
    found = ndimage.find_objects(ndimage.label(mask)[0])
    boxes = [(*(side.start for side in box), *(side.stop - side.start for side in box)) for box in found]
    return [box for box in boxes if min(box[2:]) > least]


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
    paths = [tmp_path / f"{number:04d}.png" for number in range(30)]
    for path, frame in zip(paths, np.random.default_rng(0).integers(0, 255, (30, 24, 40), np.uint8)):
        imageio.imwrite(path, frame)
    figures.write_gif(paths, tmp_path / "progress.gif")
    indices, durations = [], []
    with Image.open(tmp_path / "progress.gif") as gif:
        for index in range(gif.n_frames):
            gif.seek(index)
            frame = np.asarray(gif.convert("L"), int)
            errors = [np.abs(frame - imageio.imread(path)).max() for path in paths]
            assert min(errors) <= 5  # half a step of 32 levels of gray
            indices.append(int(np.argmin(errors)))
            durations.append(gif.info["duration"])
    assert indices[:2] == [0, 1] and indices[-1] == 29
    assert indices == sorted(set(indices)) and 5 < len(indices) <= 10
    assert durations[-1] > durations[0] > durations[1]
    figures.write_gif(paths[:1], tmp_path / "one.gif")
    assert Image.open(tmp_path / "one.gif").n_frames == 1


def test_samples_are_gray_unstretched_four_in_a_row_and_without_margin(tmp_path):
    images = np.pad(np.full((5, 32, 32), 0.5), ((0, 0), (8, 8), (8, 8)), constant_values=1.0)
    figures.sample_grid(images, [0, 5, 16, 30, 31], 8, tmp_path / "samples.png")
    picture = np.asarray(Image.open(tmp_path / "samples.png").convert("RGB")).astype(int)
    assert np.ptp(picture, axis=-1).max() == 0
    boxes = boxes_of(np.abs(picture[..., 0] - 127.5) < 1, 100)
    assert len(boxes) == 5 and all(abs(height - width) <= 1 and width > 200 for *_, height, width in boxes)
    assert 800 < picture.shape[1] < 860 and 400 < picture.shape[0] < 430


def test_like_codes_have_like_colours():
    rng = np.random.default_rng(0)
    codebook = rng.normal(size=(30, 3)) * (3, 2, 1)  # in three dimensions, principal components lose nothing
    colours = figures.code_colours(codebook)
    assert colours.shape == (30, 3) and 0 <= colours.min() <= colours.max() <= 1
    free = ((colours > 0) & (colours < 1)).all(axis=1)  # those that are not clipped
    distances = [np.linalg.norm(points[free][:, None] - points[free], axis=-1)
                 for points in (codebook, colours)]
    ratio = distances[1][distances[0] > 0] / distances[0][distances[0] > 0]
    assert free.sum() > 20 and np.ptp(ratio) < 1e-9
    for few in (codebook[:2], codebook[:, :1]):
        colours = figures.code_colours(few)
        assert colours.shape == (len(few), 3) and np.isfinite(colours).all()


@pytest.mark.parametrize("count", (1, 4))
def test_reconstructions_show_the_signed_difference_inside_the_margin(tmp_path, count):
    originals = np.full((count, 32, 32), 0.5)
    reconstructions = originals.copy()
    reconstructions[:, 8:24, 8:24] = 0.75  # by the end of the scale; a margin of 8 leaves this part alone
    codes = np.zeros((count, 4, 4), int)
    green = np.array([[0.0, 1.0, 0.0]])
    path = tmp_path / "grid.png"
    figures.reconstruction_grid(originals, reconstructions, codes, "abcd"[:count], green, 8, path)
    picture = np.asarray(Image.open(path).convert("RGB"))
    expected = {"original": (128, 128, 128), "reconstruction": (191, 191, 191), "codes": (0, 255, 0),
                "difference": np.round(255 * np.array(matplotlib.colormaps["RdBu_r"](1.0)[:3]))}
    lefts = {}
    for name, colour in expected.items():
        boxes = boxes_of((np.abs(picture.astype(int) - colour) <= 2).all(axis=-1), 120)
        lefts[name] = [left for _, left, *_ in boxes]
        assert len(boxes) == count, name
    assert np.ptp(list(lefts.values()), axis=0).max() <= 25  # in one column; the scale stands beside one row
    assert picture.shape[1] < 250 * count + 150  # no empty page around a single one


def test_prior_is_plotted_under_what_each_curve_is(tmp_path, monkeypatch):
    curves = {}
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, *args, label, **kwargs: curves.update({label: y[0]}))
    columns = "bits_per_code", "val_bits_per_code", "bits_per_code_no_context", "val_bits_per_code_alone"
    history = {name: np.arange(3) + 10 * index for index, name in enumerate(columns)}
    figures.plot_prior({"epoch": np.arange(3), **history}, 7.0, tmp_path / "prior.png")
    assert curves == {
        "training, with dropout": 0, "validation, given slices below and person": 10,
        "training, slices below hidden, person mostly given": 20,
        "validation, slice alone: neither of both given": 30}


def test_losses_are_plotted_on_both_axes(monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, dpi: drawn.extend(self.axes))
    names = "loss", "reconstruction_loss", "vq_loss", "val_loss", "val_reconstruction_loss", "val_vq_loss"
    history = {name: np.arange(2) + index for index, name in enumerate(names)}
    figures.plot_losses({"epoch": np.arange(2), **history}, None)
    scales = {axes.get_yscale(): sorted(line.get_ydata()[0] for line in axes.lines) for axes in drawn}
    assert scales == {"linear": list(range(6)), "log": list(range(6))}


def test_figures_are_made_for_a_page_of_830_pixels(monkeypatch):
    """At most 1080 pixels wide: then text of 8 points is at least 10 pixels high at 830 pixels."""
    widths = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, dpi: widths.append(self.get_figwidth() * dpi))
    images, positions = np.zeros((4, 8, 8)), np.arange(4)
    columns = "loss", "reconstruction_loss", "vq_loss", "bits_per_code", "ssim"
    history = {name: np.ones(2) for column in columns for name in (column, f"val_{column}", f"test_{column}")}
    names = "epoch", "bits_per_code_no_context", "val_bits_per_code_alone"
    history |= {name: np.arange(2) for name in names}
    figures.plot_losses(history, None)
    figures.plot_ssim(history, None)
    figures.plot_prior(history, 7.0, None)
    figures.reconstruction_grid(images, images, np.zeros((4, 2, 2), int), "abcd", np.ones((1, 3)), 0, None)
    figures.sample_grid(images, positions, 0, None)
    figures.neighbour_grid(images, np.uint8(images), "abcd", None)
    figures.plot_errors(np.ones(4), positions, images[0], 0, None)
    ventricles.head_comparison(np.full((3, 8, 8, 8), 99, np.uint8), np.arange(8), "abc", "title", None)
    assert len(widths) == 8 and all(830 <= width <= 1080 for width in widths)


def draw_marked_head():
    """Slices whose gray tells their number, framed by 3 pixels; left, front, right have gray 30, 60, 90."""
    head = np.zeros((8, 40, 30), np.uint8)
    head[:, 3:-3, 3:-3] = np.arange(100, 180, 10)[:, np.newaxis, np.newaxis]
    head[:, 3:-3, 3], head[:, 3, 3:-3], head[:, 3:-3, -4] = 30, 60, 90
    return head


def test_cuts_of_a_head_have_top_and_front_where_they_are_said_to_be():
    head = draw_marked_head()
    coronal, sagittal = figures.head_cuts(head)
    assert coronal.shape == (8, 30) and sagittal.shape == (8, 40)
    np.testing.assert_array_equal(coronal[:, 15], np.arange(170, 90, -10))  # the highest slice on top
    assert (coronal[:, 3] == 30).all() and (coronal[:, -4] == 90).all()  # columns in their order
    np.testing.assert_array_equal(sagittal[:, 20], np.arange(170, 90, -10))
    assert (sagittal[:, 3] == 60).all() and (sagittal[:, -4] != 60).all()  # front on the left


@pytest.mark.parametrize("geometry, count, scales", (
    (SliceGeometry(1.0, 1.4), 8, [1] * 5 + [2] * 2), (SliceGeometry(2.0, 1.4), 8, [1] * 5 + [2] * 2),
    (SliceGeometry(1.0, 3.0), 8, None), (SliceGeometry(2.0, 4.0), 30, [1] * 3 + [0.5] * 6)))
def test_head_figure_shows_slab_or_whole_brain_in_true_proportions(tmp_path, geometry, count, scales):
    """Two heads, each a block: from left to right its slices and cuts, in millimetres across and down."""
    rows, columns = 80, 60
    heads = np.zeros((2, count, 100, 100), np.uint8)
    heads[:, :, 10:10 + rows, 15:15 + columns] = 200
    figures.head_figure(heads, range(count), geometry, tmp_path / "head.png")
    picture = np.asarray(Image.open(tmp_path / "head.png").convert("L")).astype(int)
    depth = count * geometry.spacing
    axial, coronal, sagittal = [(width * geometry.pixel_size, height) for width, height in (
        (columns, rows * geometry.pixel_size), (columns, depth), (rows, depth))]
    expected = [axial] * 5 + [sagittal, coronal] if count == 8 else [axial, coronal, sagittal] + [axial] * 6
    # Pixels are interpolated: an edge is where half is reached.
    boxes = sorted(boxes_of(picture > 100, 20), key=lambda box: (box[0] > len(picture) / 2, box[1]))
    assert len(boxes) == 2 * len(expected) and len(picture[0]) == 1660
    measured = np.array([(width / across, height / down) for (*_, height, width), (across, down)
                         in zip(boxes, expected * 2)])  # pixels in each millimetre
    np.testing.assert_allclose(measured[:, 0], measured[:, 1], rtol=0.05)
    if scales:
        np.testing.assert_allclose(measured[:, 0] / measured[0, 0], scales * 2, rtol=0.05)


@pytest.mark.parametrize("axes_known", (True, False))
@pytest.mark.parametrize("count, name", ((32, "Slab of 45 mm"), (79, "Whole brain"), (76, "Slab of 106 mm")))
def test_head_figure_says_what_it_shows_and_claims_front_only_if_known(monkeypatch, axes_known, count, name):
    words = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, dpi: words.extend(
        text.get_text() for text in self.findobj(matplotlib.text.Text)))
    heads = draw_marked_head()[np.newaxis, np.arange(count) % 8]
    figures.head_figure(heads, range(count), SliceGeometry(axes_known=axes_known), None)
    assert name in words and f"slice {count // 2}" in words
    page = " ".join(words)
    assert all((word in page) == axes_known for word in ("Front is up", "sagittal", "coronal"))
    assert ("cut along rows" in page and "Which way is front was not told" in page) == (not axes_known)
    assert "Left and right are unknown." in page


def test_compared_heads_are_rows_of_the_same_slices_unstretched_and_without_border(tmp_path, monkeypatch):
    words = []
    monkeypatch.setattr(Axes, "set_title", lambda self, label, **kwargs: words.append(label))
    heads = np.zeros((3, 11, 60, 60), np.uint8)
    grays = 20 * np.arange(3)[:, np.newaxis] + 8 * np.arange(11) + 60
    heads[:, :, 8:52, 12:48] = grays[..., np.newaxis, np.newaxis]
    ventricles.head_comparison(heads, range(20, 31), ("one", "two", "three"), "title", tmp_path / "heads.png")
    picture = np.asarray(Image.open(tmp_path / "heads.png").convert("RGB")).astype(int)
    assert np.ptp(picture, axis=-1).max() == 0
    boxes = {}
    for row, column in np.ndindex(3, 4):
        gray = heads[row, 2 * column + 2, 30, 30]  # of 11 slices, those with the numbers 2, 4, 6 and 8
        (*boxes[row, column], height, width), = boxes_of(np.abs(picture[..., 0] - int(gray)) <= 1, 100)
        assert width > 140 and height / width == pytest.approx(44 / 36, rel=0.02)
    assert all(box == [boxes[row, 0][0], boxes[0, column][1]] for (row, column), box in boxes.items())
    assert boxes[0, 0] < boxes[1, 0] < boxes[2, 0] and boxes[0, 0] < boxes[0, 1] < boxes[0, 3]
    assert words == [f"slice {position}" for position in (22, 24, 26, 28)]


def test_the_schematic_says_what_the_models_are():
    prior = small_prior(grid_size=8, num_embeddings=16, person_size=5, steps_below=(1, 2))
    texts = architecture.outline(small_vqvae(margin=8), prior)
    assert texts["image"] == "64 x 64 x 1" and texts["codebook"] == "16 x 4" and texts["codes"] == "8 x 8"
    assert texts["encoder"][0] == "less 8 black pixels" and texts["decoder"][-1] == "plus 8 black pixels"
    assert texts["encoder"].count("residual block") == 1 and texts["decoder"].count("residual block") == 2
    assert dict(texts["conditioning"]) == {
        "codes above and to the left": "8 x 8", "codes of the slices below": "2 x 8 x 8", "person": "5",
        "slice position": "1 of 4"}

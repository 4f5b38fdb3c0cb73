"""The pictures of support/figures.py, read back from their files."""

import imageio.v3 as imageio
import matplotlib
from matplotlib.figure import Figure
import numpy as np
from PIL import Image
import pytest
from scipy import ndimage

from support import figures
from support.volumes import SliceGeometry


def boxes_of(mask, least):
    """(top, left, height, width) of a mask's regions with sides over `least`; the rest is bits of letters."""
    found = ndimage.find_objects(ndimage.label(mask)[0])
    boxes = [(*(side.start for side in box), *(side.stop - side.start for side in box)) for box in found]
    return sorted(box for box in boxes if min(box[2:]) > least)


@pytest.mark.parametrize("kind", ("frame", "reconstructions", "samples"))
@pytest.mark.parametrize("count", (1, 4, 5))
def test_pictures_stand_in_rows_unstretched_without_margin_and_without_an_empty_page(tmp_path, kind, count):
    """Five samples take two rows. A margin of 8 pixels leaves the middle alone."""
    def squares(inner):
        return np.pad(np.full((count, 16, 16), inner), ((0, 0), (8, 8), (8, 8)), constant_values=0.9)
    path, captions = tmp_path / "grid.png", "abcde"[:count]
    gray, light, green = (128, 128, 128), (204, 204, 204), np.array([[0.0, 1.0, 0.0]])
    originals, others = squares(0.5), squares(0.8)
    rows = {"original": gray, "other": light}
    if kind == "frame":
        frame = figures.progress_frame(np.uint8(originals * 255 + 0.5), np.uint8(others * 255), 8, "epoch 1")
        assert frame.dtype == np.uint8
        Image.fromarray(frame).save(path)
        rows["error x 3"] = (3 * 76,) * 3
    elif kind == "reconstructions":
        figures.reconstruction_grid(originals, others, np.zeros((count, 4, 4), int), captions, green, 8, path)
        rows |= {"difference": np.round(255 * np.array(matplotlib.colormaps["RdBu_r"](1.0)[:3])),
                 "codes": (0, 255, 0)}
    else:
        figures.sample_grid(originals, range(count), 8, path)
        del rows["other"]
    columns = min(count, 4) if kind == "samples" else count
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert 830 <= picture.shape[1] <= 860 if columns == 4 else picture.shape[1] < 250 * columns + 150
    boxes = {name: boxes_of((np.abs(picture - colour) <= 2).all(-1), 100) for name, colour in rows.items()}
    for name, found in boxes.items():
        assert len(found) == count, name
        assert all(abs(height - width) <= 2 for *_, height, width in found)
    tops = [found[0][0] for found in boxes.values()]
    assert tops == sorted(set(tops))
    lefts = [sorted(left for _, left, *_ in found) for found in boxes.values()]
    assert np.ptp(lefts, axis=0).max() <= 25  # in one column; the scale of colours stands beside one row


def test_of_the_brains_differences_one_percent_lies_beyond_the_colours(monkeypatch):
    drawn, originals = [], np.full((1, 40, 50), 0.5)
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    originals[:, 20:] = 0  # the background's differences do not count
    differences = np.concatenate([np.linspace(-0.2, 0.2, 1000), np.ones(1000)]).reshape(1, 40, 50)
    figures.reconstruction_grid(originals, originals + differences, np.zeros((1, 4, 4), int), ["a"],
                                np.ones((1, 3)), 0, None)
    picture, bar = drawn[0].axes[2].images[0], drawn[0].axes[4]
    assert picture.get_clim() == pytest.approx((-0.198, 0.198), abs=0.001)
    assert "1 % of the brain lies beyond" in bar.get_ylabel()
    assert bar.get_yticks() == pytest.approx((-0.198, 0, 0.198), abs=0.001)


def test_progress_gif_begins_with_the_last_frame_keeps_first_and_early_ones_and_rests(tmp_path):
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
    assert indices[:3] == [29, 0, 1] and indices[1:] == sorted(indices[1:]) and 5 < len(indices) <= 10
    assert durations[0] > durations[1] > durations[2]


def test_like_codes_have_like_colours():
    rng = np.random.default_rng(0)
    codebook = rng.normal(size=(30, 3)) * (3, 2, 1)  # in three dimensions, principal components lose nothing
    colours = figures.code_colours(codebook)
    assert colours.shape == (30, 3) and 0 <= colours.min() <= colours.max() <= 1
    free = ((colours > 0) & (colours < 1)).all(axis=1)  # those that are not clipped
    distances = [np.linalg.norm(rows[free][:, None] - rows[free], axis=-1) for rows in (codebook, colours)]
    ratio = distances[1][distances[0] > 0] / distances[0][distances[0] > 0]
    assert free.sum() > 20 and np.ptp(ratio) < 1e-9


def test_plots_name_each_curve_and_fit_a_page_of_830_pixels(monkeypatch):
    """At most 1080 pixels wide: then text of 8 points is at least 10 pixels high at 830 pixels."""
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    columns = ("bits_per_code", "val_bits_per_code", "bits_per_code_no_context", "val_bits_per_code_alone",
               "loss", "val_loss", "reconstruction_loss", "val_reconstruction_loss", "vq_loss", "val_vq_loss",
               "val_ssim", "test_ssim")
    history = {"epoch": np.arange(3)} | {name: np.arange(3) + 10 * i for i, name in enumerate(columns)}
    figures.plot_prior(history, 7.0, None)
    figures.plot_losses(history, None)
    figures.plot_ssim(history, None)
    found = {line.get_label(): line.get_ydata()[0] for figure in drawn for line in figure.axes[0].lines}
    assert list(found.values()) == [0, 10, 20, 30, 7, *range(40, 120, 10)]
    assert found["validation, slice alone: neither of both given"] == 30 and found["total: validation"] == 50
    assert found["10 random test images: they choose nothing"] == 110
    assert [axes.get_yscale() for axes in drawn[1].axes] == ["linear", "log"]
    ssims, positions = np.array([0.5, 0.7, 0.6, 0.9]), np.array([4, 4, 4, 7])
    figures.plot_errors(ssims, positions, np.zeros((8, 8)), 0, None)
    lines = drawn[3].axes[0].lines
    assert [line.get_xydata().mean(axis=0).tolist() for line in lines if line.get_color() == "C1"] == [
        [4, 0.6], [7, 0.9]]  # the medians
    assert all(830 <= figure.bbox.width <= 1080 for figure in drawn)


@pytest.mark.parametrize("geometry, count, scales", (
    (SliceGeometry(2.0, 1.4), 8, [1] * 5 + [2] * 2), (SliceGeometry(2.0, 4.0), 30, [1] * 3 + [0.5] * 6)))
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
    np.testing.assert_allclose(measured[:, 0] / measured[0, 0], scales * 2, rtol=0.05)

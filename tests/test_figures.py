import imageio.v3 as imageio
import numpy as np
from PIL import Image
from scipy import ndimage

import figures


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

import imageio.v3 as imageio
import numpy as np
from PIL import Image

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


def test_grids_draw_pictures_unstretched(tmp_path):
    images = np.zeros((3, 32, 32))
    images[:, 8:24, 8:24] = 1  # a white square
    figures.sample_grid(images, [0, 5, 31], tmp_path / "samples.png")
    picture = np.asarray(Image.open(tmp_path / "samples.png").convert("RGB")).astype(int)
    dark = np.argwhere(picture.max(axis=-1) < 40)
    (top, left), (bottom, right) = dark.min(axis=0), dark.max(axis=0)
    assert np.ptp(picture, axis=-1).max() == 0  # gray throughout
    first = picture[top:bottom, left:left + (bottom - top)]
    middle_row, middle_column = first[len(first) // 2], first[:, len(first) // 2]
    assert abs((middle_row > 200).sum() - (middle_column > 200).sum()) <= 4

"""Every picture, plot and GIF."""

import imageio.v3 as imageio
import matplotlib
from matplotlib import pyplot as plt
import numpy as np
from PIL import Image, ImageDraw, ImageFont

matplotlib.use("Agg")  # no screen is needed, nor looked for


def _save(figure, path):
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_losses(history, path, scale):
    """Draws stage 1's total, reconstruction and VQ loss, training and validation.

    Args:
        history: dict of columns of vqvae_history.csv.
        path: PNG to write.
        scale: "linear" or "log".
    """
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    epochs = history["epoch"] + 1
    for name, label, colour in (("loss", "total", "C0"), ("reconstruction_loss", "reconstruction (MSE / variance)", "C1"),
                                ("vq_loss", "vector quantisation", "C2")):
        axes.plot(epochs, history[name], "o-", color=colour, markersize=3, label=f"{label}: training")
        axes.plot(epochs, history[f"val_{name}"], "s--", color=colour, markersize=3, label="validation")
    axes.set(xlabel="epoch", ylabel=f"loss ({scale} axis)", yscale=scale, title="VQ-VAE losses")
    if scale == "linear":
        axes.set_ylim(bottom=0)
    _finish(axes)
    _save(figure, path)


def plot_ssim(history, path):
    """Draws the SSIM of the monitored images after each epoch."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    epochs = history["epoch"] + 1
    axes.plot(epochs, history["val_ssim"], "o-", markersize=3, label="fixed validation images")
    axes.plot(epochs, history["test_ssim"], "s--", markersize=3, label="10 random test images")
    axes.set(xlabel="epoch", ylabel="mean SSIM (7x7 window)", title="SSIM of reconstructions")
    axes.set_ylim(top=1)
    _finish(axes)
    _save(figure, path)


def plot_prior(history, code_entropy, path):
    """Draws stage 2's code length, and the entropy of the codes that it has to beat (bits per code)."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    epochs = history["epoch"] + 1
    axes.plot(epochs, history["bits_per_code"], "o-", markersize=3, label="training people (with dropout)")
    axes.plot(epochs, history["val_bits_per_code"], "s--", markersize=3, label="validation people")
    axes.axhline(code_entropy, color="0.5", linestyle=":", label="entropy of independent codes")
    axes.set(xlabel="epoch", ylabel="bits per code", title="PixelCNN prior")
    axes.set_ylim(bottom=0)
    _finish(axes)
    _save(figure, path)


def _finish(axes):
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.figure.legend(loc="outside lower center", ncols=3, fontsize="small")  # beside the curves, not over them


def reconstruction_grid(originals, reconstructions, codes, ssims, num_embeddings, path):
    """Draws originals over reconstructions with their SSIM, over their codes.

    Args:
        originals: (N, H, W) in [0, 1].
        reconstructions: (N, H, W) in [0, 1].
        codes: int (N, g, g).
        ssims: float (N,).
        num_embeddings: K, the range of the codes' colours.
        path: PNG to write.
    """
    count = len(originals)
    figure, axes = plt.subplots(3, count, figsize=(1.7 * count + 0.4, 5.6), layout="constrained", squeeze=False)
    for column in range(count):
        axes[0, column].imshow(originals[column], cmap="gray", vmin=0, vmax=1)
        axes[1, column].imshow(reconstructions[column], cmap="gray", vmin=0, vmax=1)
        axes[1, column].set_xlabel(f"SSIM {ssims[column]:.3f}", fontsize="small")
        axes[2, column].imshow(codes[column], cmap="nipy_spectral", vmin=0, vmax=num_embeddings - 1, interpolation="nearest")
    for row, label in enumerate(("original", "reconstruction", "codes")):
        axes[row, 0].set_ylabel(label)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    _save(figure, path)


def sample_grid(images, positions, path):
    """Draws sampled images, (N, H, W) in [0, 1], each under its slice position, up to eight in a row."""
    columns = min(8, len(images))
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1.7 * columns, 1.9 * rows), layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, position in zip(axes.flat, images, positions):
        axis.imshow(image, cmap="gray", vmin=0, vmax=1)
        axis.set_title(f"slice {position}", fontsize="small")
    _save(figure, path)


def neighbour_grid(samples, neighbours, captions, path):
    """Draws each sample, (N, H, W) in [0, 1], over its nearest training image, uint8 (N, H, W), with a caption below."""
    columns = min(8, len(samples))
    bands = -(-len(samples) // columns)
    figure, axes = plt.subplots(2 * bands, columns, figsize=(1.7 * columns + 0.3, 3.9 * bands), layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.set_frame_on(False)
    for index, caption in enumerate(captions):
        band, column = divmod(index, columns)
        axes[2 * band, column].imshow(samples[index], cmap="gray", vmin=0, vmax=1)
        axes[2 * band + 1, column].imshow(neighbours[index], cmap="gray", vmin=0, vmax=255)
        axes[2 * band + 1, column].set_xlabel(caption, fontsize="small")
    for band in range(bands):
        axes[2 * band, 0].set_ylabel("sample")
        axes[2 * band + 1, 0].set_ylabel("nearest training")
    _save(figure, path)


def plot_distances(sample_distances, test_distances, path):
    """Draws the distributions of the distances to the nearest training image: of samples and of test people."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    bins = np.histogram_bin_edges(np.concatenate([sample_distances, test_distances]), 40)
    axes.hist(test_distances, bins, density=True, color="0.7", label="test people")
    axes.hist(sample_distances, bins, density=True, histtype="step", color="C3", linewidth=1.5, label="samples")
    axes.set(xlabel="distance to the nearest training image (whitened principal components)", ylabel="density", xlim=(0, None),
             title="Copies would pile up at 0")
    axes.legend(fontsize="small")
    _save(figure, path)


def plot_tissue(samples, sample_positions, people, positions, path):
    """Draws the tissue statistics over the slice position: median and the middle 80 %, of samples and of test people.

    Args:
        samples: a dict of `metrics.tissue_statistics`.
        sample_positions: int (N,).
        people: the same dict for the test people.
        positions: int (M,).
        path: PNG to write.
    """
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.9), layout="constrained")
    titles = {"brain_area": "brain area (share of the frame)", "dark_fraction": "dark share of the deep brain",
              "symmetry": "left-right symmetry (correlation)"}
    for axes, (name, title) in zip(panels, titles.items()):
        for values, places, colour, label in ((people[name], positions, "0.4", "test people"),
                                              (samples[name], sample_positions, "C3", "samples")):
            shown = np.unique(places)
            low, middle, high = np.array([np.quantile(values[places == place], (0.1, 0.5, 0.9)) for place in shown]).T
            axes.fill_between(shown, low, high, color=colour, alpha=0.25, linewidth=0)
            axes.plot(shown, middle, color=colour, label=f"{label}: median, middle 80 %")
        axes.set(xlabel="slice position, 0 the lowest", title=title)
        axes.grid(alpha=0.3)
    for axes in panels[:2]:
        axes.margins(y=0.1)
        axes.set_ylim(bottom=0)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize="small")
    _save(figure, path)


def progress_frame(originals, reconstructions, title):
    """Draws one frame of the progress GIF: originals over reconstructions under a title.

    Args:
        originals: uint8 (N, H, W).
        reconstructions: uint8 (N, H, W).
        title: one line.

    Returns:
        uint8 (2 H + 24, N W).
    """
    pictures = np.vstack([np.hstack(originals), np.hstack(reconstructions)])
    frame = Image.fromarray(np.vstack([np.zeros((24, pictures.shape[1]), np.uint8), pictures]))
    ImageDraw.Draw(frame).text((6, 3), title, fill=255, font=ImageFont.load_default(14))
    return np.asarray(frame)


def write_gif(frame_paths, path, seconds=0.4):
    """Writes PNG frames as an endless GIF that rests on the last one."""
    frames = [imageio.imread(frame) for frame in frame_paths]
    durations = [1000 * seconds] * (len(frames) - 1) + [2000]
    # Of a single frame, Pillow wants a single duration.
    imageio.imwrite(path, frames, extension=".gif", duration=durations if len(frames) > 1 else 2000, loop=0)


def plot_rate_distortion(curves, model, fixed, path):
    """Draws SSIM over bytes per image, containers not counted.

    Args:
        curves: dict of codec -> list of (bytes, SSIM).
        model: the same list for the model with its prior as entropy coder.
        fixed: (bytes, SSIM) of the model with codes of fixed length.
        path: PNG to write.
    """
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for codec, points in curves.items():
        axes.plot(*zip(*points), "o-", markersize=3, label=codec)
    axes.plot(*zip(*model), "*-", color="black", markersize=8, label="VQ-VAE, codes coded by the prior")
    axes.plot(*fixed, "D", color="black", label="VQ-VAE, codes of fixed length")
    axes.set(xlabel="bytes per image, without container (log axis)", ylabel="mean SSIM (7x7 window)", xscale="log",
             title="Rate and distortion on test people")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    _save(figure, path)

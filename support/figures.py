"""Every picture, plot and GIF, drawn without pyplot: no display, and no state that threads could share.

Images are (N, H, W) in [0, 1], `path` is the PNG to write, `margin` the pixels that the model paints black on
each side: they are left out."""

import imageio.v3 as imageio
import matplotlib
from matplotlib.figure import Figure
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from sklearn.decomposition import PCA

from support.images import brain_box, crop, spread

matplotlib.rcdefaults()  # whatever a matplotlibrc says
DPI = 120
WIDTH = 7  # inches: at 120 dots per inch the width of a page on GitHub
MAX_DIFFERENCE = 0.25  # end of the colour scale of differences, of intensities in [0, 1]
NO_TICKS = {"xticks": [], "yticks": []}
MAX_CUT_SCALE = 2  # of the cuts through a head, beside its slices: few slices make flat cuts


def new_figure(height, rows=1, columns=1, width=WIDTH, **options):
    """A figure of `width` x `height` inches, and its axes, by `options` of matplotlib's `Figure.subplots`."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def _show(axes, image, **options):
    """Draws an image, (H, W) in [0, 1] or uint8, in grays."""
    axes.imshow(image, cmap="gray", vmin=0, vmax=255 if image.dtype == np.uint8 else 1, **options)


def _finish(axes, xlabel):
    """Names an x axis of whole numbers and draws the grid."""
    axes.set_xlabel(xlabel)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)


def _save_curves(figure, axes, path, columns=2):
    """Writes a plot over epochs; its legend is that of `axes`, beside the curves, not over them."""
    handles = axes.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=columns, fontsize="small")
    figure.savefig(path, dpi=DPI)


def plot_losses(history, path):
    """Draws stage 1's losses, columns of vqvae_history.csv, on a linear and a logarithmic axis."""
    curves = {"loss": ("total", "C0"), "reconstruction_loss": ("reconstruction (MSE / variance)", "C1"),
              "vq_loss": ("vector quantisation", "C2")}
    figure, panels = new_figure(4, columns=2)
    epochs = history["epoch"] + 1
    for axes, scale in zip(panels, ("linear", "log")):
        for name, (label, colour) in curves.items():
            axes.plot(epochs, history[name], "o-", color=colour, markersize=3, label=f"{label}: training")
            axes.plot(epochs, history[f"val_{name}"], "s--", color=colour, markersize=3, label="validation")
        axes.set(ylabel="loss", yscale=scale, title=f"{'logarithmic' if scale == 'log' else scale} axis")
        _finish(axes, "epoch")
    panels[0].set_ylim(0, None)
    _save_curves(figure, panels[0], path, columns=3)


def plot_ssim(history, path):
    """Draws the SSIM of the monitored images after each epoch."""
    figure, axes = new_figure(4.5)
    epochs = history["epoch"] + 1
    axes.plot(epochs, history["val_ssim"], "o-", markersize=3, label="fixed validation images")
    axes.plot(epochs, history["test_ssim"], "s--", markersize=3, label="10 random test images")
    axes.set(ylabel="mean SSIM (7x7 window)", title="SSIM of reconstructions", ylim=(None, 1))
    _finish(axes, "epoch")
    _save_curves(figure, axes, path)


def plot_prior(history, code_entropy, path):
    """Draws stage 2's bits per code, by pixelcnn_history.csv, and the entropy that the prior has to beat.

    Without the slices below, training and validation give different things: training hides them from a part
    of the slices, most of which still know their person; validation people are also measured slice by slice,
    without person. The latter tells whether single samples can be good.
    """
    curves = {"bits_per_code": ("training, with dropout", "C0", "o-"),
              "val_bits_per_code": ("validation, given slices below and person", "C0", "s--"),
              "bits_per_code_no_context": ("training, slices below hidden, person mostly given", "C1", "o-"),
              "val_bits_per_code_alone": ("validation, slice alone: neither of both given", "C2", "s--")}
    figure, axes = new_figure(4.5)
    for name, (label, colour, line) in curves.items():
        axes.plot(history["epoch"] + 1, history[name], line, color=colour, markersize=3, label=label)
    axes.axhline(code_entropy, color="0.5", linestyle=":", label="entropy of independent codes")
    axes.set(ylabel="bits per code", title="PixelCNN prior", ylim=(0, None))
    _finish(axes, "epoch")
    _save_curves(figure, axes, path)


def code_colours(codebook):
    """A colour for each code, (K, D) -> (K, 3) in [0, 1]: like codes look alike.

    They are three principal components on one scale: colours are as far apart as vectors.
    """
    codebook = np.asarray(codebook, np.float64)
    scores = PCA(min(3, *codebook.shape), svd_solver="full").fit_transform(codebook)
    scores = np.pad(scores, ((0, 0), (0, 3 - scores.shape[1])))
    return (0.5 + scores / (4 * scores[:, 0].std())).clip(0, 1)


def reconstruction_grid(originals, reconstructions, codes, captions, colours, margin, path):
    """Draws images, reconstructions, their differences and codes, int (N, g, g), a column per image.

    The N `captions` stand over the columns; `colours` are those of `code_colours`.
    """
    count = len(originals)
    originals, reconstructions = crop(originals, margin), crop(reconstructions, margin)
    side = (WIDTH - 0.8) / max(count, 4)
    size = {"height": 0.5 + 4 * side, "width": 0.8 + side * count}
    figure, axes = new_figure(**size, rows=4, columns=count, squeeze=False, subplot_kw=NO_TICKS)
    for column in range(count):
        axes[0, column].set_title(captions[column], fontsize="small")
        _show(axes[0, column], originals[column])
        _show(axes[1, column], reconstructions[column])
        difference = axes[2, column].imshow(reconstructions[column] - originals[column], cmap="RdBu_r",
                                            vmin=-MAX_DIFFERENCE, vmax=MAX_DIFFERENCE)
        axes[3, column].imshow(colours[codes[column]], interpolation="nearest")
    figure.colorbar(difference, ax=list(axes[2]), extend="both", shrink=0.95, pad=0.01, ticks=(-0.2, 0, 0.2))
    for row, label in enumerate(("original", "reconstruction", "reconstruction - original", "codes")):
        axes[row, 0].set_ylabel(label, fontsize="small")
    figure.savefig(path, dpi=DPI)


def plot_errors(ssims, positions, errors, margin, path):
    """Draws the SSIM (N,) by slice position (N,), and the mean absolute error of each pixel, (H, W)."""
    figure, (curve, picture) = new_figure(4, columns=2, width=9, width_ratios=(1.25, 1))
    present = np.unique(positions)
    worst, low, middle, high = np.transpose([np.quantile(ssims[positions == position], (0, 0.1, 0.5, 0.9))
                                             for position in present])
    curve.fill_between(present, low, high, color="C0", alpha=0.25, linewidth=0,
                       label="middle 80 % of the images")
    curve.plot(present, middle, "o-", color="C0", markersize=3, label="median")
    curve.plot(present, worst, "v", color="0.4", markersize=3, label="worst image")
    curve.set(ylabel="SSIM (7x7 window)", title=f"SSIM of {len(ssims)} test images")
    _finish(curve, "slice position, 0 the lowest")
    curve.legend(fontsize="small")
    error_map = picture.imshow(crop(errors, margin), cmap="magma", vmin=0)
    picture.set(**NO_TICKS, title="mean absolute error of each pixel")
    figure.colorbar(error_map, ax=picture, label="intensity, 0 black to 1 white")
    figure.savefig(path, dpi=DPI)


def sample_grid(images, positions, margin, path):
    """Draws sampled images, four in a row, each with its slice position inside."""
    columns = min(4, len(images))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(columns * WIDTH / 4, rows * WIDTH / 4))  # without the space for labels
    axes = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(left=0, right=1, bottom=0, top=1, wspace=0.02, hspace=0.02)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, position in zip(axes.flat, crop(images, margin), positions):
        _show(axis, image)
        axis.text(0.03, 0.97, position, color="white", fontsize="medium", va="top", transform=axis.transAxes)
    figure.savefig(path, dpi=DPI)


def neighbour_grid(samples, neighbours, captions, path):
    """Draws each sample over its nearest training image, both uint8, four in a row, a caption below each."""
    columns = min(4, len(samples))
    bands = -(-len(samples) // columns)
    side = (WIDTH - 0.3) / columns
    figure, axes = new_figure((2 * side + 0.4) * bands, 2 * bands, columns, squeeze=False,
                              subplot_kw={**NO_TICKS, "frame_on": False})
    for index, caption in enumerate(captions):
        band, column = divmod(index, columns)
        _show(axes[2 * band, column], samples[index])
        _show(axes[2 * band + 1, column], neighbours[index])
        axes[2 * band + 1, column].set_xlabel(caption, fontsize="small")
    for upper, lower in zip(axes[::2, 0], axes[1::2, 0]):
        upper.set_ylabel("sample")
        lower.set_ylabel("nearest training")
    figure.savefig(path, dpi=DPI)


def code_use_plot(codes, num_embeddings):
    """Draws how often each code is used, most used first; returns a matplotlib figure."""
    use = np.sort(np.bincount(np.ravel(codes), minlength=num_embeddings))[::-1] / np.size(codes)
    figure, axes = new_figure(2.6)
    axes.bar(np.arange(num_embeddings), use, width=1.0, color="0.4")
    axes.axhline(1 / num_embeddings, color="C3", linewidth=1, label="all used equally")
    axes.set(xlabel="codes, most used first", ylabel="share of all codes", xlim=(-0.5, num_embeddings - 0.5))
    axes.legend(fontsize="small")
    return figure


def head_cuts(head):
    """The two cuts through the middle of a head, uint8 (S, H, W), its highest slice on top.

    Returns (uint8 (S, W), along the middle row: the coronal cut, if front is up in the slices; uint8 (S, H),
    along the middle column: then the sagittal cut, front on the left).
    """
    return head[::-1, head.shape[1] // 2], head[::-1, :, head.shape[2] // 2]


def cut_names(geometry):
    """The names of both `head_cuts`: anatomical only if a `volumes.SliceGeometry` knows the axes."""
    return ("coronal cut", "sagittal cut") if geometry.axes_known else ("cut along rows", "cut along columns")


def axes_caption(geometry):
    """What may be said of the directions in pictures of heads, by their `volumes.SliceGeometry`."""
    if geometry.axes_known:
        return "Front is up; in sagittal cuts, front is on the left. Left and right are unknown."
    return "Which way is front was not told. Left and right are unknown."


def inner_slices(count, wanted):
    """Indices of up to `wanted` slices, spread evenly over a head of `count`, without its ends."""
    return spread(count, wanted + 2)[1:-1] if count > 2 else np.arange(count)


def stack_name(geometry, count):
    """What `count` slices of a `volumes.SliceGeometry` are: "whole brain" or "slab of 45 mm"."""
    height = count * geometry.spacing
    return "whole brain" if height >= 110 else f"slab of {height:.0f} mm"


def head_figure(heads, positions, geometry, path):
    """Draws each head as a row on black, in true proportions.

    A whole brain is shown by three cuts through its middle in one scale, and six smaller axial slices; a slab
    by five axial slices, and both cuts enlarged, one above the other.

    Args:
        heads: uint8 (N, S, H, W), of `positions`, S slice numbers.
        geometry: their `volumes.SliceGeometry`, which also tells what may be said of the axes.
        path: PNG to write.
    """
    name, heads = stack_name(geometry, len(positions)), heads[brain_box(heads, rim=2)]
    depth, height, width = np.multiply(heads.shape[1:], [geometry.spacing, *[geometry.pixel_size] * 2])  # mm
    is_whole = name == "whole brain" and len(positions) > 7
    axial = dict(zip("123456", inner_slices(len(positions), 6 if is_whole else 5)))
    if is_whole:
        layout, widths = "mcs123;mcs456", [width, width, height, *[width / 2] * 3]
        axial["m"], tallest = len(positions) // 2, max(depth, height)
    else:
        layout = ";".join("".join(axial) + cut for cut in "sc")
        widths, tallest = [*[width] * len(axial), MAX_CUT_SCALE * max(height, width)], height
    figure = Figure((10, 0.6 + len(heads) * (0.3 + 10 * tallest / sum(widths))), facecolor="black",
                    layout="constrained")
    figure.suptitle(f"{name[0].upper()}{name[1:]}", color="0.8", fontsize=10)
    figure.supxlabel(axes_caption(geometry), color="0.8", fontsize=10)
    for row, head in zip(np.atleast_1d(figure.subfigures(len(heads))), heads):
        pictures = {key: (f"slice {positions[index]}", head[index], height) for key, index in axial.items()}
        pictures |= {key: (title, cut, depth)
                     for key, title, cut in zip("cs", cut_names(geometry), head_cuts(head))}
        for key, axes in row.subplot_mosaic(layout, width_ratios=widths).items():
            title, picture, picture_height = pictures[key]
            right = picture.shape[1] * geometry.pixel_size / 2
            _show(axes, picture, interpolation="bicubic",
                  extent=(-right, right, -picture_height / 2, picture_height / 2))
            axes.set_title(title, color="0.8", fontsize=10)
            axes.axis("off")
            if key in "cs" and not is_whole:  # both in one scale
                axes.set_xlim(-max(height, width) / 2, max(height, width) / 2)
    figure.savefig(path, dpi=166)  # 1660 pixels wide: sharp at half of that


def progress_frame(originals, reconstructions, margin, title):
    """A frame of the progress GIF, uint8: N originals, their reconstructions (uint8) and what these miss.

    It has a line of 24 pixels with the title, then three rows of pictures, at their left a strip of 24 pixels
    with their names. Small pictures are enlarged by a whole factor, to about 800 pixels for all N.
    """
    originals, reconstructions = crop(originals, margin), crop(reconstructions, margin)
    errors = np.uint8((3 * np.abs(reconstructions.astype(int) - originals)).clip(0, 255))
    rows = {"original": originals, "reconstruction": reconstructions, "error x 3": errors}
    factor = max(1, round(800 / (len(originals) * originals.shape[-1])))
    bands = []
    for name, images in rows.items():
        picture = np.kron(np.hstack(images), np.ones((factor, factor), np.uint8))
        bands.append(np.hstack([np.rot90(_text_line(name, len(picture))), picture]))
    return np.vstack([_text_line(title, bands[0].shape[1]), *bands])


def _text_line(text, width):
    """A line of white text on black: uint8 (24, width)."""
    picture = Image.new("L", (width, 24))
    ImageDraw.Draw(picture).text((6, 3), text, fill=255, font=ImageFont.load_default(14))
    return np.asarray(picture)


def write_gif(frame_paths, path, max_frames=10, levels=32):
    """Writes PNG frames as an endless GIF that rests on the first and longer on the last.

    It keeps the first, the last, and more of the early ones, where most changes. With all 256 levels of gray
    the file would be several times as large.
    """
    indices = np.unique(np.geomspace(1, len(frame_paths), max_frames).round().astype(int)) - 1
    step = 255 / (levels - 1)
    frames = [imageio.imread(frame_paths[index]) for index in indices]
    frames = [np.uint8(np.round(np.round(frame / step) * step)) for frame in frames]
    durations = [1200, *[600] * (len(frames) - 2), 3000]
    # Of a single frame, Pillow wants a single duration.
    imageio.imwrite(path, frames, extension=".gif", duration=durations if len(frames) > 1 else 3000, loop=0)

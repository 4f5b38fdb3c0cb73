"""Every picture, plot and GIF, drawn without pyplot: no display, and no state that threads could share.

Images are (N, H, W) in [0, 1], `path` is the PNG to write, `margin` the pixels that the model paints black on
each side: they are left out."""

import textwrap

import imageio.v3 as imageio
import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
import numpy as np
from sklearn.decomposition import PCA

from support.images import brain_box, crop, FOREGROUND, spread
from support.volumes import is_whole_brain, stack_name

matplotlib.rcdefaults()  # whatever a matplotlibrc says
DPI = 120
WIDTH = 7  # inches: at 120 dots per inch the width of a page on GitHub
GRAYS, BYTES = {"cmap": "gray", "vmin": 0, "vmax": 1}, {"cmap": "gray", "vmin": 0, "vmax": 255}


def new_figure(height, rows=1, columns=1, width=WIDTH, **options):
    """A figure of `width` x `height` inches, and its axes, by `options` of matplotlib's `Figure.subplots`."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def _plot_epochs(history, curves, path, scales=("linear",), *, title, **options):
    """Plots columns of a history, {column: (label, line)}, over the epochs; `options` are of the axes."""
    figure, panels = new_figure(4.5, columns=len(scales), squeeze=False)
    for axes, scale in zip(panels[0], scales):
        for name, (label, line) in curves.items():
            axes.plot(history["epoch"] + 1, history[name], line, markersize=3, label=label)
        axes.set(xlabel="epoch", yscale=scale, **options,
                 title=title if len(scales) == 1 else f"{title}, {scale} axis")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()  # beside the curves, not over them
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(path)


def plot_losses(history, path):
    """Draws stage 1's losses, columns of vqvae_history.csv, on a linear and on a logarithmic axis."""
    losses = {"loss": "total", "reconstruction_loss": "reconstruction (MSE / variance)",
              "vq_loss": "vector quantisation"}
    curves = {}
    for number, (name, label) in enumerate(losses.items()):
        curves |= {name: (f"{label}: training", f"C{number}o-"),
                   f"val_{name}": (f"{label}: validation", f"C{number}s--")}
    _plot_epochs(history, curves, path, scales=("linear", "log"), title="VQ-VAE losses", ylabel="loss")


def plot_ssim(history, path):
    """Draws the SSIM of the monitored images after each epoch."""
    curves = {"val_ssim": ("fixed validation images", "C0o-"),
              "test_ssim": ("10 random test images: they choose nothing", "C1s--")}
    _plot_epochs(history, curves, path, title="SSIM of reconstructions", ylabel="mean SSIM (7x7 window)")


def plot_prior(history, code_entropy, path):
    """Draws stage 2's bits per code, by pixelcnn_history.csv, and the entropy that the prior has to beat."""
    # Only in validation do slices alone not know their person: that tells whether single samples can be good.
    curves = {"bits_per_code": ("training, with dropout", "C0o-"),
              "val_bits_per_code": ("validation, given slices below and person", "C0s--"),
              "bits_per_code_no_context": ("training, slices below hidden, person mostly given", "C1o-"),
              "val_bits_per_code_alone": ("validation, slice alone: neither of both given", "C2s--"),
              "entropy": ("entropy of independent codes", "k:")}
    columns = {name: history[name] for name in ("epoch", *curves) if name != "entropy"}
    columns["entropy"] = np.full(len(history["epoch"]), code_entropy)
    _plot_epochs(columns, curves, path, title="PixelCNN prior", ylabel="bits per code", ylim=(0, None))


def code_colours(codebook):
    """A colour for each code, (K, D) -> (K, 3) in [0, 1]: principal components, so like codes look alike."""
    codebook = np.asarray(codebook, np.float64)
    scores = PCA(min(3, *codebook.shape), svd_solver="full").fit_transform(codebook)
    scores = np.pad(scores, ((0, 0), (0, 3 - scores.shape[1])))  # all on one scale below, like the vectors
    return (0.5 + scores / (4 * scores[:, 0].std())).clip(0, 1)


def _wrapped(caption):
    return "\n".join(part for line in caption.splitlines() for part in textwrap.wrap(line, 24))


def draw_rows(rows, most=None):
    """Draws rows of N pictures, (label, images, N captions or none, options of `imshow`): (figure, axes)."""
    # After `most` pictures all begins anew below.
    count = max(len(images) for _, images, *_ in rows)
    columns = min(count, most or count)
    rows = [(label, images[i:i + columns], list(map(_wrapped, captions[i:i + columns])), options)
            for i in range(0, count, columns) for label, images, captions, options in rows]
    side = (WIDTH - 0.8) / max(columns, 4)
    lines = [1 + max(caption.count("\n") for caption in captions) for *_, captions, _ in rows if captions]
    height = len(rows) * side + sum(0.16 + 0.14 * count for count in lines)
    figure, axes = new_figure(height, len(rows), columns, min(WIDTH, 1 + side * columns), squeeze=False,
                              subplot_kw={"xticks": [], "yticks": [], "frame_on": False})
    for axes_of_row, (label, images, captions, options) in zip(axes, rows):
        axes_of_row[0].set_ylabel(label, fontsize="small")
        for axis, image in zip(axes_of_row, images):
            axis.imshow(image, **options)
        for axis, caption in zip(axes_of_row, captions):
            axis.set_title(caption, fontsize="small")
    return figure, axes


def reconstruction_grid(originals, reconstructions, codes, captions, colours, margin, path):
    """Draws N images, their reconstructions, differences and codes, (N, g, g), a column with caption each."""
    originals, reconstructions = crop(originals, margin), crop(reconstructions, margin)
    differences = reconstructions - originals
    in_brain = differences[originals > FOREGROUND]
    limit = max(0.01, np.percentile(np.abs(in_brain), 99)) if in_brain.size else 1.0
    figure, axes = draw_rows([
        ("original", originals, captions, GRAYS), ("reconstruction", reconstructions, [], GRAYS),
        ("reconstruction - original", differences, [], {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}),
        ("codes", colours[codes], [], {"interpolation": "nearest"})])
    bar = figure.colorbar(axes[2, 0].images[0], ax=list(axes[2]), extend="both", pad=0.01,
                          ticks=(-limit, 0, limit), format="%.2f")
    bar.set_label("1 % of the brain lies beyond", fontsize="small")
    figure.savefig(path)


def sample_grid(images, positions, margin, path):
    """Draws sampled images, four in a row, each with its slice position above."""
    captions = [f"slice {position}" for position in positions]
    draw_rows([("", crop(images, margin), captions, GRAYS)], most=4)[0].savefig(path)


def plot_errors(ssims, positions, errors, margin, path):
    """Draws the SSIM (N,) by slice position (N,), and the mean absolute error of each pixel, (H, W)."""
    figure, (boxes, picture) = new_figure(4, columns=2, width=9, width_ratios=(1.25, 1))
    present = np.unique(positions)
    by_position = [ssims[positions == position] for position in present]
    boxes.boxplot(by_position, positions=present, whis=(0, 100), widths=0.7, manage_ticks=False)
    boxes.set(xlabel="slice position, 0 the lowest", ylabel="SSIM (7x7 window)",
              title=f"SSIM of {len(ssims)} test images: range and quartiles")
    boxes.grid(alpha=0.3)
    error_map = picture.imshow(crop(errors, margin), cmap="magma", vmin=0)
    picture.set(xticks=[], yticks=[], title="mean absolute error of each pixel")
    figure.colorbar(error_map, ax=picture, label="intensity, 0 black to 1 white")
    figure.savefig(path)


def axes_caption(geometry):
    """What may be said of the directions in pictures of heads, by their `volumes.SliceGeometry`."""
    if geometry.axes_known:
        return "Front is up; in sagittal cuts, front is on the left. Left and right are unknown."
    return "Which way is front was not told. Left and right are unknown."


def head_planes(head, geometry):
    """All cuts through a head, uint8 (S, H, W): three of (name, cuts, width and height of a cut in mm).

    They are the slices; the cuts along their rows, uint8 (H, S, W), and along their columns, (W, S, H), with
    the highest slice on top. If front is up in the slices: coronal, and sagittal with front on the left."""
    depth, height, width = np.multiply(head.shape, [geometry.spacing, *[geometry.pixel_size] * 2]).tolist()
    along_rows, along_columns = head[::-1].swapaxes(0, 1), head[::-1].transpose(2, 0, 1)
    known = geometry.axes_known
    return [("slice", head, width, height),
            ("coronal cut" if known else "cut along rows", along_rows, width, depth),
            ("sagittal cut" if known else "cut along columns", along_columns, height, depth)]


def inner_slices(count, wanted):
    """Indices of up to `wanted` slices, spread evenly over a head of `count`, without its ends."""
    return spread(count, wanted + 2)[1:-1] if count > 2 else np.arange(count)


def head_figure(heads, positions, geometry, path):
    """Draws each head, uint8 (N, S, H, W), of S `positions`, as a row on black, in true proportions."""
    # A whole brain: three cuts in one scale, six smaller slices. A slab: five slices, both cuts enlarged.
    name, heads = stack_name(geometry, len(positions)), heads[brain_box(heads, rim=2)]
    (_, _, width, height), (_, _, _, depth), _ = head_planes(heads[0], geometry)
    is_whole = is_whole_brain(geometry, len(positions)) and len(positions) > 7
    few = inner_slices(len(positions), 6 if is_whole else 5)
    digits = "123456"[:len(few)]
    layout, widths, tallest = f"{digits}s;{digits}c", [*[width] * len(few), 2 * max(height, width)], height
    if is_whole:
        layout, widths = "acs123;acs456", [width, width, height, *[width / 2] * 3]
        tallest = max(depth, height)
    figure = Figure((10, 0.6 + len(heads) * (0.3 + 10 * tallest / sum(widths))), facecolor="black",
                    layout="constrained")
    text = {"color": "0.8", "fontsize": 10}
    figure.suptitle(name[0].upper() + name[1:], **text)
    figure.supxlabel(axes_caption(geometry), **text)
    for row, head in zip(np.atleast_1d(figure.subfigures(len(heads))), heads):
        planes = dict(zip("acs", head_planes(head, geometry)))
        for key, axes in row.subplot_mosaic(layout, width_ratios=widths).items():
            title, cuts, across, down = planes.get(key, planes["a"])
            index = few[int(key) - 1] if key in digits else len(cuts) // 2
            axes.set_title(f"slice {positions[index]}" if title == "slice" else title, **text)
            axes.imshow(cuts[index], interpolation="bicubic", **BYTES,
                        extent=(-across / 2, across / 2, -down / 2, down / 2))
            axes.axis("off")
            if key in "cs" and not is_whole:  # both in one scale
                axes.set_xlim(-max(height, width) / 2, max(height, width) / 2)
    figure.savefig(path, dpi=166)  # 1660 pixels wide: sharp at half of that


def progress_frame(originals, reconstructions, margin, title):
    """A frame of the progress GIF, uint8 (H, W): N originals, their reconstructions (uint8), the errors."""
    originals, reconstructions = crop(originals, margin), crop(reconstructions, margin)
    rows = {"original": originals, "reconstruction": reconstructions,
            "error x 3\n(white: 0.33 or more)": 3 * np.abs(reconstructions.astype(int) - originals)}
    figure, _ = draw_rows([(name, images, [], BYTES) for name, images in rows.items()])
    figure.suptitle(title, fontsize="small")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., 0]


def write_gif(frame_paths, path, max_frames=10, levels=32):
    """Writes PNG frames as an endless GIF from the last on: all that is seen where animations are off."""
    # More early frames are kept, where most changes. All 256 levels of gray would take several times as much.
    indices = np.roll(np.unique(np.geomspace(1, len(frame_paths), max_frames).round().astype(int)) - 1, 1)
    step = 255 / (levels - 1)
    frames = [np.uint8(np.round(np.round(imageio.imread(frame_paths[i]) / step) * step)) for i in indices]
    # It rests on the first, and longer on the last.
    durations = [3000, 1200, *[600] * (len(frames) - 2)]
    # Of a single frame, Pillow wants a single duration.
    imageio.imwrite(path, frames, extension=".gif", duration=durations if len(frames) > 1 else 3000, loop=0)

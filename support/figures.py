"""Every picture, plot and GIF.

Figures are drawn without pyplot: no display, no backend and no state that another thread could share.
"""

import itertools

import imageio.v3 as imageio
from keras import layers
import matplotlib
from matplotlib import patches
from matplotlib.figure import Figure
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from sklearn.decomposition import PCA

matplotlib.rcdefaults()  # whatever a matplotlibrc says
DPI = 120
WIDTH = 7  # inches: at 120 dots per inch the width of a page on GitHub
MAX_DIFFERENCE = 0.25  # end of the colour scale of differences, of intensities in [0, 1]
VQVAE_Y = 42  # the height of the VQ-VAE's row in the schematic
BRAIN_LEVEL = 8  # of 255: a brighter pixel is part of the head
MAX_CUT_SCALE = 2  # of the cuts through a head, beside its slices: few slices make flat cuts


def new_figure(height, rows=1, columns=1, width=WIDTH, **options):
    """A figure of `width` x `height` inches, and its axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def crop(images, margin):
    """Images (..., H, W) without the margin that the model paints black."""
    return images[..., margin:images.shape[-2] - margin, margin:images.shape[-1] - margin]


def plot_losses(history, path):
    """Draws stage 1's total, reconstruction and VQ loss, training and validation, on a linear and a logarithmic axis.

    Args:
        history: dict of columns of vqvae_history.csv.
        path: PNG to write.
    """
    curves = {"loss": ("total", "C0"), "reconstruction_loss": ("reconstruction (MSE / variance)", "C1"),
              "vq_loss": ("vector quantisation", "C2")}
    figure, panels = new_figure(4, columns=2)
    epochs = history["epoch"] + 1
    for axes, scale in zip(panels, ("linear", "log")):
        for name, (label, colour) in curves.items():
            axes.plot(epochs, history[name], "o-", color=colour, markersize=3, label=f"{label}: training")
            axes.plot(epochs, history[f"val_{name}"], "s--", color=colour, markersize=3, label="validation")
        axes.set(ylabel="loss", yscale=scale)
        _finish(axes, "epoch")
    panels[0].set(ylim=(0, None), title="linear axis")
    panels[1].set(title="logarithmic axis")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(path, dpi=DPI)


def plot_ssim(history, path):
    """Draws the SSIM of the monitored images after each epoch."""
    figure, axes = new_figure(4.5)
    epochs = history["epoch"] + 1
    axes.plot(epochs, history["val_ssim"], "o-", markersize=3, label="fixed validation images")
    axes.plot(epochs, history["test_ssim"], "s--", markersize=3, label="10 random test images")
    axes.set(ylabel="mean SSIM (7x7 window)", title="SSIM of reconstructions")
    axes.set_ylim(top=1)
    _finish(axes, "epoch")
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")  # beside the curves, not over them
    figure.savefig(path, dpi=DPI)


def plot_prior(history, code_entropy, path):
    """Draws stage 2's code length with and without context, and the entropy of the codes, all in bits per code.

    The code length without context (and, on validation people, without person) tells whether single samples can be good.

    Args:
        history: dict of columns of pixelcnn_history.csv.
        code_entropy: what the prior has to beat.
        path: PNG to write.
    """
    figure, axes = new_figure(4.5)
    epochs = history["epoch"] + 1

    def plot(name, label, colour):
        axes.plot(epochs, history[name], "o-", color=colour, markersize=3, label=f"{label}: training (dropout)")
        axes.plot(epochs, history[f"val_{name}"], "s--", color=colour, markersize=3, label=f"{label}: validation")

    # In this order, the legend has a column for each of the two.
    plot("bits_per_code_alone", "slice alone", "C1")
    axes.axhline(code_entropy, color="0.5", linestyle=":", label="entropy of independent codes")
    plot("bits_per_code", "given slices below and person", "C0")
    axes.set(ylabel="bits per code", title="PixelCNN prior")
    axes.set_ylim(bottom=0)
    _finish(axes, "epoch")
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(path, dpi=DPI)


def _finish(axes, xlabel):
    """Names an x axis of whole numbers and draws the grid."""
    axes.set_xlabel(xlabel)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)


def code_colours(codebook):
    """A colour for each code, such that like codes look alike: the first three principal components of their vectors.

    Args:
        codebook: float (K, D).

    Returns:
        float (K, 3), red, green and blue in [0, 1], all on one scale: colours are as far apart as vectors.
    """
    codebook = np.asarray(codebook, np.float64)
    scores = PCA(min(3, *codebook.shape), svd_solver="full").fit_transform(codebook)
    scores = np.pad(scores, ((0, 0), (0, 3 - scores.shape[1])))
    return (0.5 + scores / (4 * scores[:, 0].std())).clip(0, 1)


def reconstruction_grid(originals, reconstructions, codes, captions, colours, margin, path, title=None):
    """Draws originals, reconstructions, their differences and their codes, a column per image.

    Args:
        originals: (N, H, W) in [0, 1].
        reconstructions: (N, H, W) in [0, 1].
        codes: int (N, g, g).
        captions: N texts, written over the columns.
        colours: (K, 3), see `code_colours`.
        margin: pixels that the model paints black on each side; they are left out, as they have no codes.
        path: PNG to write.
        title: one line, or None.
    """
    count = len(originals)
    originals, reconstructions = crop(originals, margin), crop(reconstructions, margin)
    height = 0.5 + 4 * (WIDTH - 0.8) / max(count, 4)
    figure, axes = new_figure(height, 4, count, squeeze=False)
    for column in range(count):
        axes[0, column].set_title(captions[column], fontsize="small")
        axes[0, column].imshow(originals[column], cmap="gray", vmin=0, vmax=1)
        axes[1, column].imshow(reconstructions[column], cmap="gray", vmin=0, vmax=1)
        difference = axes[2, column].imshow(reconstructions[column] - originals[column], cmap="RdBu_r",
                                            vmin=-MAX_DIFFERENCE, vmax=MAX_DIFFERENCE)
        axes[3, column].imshow(colours[codes[column]], interpolation="nearest")
    figure.colorbar(difference, ax=list(axes[2]), extend="both", shrink=0.95, pad=0.01, ticks=(-0.2, 0, 0.2))
    for row, label in enumerate(("original", "reconstruction", "reconstruction - original", "codes")):
        axes[row, 0].set_ylabel(label, fontsize="small")
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    if title:
        figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=DPI)


def plot_errors(ssims, positions, errors, margin, path):
    """Draws where reconstructions of test images are wrong: SSIM over the slice position, and the mean error of each pixel.

    Args:
        ssims: float (N,).
        positions: int (N,).
        errors: (H, W), the mean absolute error over all images, of intensities in [0, 1].
        margin: pixels that the model paints black on each side; they are left out.
        path: PNG to write.
    """
    figure, (curve, picture) = new_figure(4, columns=2, width=9, width_ratios=(1.25, 1))
    places, (worst, low, middle, high) = _quantiles(ssims, positions, (0, 0.1, 0.5, 0.9))
    curve.fill_between(places, low, high, color="C0", alpha=0.25, linewidth=0, label="middle 80 % of the images")
    curve.plot(places, middle, "o-", color="C0", markersize=3, label="median")
    curve.plot(places, worst, "v", color="0.4", markersize=3, label="worst image")
    curve.set(ylabel="SSIM (7x7 window)", title=f"SSIM of {len(ssims)} test images")
    _finish(curve, "slice position, 0 the lowest")
    curve.legend(fontsize="small")
    error_map = picture.imshow(crop(errors, margin), cmap="magma", vmin=0)
    picture.set(xticks=[], yticks=[], title="mean absolute error of each pixel")
    figure.colorbar(error_map, ax=picture, label="intensity, 0 black to 1 white")
    figure.savefig(path, dpi=DPI)


def _quantiles(values, positions, shares):
    """The positions there are, int (P,), and the quantiles of the values at each, float (len(shares), P)."""
    places = np.unique(positions)
    return places, np.array([np.quantile(values[positions == place], shares) for place in places]).T


def sample_grid(images, positions, margin, path):
    """Draws sampled images, four in a row, each with its slice position inside.

    Args:
        images: (N, H, W) in [0, 1].
        positions: int (N,).
        margin: pixels that the model paints black on each side; they are left out.
        path: PNG to write.
    """
    columns = min(4, len(images))
    rows = -(-len(images) // columns)
    side = WIDTH / 4
    figure = Figure(figsize=(side * columns, side * rows))
    axes = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(left=0, right=1, bottom=0, top=1, wspace=0.02, hspace=0.02)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, position in zip(axes.flat, crop(images, margin), positions):
        axis.imshow(image, cmap="gray", vmin=0, vmax=1)
        axis.text(0.03, 0.97, position, color="white", fontsize="medium", va="top", transform=axis.transAxes)
    figure.savefig(path, dpi=DPI)


def neighbour_grid(samples, neighbours, captions, path):
    """Draws each sample over its nearest training image, four in a row.

    Args:
        samples: (N, H, W) in [0, 1].
        neighbours: uint8 (N, H, W).
        captions: N texts, written below.
        path: PNG to write.
    """
    columns = min(4, len(samples))
    bands = -(-len(samples) // columns)
    side = (WIDTH - 0.3) / columns
    figure, axes = new_figure((2 * side + 0.4) * bands, 2 * bands, columns, squeeze=False)
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
    figure.savefig(path, dpi=DPI)


def plot_distances(sample_distances, test_distances, path):
    """Draws the distributions of the distances to the nearest training image: of samples and of test people."""
    figure, axes = new_figure(4.5)
    bins = np.histogram_bin_edges(np.concatenate([sample_distances, test_distances]), 40)
    axes.hist(test_distances, bins, density=True, color="0.7", label="test people")
    axes.hist(sample_distances, bins, density=True, histtype="step", color="C3", linewidth=1.5, label="samples")
    axes.set(xlabel="distance to the nearest training image (whitened principal components)", ylabel="density",
             xlim=(0, None), title="Copies would pile up at 0")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=DPI)


def plot_tissue(samples, sample_positions, people, positions, path):
    """Draws the tissue statistics over the slice position: median and the middle 80 %, of samples and of test people.

    Args:
        samples: a dict of `metrics.tissue_statistics`.
        sample_positions: int (N,).
        people: the same dict for the test people.
        positions: int (M,).
        path: PNG to write.
    """
    panels = {"brain_area": ("size of the brain", "share of the picture inside its outline"),
              "dark_fraction": ("ventricles and fissures", "dark share of the brain's inner half"),
              "symmetry": ("symmetry", "correlation with the mirror image")}
    figure, all_axes = new_figure(4, columns=3, width=9)
    for axes, (name, (title, unit)) in zip(all_axes, panels.items()):
        for values, places, colour, line, label in ((people[name], positions, "0.3", "-", "test people"),
                                                    (samples[name], sample_positions, "C3", "--", "samples")):
            places, (low, middle, high) = _quantiles(values, places, (0.1, 0.5, 0.9))
            axes.fill_between(places, low, high, color=colour, alpha=0.25, linewidth=0)
            axes.plot(places, middle, line, color=colour, label=f"{label}: median, and the middle 80 % as a band")
        axes.set(ylabel=unit, title=title)
        _finish(axes, "slice position, 0 the lowest")
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(path, dpi=DPI)


# The schematic --------------------------------------------------------------------------------------------------------


def outline(vqvae, prior):
    """What the schematic of both networks says, read from the models.

    Returns:
        A dict of texts: `image`, `vectors`, `codebook`, `codes` and `logits`, the shapes of these; `encoder`, `decoder` and
        `prior`, lists of the steps of these; `conditioning`, a list of (name, shape) of what the logits depend on. And
        `colours`, those of the codes.
    """
    def shape(*sizes):
        return " x ".join(map(str, sizes))

    size, grid = vqvae.image_size, vqvae.grid_size
    count, length = vqvae.quantizer.num_embeddings, vqvae.quantizer.embedding_dim
    steps_below, person_size = prior.settings["steps_below"], prior.settings["person_size"]
    conditioning = [("codes above and to the left", shape(grid, grid))]
    if steps_below:
        conditioning.append(("codes of the slices below", shape(len(steps_below), grid, grid)))
    if person_size:
        conditioning.append(("person", str(person_size)))
    conditioning.append(("slice position", f"1 of {prior.num_positions}"))
    return {
        "image": shape(size, size, 1), "vectors": shape(grid, grid, length), "codebook": shape(count, length),
        "codes": shape(grid, grid), "logits": shape(grid, grid, count),
        "encoder": _steps(vqvae.encoder), "decoder": _steps(vqvae.decoder), "prior": _prior_steps(prior),
        "conditioning": conditioning, "colours": code_colours(vqvae.quantizer.embeddings)}


def _prior_steps(prior):
    rows_up = prior.blocks[0].rows_up
    codes_left = max(block.codes_left for block in prior.blocks)
    dense = [str(layer.units) for layer in prior.logits.layers if isinstance(layer, layers.Dense)]
    return [f"embeddings of {prior.num_filters}",
            f"{_steps(prior.context_blocks).count('residual block')} residual blocks for the slices below",
            f"{len(prior.blocks)} gated blocks, {rows_up} row{'s' if rows_up > 1 else ''} up,",
            f"up to {codes_left} codes to the left",
            f"{len(prior.attentions)} axial attentions",
            f"dense {', '.join(dense)}"]


def _steps(model):
    steps = []
    for layer in model.layers:
        if isinstance(layer, layers.Add):
            steps[-2:] = ["residual block"]
        elif isinstance(layer, (layers.Conv2D, layers.Conv2DTranspose)):
            kind = "up-convolution" if isinstance(layer, layers.Conv2DTranspose) else "convolution"
            stride = f", stride {layer.strides[0]}" if layer.strides[0] > 1 else ""
            steps.append(f"{kind} {' x '.join(map(str, layer.kernel_size))}{stride}")
        elif isinstance(layer, layers.Cropping2D) and layer.cropping[0][0]:
            steps.append(f"less {layer.cropping[0][0]} black pixels")
        elif isinstance(layer, layers.ZeroPadding2D) and layer.padding[0][0]:
            steps.append(f"plus {layer.padding[0][0]} black pixels")
    return steps


def _arrow(axes, start, end, label="", colour="0.3"):
    """Draws an arrow from point to point, its label above the middle."""
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "shrinkA": 0, "shrinkB": 0})
    axes.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 1.2, label, ha="center", fontsize=7.5)


def _tensor(axes, left, name, shape, picture, **options):
    """Draws a picture in a frame, at the height of the VQ-VAE's row, its name and shape below."""
    axes.imshow(picture, extent=(left, left + 9, VQVAE_Y - 4.5, VQVAE_Y + 4.5), interpolation="nearest", zorder=2, **options)
    axes.add_patch(patches.Rectangle((left, VQVAE_Y - 4.5), 9, 9, fill=False, edgecolor="0.3", zorder=3))
    axes.text(left + 4.5, VQVAE_Y - 5.3, f"{name}\n{shape}", ha="center", va="top", fontsize=7.5, linespacing=1.4)


def _box(axes, corners, title, steps, colour):
    """Draws a network: a polygon with its title and its steps inside."""
    axes.add_patch(patches.Polygon(corners, facecolor=colour, edgecolor="0.3"))
    x, y = np.mean(corners, axis=0)
    axes.text(x, y + len(steps) * 1.15, title, ha="center", va="center", fontsize=9, weight="bold")
    axes.text(x, y - 1.15, "\n".join(steps), ha="center", va="center", fontsize=6.8, linespacing=1.35)


def _rounded(axes, left, bottom, width, height):
    """Draws a light box with round corners."""
    axes.add_patch(patches.FancyBboxPatch((left, bottom), width, height, boxstyle="round,pad=0.3", facecolor="0.95",
                                          edgecolor="0.5"))


def _draw_prior(axes, texts):
    """Draws the lower row: what the prior is conditioned on, the prior, and what it gives."""
    middle, rows = 11.5, texts["conditioning"]
    for row, (name, shape) in enumerate(rows):
        y = middle + 2.5 * (len(rows) - 1) - 5 * row
        _rounded(axes, 2, y - 1.5, 22, 3)
        axes.text(13, y, name, ha="center", va="center", fontsize=7.5)
        axes.text(25, y, shape, va="center", fontsize=7.5)
        _arrow(axes, (33.5, y), (38, middle + (y - middle) * 0.6))
    _box(axes, [(38, 3), (38, 20), (62, 20), (62, 3)], "PixelCNN prior", texts["prior"], "#fbe3d4")
    _arrow(axes, (62, middle), (68, middle))
    _rounded(axes, 68.5, 8.8, 23, 5.4)
    axes.text(80, middle, f"p(code | codes before, ...)\n{texts['logits']}", ha="center", va="center", fontsize=7.5,
              linespacing=1.4)
    axes.plot((80, 80, 57), (14.8, 25, 25), color="0.3", linewidth=1)
    _arrow(axes, (57, 25), (57, 31.5))
    axes.text(68.5, 26, "sample one code after another", ha="center", fontsize=7.5)


def _draw_vqvae(axes, texts):
    """Draws the upper row: the image, encoder, vectors, codes, decoder and the image again; the codebook above."""
    blue = "#dbe9f6"
    rng = np.random.default_rng(0)
    colours = texts["colours"]
    cells = colours[rng.integers(0, len(colours), (8, 8))]
    gray = np.repeat(cells.mean(axis=-1, keepdims=True), 3, axis=-1)
    vectors = (gray + 0.15 * rng.normal(size=gray.shape)).clip(0, 1)
    head = _schematic_head()
    low, high = VQVAE_Y - 8, VQVAE_Y + 8
    _tensor(axes, 1, "image", texts["image"], head, cmap="gray", vmin=0, vmax=1)
    _box(axes, [(13, low - 4), (13, high + 4), (32, high), (32, low)], "encoder", _merge_repeats(texts["encoder"]), blue)
    _tensor(axes, 34.5, "vectors", texts["vectors"], vectors)
    _tensor(axes, 52.5, "codes", texts["codes"], cells)
    _box(axes, [(68, low), (68, high), (87, high + 4), (87, low - 4)], "decoder", _merge_repeats(texts["decoder"]), blue)
    _tensor(axes, 90, "image", texts["image"], head, cmap="gray", vmin=0, vmax=1)
    for start, end, label in ((10, 13, ""), (32, 34.5, ""), (43.5, 52.5, "nearest"), (61.5, 68, "look up"), (87, 90, "")):
        _arrow(axes, (start, VQVAE_Y), (end, VQVAE_Y), label)
    strip = colours[np.linspace(0, len(colours) - 1, 16).astype(int)][np.newaxis]
    axes.imshow(strip, extent=(45, 67.7, 55, 57), aspect="auto", interpolation="nearest")
    axes.text(56.4, 58, f"codebook, {texts['codebook']}", ha="center", fontsize=7.5)
    for x in (48, 64.7):
        _arrow(axes, (x, 55), (x, VQVAE_Y + 3.4), colour="0.6")


def plot_architecture(texts, path):
    """Draws the schematic of both networks.

    Args:
        texts: the dict of `outline`.
        path: PNG to write.
    """
    figure = Figure(figsize=(8.3, 5.2))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    _draw_vqvae(axes, texts)
    _draw_prior(axes, texts)
    axes.set(xlim=(0, 100), ylim=(0, 62.65), aspect="equal")  # last, as imshow changes the limits
    figure.savefig(path, dpi=DPI)


def _merge_repeats(steps):
    """Equal steps in a row as one line: "2 residual blocks"."""
    runs = [(step, len(list(run))) for step, run in itertools.groupby(steps)]
    return [step if times == 1 else f"{times} {step}s" for step, times in runs]


def _schematic_head():
    """A head as a schematic shows it: float (64, 64) in [0, 1]."""
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    radius = np.hypot(x / 0.68, y / 0.86)
    head = np.where(radius < 1, np.where(radius < 0.9, 0.75, 0.5), 0.0)
    head[np.hypot((np.abs(x) - 0.14) / 0.08, (y + 0.05) / 0.3) < 1] = 0.15
    return head


def code_use_plot(codes, num_embeddings):
    """Draws how often each code is used, most used first; returns a matplotlib figure."""
    use = np.sort(np.bincount(np.ravel(codes), minlength=num_embeddings))[::-1] / np.size(codes)
    figure, axes = new_figure(2.6)
    axes.bar(np.arange(num_embeddings), use, width=1.0, color="0.4")
    axes.axhline(1 / num_embeddings, color="C3", linewidth=1, label="all used equally")
    axes.set(xlabel="codes, most used first", ylabel="share of all codes", xlim=(-0.5, num_embeddings - 0.5))
    axes.legend(fontsize="small")
    return figure


# Whole heads ----------------------------------------------------------------------------------------------------------


def crop_to_brain(heads):
    """Cuts heads, uint8 (N, S, H, W), to the rows and columns that any slice of them reaches, and two pixels more."""
    bright = (heads > BRAIN_LEVEL).any(axis=(0, 1))
    sides = []
    for axis in (0, 1):
        lines = np.flatnonzero(bright.any(axis=1 - axis))
        sides.append(slice(max(0, lines[0] - 2), lines[-1] + 3) if lines.size else slice(None))
    return heads[:, :, sides[0], sides[1]]


def head_cuts(head):
    """The two cuts through the middle of a head, across its slices, the highest slice on top.

    Args:
        head: uint8 (S, H, W), axial slices from the lowest up.

    Returns:
        (uint8 (S, W), along the middle row: the coronal cut, if front is up in the slices; uint8 (S, H), along the middle
        column: then the sagittal cut, front on the left).
    """
    return head[::-1, head.shape[1] // 2], head[::-1, :, head.shape[2] // 2]


def cut_names(frame):
    """The names of both `head_cuts`: the anatomical ones only where a `volumes.Frame` says that the axes are known."""
    return ("coronal cut", "sagittal cut") if frame.axes_known else ("cut along the rows", "cut along the columns")


def axes_caption(frame):
    """What may be said of the directions in pictures of heads, by their `volumes.Frame`."""
    if frame.axes_known:
        return "Front is up; in sagittal cuts, front is on the left. Left and right are unknown."
    return "Which way is front was not told. Left and right are unknown."


def _inner_slices(count, num_slices):
    """The indices of `num_slices` slices spread evenly over a head of `count`, without its ends; fewer if it has fewer."""
    return np.unique(np.linspace(0, count - 1, num_slices + 2).round().astype(int)[1:-1])


def head_figure(heads, positions, frame, path, num_slices=5):
    """Draws each head as a row: axial slices from low to high, and at their right both cuts, one over the other.

    Args:
        heads: uint8 (N, S, H, W), axial slices from the lowest up.
        positions: their S slice positions.
        frame: `volumes.Frame`, for the proportions and for what is said of the axes.
        path: PNG to write.
        num_slices: axial slices to draw.
    """
    heads = crop_to_brain(heads)
    depth = heads.shape[1] * frame.spacing
    indices = _inner_slices(heads.shape[1], num_slices)
    # All lengths are in mm of the axial slices. The cuts are drawn larger, so that two are nearly as high as a slice.
    height, width = (pixels * frame.pixel_size for pixels in heads.shape[2:])
    gap, line = 5, 24
    scale = min(MAX_CUT_SCALE, (height - 3 * gap) / (2 * depth))
    cuts_left = len(indices) * (width + gap)
    cuts_width = max(scale * max(height, width), height)  # at least as wide as their title
    size = cuts_left + cuts_width, 2 * line + len(heads) * (height + gap)
    figure = Figure(figsize=(10, 10 * size[1] / size[0]), facecolor="black")
    # One axes over the whole figure, in mm, y down.
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")

    def draw(picture, left, top, width, height):
        axes.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="bilinear",
                    extent=(left, left + width, top + height, top))

    def write(text, middle, top):
        axes.text(middle, top, text, color="0.8", fontsize=10, ha="center", va="center")

    cuts_middle = cuts_left + cuts_width / 2
    for column, index in enumerate(indices):
        write(f"slice {positions[index]}", column * (width + gap) + width / 2, line / 2)
        for row, head in enumerate(heads):
            draw(head[index], column * (width + gap), line + row * (height + gap), width, height)
    for row, head in enumerate(heads):
        first_top = line + row * (height + gap) + (height - 2 * scale * depth - gap) / 2
        for cut, top in zip(head_cuts(head)[::-1], (first_top, first_top + scale * depth + gap)):
            cut_width = scale * cut.shape[1] * frame.pixel_size
            draw(cut, cuts_middle - cut_width / 2, top, cut_width, scale * depth)
    write("sagittal and coronal cut" if frame.axes_known else "cuts along columns, rows", cuts_middle, line / 2)
    write(axes_caption(frame), size[0] / 2, size[1] - line / 2)
    axes.set(xlim=(0, size[0]), ylim=(size[1], 0), aspect="equal")  # last, as imshow changes the limits
    figure.savefig(path, dpi=166, facecolor="black")  # 1660 pixels wide: sharp at half of that


def head_comparison(heads, positions, labels, title, path, num_slices=4):
    """Draws heads for comparison: a row per head, its label at the left, and in each column the same slice of all.

    Args:
        heads: uint8 (N, S, H, W), axial slices from the lowest up.
        positions: their S slice positions.
        labels: N texts.
        title: one line.
        path: PNG to write.
        num_slices: axial slices to draw.
    """
    heads = crop_to_brain(heads)
    indices = _inner_slices(len(positions), num_slices)
    side = (WIDTH - 0.6) / len(indices)
    height = 0.6 + len(heads) * side * heads.shape[2] / heads.shape[3]
    figure, axes = new_figure(height, len(heads), len(indices), squeeze=False)
    for row, (head, label) in enumerate(zip(heads, labels, strict=True)):
        axes[row, 0].set_ylabel(label)
        for column, index in enumerate(indices):
            axes[row, column].imshow(head[index], cmap="gray", vmin=0, vmax=255)
            axes[row, column].set(xticks=[], yticks=[])
    for column, index in enumerate(indices):
        axes[0, column].set_title(f"slice {positions[index]}", fontsize="medium")
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=DPI)


# The progress GIF -----------------------------------------------------------------------------------------------------


def progress_frame(originals, reconstructions, margin, title):
    """Draws one frame of the progress GIF: originals, their reconstructions and what these miss, under a title.

    Args:
        originals: uint8 (N, H, W).
        reconstructions: uint8 (N, H, W).
        margin: pixels that the model paints black on each side; they are left out.
        title: one line.

    Returns:
        uint8, N pictures and a strip of 24 pixels wide, three pictures and 24 pixels high. Small pictures are enlarged by a
        whole factor, to about 800 pixels for all N.
    """
    originals, reconstructions = crop(originals, margin), crop(reconstructions, margin)
    errors = np.abs(reconstructions.astype(int) - originals)
    rows = {"original": originals, "reconstruction": reconstructions, "error x 3": np.uint8((3 * errors).clip(0, 255))}
    factor = max(1, round(800 / (len(originals) * originals.shape[-1])))
    pictures = [np.kron(np.hstack(images), np.ones((factor, factor), np.uint8)) for images in rows.values()]
    bands = [np.hstack([np.rot90(_text_line(name, len(picture))), picture]) for name, picture in zip(rows, pictures)]
    return np.vstack([_text_line(title, bands[0].shape[1]), *bands])


def _text_line(text, width):
    """A line of white text on black: uint8 (24, width)."""
    picture = Image.new("L", (width, 24))
    ImageDraw.Draw(picture).text((6, 3), text, fill=255, font=ImageFont.load_default(14))
    return np.asarray(picture)


def write_gif(frame_paths, path, max_frames=10, levels=32):
    """Writes PNG frames as an endless GIF that rests on the first and longer on the last.

    Args:
        frame_paths: the frames in their order.
        path: GIF to write.
        max_frames: in the GIF: the first, the last, and more of the early ones, where most changes.
        levels: of gray; with all 256 the file would be several times as large.
    """
    indices = np.unique(np.geomspace(1, len(frame_paths), max_frames).round().astype(int)) - 1
    step = 255 / (levels - 1)
    frames = [np.uint8(np.round(np.round(imageio.imread(frame_paths[index]) / step) * step)) for index in indices]
    durations = [1200, *[600] * (len(frames) - 2), 3000]
    # Of a single frame, Pillow wants a single duration.
    imageio.imwrite(path, frames, extension=".gif", duration=durations if len(frames) > 1 else 3000, loop=0)

"""Every picture, plot and GIF, and the report page."""

import base64
import html
import io
import itertools

import imageio.v3 as imageio
from keras import layers
import matplotlib
from matplotlib import patches
from matplotlib import pyplot as plt
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from sklearn.decomposition import PCA

matplotlib.rcdefaults()  # whatever a matplotlibrc says
MIDDLE = 42  # the height of the VQ-VAE in the schematic
WIDTH = 7  # inches: at 120 dots per inch the width of a page on GitHub
LARGEST_ERROR = 0.25  # of the colour scale of differences, of intensities in [0, 1]


def _save(figure, path):
    figure.savefig(path, dpi=120)
    plt.close(figure)


def crop(images, margin):
    """Images (..., H, W) without the margin that the model paints black."""
    return images[..., margin:images.shape[-2] - margin, margin:images.shape[-1] - margin]


def plot_losses(history, path):
    """Draws stage 1's total, reconstruction and VQ loss, training and validation, on a linear and a logarithmic axis.

    Args:
        history: dict of columns of vqvae_history.csv.
        path: PNG to write.
    """
    figure, panels = plt.subplots(1, 2, figsize=(9, 4.2), layout="constrained")
    epochs = history["epoch"] + 1
    for axes, scale in zip(panels, ("linear", "log")):
        for name, label, colour in (("loss", "total", "C0"), ("reconstruction_loss", "reconstruction (MSE / variance)", "C1"),
                                    ("vq_loss", "vector quantisation", "C2")):
            axes.plot(epochs, history[name], "o-", color=colour, markersize=3, label=f"{label}: training")
            axes.plot(epochs, history[f"val_{name}"], "s--", color=colour, markersize=3, label="validation")
        axes.set(xlabel="epoch", ylabel="loss", yscale=scale, title=f"{'linear' if scale == 'linear' else 'logarithmic'} axis")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    panels[0].set_ylim(bottom=0)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
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
    size = WIDTH, 0.5 + 4 * (WIDTH - 0.8) / max(count, 4)
    figure, axes = plt.subplots(4, count, figsize=size, layout="constrained", squeeze=False)
    for column in range(count):
        axes[0, column].imshow(originals[column], cmap="gray", vmin=0, vmax=1)
        axes[0, column].set_title(captions[column], fontsize="small")
        axes[1, column].imshow(reconstructions[column], cmap="gray", vmin=0, vmax=1)
        difference = axes[2, column].imshow(reconstructions[column] - originals[column], cmap="RdBu_r", vmin=-LARGEST_ERROR,
                                            vmax=LARGEST_ERROR)
        axes[3, column].imshow(colours[codes[column]], interpolation="nearest")
    figure.colorbar(difference, ax=list(axes[2]), extend="both", shrink=0.95, pad=0.01, ticks=(-0.2, 0, 0.2))
    for row, label in enumerate(("original", "reconstruction", "reconstruction - original", "codes")):
        axes[row, 0].set_ylabel(label, fontsize="small")
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    if title:
        figure.suptitle(title, fontsize="medium")
    _save(figure, path)


def plot_errors(ssims, positions, errors, margin, path):
    """Draws where reconstructions of test images are wrong: SSIM over the slice position, and the mean error of each pixel.

    Args:
        ssims: float (N,).
        positions: int (N,).
        errors: (H, W), the mean absolute error over all images, of intensities in [0, 1].
        margin: pixels that the model paints black on each side; they are left out.
        path: PNG to write.
    """
    figure, (curve, picture) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained", width_ratios=(1.25, 1))
    shown = np.unique(positions)
    quantiles = np.array([np.quantile(ssims[positions == place], (0, 0.1, 0.5, 0.9)) for place in shown]).T
    curve.fill_between(shown, quantiles[1], quantiles[3], color="C0", alpha=0.25, linewidth=0, label="middle 80 % of the images")
    curve.plot(shown, quantiles[2], "o-", color="C0", markersize=3, label="median")
    curve.plot(shown, quantiles[0], "v", color="0.4", markersize=3, label="worst image")
    curve.set(xlabel="slice position, 0 the lowest", ylabel="SSIM (7x7 window)", title=f"SSIM of {len(ssims)} test images")
    curve.xaxis.get_major_locator().set_params(integer=True)
    curve.grid(alpha=0.3)
    curve.legend(fontsize="small")
    drawn = picture.imshow(crop(errors, margin), cmap="magma", vmin=0)
    picture.set(xticks=[], yticks=[], title="mean absolute error of each pixel")
    figure.colorbar(drawn, ax=picture, label="intensity, 0 black to 1 white")
    _save(figure, path)


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
    figure, axes = plt.subplots(rows, columns, figsize=(side * columns, side * rows), squeeze=False,
                                gridspec_kw={"left": 0, "right": 1, "bottom": 0, "top": 1, "wspace": 0.02, "hspace": 0.02})
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, position in zip(axes.flat, crop(images, margin), positions):
        axis.imshow(image, cmap="gray", vmin=0, vmax=1)
        axis.text(0.03, 0.97, position, color="white", fontsize="medium", va="top", transform=axis.transAxes)
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
    titles = {"brain_area": ("size of the brain", "share of the picture inside its outline"),
              "dark_fraction": ("ventricles and deep fissures", "dark share of the inner half of the brain"),
              "symmetry": ("symmetry", "correlation with the mirror image")}
    for axes, (name, (title, unit)) in zip(panels, titles.items()):
        for values, places, colour, line, label in ((people[name], positions, "0.3", "-", "test people"),
                                                    (samples[name], sample_positions, "C3", "--", "samples")):
            shown = np.unique(places)
            low, middle, high = np.array([np.quantile(values[places == place], (0.1, 0.5, 0.9)) for place in shown]).T
            axes.fill_between(shown, low, high, color=colour, alpha=0.25, linewidth=0)
            axes.plot(shown, middle, line, color=colour, label=f"{label}: median, and the middle 80 % as a band")
        axes.set(xlabel="slice position, 0 the lowest", ylabel=unit, title=title)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize="small")
    _save(figure, path)


def outline(vqvae, prior):
    """What the schematic of both networks says, read from the models.

    Returns:
        A dict of texts: `image`, `vectors`, `codebook`, `codes` and `logits`, the shapes of these; `encoder`, `decoder` and
        `prior`, lists of the steps of these; `told`, a list of what the prior is told, each (name, shape). And `colours`, those
        of the codes.
    """
    def shape(*sizes):
        return " x ".join(map(str, sizes))

    size, grid, settings = vqvae.image_size, vqvae.grid_size, prior.settings
    count, length = vqvae.quantizer.num_embeddings, vqvae.quantizer.embedding_dim
    told = [("codes above and to the left", shape(grid, grid))]
    if settings.get("steps_below"):
        told.append(("codes of the slices below", shape(len(settings["steps_below"]), grid, grid)))
    if settings.get("person_size"):
        told.append(("person", str(settings["person_size"])))
    told.append(("slice position", f"1 of {prior.num_positions}"))
    rows_up = prior.blocks[0].rows_up
    dense = [layer.units for layer in prior.head.layers if isinstance(layer, layers.Dense)]
    return {
        "image": shape(size, size, 1), "vectors": shape(grid, grid, length), "codebook": shape(count, length),
        "codes": shape(grid, grid), "logits": shape(grid, grid, count), "told": told,
        "encoder": _steps(vqvae.encoder), "decoder": _steps(vqvae.decoder),
        "prior": [f"embeddings of {prior.num_filters}", f"{len(prior.known_convs) // 2} residual blocks for the slices below",
                  f"{len(prior.blocks)} gated blocks, {rows_up} row{'s' * (rows_up > 1)} up,",
                  f"up to {max(block.codes_left for block in prior.blocks)} codes to the left",
                  f"{len(prior.attentions)} axial attentions", f"dense {', '.join(map(str, dense))}"],
        "colours": code_colours(vqvae.quantizer.embeddings)}


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
    axes.imshow(picture, extent=(left, left + 9, MIDDLE - 4.5, MIDDLE + 4.5), interpolation="nearest", zorder=2, **options)
    axes.add_patch(patches.Rectangle((left, MIDDLE - 4.5), 9, 9, fill=False, edgecolor="0.3", zorder=3))
    axes.text(left + 4.5, MIDDLE - 5.3, f"{name}\n{shape}", ha="center", va="top", fontsize=7.5, linespacing=1.4)


def _box(axes, corners, title, steps, colour):
    """Draws a network: a polygon with its title and its steps inside."""
    axes.add_patch(patches.Polygon(corners, facecolor=colour, edgecolor="0.3"))
    x, y = np.mean(corners, axis=0)
    axes.text(x, y + len(steps) * 1.15, title, ha="center", va="center", fontsize=9, weight="bold")
    axes.text(x, y - 1.15, "\n".join(steps), ha="center", va="center", fontsize=6.8, linespacing=1.35)


def _draw_prior(axes, told):
    """Draws the lower row: what the prior is told, the prior, and what it gives."""
    for row, (name, shape) in enumerate(told["told"]):
        y = 11.5 + 2.5 * (len(told["told"]) - 1) - 5 * row
        axes.add_patch(patches.FancyBboxPatch((2, y - 1.5), 22, 3, boxstyle="round,pad=0.3", facecolor="0.95", edgecolor="0.5"))
        axes.text(13, y, name, ha="center", va="center", fontsize=7.5)
        axes.text(25, y, shape, va="center", fontsize=7.5)
        _arrow(axes, (33.5, y), (38, 11.5 + (y - 11.5) * 0.6))
    _box(axes, [(38, 3), (38, 20), (62, 20), (62, 3)], "PixelCNN prior", told["prior"], "#fbe3d4")
    _arrow(axes, (62, 11.5), (68, 11.5))
    axes.add_patch(patches.FancyBboxPatch((68.5, 8.8), 23, 5.4, boxstyle="round,pad=0.3", facecolor="0.95", edgecolor="0.5"))
    axes.text(80, 11.5, f"p(code | codes before, ...)\n{told['logits']}", ha="center", va="center", fontsize=7.5, linespacing=1.4)
    axes.plot((80, 80, 57), (14.8, 25, 25), color="0.3", linewidth=1)
    _arrow(axes, (57, 25), (57, 31.5))
    axes.text(68.5, 26, "draw one code after another", ha="center", fontsize=7.5)


def plot_architecture(told, path):
    """Draws the schematic of both networks.

    Args:
        told: the dict of `outline`.
        path: PNG to write.
    """
    figure, axes = plt.subplots(figsize=(8.3, 5.2))
    figure.subplots_adjust(0, 0, 1, 1)
    axes.set(xlim=(0, 100), ylim=(0, 62.65), aspect="equal")
    axes.axis("off")
    rng = np.random.default_rng(0)
    cells = told["colours"][rng.integers(0, len(told["colours"]), (8, 8))]
    blue = "#dbe9f6"
    head = _drawn_head()
    _tensor(axes, 1, "image", told["image"], head, cmap="gray", vmin=0, vmax=1)
    _box(axes, [(13, MIDDLE - 12), (13, MIDDLE + 12), (32, MIDDLE + 8), (32, MIDDLE - 8)], "encoder", _merged(told["encoder"]), blue)
    gray = np.repeat(cells.mean(axis=-1, keepdims=True), 3, axis=-1)
    _tensor(axes, 34.5, "vectors", told["vectors"], (gray + 0.15 * rng.normal(size=gray.shape)).clip(0, 1))
    _tensor(axes, 52.5, "codes", told["codes"], cells)
    _box(axes, [(68, MIDDLE - 8), (68, MIDDLE + 8), (87, MIDDLE + 12), (87, MIDDLE - 12)], "decoder", _merged(told["decoder"]), blue)
    _tensor(axes, 90, "image", told["image"], head, cmap="gray", vmin=0, vmax=1)
    for start, end, label in ((10, 13, ""), (32, 34.5, ""), (43.5, 52.5, "nearest"), (61.5, 68, "look up"), (87, 90, "")):
        _arrow(axes, (start, MIDDLE), (end, MIDDLE), label)
    codebook = told["colours"][np.linspace(0, len(told["colours"]) - 1, 16).astype(int)][np.newaxis]
    axes.imshow(codebook, extent=(45, 67.7, 55, 57), aspect="auto", interpolation="nearest")
    axes.text(56.4, 58, f"codebook, {told['codebook']}", ha="center", fontsize=7.5)
    for x in (48, 64.7):
        _arrow(axes, (x, 55), (x, MIDDLE + 3.4), colour="0.6")
    _draw_prior(axes, told)
    axes.set(xlim=(0, 100), ylim=(0, 62.65))  # imshow has moved them
    _save(figure, path)


def _merged(steps):
    """Equal steps in a row as one line: "2 residual blocks"."""
    runs = [(step, len(list(run))) for step, run in itertools.groupby(steps)]
    return [step if times == 1 else f"{times} {step}s" for step, times in runs]


def _drawn_head():
    """A head as a schematic shows it: float (64, 64) in [0, 1]."""
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    radius = np.hypot(x / 0.68, y / 0.86)
    head = np.where(radius < 1, np.where(radius < 0.9, 0.75, 0.5), 0.0)
    head[np.hypot((np.abs(x) - 0.14) / 0.08, (y + 0.05) / 0.3) < 1] = 0.15
    return head


def code_use_plot(codes, num_embeddings):
    """Draws how often each code is used, most used first; returns a matplotlib figure."""
    use = np.sort(np.bincount(np.ravel(codes), minlength=num_embeddings))[::-1] / np.size(codes)
    figure, axes = plt.subplots(figsize=(7, 2.6), layout="constrained")
    axes.bar(np.arange(num_embeddings), use, width=1.0, color="0.4")
    axes.axhline(1 / num_embeddings, color="C3", linewidth=1, label="all alike")
    axes.set(xlabel="code, by its use", ylabel="share of all codes", xlim=(-0.5, num_embeddings - 0.5))
    axes.legend(fontsize="small")
    return figure


# Whole heads ----------------------------------------------------------------------------------------------------------


def crop_to_brain(heads):
    """Cuts heads, uint8 (N, S, H, W), to the rows and columns that any slice of them reaches, and two pixels more."""
    inked = (heads > 8).any(axis=(0, 1))
    sides = []
    for axis in (0, 1):
        found = np.flatnonzero(inked.any(axis=1 - axis))
        sides.append(slice(max(0, found[0] - 2), found[-1] + 3) if found.size else slice(None))
    return heads[:, :, sides[0], sides[1]]


def head_cuts(head):
    """The coronal and the sagittal cut through the middle of a head.

    Args:
        head: uint8 (S, H, W), axial slices from the lowest up, front up, the head's left on the left.

    Returns:
        (uint8 (S, W), top up, the head's left on the left; uint8 (S, H), top up, front on the left).
    """
    return head[::-1, head.shape[1] // 2], head[::-1, :, head.shape[2] // 2]


def head_figure(heads, spacing, path, num_slices=5):
    """Draws each head as a row: axial slices from low to high, and at their right a sagittal over a coronal cut.

    Args:
        heads: uint8 (N, S, H, W), as `head_cuts` takes them, pixels of 1 mm.
        spacing: mm between slices.
        path: PNG to write.
        num_slices: axial slices to draw.
    """
    heads = crop_to_brain(heads)
    count, depth, height, width = heads.shape
    shown = np.unique(np.linspace(0, depth - 1, num_slices + 2).round().astype(int)[1:-1])
    # All lengths are in mm of the axial slices. The cuts are drawn larger, so that two are nearly as high as a slice.
    gap, line = 5, 24
    scale = (height - 3 * gap) / (2 * depth * spacing)
    cuts_left = len(shown) * (width + gap)
    total = np.array([cuts_left + scale * max(height, width), 2 * line + count * (height + gap)])
    figure = plt.figure(figsize=10 * total / total[0], facecolor="black")

    def draw(picture, left, top, *size):
        corner = (left, total[1] - top - size[1]) / total
        axes = figure.add_axes([*corner, *(size / total)])
        axes.imshow(picture, cmap="gray", vmin=0, vmax=255, aspect="auto", interpolation="bilinear")
        axes.axis("off")

    def write(text, middle, top):
        figure.text(middle / total[0], 1 - top / total[1], text, color="0.8", fontsize=10, ha="center", va="center")

    cuts_middle = (cuts_left + total[0]) / 2
    for column, index in enumerate(shown):
        write(f"slice {index}", column * (width + gap) + width / 2, line / 2)
    write("sagittal and coronal cut", cuts_middle, line / 2)
    write("Front is up; in sagittal cuts, front is on the left.", total[0] / 2, total[1] - line / 2)
    for row, head in enumerate(heads):
        top = line + row * (height + gap)
        for column, index in enumerate(shown):
            draw(head[index], column * (width + gap), top, width, height)
        for cut, place in zip(head_cuts(head)[::-1], (gap, 2 * gap + scale * depth * spacing)):
            draw(cut, cuts_middle - scale * cut.shape[1] / 2, top + place, scale * cut.shape[1], scale * depth * spacing)
    figure.savefig(path, dpi=166, facecolor="black")  # 1660 pixels wide: sharp at half of that
    plt.close(figure)


def head_viewer(head, spacing):
    """A head as HTML: its axial slices under a slider, and beside them both cuts, with a line where the slice lies.

    Args:
        head: uint8 (S, H, W), as `head_cuts` takes it, pixels of 1 mm.
        spacing: mm between slices.

    Returns:
        A text without references to anything outside.
    """
    head = crop_to_brain(head[np.newaxis])[0]
    depth, height, width = head.shape
    cuts = "".join(
        f'<div class="cut" style="aspect-ratio: {cut.shape[1]} / {depth * spacing:.1f}"><img src="{_data_url(cut / 255)}" '
        f'alt="{name} cut"><i></i></div>' for name, cut in zip(("coronal", "sagittal"), head_cuts(head)))
    # One picture of all slices, of which a window shows one.
    return (f'<div class="head" style="--slices: {depth}; --slice: {depth // 2}"><div>'
            f'<div class="slice" style="aspect-ratio: {width} / {height}"><img src="{_data_url(np.concatenate(head) / 255)}" '
            f'alt="slices of a sampled head"></div>'
            f'<input type="range" min="0" max="{depth - 1}" value="{depth // 2}" aria-label="slice"><output>slice {depth // 2}'
            f"</output></div><div>{cuts}</div></div>")


def write_report(path, title, metrics, shown, bits, all_codes, colours, margin, samples, captions, neighbours=None, heads=(),
                 spacing=1.0, head_table=()):
    """Writes one HTML page that needs neither network nor other files.

    Args:
        path: file to write.
        title: one line.
        metrics: dict of numbers and sentences.
        shown: (originals, reconstructions, codes, captions) of test images: (N, H, W) in [0, 1], the same, int (N, g, g) and N
            texts. Each original is laid under its reconstruction, with a slider between them; the codes are drawn as maps.
        bits: float (N, g, g), what the prior spends on each code, drawn as maps too.
        all_codes: int (...), whose use is plotted.
        colours: (K, 3), see `code_colours`.
        margin: pixels that the model paints black on each side; they are left out.
        samples: (M, H, W) in [0, 1].
        captions: M texts.
        neighbours: uint8 (M, H, W), each sample's nearest training image, or None to leave them out.
        heads: uint8 (P, S, H, W), whole heads to look through; see `head_viewer`.
        spacing: mm between their slices.
        head_table: rows of texts, the first a heading: what was measured of heads.
    """
    rows = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(f'{value:.4g}' if isinstance(value, float) else str(value))}"
                   "</td></tr>" for name, value in metrics.items())
    most = float(np.ceil(np.max(bits)))
    surprise = matplotlib.colormaps["inferno"](bits / max(most, 1))[..., :3]
    pairs = "".join(
        f'<figure class="pair"><div><img src="{_data_url(original)}" alt="original">'
        f'<img class="over" src="{_data_url(reconstruction)}" alt="reconstruction">'
        f'<input type="range" value="50" aria-label="share of the reconstruction"></div>'
        f'<img class="codes" src="{_data_url(colours[grid])}" alt="codes"><img class="codes" src="{_data_url(map_)}" '
        f'alt="bits per code"><figcaption>{html.escape(caption)}</figcaption></figure>'
        for original, reconstruction, grid, caption, map_
        in zip(crop(shown[0], margin), crop(shown[1], margin), *shown[2:], surprise))
    drawn = "".join(
        f'<figure><img src="{_data_url(sample)}" alt="sample">'
        + (f'<img src="{_data_url(crop(neighbours[index], margin) / 255)}" alt="nearest training image">'
           if neighbours is not None else "")
        + f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        for index, (sample, caption) in enumerate(zip(crop(samples, margin), captions)))
    plot = io.BytesIO()
    figure = code_use_plot(all_codes, len(colours))
    figure.savefig(plot, format="png", dpi=120)
    plt.close(figure)
    use = "data:image/png;base64," + base64.b64encode(plot.getvalue()).decode()
    below = " Below each sample: its nearest training image." if neighbours is not None else ""
    viewers = "".join(head_viewer(head, spacing) for head in heads)
    judged = "".join(f"<tr>{''.join(f'<td>{html.escape(text)}</td>' for text in row)}</tr>" for row in head_table)
    whole = HEADS.format(viewers=viewers, judged=judged) if viewers or judged else ""
    page = REPORT.format(title=html.escape(title), rows=rows, pairs=pairs, samples=drawn, use=use, below=below, heads=whole,
                         most=most)
    path.write_text(page, encoding="utf-8")


def _data_url(image):
    """An image in [0, 1], (H, W) or (H, W, 3), as the text of a PNG."""
    file = io.BytesIO()
    Image.fromarray(np.uint8(np.round(np.clip(image, 0, 1) * 255))).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


REPORT = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
body {{ font: 16px/1.5 sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse }} th, td {{ text-align: left; padding: .1rem 1rem .1rem 0; border-bottom: 1px solid #ddd }}
section div.all {{ display: flex; flex-wrap: wrap; gap: 1rem }}
figure {{ margin: 0; width: 10.5rem }} figure img, figure input {{ width: 100%; display: block }} input {{ margin: .3rem 0 0 }}
.pair {{ display: grid; grid-template-columns: repeat(3, 1fr); gap: .3rem; width: 33rem; max-width: 100% }}
.pair div {{ position: relative }} .pair .over {{ position: absolute; top: 0; left: 0; clip-path: inset(0 0 0 50%) }}
.pair figcaption {{ grid-column: 1 / 4 }}
.codes {{ image-rendering: pixelated }} figcaption {{ text-align: center; font-size: .85rem }}
.head {{ display: flex; flex-wrap: wrap; gap: 1rem; background: #000; color: #ddd; padding: 1rem; margin-bottom: 1rem }}
.head > div {{ flex: 1 1 20rem; max-width: 28rem }} .head input {{ width: 100% }}
.slice, .cut {{ position: relative; overflow: hidden; margin-bottom: .5rem }} .cut img {{ width: 100%; height: 100% }}
.slice img {{ width: 100%; position: absolute; transform: translateY(calc(-100% * var(--slice) / var(--slices))) }}
.cut i {{ position: absolute; left: 0; right: 0; border-top: 1px solid #fb0;
  top: calc(100% * (1 - (var(--slice) + .5) / var(--slices))) }}
</style></head><body>
<h1>{title}</h1>
<section><h2>Metrics</h2><table>{rows}</table></section>
<section><h2>Reconstructions of test images</h2>
<p>Left of the slider: the original; right of it: the reconstruction. Beside it: the codes, coloured so that like codes look
alike; and what the prior did not expect: the bits that it spends on each code, from 0 (black) to {most:.0f} (bright), when it is
told the codes before and the slice's position. For research only: what surprises this model need not be of medical interest, and
what is need not surprise it.</p><div class="all">{pairs}</div></section>
<section><h2>Samples</h2><p>Invented by the prior, by slice position.{below}</p><div class="all">{samples}</div></section>
{heads}<section><h2>Use of the codebook</h2><p>By all test images.</p><img src="{use}" alt="use of the codes" style="max-width: 100%"></section>
<script>
document.querySelectorAll(".pair").forEach(pair => pair.querySelector("input").addEventListener("input", event =>
  pair.querySelector(".over").style.clipPath = `inset(0 0 0 ${{event.target.value}}%)`));
document.querySelectorAll(".head").forEach(head => head.querySelector("input").addEventListener("input", event => {{
  head.style.setProperty("--slice", event.target.value);
  head.querySelector("output").textContent = `slice ${{event.target.value}}`;
}}));
</script></body></html>
"""

HEADS = """<section><h2>Whole heads</h2>
<p>Sampled slice by slice, from the lowest up. Front is up; in the sagittal cut, front is on the
left. The line shows where the slice lies.</p>{viewers}<table>{judged}</table></section>
"""


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
    labelled = [np.hstack([np.rot90(_line(name, len(picture))), picture]) for name, picture in zip(rows, pictures)]
    return np.vstack([_line(title, labelled[0].shape[1]), *labelled])


def _line(text, width):
    """A line of white text on black: uint8 (24, width)."""
    picture = Image.new("L", (width, 24))
    ImageDraw.Draw(picture).text((6, 3), text, fill=255, font=ImageFont.load_default(14))
    return np.asarray(picture)


def write_gif(frame_paths, path, most=10, levels=32):
    """Writes PNG frames as an endless GIF that rests on the first and longer on the last.

    Args:
        frame_paths: the frames in their order.
        path: GIF to write.
        most: frames to keep, at most: the first, the last, and more of the early ones, where most changes.
        levels: of gray; with all 256 the file would be several times as large.
    """
    kept = np.unique(np.geomspace(1, len(frame_paths), most).round().astype(int)) - 1
    step = 255 / (levels - 1)
    frames = [np.uint8(np.round(np.round(imageio.imread(frame_paths[index]) / step) * step)) for index in kept]
    durations = [1200, *[600] * (len(frames) - 2), 3000]
    # Of a single frame, Pillow wants a single duration.
    imageio.imwrite(path, frames, extension=".gif", duration=durations if len(frames) > 1 else 3000, loop=0)


def plot_rate_distortion(curves, model, fixed, path):
    """Draws SSIM over bytes per image, containers not counted.

    Of a codec only those points are drawn that no smaller file of it reaches. Some qualities decode black as 1 or 2 of 255,
    which no eye sees and SSIM punishes: their curves would jump.

    Args:
        curves: dict of codec -> list of (bytes, SSIM).
        model: the same list for the model with its prior as entropy coder.
        fixed: (bytes, SSIM) of the model with codes of fixed length.
        path: PNG to write.
    """
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for codec, points in curves.items():
        points = sorted(points)
        best = np.maximum.accumulate([ssim for _, ssim in points])
        kept = [point for index, point in enumerate(points) if not index or point[1] > best[index - 1]]
        axes.plot(*zip(*kept), "o-", markersize=3, label=codec)
    axes.plot(*zip(*model), "*-", color="black", markersize=8, label="VQ-VAE, codes coded by the prior")
    axes.plot(*fixed, "D", color="black", label="VQ-VAE, codes of fixed length")
    axes.set(xlabel="bytes per image, without container (log axis)", ylabel="mean SSIM (7x7 window)", xscale="log",
             title="Rate and distortion on test people")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", title="a codec's points that a smaller file of it beats are left out", title_fontsize="x-small")
    _save(figure, path)

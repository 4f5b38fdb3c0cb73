"""Draws assets/architecture.png, the schematic of both networks, read from a run's models."""

from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).parents[1]))
import support.environment  # noqa: F401 (first: what TensorFlow, Keras and matplotlib read when imported)

import itertools

from keras import layers
from matplotlib import patches
from matplotlib.figure import Figure
import numpy as np

from support.figures import code_colours, DPI

VQVAE_Y = 42  # the height of the VQ-VAE's row in the schematic


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

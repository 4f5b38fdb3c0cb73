"""Draws assets/architecture.png, the schematic of both networks, with what a run's models make of a slice.

    python benchmarks/architecture.py [--run-dir RUN]

The slice is one of the demo cohort, a simulated person's.
"""

from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).parents[1]))
import support.environment  # noqa: F401

import itertools

from keras import layers
from matplotlib import patches
from matplotlib.figure import Figure
import numpy as np

import dataset
import predict
from support import cli, devices, template
from support.figures import code_colours, DPI
from support.files import whole_file
from support.images import fit_to_square, spread, to_unit

PICTURE = Path(__file__).parents[1] / "assets" / "architecture.png"
VQVAE_Y = 42  # the height of the VQ-VAE's row in the schematic
POSITION = 14  # of the slice that is drawn
FONT_SIZE = 8.5  # at 830 pixels, the width of a page on GitHub, letters of 12 pixels; in boxes 11


def outline(vqvae, prior):
    """The words of the schematic, read from the models.

    Returns:
        A dict of texts: `image`, `vectors`, `codebook`, `codes` and `logits`, the shapes of these; `encoder`,
        `decoder` and `prior`, lists of the steps of these; `conditioning`, a list of (name, shape) of what
        the logits depend on.
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
        "conditioning": conditioning}


def pictures_of_slice(vqvae):
    """A slice of the demo cohort on its way through the VQ-VAE.

    Returns:
        A dict of pictures in [0, 1]: `image`, `decoded`, (H, W); `vectors`, their lengths, (g, g, 3) in gray;
        `codes`, (g, g, 3), coloured as the codebook; `codebook`, (1, 16, 3), 16 of its colours.
    """
    test = dataset.load_splits(template.make_demo_cohort(), ["test"], limit=1)["test"]
    image, _ = fit_to_square(test.images[test.positions == POSITION], vqvae.image_size)
    vectors = np.asarray(vqvae.encoder(dataset.normalise(image)[..., np.newaxis]))[0]
    codes = np.asarray(vqvae.encode_to_codes(dataset.normalise(image)[..., np.newaxis]))
    colours = code_colours(vqvae.quantizer.embeddings)
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return {"image": image[0] / 255, "vectors": np.repeat(length / length.max(), 3, axis=-1),
            "codes": colours[codes[0]], "decoded": to_unit(vqvae.decode_codes(codes))[0],
            "codebook": colours[spread(len(colours), 16)][np.newaxis]}


def _prior_steps(prior):
    rows_up = prior.blocks[0].rows_up
    codes_left = max(block.codes_left for block in prior.blocks)
    dense = [str(layer.units) for layer in prior.logits.layers if isinstance(layer, layers.Dense)]
    return [f"embeddings of {prior.num_filters}",
            f"{_steps(prior.context_blocks).count('residual block')} residual blocks for the slices below",
            f"{len(prior.blocks)} gated blocks: each sees {rows_up} row{'s' if rows_up > 1 else ''} above",
            f"and up to {codes_left} codes to the left",
            f"{sum(map(bool, prior.attentions))} axial attentions",
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
            steps.append(f"crop border of {layer.cropping[0][0]} pixels")
        elif isinstance(layer, layers.ZeroPadding2D) and layer.padding[0][0]:
            steps.append(f"black border of {layer.padding[0][0]} pixels")
    return steps


def _arrow(axes, start, end, label="", colour="0.3"):
    """Draws an arrow from point to point, its label above the middle."""
    style = {"arrowstyle": "-|>", "color": colour, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=style)
    axes.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 1.2, label, ha="center", fontsize=FONT_SIZE)


def _tensor(axes, left, name, shape, picture, **options):
    """Draws a picture in a frame, at the height of the VQ-VAE's row, its name and shape below."""
    extent = left, left + 8.5, VQVAE_Y - 4.25, VQVAE_Y + 4.25
    axes.imshow(picture, extent=extent, interpolation="nearest", zorder=2, **options)
    axes.add_patch(patches.Rectangle((left, VQVAE_Y - 4.25), 8.5, 8.5, fill=False, edgecolor="0.3", zorder=3))
    axes.text(left + 4.25, VQVAE_Y - 5.3, f"{name}\n{shape}", ha="center", va="top", fontsize=FONT_SIZE,
              linespacing=1.4)


def _box(axes, corners, title, steps, colour):
    """Draws a network: a polygon with its title and its steps inside."""
    axes.add_patch(patches.Polygon(corners, facecolor=colour, edgecolor="0.3"))
    x, y = np.mean(corners, axis=0)
    axes.text(x, y + len(steps) * 1.15, title, ha="center", va="center", fontsize=10.5, weight="bold")
    axes.text(x, y - 1.15, "\n".join(steps), ha="center", va="center", fontsize=8, linespacing=1.35)


def _rounded(axes, left, bottom, width, height):
    """Draws a light box with round corners."""
    axes.add_patch(patches.FancyBboxPatch((left, bottom), width, height, boxstyle="round,pad=0.3",
                                          facecolor="0.95", edgecolor="0.5"))


def _draw_prior(axes, texts):
    """Draws the lower row: what the prior is conditioned on, the prior, and what it gives."""
    middle, rows = 11.5, texts["conditioning"]
    for row, (name, shape) in enumerate(rows):
        y = middle + 2.5 * (len(rows) - 1) - 5 * row
        _rounded(axes, 2, y - 1.5, 22, 3)
        axes.text(13, y, name, ha="center", va="center", fontsize=FONT_SIZE)
        axes.text(25, y, shape, va="center", fontsize=FONT_SIZE)
        _arrow(axes, (34.3, y), (37.5, middle + (y - middle) * 0.6))
    _box(axes, [(37.5, 3), (37.5, 20), (67.5, 20), (67.5, 3)], "PixelCNN prior", texts["prior"], "#fbe3d4")
    _arrow(axes, (67.5, middle), (72, middle))
    _rounded(axes, 72.5, 8.8, 23, 5.4)
    axes.text(84, middle, f"probability of each code\n{texts['logits']}", ha="center", va="center",
              fontsize=FONT_SIZE, linespacing=1.4)
    axes.plot((84, 84, 55.75), (14.8, 25, 25), color="0.3", linewidth=1)
    _arrow(axes, (55.75, 25), (55.75, 31.5))
    axes.text(70, 26, "sample one code after another", ha="center", fontsize=FONT_SIZE)


def _draw_vqvae(axes, texts, pictures):
    """Draws the upper row: image, encoder, vectors, codes, decoder, what is decoded; the codebook above."""
    blue = "#dbe9f6"
    encoder, decoder = _merge_repeats(texts["encoder"]), _merge_repeats(texts["decoder"])
    low, high = VQVAE_Y - 8, VQVAE_Y + 8
    _tensor(axes, 1.3, "image", texts["image"], pictures["image"], cmap="gray", vmin=0, vmax=1)
    _box(axes, [(11.5, low - 4), (11.5, high + 4), (34, high), (34, low)], "encoder", encoder, blue)
    _tensor(axes, 36, "vectors", texts["vectors"], pictures["vectors"])
    _tensor(axes, 51.5, "codes", texts["codes"], pictures["codes"])
    _box(axes, [(66.5, low), (66.5, high), (89, high + 4), (89, low - 4)], "decoder", decoder, blue)
    _tensor(axes, 90.6, "decoded", texts["image"], pictures["decoded"], cmap="gray", vmin=0, vmax=1)
    arrows = (9.8, 11.5, ""), (34, 36, ""), (44.5, 51.5, "nearest"), (60, 66.5, "look up"), (89, 90.6, "")
    for start, end, label in arrows:
        _arrow(axes, (start, VQVAE_Y), (end, VQVAE_Y), label)
    axes.imshow(pictures["codebook"], extent=(44.4, 67.1, 55, 57), aspect="auto", interpolation="nearest")
    axes.text(55.75, 58, f"codebook, {texts['codebook']}", ha="center", fontsize=FONT_SIZE)
    for x in (48, 63.3):
        _arrow(axes, (x, 55), (x, VQVAE_Y + 3.4), colour="0.6")


def plot_architecture(texts, pictures, path):
    """Draws the schematic, a PNG, of the dicts that `outline` and `pictures_of_slice` return."""
    figure = Figure(figsize=(8.3, 5.2))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    _draw_vqvae(axes, texts, pictures)
    _draw_prior(axes, texts)
    axes.set(xlim=(0, 100), ylim=(0, 62.65), aspect="equal")  # last, as imshow changes the limits
    figure.savefig(path, dpi=DPI)


def _merge_repeats(steps):
    """Equal steps in a row as one line: "2 residual blocks"."""
    runs = [(step, len(list(run))) for step, run in itertools.groupby(steps)]
    return [step if times == 1 else f"{times} {step}s" for step, times in runs]


@cli.exit_on_user_error
def main():
    """Draws the picture of the README."""
    parser = cli.script_parser(__doc__)
    parser.add_argument("--run-dir", metavar="DIR", help="folder of the run (default: as that of predict.py)")
    arguments = parser.parse_args()
    devices.prepare(exact=True)
    vqvae, prior = predict.load_models(predict.find_run(arguments.run_dir))
    with whole_file(PICTURE) as new:
        plot_architecture(outline(vqvae, prior), pictures_of_slice(vqvae), new)
    print(f"Drawn: {PICTURE}")


if __name__ == "__main__":
    main()

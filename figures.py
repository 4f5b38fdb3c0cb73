"""Every picture, plot and GIF, and the report page."""

import base64
import html
import io

import imageio.v3 as imageio
from keras import layers
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


def outline(vqvae, prior):
    """The steps of both networks with the shapes of their outputs, read from the models, for a diagram.

    Returns:
        (list of (step, shape) of the VQ-VAE, the same of the PixelCNN), texts all.
    """
    def shape(*sizes):
        return "x".join(map(str, sizes))

    grid, codes = vqvae.grid_size, vqvae.quantizer.num_embeddings
    steps = [("image", shape(vqvae.image_size, vqvae.image_size, 1)), *_layer_steps(vqvae.encoder),
             (f"nearest of {codes} codes", shape(grid, grid)), ("their vectors", shape(grid, grid, vqvae.quantizer.embedding_dim)),
             *_layer_steps(vqvae.decoder)]
    filters = prior.num_filters
    prior_steps = [("codes above and to the left", shape(grid, grid)), ("embedding + place", shape(grid, grid, filters))]
    for index, block in enumerate(prior.blocks):
        if index % 3 == 2:
            prior_steps.append(("axial attention (vertical stack)", shape(grid, grid, filters)))
        prior_steps.append((f"gated block, {block.codes_left} to the left, + slice position", f"2 x {shape(grid, grid, filters)}"))
    head = [layer for layer in prior.head.layers if isinstance(layer, layers.Dense)]
    prior_steps += [(f"dense {layer.units}", shape(grid, grid, layer.units)) for layer in head]
    return steps, [*prior_steps, ("softmax: p(code | codes before)", shape(grid, grid, codes))]


def _layer_steps(model):
    steps = []
    for layer in model.layers:
        output = "x".join(map(str, layer.output.shape[1:]))
        if isinstance(layer, layers.Add):
            steps[-2:] = [("residual block", output)]
        elif isinstance(layer, (layers.Conv2D, layers.Conv2DTranspose)):
            kind = "transposed convolution" if isinstance(layer, layers.Conv2DTranspose) else "convolution"
            steps.append((f"{kind} {'x'.join(map(str, layer.kernel_size))}, stride {layer.strides[0]}", output))
        elif isinstance(layer, (layers.Cropping2D, layers.ZeroPadding2D)):
            steps.append(("less the black margin" if isinstance(layer, layers.Cropping2D) else "black margin", output))
    return steps


def plot_architecture(vqvae, prior, path):
    """Draws both networks as columns of steps with the shapes of their tensors.

    Args:
        vqvae: list of (step, shape as text).
        prior: the same.
        path: PNG to write.
    """
    longest = max(len(vqvae), len(prior))
    figure, panels = plt.subplots(1, 2, figsize=(10, 0.5 * longest + 0.6), layout="constrained")
    for axes, title, steps in zip(panels, ("VQ-VAE", "PixelCNN prior"), (vqvae, prior)):
        axes.set(xlim=(0, 1), ylim=(-longest, 0.4), title=title)
        axes.axis("off")
        for row, (step, shape) in enumerate(steps):
            box = {"boxstyle": "round", "facecolor": "0.93", "edgecolor": "0.5"}
            axes.text(0.36, -row - 0.4, step, ha="center", va="center", fontsize="small", bbox=box)
            axes.text(0.98, -row - 0.4, shape, ha="right", va="center", fontsize="small", family="monospace")
            if row:
                axes.annotate("", (0.36, -row - 0.18), (0.36, -row + 0.18), arrowprops={"arrowstyle": "->", "color": "0.4"})
    _save(figure, path)


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
    write("Front is up, the head's left on the left; in sagittal cuts, front is on the left.", total[0] / 2, total[1] - line / 2)
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


def write_report(path, title, metrics, originals, reconstructions, codes, ssims, all_codes, num_embeddings, samples, captions,
                 neighbours=None, heads=(), spacing=1.0, head_table=()):
    """Writes one HTML page that needs neither network nor other files.

    Args:
        path: file to write.
        title: one line.
        metrics: dict of numbers and sentences.
        originals: (N, H, W) in [0, 1]; each is laid under its reconstruction, with a slider between them.
        reconstructions: (N, H, W) in [0, 1].
        codes: int (N, g, g), drawn as maps.
        ssims: float (N,).
        all_codes: int (...), whose use is plotted.
        num_embeddings: K.
        samples: (M, H, W) in [0, 1].
        captions: M texts.
        neighbours: uint8 (M, H, W), each sample's nearest training image, or None to leave them out.
        heads: uint8 (P, S, H, W), whole heads to look through; see `head_viewer`.
        spacing: mm between their slices.
        head_table: rows of texts, the first a heading: what was measured of heads.
    """
    rows = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(f'{value:.4g}' if isinstance(value, float) else str(value))}"
                   "</td></tr>" for name, value in metrics.items())
    spectrum = matplotlib.colormaps["nipy_spectral"]
    pairs = "".join(
        f'<figure class="pair"><div><img src="{_data_url(original)}" alt="original"><img class="over" src="{_data_url(reconstruction)}" '
        f'alt="reconstruction"></div><input type="range" value="50" aria-label="share of the reconstruction">'
        f'<img class="codes" src="{_data_url(spectrum(grid / (num_embeddings - 1))[..., :3])}" alt="codes">'
        f"<figcaption>SSIM {ssim:.3f}</figcaption></figure>"
        for original, reconstruction, grid, ssim in zip(originals, reconstructions, codes, ssims))
    drawn = "".join(
        f'<figure><img src="{_data_url(sample)}" alt="sample">'
        + (f'<img src="{_data_url(neighbours[index] / 255)}" alt="nearest training image">' if neighbours is not None else "")
        + f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        for index, (sample, caption) in enumerate(zip(samples, captions)))
    plot = io.BytesIO()
    figure = code_use_plot(all_codes, num_embeddings)
    figure.savefig(plot, format="png", dpi=120)
    plt.close(figure)
    use = "data:image/png;base64," + base64.b64encode(plot.getvalue()).decode()
    below = " Below each sample: its nearest training image." if neighbours is not None else ""
    viewers = "".join(head_viewer(head, spacing) for head in heads)
    judged = "".join(f"<tr>{''.join(f'<td>{html.escape(text)}</td>' for text in row)}</tr>" for row in head_table)
    whole = HEADS.format(viewers=viewers, judged=judged) if viewers or judged else ""
    page = REPORT.format(title=html.escape(title), rows=rows, pairs=pairs, samples=drawn, use=use, below=below, heads=whole)
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
figure {{ margin: 0; width: 10.5rem }} figure img, figure input {{ width: 100%; display: block }}
.pair div {{ position: relative }} .pair .over {{ position: absolute; inset: 0; clip-path: inset(0 0 0 50%) }}
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
<p>Left of the slider: the original; right of it: the reconstruction. Below: the codes.</p><div class="all">{pairs}</div></section>
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
<p>Sampled slice by slice, from the lowest up. Front is up and the head's left on the left; in the sagittal cut, front is on the
left. The line shows where the slice lies.</p>{viewers}<table>{judged}</table></section>
"""


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

"""The report: one HTML page of a run's figures, pictures and heads. It needs no network and no other file."""

import base64
import io
import math
from pathlib import Path
from typing import NamedTuple

import jinja2
import matplotlib
import numpy as np
from PIL import Image

from support import figures, judge
from support.images import brain_box, crop

# What each figure of metrics.json is, by the heading that it stands under.
MEANINGS = {
    "Reconstruction": {
        "ssim": "structural similarity, 7x7 window, 1 is equal",
        "ssim_gaussian": "structural similarity, Gaussian window (Wang et al. 2004), 1 is equal",
        "ssim_foreground": "the same over the original's brain only",
        "psnr": "peak signal-to-noise ratio in dB, more is better",
        "mse": "mean squared error of intensities from 0 to 1",
        "num_images": "test images measured",
    },
    "Codes and bits": {
        "bits_per_code": "code length of whole heads, given slices below and person, whose bits are in it",
        "bits_per_code_alone": "code length of single slices, without any context",
        "bytes_per_image": "size of a slice, coded by the prior",
        "code_entropy": "bits per code if codes were independent",
        "perplexity": "number of equally likely codes with that entropy",
        "codes_used": "codes that occur at all",
    },
}


class Examples(NamedTuple):
    """Test images to look at: each original under its reconstruction, its codes and their bits beside it."""

    originals: np.ndarray  # (N, H, W) in [0, 1]
    reconstructions: np.ndarray  # likewise
    codes: np.ndarray  # int (N, g, g)
    bits: np.ndarray  # float (N, g, g), the code length of each code, given the slices below and the person
    captions: list  # N texts


def write_report(path, *, title, facts, notice, margin, colours, samples, sample_positions, heads,
                 head_positions, geometry, metrics=None, examples=None, codes=None, head_table=None):
    """Writes the page as HTML. What is None or empty is left out, with its heading.

    Args:
        notice: see `synthetic.notice`.
        margin: pixels that the model paints black on each side; they are cut off.
        colours: (K, 3), see `figures.code_colours`.
        samples, sample_positions: (M, H, W) in [0, 1], and their M slice positions.
        heads, head_positions: uint8 (P, S, H, W), from the lowest slice up, and their S slice positions.
        geometry: `volumes.SliceGeometry` of the heads.
        metrics: dict of numbers. A `NAME_sd` is shown as the spread of NAME.
        codes: int (...), those of all test images, whose use is plotted.
        head_table: rows of texts, the first a heading; the others begin with a key of `judge.ROWS`.
    """
    templates = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
                                   undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    heading, *rows = head_table or [()]
    page = templates.get_template("report.html").render(
        title=title, facts=facts, notice=notice, metric_groups=_metric_groups(metrics or {}),
        examples=_example_pictures(examples, margin, colours) if examples else [],
        top=_top(examples.bits) if examples else 0,
        samples=[(_png(image), position) for image, position in zip(crop(samples, margin), sample_positions)],
        heads=[_head_pictures(head, head_positions, geometry) for head in heads],
        head_table=[[*row, judge.ROWS[row[0]]] for row in rows], head_heading=[*heading, "what it is"],
        cut_names=figures.cut_names(geometry), axes_caption=figures.axes_caption(geometry),
        code_use=None if codes is None else _uri(
            lambda file: figures.code_use_plot(codes, len(colours)).savefig(file, dpi=figures.DPI)))
    path.write_text(page, encoding="utf-8", errors="backslashreplace")  # a folder's name need not be text


def with_spread(value, spread=None):
    """A figure as text, with its standard deviation over people if there is one: "0.917 ± 0.008"."""
    if not isinstance(value, float):
        return str(value)
    if not spread or not math.isfinite(spread):
        return f"{value:.4g}"
    decimals = max(0, math.ceil(-math.log10(spread / 2)))  # one digit of the spread; two if it begins with 1
    return f"{value:.{decimals}f} ± {spread:.{decimals}f}"


def _metric_groups(metrics):
    """Lists of (name, value, meaning) by their heading."""
    known = {name for meanings in MEANINGS.values() for name in meanings} | {f"{name}_sd" for name in metrics}
    groups = {**MEANINGS, "Other figures": {name: "" for name in metrics if name not in known}}
    return {heading: [(name, with_spread(metrics[name], metrics.get(f"{name}_sd")), meaning)
                      for name, meaning in meanings.items() if name in metrics]
            for heading, meanings in groups.items()}


def _uri(write):
    """The PNG that `write` puts into a file, as a data URI."""
    file = io.BytesIO()
    write(file)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _png(picture):
    """A picture, (H, W) or (H, W, 3), in [0, 1] or uint8, as a data URI."""
    if picture.dtype != np.uint8:
        picture = np.uint8(np.round(np.clip(picture, 0, 1) * 255))
    return _uri(lambda file: Image.fromarray(picture).save(file, "PNG"))


def _top(bits):
    """The end of the scale of bits: the most that a code needs, rounded up."""
    return max(1, math.ceil(bits.max(initial=0, where=np.isfinite(bits))))


def _example_pictures(examples, margin, colours):
    """A dict of data URIs and texts for each of the `Examples`."""
    maps = matplotlib.colormaps["inferno"](examples.bits / _top(examples.bits))[..., :3]
    originals, reconstructions = crop(examples.originals, margin), crop(examples.reconstructions, margin)
    return [{"original": _png(originals[index]), "reconstruction": _png(reconstructions[index]),
             "codes": _png(colours[examples.codes[index]]), "bits": _png(maps[index]),
             "mean_bits": f"{np.mean(examples.bits[index]):.2f}", "caption": caption}
            for index, caption in enumerate(examples.captions)]


def _head_pictures(head, positions, geometry):
    """A head, uint8 (S, H, W): all its slices as one picture, of which a window shows one, and both cuts."""
    head = head[brain_box(head[np.newaxis], rim=2)[1:]]
    depth, height, width = head.shape
    cuts = [(name, _png(cut), f"{cut.shape[1] * geometry.pixel_size:.1f} / {depth * geometry.spacing:.1f}")
            for name, cut in zip(figures.cut_names(geometry), figures.head_cuts(head))]
    return {"slices": _png(np.concatenate(head)), "ratio": f"{width} / {height}", "cuts": cuts,
            "positions": [int(position) for position in positions]}

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
from skimage.util import montage

from support import figures, judge
from support.images import brain_box, crop, spread

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
    """Images to look at: each original under its reconstruction, its codes and their bits beside it."""

    originals: np.ndarray  # (N, H, W) in [0, 1]
    reconstructions: np.ndarray  # likewise
    codes: np.ndarray  # int (N, g, g)
    bits: np.ndarray | None  # float (N, g, g), the code length of each code; None where it is not known
    captions: list  # N texts


def write_report(path, *, title, facts, notice, margin, colours, metrics=None, baselines=None, examples=None,
                 codes=None, samples=None, sample_positions=None, heads=(), head_positions=(), geometry=None,
                 head_table=None):
    """Writes the page as HTML. What is None or empty is left out, with its heading.

    Args:
        notice: see `synthetic.notice`.
        margin: pixels that the model paints black on each side; they are cut off.
        colours: (K, 3), see `figures.code_colours`.
        samples, sample_positions: (M, H, W) in [0, 1], and their M slice positions. None on a page of given
            images: then `heads` are not called sampled, but reconstructed.
        heads, head_positions: uint8 (P, S, H, W), from the lowest slice up, and their S slice positions.
        geometry: `volumes.SliceGeometry` of the heads.
        metrics: dict of numbers. A `NAME_sd` is shown as the spread of NAME.
        baselines: what needs no model, beside them: see `metrics.baselines`.
        examples: `Examples`, of which four are shown.
        codes: int (...), those of all test images, whose use is plotted.
        head_table: rows of texts, the first a heading; the others begin with a key of `judge.ROWS`.
    """
    templates = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
                                   trim_blocks=True, lstrip_blocks=True)
    heading, *rows = head_table or [()]
    content = {"title": title, "facts": facts, "notice": notice, "is_sampled": samples is not None,
               "baselines": baselines, "metric_groups": _metric_groups(metrics or {}, baselines or {}),
               "head_table": [[*row, judge.ROWS[row[0]]] for row in rows],
               "head_heading": [*heading, "what it is"]}
    if examples:
        content |= _example_pictures(examples, margin, colours)
    if samples is not None:
        content["samples"] = list(zip(map(_png, crop(samples, margin)), sample_positions))
    if len(heads):
        content |= {"heads": [_head_cuts(head, geometry) for head in heads],
                    "positions": list(map(int, head_positions)),
                    "kind": figures.stack_name(geometry, len(head_positions)),
                    "axes_caption": figures.axes_caption(geometry)}
    if codes is not None:
        plot = figures.code_use_plot(codes, len(colours))
        content["code_use"] = _uri(lambda file: plot.savefig(file, dpi=figures.DPI))
    page = templates.get_template("report.html").render(content)
    path.write_text(page, encoding="utf-8", errors="backslashreplace")  # a folder's name need not be text


def with_spread(value, spread=None):
    """A figure as text, with its standard deviation over people if there is one: "0.917 ± 0.008"."""
    if not isinstance(value, float):
        return str(value)
    if not spread or not math.isfinite(spread):
        return f"{value:.4g}"
    decimals = max(0, math.ceil(-math.log10(spread / 2)))  # one digit of the spread; two if it begins with 1
    return f"{value:.{decimals}f} ± {spread:.{decimals}f}"


def _metric_groups(metrics, baselines):
    """Tables (heading, columns, rows): a row is (name, value, that of each baseline, meaning)."""
    known = {name for meanings in MEANINGS.values() for name in meanings} | {f"{name}_sd" for name in metrics}
    groups = {**MEANINGS, "Other figures": dict.fromkeys(sorted(metrics.keys() - known), "")}
    tables = []
    for heading, meanings in groups.items():
        names = [name for name in meanings if name in metrics]
        beside = {title: values for title, values in baselines.items() if values.keys() & set(names)}
        rows = [(name, with_spread(metrics[name], metrics.get(f"{name}_sd")),
                 *(with_spread(values.get(name, "")) for values in beside.values()), meanings[name])
                for name in names]
        columns = "figure", "value", *(title.replace("_", " ") for title in beside), "what it is"
        tables += [(heading, columns, rows)] if rows else []
    return tables


def _uri(write):
    """The PNG that `write` puts into a file, as a data URI."""
    file = io.BytesIO()
    write(file)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _png(picture):
    """A picture, (H, W) or (H, W, 3), in [0, 1] or uint8, as a data URI."""
    if picture.dtype != np.uint8:
        picture = np.uint8(np.round(np.clip(picture, 0, 1) * 255))
    return _uri(lambda file: Image.fromarray(picture).save(file, "PNG", optimize=True))


def _example_pictures(examples, margin, colours):
    """Pictures and texts of up to four of the `Examples`, and the end of the scale of bits, if known."""
    originals, reconstructions = crop(examples.originals, margin), crop(examples.reconstructions, margin)
    indices = spread(len(examples.captions), 4)
    shown = [{"original": _png(originals[index]), "reconstruction": _png(reconstructions[index]),
              "codes": _png(colours[examples.codes[index]]),
              "caption": examples.captions[index].replace("\n", ", ")} for index in indices]
    if examples.bits is None:
        return {"examples": shown}
    # The end of the scale: the most that a code needs, rounded up
    top = max(1, math.ceil(examples.bits.max(initial=0, where=np.isfinite(examples.bits))))
    inferno = matplotlib.colormaps["inferno"]
    for example, bits in zip(shown, examples.bits[indices]):
        example |= {"bits": _png(inferno(bits / top)[..., :3]), "mean_bits": f"{bits.mean():.2f}"}
    return {"examples": shown, "top": top}


def _head_cuts(head, geometry):
    """The cuts across each axis of a head, uint8 (S, H, W): (name, sheet of them, number, sides in mm)."""
    head = head[brain_box(head[np.newaxis], rim=2)[1:]]
    depth = len(head) * geometry.spacing
    height, width = (count * geometry.pixel_size for count in head.shape[1:])
    upright = head[::-1]  # in cuts the highest slice is on top
    stacks = head, upright.swapaxes(0, 1), upright.transpose(2, 0, 1)
    sides = (width, height), (width, depth), (height, depth)
    return [(name, _png(montage(stack)), len(stack), *lengths)
            for name, stack, lengths in zip(("slice", *figures.cut_names(geometry)), stacks, sides)]

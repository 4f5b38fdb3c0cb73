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
from support.images import brain_box, crop
from support.volumes import stack_name

MEANINGS = {  # of the figures of metrics.json: what readers call each, and what it is
    "ssim": ("SSIM", "structural similarity, 7x7 window; 1 is equal"),
    "ssim_gaussian": ("SSIM, Gaussian window", "that of Wang et al. 2004; 1 is equal"),
    "ssim_foreground": ("SSIM in the brain", "with the Gaussian window, over the original's brain only"),
    "ssim_alone": ("SSIM, slices alone", "each slice decoded by itself, not beside its neighbours"),
    "ssim_foreground_alone": ("SSIM in the brain, slices alone", "the same over the original's brain only"),
    "psnr": ("PSNR", "peak signal-to-noise ratio in dB; more is better"),
    "mse": ("MSE", "mean squared error of intensities from 0 to 1; less is better"),
    "num_images": ("images", "test images measured"),
    "bits_per_code": ("bits per code in a head", "given the slices below and the person, whose bits are in"),
    "bits_per_code_alone": ("bits per code of a slice", "code length of single slices, without any context"),
    "bytes_per_image": ("bytes per slice", "in a head, by an ideal coder that uses the prior"),
    "code_entropy": ("entropy of codes", "bits per code if codes were independent"),
    "perplexity": ("perplexity", "number of equally likely codes with that entropy"),
    "codes_used": ("codes used", "codes that occur at all"),
}
YARDSTICKS = {"blurred_original": "original, blurred", "mean_image": "mean training image"}


class Examples(NamedTuple):
    """Up to four images to look at: each original, its reconstruction, its codes and their bits."""
    originals: np.ndarray  # (N, H, W) in [0, 1]
    reconstructions: np.ndarray  # likewise
    codes: np.ndarray  # int (N, g, g)
    bits: np.ndarray | None  # float (N, g, g), the code length of each code; None where it is not known
    captions: list  # N texts


def write_report(path, *, title, facts, notice, margin, colours, metrics=(), baselines=None, examples=None,
                 samples=None, sample_positions=(), heads=(), head_positions=(), geometry=None,
                 head_table=()):
    """Writes the page as HTML. What is None or empty is left out, with its heading.

    `colours` are `figures.code_colours`, `samples` (M, H, W) in [0, 1], `heads` uint8 (P, S, H, W). Without
    samples the page is one of given images: then heads are not called sampled, but reconstructed."""
    templates = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
                                   trim_blocks=True, lstrip_blocks=True)
    content = {"title": title, "facts": facts, "notice": notice, "metrics": []}
    yardsticks = {heading: baselines[name] for name, heading in YARDSTICKS.items()} if baselines else {}
    def figure(value):
        return f"{value:.4g}" if isinstance(value, float) else f"{value:,}"
    content["heading"] = "figure", "this run", *yardsticks, "what it is"
    for name in (name for name in MEANINGS if name in metrics):
        label, meaning = MEANINGS[name]
        sd = f" ± {metrics[f'{name}_sd']:.2g}" if f"{name}_sd" in metrics else ""
        values = [figure(scores[name]) if name in scores else "–"
                  for scores in (metrics, *yardsticks.values())]
        content["metrics"].append((label, values[0] + sd, *values[1:], meaning))
    if examples:
        content |= _example_pictures(examples, margin, colours)
    if samples is not None:
        content["samples"] = list(zip(map(_png, crop(samples, margin)), sample_positions))
    if len(heads):
        # Of each plane: name, all cuts as one picture, their number, width and height in mm
        planes = [[(name, _png(montage(cuts)), len(cuts), *sides)
                   for name, cuts, *sides in figures.head_planes(head, geometry)]
                  for head in heads[brain_box(heads, rim=2)]]
        content |= {"heads": planes, "positions": list(map(int, head_positions)),
                    "kind": stack_name(geometry, len(head_positions)),
                    "axes_caption": figures.axes_caption(geometry)}
    content["head_table"] = [[name.replace("_", " ").replace("auc", "AUC") or "figure", *cells,
                              judge.ROWS.get(name, "what it is")] for name, *cells in head_table]
    page = templates.get_template("report.html").render(content)
    path.write_text(page, encoding="utf-8", errors="backslashreplace")  # a folder's name need not be text


def _png(picture):
    """A picture, (H, W) or (H, W, 3), in [0, 1] or uint8, as a data URI."""
    if picture.dtype != np.uint8:
        picture = np.uint8(np.round(picture * 255))
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _example_pictures(examples, margin, colours):
    """Pictures and texts of the `Examples`, and the end of the scale of bits, if known."""
    bits, top, shown = examples.bits, None, []
    if bits is not None:  # the most that a code needs, rounded up
        top = max(1, math.ceil(bits.max()))
    for index, caption in enumerate(examples.captions):
        shown.append({"original": _png(crop(examples.originals[index], margin)),
                      "reconstruction": _png(crop(examples.reconstructions[index], margin)),
                      "codes": _png(colours[examples.codes[index]]), "caption": caption.replace("\n", ", ")})
        if top:
            picture = matplotlib.colormaps["inferno"](bits[index] / top)[..., :3]
            shown[-1] |= {"bits": _png(picture), "mean_bits": f"{bits[index].mean():.2f}"}
    return {"examples": shown, "top": top}

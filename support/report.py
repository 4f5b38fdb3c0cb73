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
from support.volumes import stack_name

MEANINGS = {  # of the figures of metrics.json
    "ssim": "structural similarity, 7x7 window, 1 is equal",
    "ssim_gaussian": "structural similarity, Gaussian window (Wang et al. 2004), 1 is equal",
    "ssim_foreground": "the same over the original's brain only",
    "ssim_alone": "ssim of slices decoded by themselves, not beside their neighbours",
    "ssim_foreground_alone": "the same over the original's brain only",
    "psnr": "peak signal-to-noise ratio in dB, more is better",
    "mse": "mean squared error of intensities from 0 to 1",
    "num_images": "test images measured",
    "bits_per_code": "code length of whole heads, given slices below and person, whose bits are in it",
    "bits_per_code_alone": "code length of single slices, without any context",
    "bytes_per_image": "size of a slice, coded by the prior",
    "code_entropy": "bits per code if codes were independent",
    "perplexity": "number of equally likely codes with that entropy",
    "codes_used": "codes that occur at all",
}


class Examples(NamedTuple):
    """Images to look at: each original under its reconstruction, its codes and their bits beside it."""
    originals: np.ndarray  # (N, H, W) in [0, 1]
    reconstructions: np.ndarray  # likewise
    codes: np.ndarray  # int (N, g, g)
    bits: np.ndarray | None  # float (N, g, g), the code length of each code; None where it is not known
    captions: list  # N texts


def write_report(path, *, title, facts, notice, margin, colours, metrics=None, examples=None, samples=None,
                 sample_positions=(), heads=(), head_positions=(), geometry=None, head_table=()):
    """Writes the page as HTML. What is None or empty is left out, with its heading.

    See `synthetic.notice`, `figures.code_colours`, `metrics.evaluate`, `judge.head_table`. Of the `Examples`
    four are shown. `samples` are (M, H, W) in [0, 1]; `heads` uint8 (P, S, H, W). Without samples the page is
    one of given images: then heads are not called sampled, but reconstructed."""
    templates = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
                                   trim_blocks=True, lstrip_blocks=True)
    content = {"title": title, "facts": facts, "notice": notice, "metrics": []}
    for name in (name for name in MEANINGS if name in (metrics or ())):
        value, sd = metrics[name], metrics.get(f"{name}_sd")
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        content["metrics"].append((name, f"{text} ± {sd:.2g}" if sd else text, MEANINGS[name]))
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
    content["head_table"] = [[*row, judge.ROWS.get(row[0], "what it is")] for row in head_table]
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
    """Pictures and texts of up to four of the `Examples`, and the end of the scale of bits, if known."""
    bits, top, shown = examples.bits, None, []
    if bits is not None:  # the most that a code needs, rounded up
        top = max(1, math.ceil(bits.max()))
    for index in spread(len(examples.captions), 4):
        maps = [("codes", _png(colours[examples.codes[index]]))]
        if top:
            picture = matplotlib.colormaps["inferno"](bits[index] / top)[..., :3]
            maps.append((f"{bits[index].mean():.2f} bits per code", _png(picture)))
        shown.append({"original": _png(crop(examples.originals[index], margin)), "maps": maps,
                      "reconstruction": _png(crop(examples.reconstructions[index], margin)),
                      "caption": examples.captions[index].replace("\n", ", ")})
    return {"examples": shown, "top": top}

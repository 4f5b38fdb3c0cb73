"""Rate and distortion of a trained run on whole heads, beside image codecs and video codecs.

    pip install av                                                            # PyAV, for the video codecs
    python benchmarks/codecs.py --run-dir RUN --data-dir DIR [--num-heads 8] [--figure FILE]

All numbers are means over the same images: every slice of some test people's heads, spread evenly over them.

The image codecs are JPEG, JPEG 2000, WebP and AVIF, through Pillow. The model's bytes are counted twice: as
codes of fixed length, and as the prior's code length of each slice by itself (what an entropy coder driven by
it would spend, less than a byte more). Each codec gets, per image, the largest quality that fits these bytes.
Its container, the bytes of an all-black picture, is not counted; the model has none.

The model's curve comes from choosing codes by rate and distortion in place of distance alone: code after
code, the one with the least ``distance / (w d) - log p(code | codes before)``, where d is the mean distance
of the nearest codes and w the weight of the rate. The sampler does this exactly, with ``-distance / (w d)``
as its noise.

A whole head is coded slice by slice from the lowest up, each slice given those below it as they were coded;
the person vector is sent first, a byte per number. The video codecs, HEVC (x265, preset slow) and AV1
(SVT-AV1, preset 2), both tuned for SSIM, get each head as a film of its slices of which the first alone is a
key frame, and the largest quality that fits the bytes; the sizes of all packets count, there is no container.
The last line is JSON.
"""

import os
from pathlib import Path
import sys

os.environ.setdefault("SVT_LOG", "1")  # errors only
sys.path.insert(0, str(Path(__file__).parents[1]))
import support.environment  # noqa: F401

from fractions import Fraction
from functools import partial
import io
import math

import numpy as np
from PIL import Image
import tensorflow as tf
from tqdm import tqdm

from benchmarks import common
import dataset
import predict
from support import cli, figures, metrics, sampler
from support.cli import UserError
from support.images import in_chunks, spread, to_unit
from support.people import PERSON_BITS

# Name -> (Pillow's arguments for a quality, the qualities from worst to best).
CODECS = {
    "JPEG": (lambda quality: {"format": "JPEG", "quality": quality, "optimize": True}, range(1, 96)),
    "JPEG 2000": (lambda decibel: {"format": "JPEG2000", "quality_mode": "dB", "quality_layers": [decibel],
                                   "irreversible": True, "no_jp2": True}, range(22, 56)),
    "WebP": (lambda quality: {"format": "WEBP", "quality": quality, "method": 6}, range(101)),
    "AVIF": (lambda quality: {"format": "AVIF", "quality": quality, "subsampling": "4:0:0", "speed": 4},
             range(101)),
}
CURVE_POINTS = 8
RATE_WEIGHTS = 0.5, 1, 2, 4, 8
# Name -> (encoder, decoder, its settings, the crf from worst to best).
VIDEO_CODECS = {
    "HEVC": ("libx265", "hevc", {"preset": "slow", "tune": "ssim", "x265-params": "info=0:log-level=error"},
             np.arange(51, -0.25, -0.25)),
    "AV1": ("libsvtav1", "libdav1d", {"preset": "2", "svtav1-params": "tune=2"}, np.arange(63, 0, -1)),
}
TARGETS = {"ssim": 0.96, "ssim_foreground": 0.87}  # at which the bytes of heads are compared
BUDGET_WEIGHTS = 0, 4  # those whose bytes the codecs get, besides the bytes of codes of fixed length
BATCH = 32


def encode(image, codec, quality):
    """The file's bytes of a uint8 (H, W) image."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, **CODECS[codec][0](quality))
    return file.getvalue()


def decode(data):
    """A file's bytes -> float (H, W) in [0, 1]."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("L")) / 255


def largest_that_fits(encode_at, qualities, limit, size=len):
    """What `encode_at` makes at the best quality of a `size` within `limit`; at the worst if none fits."""
    best, low, high = encode_at(qualities[0]), 1, len(qualities) - 1
    if size(best) > limit:
        return best
    while low <= high:
        middle = (low + high) // 2
        data = encode_at(qualities[middle])
        if size(data) <= limit:
            best, low = data, middle + 1
        else:
            high = middle - 1
    return best


def measure_bytes(originals, decoded, sizes):
    """Metrics of decoded images, float (N, H, W), beside originals, uint8 (N, H, W), and their mean bytes."""
    return {**metrics.reconstruction_metrics(originals / 255, decoded), "bytes": float(np.mean(sizes))}


def code_images(images, codec, quality):
    """A row of `measure_bytes` of all images at one quality, the container counted."""
    files = [encode(image, codec, quality) for image in images]
    return measure_bytes(images, np.stack(list(map(decode, files))), list(map(len, files)))


def compare(images, codec, limit, container):
    """The codec's row within `limit` bytes for each image, its container of so many bytes not counted.

    Besides what `measure_bytes` gives, `within_limit` is the share of images whose lowest quality, at least,
    fits.
    """
    files = []
    for image in tqdm(images, f"{codec}, {limit:.0f} bytes", leave=False, disable=None):
        encode_at = partial(encode, image, codec)
        files.append(largest_that_fits(encode_at, CODECS[codec][1], limit + container))
    sizes = np.array([len(file) - container for file in files])
    row = measure_bytes(images, np.stack(list(map(decode, files))), sizes)
    return {**row, "within_limit": float(np.mean(sizes <= limit))}


def curve(images, codec, container):
    """Rows without container at qualities over the lower half of the codec's range."""
    qualities = CODECS[codec][1]
    indices = spread(len(qualities) // 2 + 1, CURVE_POINTS)
    rows = [code_images(images, codec, qualities[index]) for index in indices]
    return [{**row, "bytes": row["bytes"] - container} for row in rows]


def rate_noise(vqvae, vectors, weight):
    """The noise by which the sampler chooses by rate and distortion: -distance / (w d), (B, g, g, K)."""
    distances = vqvae.quantizer.distances(vectors) + tf.reduce_sum(vectors ** 2, -1, keepdims=True)
    return -distances / (weight * tf.reduce_mean(tf.reduce_min(distances, axis=-1)))


def choose_codes(vqvae, prior, images, positions, weight, context=None, persons=None):
    """Codes slices at a weight of the rate, given what `modules.PixelCNN.call` is given.

    Args:
        vqvae: a `modules.VQVAE`.
        prior: its `modules.PixelCNN`.
        images: uint8 (B, H, W).
        positions: int (B,).
        weight: of the rate, see above; 0 takes the nearest codes.
        context: int (B, S, g, g), or None.
        persons: float (B, P), or None.

    Returns:
        (codes, int32 (B, g, g); their code length, float (B,), in bits).
    """
    vectors = vqvae.encode(dataset.normalise(images[..., np.newaxis]))
    codes = vqvae.quantizer(vectors)["codes"]
    if weight:
        context = prior.no_context(len(images)) if context is None else tf.constant(context)
        persons = tf.zeros((len(images), prior.person_size)) if persons is None else tf.constant(persons)
        noise = rate_noise(vqvae, vectors, weight)
        sample = sampler.compiled_sampler(prior)
        codes = sample(tf.constant(positions), noise, tf.constant(1.0), context, persons)
    return codes, -prior.log_prob(codes, positions, context, persons).numpy() / math.log(2)


def model_curve(vqvae, prior, images, positions):
    """The model's rows on slices by themselves, by the weight of the rate."""
    rows = {}
    for weight in (0, *RATE_WEIGHTS):
        decoded, bits = [], []
        starts = range(0, len(images), BATCH)
        for start in tqdm(starts, f"Slices, rate weight {weight}", leave=False, disable=None):
            batch = slice(start, start + BATCH)
            codes, lengths = choose_codes(vqvae, prior, images[batch], positions[batch], weight)
            decoded.append(to_unit(vqvae.decode_codes(codes)))
            bits.append(lengths)
        rows[weight] = measure_bytes(images, np.concatenate(decoded), np.concatenate(bits) / 8)
    return rows


# Whole heads ------------------------------------------------------------------------------------------------


def import_av():
    """PyAV, which brings FFmpeg's codecs, or `UserError`: only this script needs it, no requirement then."""
    try:
        import av
    except ImportError as error:
        raise UserError("The video codecs need PyAV: pip install av.") from error
    return av


def encode_film(head, codec, quality):
    """Encodes a head, uint8 (S, H, W), as a film: the bytes of each packet."""
    av = import_av()
    encoder, _, settings, _ = VIDEO_CODECS[codec]
    context = av.CodecContext.create(encoder, "w")
    depth, context.height, context.width = head.shape
    context.pix_fmt, context.framerate, context.time_base = "yuv420p", 25, Fraction(1, 25)
    context.gop_size = 4 * depth
    context.options = {**settings, "crf": f"{quality:g}"}
    # No colour: both of its planes are at their middle.
    grey = np.full((context.height // 2, context.width), 128, np.uint8)
    packets = []
    for index, image in enumerate(head):
        frame = av.VideoFrame.from_ndarray(np.concatenate([image, grey]), "yuv420p")
        frame.pts = index
        packets += encoder_output(context, frame)
    return packets + encoder_output(context, None)


def encoder_output(context, frame):
    """The packets that come of a frame, as bytes; of None, those still held back."""
    return [bytes(packet) for packet in context.encode(frame)]


def film_size(film):
    """The bytes of all packets."""
    return sum(map(len, film))


def decode_film(film, codec, height):
    """A film's packets -> float (S, H, W) in [0, 1]."""
    av = import_av()
    context = av.CodecContext.create(VIDEO_CODECS[codec][1], "r")
    packets = [*map(av.Packet, film), None]
    images = [frame.to_ndarray()[:height] for packet in packets for frame in context.decode(packet)]
    return np.stack(images) / 255


def film_row(heads, films, codec):
    """`measure_bytes` of decoded films beside the heads, uint8 (N, S, H, W); bytes per slice."""
    decoded = np.concatenate([decode_film(film, codec, heads.shape[2]) for film in films])
    return measure_bytes(np.concatenate(heads), decoded, [film_size(film) / heads.shape[1] for film in films])


def compare_films(heads, codec, limit):
    """The video codec within `limit` bytes per slice; `within_limit` as in `compare`, of heads."""
    limit_of_head = limit * heads.shape[1]
    films = []
    for head in tqdm(heads, f"{codec}, {limit:.0f} bytes", leave=False, disable=None):
        encode_at = partial(encode_film, head, codec)
        films.append(largest_that_fits(encode_at, VIDEO_CODECS[codec][3], limit_of_head, film_size))
    within = float(np.mean([film_size(film) <= limit_of_head for film in films]))
    return {**film_row(heads, films, codec), "within_limit": within}


def film_curve(heads, codec):
    """Rows at qualities over the range where films of heads are of any use."""
    qualities = VIDEO_CODECS[codec][3]
    indices = np.linspace(0.1 * len(qualities), 0.7 * len(qualities), CURVE_POINTS).astype(int)
    films = ([encode_film(head, codec, qualities[index]) for head in heads] for index in indices)
    return [film_row(heads, films_of_quality, codec) for films_of_quality in films]


def choose_heads(vqvae, prior, heads, persons, weight):
    """Codes whole heads slice by slice, each given those below it as chosen.

    Args:
        vqvae: the VQ-VAE.
        prior: its PixelCNN.
        heads: uint8 (N, S, H, W), of the prior's `slice_positions`.
        persons: float (N, P).
        weight: of the rate, see above; 0 takes the nearest codes.

    Returns:
        (codes, int32 (N, S, g, g); their code length, float (N, S) in bits, without that of the person).
    """
    no_slice = prior.no_context(len(heads))[:, 0]
    chosen, bits = {}, []
    progress = tqdm(prior.slice_positions, f"Heads, rate weight {weight}", leave=False, disable=None)
    for number, position in enumerate(progress):
        context = tf.stack([chosen.get(position - step, no_slice) for step in prior.steps_below], axis=1)
        positions = np.full(len(heads), position, np.int32)
        chosen[position], lengths = choose_codes(vqvae, prior, heads[:, number], positions, weight, context,
                                                 persons)
        bits.append(lengths)
    return np.stack(list(chosen.values()), axis=1), np.stack(bits, axis=1)


def head_curve(vqvae, prior, heads, persons):
    """The model's rows on whole heads, by the weight of the rate; bytes per slice, the person's included."""
    rows = {}
    for weight in (0, *RATE_WEIGHTS):
        codes, bits = choose_heads(vqvae, prior, heads, persons, weight)
        decoded = np.concatenate([to_unit(vqvae.decode_head(head, prior.slice_positions)) for head in codes])
        person_bits = PERSON_BITS * persons.shape[1] / heads.shape[1]
        rows[weight] = measure_bytes(np.concatenate(heads), decoded, (bits + person_bits) / 8)
    return rows


# The comparison ---------------------------------------------------------------------------------------------


def bytes_at(rows, name, target):
    """The bytes at which `name` is `target`, between rows along their logarithm; None if out of reach."""
    rows = sorted(rows, key=lambda row: row[name])
    sizes, values = ([row[key] for row in rows] for key in ("bytes", name))
    if not values[0] <= target <= values[-1]:
        return None
    return float(np.exp(np.interp(target, values, np.log(sizes))))


def take_heads(split, vqvae, prior, count):
    """Up to `count` whole heads of a split, evenly spread: uint8 (N, S, H, W), their persons, float32 (N, P).

    Raises:
        UserError: if nobody in the split has all slices.
    """
    rows = split.head_indices(prior.slice_positions)
    if not len(rows):
        raise UserError("No test person has all slices; give other data with --data-dir.")
    rows = rows[spread(len(rows), count)]
    pictures, numbers = dataset.head_pictures(split, vqvae.margin, prior.num_positions)
    return split.images[rows], prior.encode_people(pictures)[numbers[rows[:, 0]]]


def chain_of_bytes(vqvae, prior, images, slices, heads):
    """What each step of coding saves: an image's bytes as pixels, as codes of fixed length, by the prior.

    Args:
        vqvae: the VQ-VAE.
        prior: its PixelCNN.
        images: uint8 (N, H, W).
        slices: rows of `model_curve` on these images.
        heads: rows of `head_curve` on these images.
    """
    codes = in_chunks(lambda chunk: vqvae.encode_to_codes(dataset.normalise(chunk[..., np.newaxis])), images)
    bytes_per_bit = codes[0].size / 8
    return {"num_images": len(images), "pixels": images[0].size,
            "fixed_length": math.log2(prior.num_embeddings) * bytes_per_bit,
            "by_frequency": metrics.code_metrics(codes, prior.num_embeddings)["code_entropy"] * bytes_per_bit,
            "slice_alone": slices[0]["bytes"], "slice_in_head": heads[0]["bytes"]}


def compare_images(images, slices, fixed_length):
    """The image codecs beside the model on slices by themselves, at each of its bytes.

    Args:
        images: uint8 (N, H, W).
        slices: rows of `model_curve`.
        fixed_length: bytes of codes of fixed length.

    Returns:
        What goes to JSON.
    """
    black = np.zeros_like(images[0])
    containers = {codec: len(encode(black, codec, qualities[0])) for codec, (_, qualities) in CODECS.items()}
    models = {f"rate weight {weight}": slices[weight] for weight in BUDGET_WEIGHTS}
    models["fixed length"] = {**slices[0], "bytes": fixed_length}
    comparison = {}
    for name, model in models.items():
        rows = {codec: compare(images, codec, model["bytes"], containers[codec]) for codec in CODECS}
        comparison[name] = {"model": model, **rows}
    return {"by_rate_weight": slices, "container_bytes": containers, "budgets": comparison,
            "curves": {codec: curve(images, codec, containers[codec]) for codec in CODECS}}


def compare_heads(heads, model):
    """The video codecs beside the model on heads, uint8 (N, S, H, W), at each of its bytes; for JSON."""
    budgets, bytes_at_targets = {}, {}
    for weight in BUDGET_WEIGHTS:
        rows = {codec: compare_films(heads, codec, model[weight]["bytes"]) for codec in VIDEO_CODECS}
        budgets[f"rate weight {weight}"] = {"model": model[weight], **rows}
    curves = {codec: film_curve(heads, codec) for codec in VIDEO_CODECS}
    curves_of_all = {"model": model.values(), **curves}
    for name, target in TARGETS.items():
        sizes = {method: bytes_at(rows, name, target) for method, rows in curves_of_all.items()}
        bytes_at_targets[name] = {"target": target, **sizes}
    return {"num_heads": len(heads), "by_rate_weight": model, "budgets": budgets, "curves": curves,
            "bytes_at": bytes_at_targets}


def print_budgets(title, budgets):
    """Prints what all get out of the same bytes."""
    print(f"{title:36}{'bytes':>8}{'ssim':>8}{'in brain':>10}{'psnr':>8}{'within':>8}")
    for budget, rows in budgets.items():
        for name, row in rows.items():
            print("{:36}{bytes:8.0f}{ssim:8.3f}{ssim_foreground:10.3f}{psnr:8.1f}{:8.0%}"
                  .format(f"{budget}, {name}", row.get("within_limit", 1), **row))


def points_of(rows):
    """(bytes, SSIM) of each row, by rising bytes."""
    return sorted((row["bytes"], row["ssim"]) for row in rows)


def plot_rate_distortion(curves, model, fixed, path):
    """Draws SSIM over bytes per image, containers not counted.

    Of a codec only those points are drawn that no smaller file of it reaches. Some qualities decode black as
    1 or 2 of 255, which is invisible but lowers SSIM: their curves would jump.

    Args:
        curves: dict of codec -> `points_of` its rows.
        model: the same list for the model with its prior as entropy coder.
        fixed: (bytes, SSIM) of the model with codes of fixed length.
        path: PNG to write.
    """
    figure, axes = figures.new_figure(4.5)
    for codec, points in curves.items():
        best = np.maximum.accumulate([ssim for _, ssim in points])
        useful = [point for index, point in enumerate(points) if not index or point[1] > best[index - 1]]
        axes.plot(*zip(*useful, strict=True), "o-", markersize=3, label=codec)
    label = "VQ-VAE, codes coded by the prior"
    axes.plot(*zip(*model, strict=True), "*-", color="black", markersize=8, label=label)
    axes.plot(*fixed, "D", color="black", label="VQ-VAE, codes of fixed length")
    axes.set(xlabel="bytes per image, without container (log axis)", xscale="log",
             ylabel="mean SSIM (7x7 window)", title="Rate and distortion on test people")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", title="a codec's points that a smaller file of it beats are left out",
                title_fontsize="x-small")
    figure.savefig(path, dpi=figures.DPI)


@cli.exit_on_user_error
def main():
    """Prints the tables, draws the figure, then prints JSON."""
    parser = common.argument_parser(__doc__)
    parser.add_argument("--run-dir", metavar="DIR", help="folder of the run (default: the newest in runs/)")
    parser.add_argument("--data-dir", metavar="DIR", help="folder of the PNG splits (default: the run's own)")
    parser.add_argument("--num-heads", type=cli.number(int, 1), default=8, metavar="N",
                        help="whole test heads, spread evenly over the split (default: 8)")
    parser.add_argument("--figure", metavar="FILE",
                        help="PNG to draw (default: RUN/figures/rate_distortion.png)")
    arguments = parser.parse_args()
    import_av()  # fails now rather than at the end
    run = predict.find_run(arguments.run_dir)
    vqvae, prior = predict.load_models(run)
    data = run.config["data"]
    split = dataset.load_splits(arguments.data_dir or data["folder"], ["test"], front=data["front"])["test"]
    heads, persons = take_heads(split, vqvae, prior, arguments.num_heads)
    images, positions = np.concatenate(heads), np.tile(np.int32(prior.slice_positions), len(heads))
    slices = model_curve(vqvae, prior, images, positions)
    in_heads = head_curve(vqvae, prior, heads, persons)
    chain = chain_of_bytes(vqvae, prior, images, slices, in_heads)
    print("Bytes per image, of {num_images}: {pixels:,} as pixels; {fixed_length:,.0f} as codes of fixed "
          "length; {by_frequency:,.0f} by the codes' frequency; {slice_alone:.0f} by the prior, a slice by "
          "itself; {slice_in_head:.0f} in its head".format(**chain))
    of_images = compare_images(images, slices, chain["fixed_length"])
    print_budgets("Slices by themselves", of_images["budgets"])
    of_heads = compare_heads(heads, in_heads)
    print_budgets("Whole heads, bytes per slice", of_heads["budgets"])
    for name, sizes in of_heads["bytes_at"].items():
        print(f"Bytes per slice at {name} {sizes['target']}: " + ", ".join(
            f"{method} {'not reached' if sizes[method] is None else format(sizes[method], '.0f')}"
            for method in ("model", *VIDEO_CODECS)))
    figure = Path(arguments.figure or run.folder / "figures" / "rate_distortion.png")
    curves = {codec: points_of(rows) for codec, rows in of_images["curves"].items()}
    fixed = chain["fixed_length"], slices[0]["ssim"]
    plot_rate_distortion(curves, points_of(slices.values()), fixed, figure)
    print(f"Figure: {figure}")
    common.finish("codecs", arguments, {"settings": {"run_dir": str(run.folder), "num_images": len(images)},
                                        "chain": chain, **of_images, "heads": of_heads})


if __name__ == "__main__":
    main()

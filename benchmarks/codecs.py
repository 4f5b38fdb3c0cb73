"""Rate and distortion of a trained run against image codecs, and on whole heads against video codecs.

    pip install av                                                            # PyAV, for the video codecs
    python benchmarks/codecs.py --run-dir RUN --data-dir DIR [--num-images 64] [--num-heads 8] [--figure FILE]

The image codecs are JPEG, JPEG 2000, WebP and AVIF, through Pillow.

The model's bytes are counted twice: as codes of fixed length, and as the prior's code length on the same test images
(what an entropy coder driven by it would spend, less than a byte more). Each codec gets, per image, the largest quality
that fits these bytes; once with its container counted, once with the container's bytes, those of an all-black picture,
added to what it may spend. The model's own side has no container.

The model's curve comes from choosing codes by rate and distortion in place of distance alone: code after code, the one
with the least ``distance / (w d) - log p(code | codes before)``, where d is the mean distance of the nearest codes and w
the weight of the rate. The sampler does this exactly, with ``-distance / (w d)`` as its noise.

A whole head is coded slice by slice from the lowest up, each slice given those below it as they were coded; the person vector is
sent first, a byte per number. The video codecs, HEVC (x265, preset slow) and AV1 (SVT-AV1, preset 2), both tuned for SSIM, get
each head as a film of 32 frames of which the first alone is a key frame, and the largest quality that fits the bytes; the sizes
of all packets count, there is no container. The last line is JSON.
"""

import os
from pathlib import Path
import sys

os.environ.setdefault("SVT_LOG", "1")  # errors alone
sys.path.insert(0, str(Path(__file__).parents[1]))
from support import cli  # first: sets what TensorFlow, Keras and matplotlib read when imported

from fractions import Fraction
import io
import math

import numpy as np
from PIL import Image
from scipy import ndimage
import tensorflow as tf
from tqdm import tqdm

from benchmarks import common
from support.cli import InputError
import dataset
from support import figures, metrics
import predict

# Name -> (Pillow's arguments for a quality, the qualities from worst to best).
CODECS = {
    "JPEG": (lambda quality: {"format": "JPEG", "quality": quality, "optimize": True}, range(1, 96)),
    "JPEG 2000": (lambda decibel: {"format": "JPEG2000", "quality_mode": "dB", "quality_layers": [decibel],
                                   "irreversible": True, "no_jp2": True}, range(22, 56)),
    "WebP": (lambda quality: {"format": "WEBP", "quality": quality, "method": 6}, range(0, 101)),
    "AVIF": (lambda quality: {"format": "AVIF", "quality": quality, "subsampling": "4:0:0", "speed": 4}, range(0, 101)),
}
CURVE_POINTS = 8
RATE_WEIGHTS = 0.5, 1, 2, 4, 8
# Name -> (encoder, decoder, its settings, the crf from worst to best).
VIDEO_CODECS = {
    "HEVC": ("libx265", "hevc", {"preset": "slow", "tune": "ssim", "x265-params": "info=0:log-level=error"},
             np.arange(51, -0.25, -0.25)),
    "AV1": ("libsvtav1", "libdav1d", {"preset": "2", "svtav1-params": "tune=2"}, np.arange(63, 0, -1)),
}
SSIM_TARGET = 0.96  # at which the bytes of heads are compared
COMPARED_WEIGHTS = 0, 4  # those whose bytes the codecs get, besides the bytes of codes of fixed length


def encode(image, codec, quality):
    """The file's bytes of a uint8 (H, W) image."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, **CODECS[codec][0](quality))
    return file.getvalue()


def decode(data):
    """A file's bytes -> float (H, W) in [0, 1]."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("L")) / 255


def largest_that_fits(encode_at, qualities, limit, size=len):
    """What `encode_at` makes, of a `size` within `limit`, at the best quality, by bisection; at the worst one if none fits."""
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


def quality_row(images, files):
    """Metrics of decoded files beside the images, with their mean bytes."""
    decoded = np.stack([decode(file) for file in files])
    return {**metrics.reconstruction_metrics(images / 255, decoded), "bytes": float(np.mean([len(file) for file in files]))}


def compare(images, codec, limit, overhead):
    """The codec within `limit` bytes, its container of `overhead` bytes counted or not."""
    rows = {}
    for name, free in (("with_container", 0), ("without_container", overhead)):
        files = [largest_that_fits(lambda quality: encode(image, codec, quality), CODECS[codec][1], limit + free)
                 for image in tqdm(images, f"{codec}, {limit:.0f} bytes", leave=False, disable=None)]
        row = quality_row(images, files)
        row["fitted"] = float(np.mean([len(file) <= limit + free for file in files]))
        row["bytes"] -= free
        rows[name] = row
    return rows


def curve(images, codec, overhead):
    """(mean bytes without container, mean SSIM) at qualities over the lower half of the codec's range."""
    qualities = CODECS[codec][1]
    points = []
    for index in np.unique(np.linspace(0, len(qualities) // 2, CURVE_POINTS).astype(int)):
        row = quality_row(images, [encode(image, codec, qualities[index]) for image in images])
        points.append((row["bytes"] - overhead, row["ssim"]))
    return sorted(points)


def rate_noise(vqvae, vectors, weight):
    """The noise with which the sampler chooses codes by rate and distortion: -distance / (w d), (B, g, g, K)."""
    distances = vqvae.quantizer.distances(vectors) + tf.reduce_sum(vectors ** 2, -1, keepdims=True)
    return -distances / (weight * tf.reduce_mean(tf.reduce_min(distances, axis=-1)))


def model_curve(vqvae, prior, batches):
    """The model's rows, by the weight of the rate in choosing codes; 0 is the nearest code each."""
    choose = tf.function(prior.sample_from_noise)
    rows = {}
    for weight in (0, *RATE_WEIGHTS):
        originals, decoded, bits = [], [], []
        for images, positions in batches:
            vectors = vqvae.encode(images)
            codes = vqvae.quantize_vectors(vectors)["codes"]
            if weight:
                codes = choose(positions, rate_noise(vqvae, vectors, weight), tf.constant(1.0))
            originals.append(metrics.to_unit(images))
            decoded.append(metrics.to_unit(vqvae.decode_codes(codes)))
            bits.append(-prior.log_prob(codes, positions).numpy() / math.log(2))
        rows[weight] = {**metrics.reconstruction_metrics(*map(np.concatenate, (originals, decoded))),
                        "bytes": float(np.concatenate(bits).mean() / 8)}
    return rows


# Whole heads ----------------------------------------------------------------------------------------------------------


def import_av():
    """PyAV, which brings FFmpeg's video codecs, or `InputError`: it is needed here alone, so requirements.txt leaves it out."""
    try:
        import av
    except ImportError as error:
        raise InputError("The video codecs need PyAV; pip install av, or give --num-heads 0.") from error
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
    grey = np.full((context.height // 2, context.width), 128, np.uint8)  # no colour: both of its planes at their middle
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
    return np.stack([frame.to_ndarray()[:height] for packet in packets for frame in context.decode(packet)]) / 255


def film_row(heads, films, codec):
    """Metrics of decoded films beside the heads, uint8 (N, S, H, W), with their mean bytes per slice."""
    decoded = np.concatenate([decode_film(film, codec, heads.shape[2]) for film in films])
    measured = metrics.reconstruction_metrics(np.concatenate(heads) / 255, decoded)
    return {**measured, "bytes": float(np.mean([film_size(film) for film in films])) / heads.shape[1]}


def compare_films(heads, codec, limit):
    """The video codec within `limit` bytes per slice."""
    whole = limit * heads.shape[1]
    films = [largest_that_fits(lambda crf: encode_film(head, codec, crf), VIDEO_CODECS[codec][3], whole, film_size)
             for head in tqdm(heads, f"{codec}, {limit:.0f} bytes", leave=False, disable=None)]
    fitted = float(np.mean([film_size(film) <= whole for film in films]))
    return {**film_row(heads, films, codec), "fitted": fitted}


def film_curve(heads, codec):
    """(mean bytes per slice, mean SSIM) at qualities over the range where films of heads are of any use."""
    qualities = VIDEO_CODECS[codec][3]
    points = []
    for index in np.linspace(0.1 * len(qualities), 0.7 * len(qualities), CURVE_POINTS).astype(int):
        row = film_row(heads, [encode_film(head, codec, qualities[index]) for head in heads], codec)
        points.append((row["bytes"], row["ssim"]))
    return sorted(points)


def choose_heads(vqvae, prior, heads, persons, weight):
    """Codes whole heads slice by slice, each given those below it as chosen.

    Args:
        vqvae: the VQ-VAE.
        prior: its PixelCNN.
        heads: uint8 (N, S, H, W).
        persons: float (N, P).
        weight: of the rate, see above; 0 takes the nearest codes.

    Returns:
        (codes, int32 (N, S, g, g); their code length, float (N, S) in bits, without that of the person).
    """
    none = tf.fill((len(heads), prior.grid_size, prior.grid_size), prior.num_embeddings)
    persons = tf.constant(persons, tf.float32)
    drawn, bits = [], []
    for position in tqdm(range(heads.shape[1]), f"Heads, rate weight {weight}", leave=False, disable=None):
        positions = tf.fill(len(heads), position)
        below = tf.stack([drawn[-step] if step <= position else none for step in prior.steps_below], axis=1)
        vectors = vqvae.encode(dataset.normalise(heads[:, position, ..., np.newaxis]))
        codes = vqvae.quantize_vectors(vectors)["codes"]
        if weight:
            codes = prior.compiled_sampler(positions, rate_noise(vqvae, vectors, weight), tf.constant(1.0), below, persons)
        drawn.append(codes)
        bits.append(-prior.log_prob(codes, positions, below, persons).numpy() / math.log(2))
    return np.stack(drawn, axis=1), np.stack(bits, axis=1)


def head_curve(vqvae, prior, heads, persons):
    """The model's rows on whole heads, by the weight of the rate; bytes per slice, the person's included."""
    rows = {}
    for weight in (0, *RATE_WEIGHTS):
        codes, bits = choose_heads(vqvae, prior, heads, persons, weight)
        decoded = np.concatenate([metrics.to_unit(vqvae.decode_codes(head)) for head in codes])
        rows[weight] = {**metrics.reconstruction_metrics(np.concatenate(heads) / 255, decoded),
                        "bits_per_code": float(bits.mean() / codes[0, 0].size),
                        "bytes": float(bits.mean() / 8 + persons.shape[1] / heads.shape[1])}
    return rows


def bytes_at(points, ssim=SSIM_TARGET):
    """The bytes at an SSIM, between (bytes, SSIM) points along the logarithm of the bytes; None if they do not reach it."""
    sizes, ssims = np.transpose(sorted(points, key=lambda point: point[1]))
    return float(np.exp(np.interp(ssim, ssims, np.log(sizes)))) if ssims[0] <= ssim <= ssims[-1] else None


def compare_heads(vqvae, prior, split, count):
    """The whole comparison on up to `count` heads of a split, spread evenly; prints its table, returns what goes to JSON.

    Raises:
        InputError: if nobody in the split has all slices.
    """
    rows = split.heads(range(prior.num_positions))
    if not len(rows):
        raise InputError("No test person has all slices; give --num-heads 0 to leave whole heads out.")
    _, persons = dataset.head_context(split, prior, vqvae.settings["margin"])
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, count).astype(int))]
    heads, persons = split.images[rows], persons[rows[:, 0]]
    model = head_curve(vqvae, prior, heads, persons)
    films = {f"rate weight {weight}": {codec: compare_films(heads, codec, model[weight]["bytes"]) for codec in VIDEO_CODECS}
             for weight in COMPARED_WEIGHTS}
    curves = {codec: film_curve(heads, codec) for codec in VIDEO_CODECS}
    line = "{:32}{:>8.0f}{:>9.3f}{:>17.3f}{:>9.1f}{:>9.0%}".format
    print(f"{len(heads)} whole heads, bytes per slice:")
    for weight, row in model.items():
        print(line(f"model, rate weight {weight}", row["bytes"], row["ssim"], row["ssim_foreground"], row["psnr"], 1))
        for codec, found in films.get(f"rate weight {weight}", {}).items():
            print(line(f"  {codec}", found["bytes"], found["ssim"], found["ssim_foreground"], found["psnr"], found["fitted"]))
    at_target = {"model": bytes_at([(row["bytes"], row["ssim"]) for row in model.values()]),
                 **{codec: bytes_at(points) for codec, points in curves.items()}}
    print(f"Bytes per slice at SSIM {SSIM_TARGET}: " + ", ".join(
        f"{name} {'not reached' if size is None else format(size, '.0f')}" for name, size in at_target.items()))
    return {"num_heads": len(heads), "by_rate_weight": model, "video": films, "curves": curves,
            "bytes_at_ssim": {"ssim": SSIM_TARGET, **at_target},
            "ratio": {name: {codec: model[weight]["ssim"] / row["ssim"] for codec, row in films[name].items()}
                      for weight, name in zip(COMPARED_WEIGHTS, films)}}


def plot_rate_distortion(curves, model, fixed, path):
    """Draws SSIM over bytes per image, containers not counted.

    Of a codec only those points are drawn that no smaller file of it reaches. Some qualities decode black as 1 or 2 of 255,
    which is invisible but lowers SSIM: their curves would jump.

    Args:
        curves: dict of codec -> list of (bytes, SSIM).
        model: the same list for the model with its prior as entropy coder.
        fixed: (bytes, SSIM) of the model with codes of fixed length.
        path: PNG to write.
    """
    figure, axes = figures.new_figure(4.5)
    for codec, points in curves.items():
        points = sorted(points)
        best = np.maximum.accumulate([ssim for _, ssim in points])
        useful = [point for index, point in enumerate(points) if not index or point[1] > best[index - 1]]
        axes.plot(*zip(*useful), "o-", markersize=3, label=codec)
    axes.plot(*zip(*model), "*-", color="black", markersize=8, label="VQ-VAE, codes coded by the prior")
    axes.plot(*fixed, "D", color="black", label="VQ-VAE, codes of fixed length")
    axes.set(xlabel="bytes per image, without container (log axis)", ylabel="mean SSIM (7x7 window)", xscale="log",
             title="Rate and distortion on test people")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", title="a codec's points that a smaller file of it beats are left out",
                title_fontsize="x-small")
    figure.savefig(path, dpi=figures.DPI)


@cli.exit_on_input_error
def main():
    """Prints the table, draws the figure, then prints JSON."""
    parser = common.argument_parser(__doc__)
    parser.add_argument("--run-dir", metavar="DIR", help="folder of the run (default: the newest in runs/)")
    parser.add_argument("--data-dir", metavar="DIR", help="folder of the PNG splits (default: the run's own)")
    parser.add_argument("--num-images", type=cli.number(int, 1), default=64, metavar="N",
                        help="test images, spread evenly over the split (default: 64)")
    parser.add_argument("--num-heads", type=cli.number(int, 0), default=8, metavar="N",
                        help="whole test heads, spread evenly, to compare with video codecs; 0 for none (default: 8)")
    parser.add_argument("--figure", metavar="FILE", help="PNG to draw (default: RUN/figures/rate_distortion.png)")
    arguments = parser.parse_args()
    if arguments.num_heads:
        import_av()  # fails now rather than at the end
    run_dir = predict.find_run(arguments.run_dir)
    config, vqvae, prior = predict.load_run(run_dir)
    split = dataset.load_splits(arguments.data_dir or config["data"]["folder"], ["test"])["test"]
    whole_split, split = split, split.take(split.spread(arguments.num_images))
    images = split.images
    model = model_curve(vqvae, prior, dataset.image_batches(split, 32))
    budgets = {f"rate weight {weight}": (model[weight]["bytes"], model[weight]) for weight in COMPARED_WEIGHTS}
    budgets["fixed length"] = vqvae.grid_size ** 2 * math.log2(prior.num_embeddings) / 8, model[0]

    black = np.zeros_like(images[0])
    overheads = {codec: len(encode(black, codec, CODECS[codec][1][0])) for codec in CODECS}
    table = {name: {codec: compare(images, codec, limit, overheads[codec]) for codec in CODECS}
             for name, (limit, _) in budgets.items()}
    mean = np.broadcast_to(images.mean(axis=0) / 255, images.shape)
    sanity = {"mean_image": metrics.reconstruction_metrics(images / 255, mean), "blurred_original":
              metrics.reconstruction_metrics(images / 255, ndimage.gaussian_filter(images / 255, (0, 2, 2)))}

    line = "{:10}{:22}{:>8.0f}{:>9.3f}{:>17.3f}{:>9.1f}{:>9.0%}".format
    print(f"{'':10}{'':22}{'bytes':>8}{'ssim':>9}{'ssim_foreground':>17}{'psnr':>9}{'fitted':>9}")
    for name, (limit, row) in budgets.items():
        print(line("model", name, limit, row["ssim"], row["ssim_foreground"], row["psnr"], 1))
        for codec, rows in table[name].items():
            for key, row in rows.items():
                print(line(codec, key, row["bytes"], row["ssim"], row["ssim_foreground"], row["psnr"], row["fitted"]))
    for name, row in {**{f"model, rate weight {weight}": row for weight, row in model.items()}, **sanity}.items():
        print(f"{name:32}{row.get('bytes', math.nan):>8.0f}{row['ssim']:>9.3f}{row['ssim_foreground']:>17.3f}{row['psnr']:>9.1f}")
    figure = Path(arguments.figure or run_dir / "figures" / "rate_distortion.png")
    curves = {codec: curve(images, codec, overheads[codec]) for codec in CODECS}
    plot_rate_distortion(curves, sorted((row["bytes"], row["ssim"]) for row in model.values()),
                         (budgets["fixed length"][0], model[0]["ssim"]), figure)
    print(f"Drawn: {figure}")
    heads = {"heads": compare_heads(vqvae, prior, whole_split, arguments.num_heads)} if arguments.num_heads else {}
    common.finish("codecs", arguments, {
        "settings": {"run_dir": str(run_dir), "num_images": len(images)},
        "model": {"by_rate_weight": model, "bytes_fixed_length": budgets["fixed length"][0]},
        "container_bytes": overheads, "codecs": table, "curves": curves, **sanity, **heads,
        "ratio": {name: {codec: row["ssim"] / rows["without_container"]["ssim"] for codec, rows in table[name].items()}
                  for name, (_, row) in budgets.items()}})


if __name__ == "__main__":
    main()

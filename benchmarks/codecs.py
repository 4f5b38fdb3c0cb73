"""Rate and distortion of a trained run against JPEG, JPEG 2000, WebP and AVIF, through Pillow.

    python benchmarks/codecs.py --run-dir RUN --data-dir DIR [--num-images 64] [--figure FILE]

The model's bytes are counted twice: as codes of fixed length, and as the prior's code length on the same test images
(what an entropy coder driven by it would spend, less than a byte more). Each codec gets, per image, the largest quality
that fits these bytes; once with its container counted, once with the container's bytes, those of an all-black picture,
added to what it may spend. The model's own side has no container.

The model's curve comes from choosing codes by rate and distortion in place of distance alone: code after code, the one
with the least ``distance / (w d) - log p(code | codes before)``, where d is the mean distance of the nearest codes and w
the weight of the rate. The sampler does this exactly, with ``-distance / (w d)`` as its noise. The last line is JSON.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import io
import math
from pathlib import Path
import sys

import numpy as np
from PIL import Image
from scipy import ndimage
import tensorflow as tf
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import common
import cli
import dataset
import figures
import metrics
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
COMPARED_WEIGHTS = 0, 4  # those whose bytes the codecs get, besides the bytes of codes of fixed length


def encode(image, codec, quality):
    """The file's bytes of a uint8 (H, W) image."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, **CODECS[codec][0](quality))
    return file.getvalue()


def decode(data):
    """A file's bytes -> float (H, W) in [0, 1]."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("L")) / 255


def largest_that_fits(image, codec, limit):
    """The file of the largest quality within `limit` bytes, by bisection; that of the lowest quality if none fits."""
    qualities = CODECS[codec][1]
    best, low, high = encode(image, codec, qualities[0]), 1, len(qualities) - 1
    if len(best) > limit:
        return best
    while low <= high:
        middle = (low + high) // 2
        data = encode(image, codec, qualities[middle])
        if len(data) <= limit:
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
        files = [largest_that_fits(image, codec, limit + free) for image in tqdm(images, f"{codec}, {limit:.0f} bytes",
                                                                               leave=False, disable=None)]
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
                distances = vqvae.quantizer.distances(vectors) + tf.reduce_sum(vectors ** 2, -1, keepdims=True)
                nearest = tf.reduce_mean(tf.reduce_min(distances, axis=-1))
                codes = choose(positions, -distances / (weight * nearest), tf.constant(1.0))
            originals.append(metrics.to_unit(images))
            decoded.append(metrics.to_unit(vqvae.decode_codes(codes)))
            bits.append(-prior.log_prob(codes, positions).numpy() / math.log(2))
        rows[weight] = {**metrics.reconstruction_metrics(*map(np.concatenate, (originals, decoded))),
                        "bytes": float(np.concatenate(bits).mean() / 8)}
    return rows


@cli.exit_on_input_error
def main():
    """Prints the table, draws the figure, then prints JSON."""
    parser = common.argument_parser(__doc__)
    parser.add_argument("--run-dir", metavar="DIR", help="folder of the run (default: the newest in runs/)")
    parser.add_argument("--data-dir", metavar="DIR", help="folder of the PNG splits (default: the run's own)")
    parser.add_argument("--num-images", type=cli.number(int, 1), default=64, metavar="N",
                        help="test images, spread evenly over the split (default: 64)")
    parser.add_argument("--figure", metavar="FILE", help="PNG to draw (default: RUN/figures/rate_distortion.png)")
    arguments = parser.parse_args()
    run_dir = predict.find_run(arguments.run_dir)
    config, vqvae, prior = predict.load_run(run_dir)
    split = dataset.load_splits(arguments.data_dir or config["data"]["folder"], ["test"])["test"]
    split = split.take(split.spread(arguments.num_images))
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
    figures.plot_rate_distortion(curves, sorted((row["bytes"], row["ssim"]) for row in model.values()),
                                 (budgets["fixed length"][0], model[0]["ssim"]), figure)
    print(f"Drawn: {figure}")
    common.finish("codecs", arguments, {
        "settings": {"run_dir": str(run_dir), "num_images": len(images)},
        "model": {"by_rate_weight": model, "bytes_fixed_length": budgets["fixed length"][0]},
        "container_bytes": overheads, "codecs": table, "curves": curves, **sanity})


if __name__ == "__main__":
    main()

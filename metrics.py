"""Every number this repository reports.

Images here are NumPy float (height, width) in [0, 1]; codes are int arrays.
"""

import numpy as np
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from tqdm import tqdm

FOREGROUND = 0.03  # intensity above which a pixel of the original counts as brain


def ssim(original, reconstruction):
    """Structural similarity as the followed project measured it: scikit-image's default uniform 7x7 window.

    Args:
        original: float (H, W); its own range is the data range (1 if it is constant).
        reconstruction: float (H, W).

    Returns:
        The mean over the image, at most 1.
    """
    data_range = float(np.ptp(original)) or 1.0
    return float(structural_similarity(original, reconstruction, data_range=data_range))


def ssim_gaussian(original, reconstruction):
    """Structural similarity as in Wang et al. 2004: Gaussian window of sigma 1.5, population covariance, range 1.

    Args:
        original: float (H, W) in [0, 1].
        reconstruction: float (H, W); clipped to [0, 1].

    Returns:
        (mean over the image, mean over the original's brain). The brain is where the original exceeds 0.03; without any,
        the second is the first.

    References:
        Wang, Bovik, Sheikh, Simoncelli: Image Quality Assessment, IEEE Transactions on Image Processing 13(4), 2004.
    """
    mean, ssim_map = structural_similarity(original, np.clip(reconstruction, 0, 1), data_range=1.0, gaussian_weights=True,
                                           sigma=1.5, use_sample_covariance=False, full=True)
    brain = original > FOREGROUND
    return float(mean), float(ssim_map[brain].mean() if brain.any() else mean)


def reconstruction_metrics(originals, reconstructions):
    """Means over images.

    Args:
        originals: float (N, H, W) in [0, 1].
        reconstructions: float (N, H, W) in [0, 1].

    Returns:
        A dict of `ssim`, `ssim_gaussian`, `ssim_foreground`, `psnr` (dB, peak 1; an exact image counts as 100 dB),
        `mse` (of intensities in [0, 1]) and `num_images`.
    """
    rows = []
    pairs = zip(originals, reconstructions)
    for original, reconstruction in tqdm(pairs, "Measuring", len(originals), unit=" images", leave=False, disable=None):
        mse = np.mean((original - reconstruction) ** 2)
        psnr = peak_signal_noise_ratio(original, reconstruction, data_range=1.0) if mse > 1e-10 else 100.0
        rows.append((ssim(original, reconstruction), *ssim_gaussian(original, reconstruction), psnr, mse))
    names = "ssim", "ssim_gaussian", "ssim_foreground", "psnr", "mse"
    return {**dict(zip(names, np.mean(rows, axis=0).tolist())), "num_images": len(originals)}


def code_metrics(codes, num_embeddings):
    """How the codebook is used.

    Args:
        codes: int (...) in [0, num_embeddings).
        num_embeddings: K.

    Returns:
        A dict of `code_entropy` (bits per code, if codes were independent), `perplexity` (2 to that: the number of equally
        likely codes with the same entropy) and `codes_used`.
    """
    share = np.bincount(np.ravel(codes), minlength=num_embeddings) / np.size(codes)
    share = share[share > 0]
    entropy = float(-(share * np.log2(share)).sum())
    return {"code_entropy": entropy, "perplexity": 2 ** entropy, "codes_used": len(share)}


def to_unit(images):
    """(N, H, W, 1) in [-1, 1] -> float64 NumPy (N, H, W) in [0, 1], for the functions above."""
    return (np.asarray(images, np.float64)[..., 0] + 1) / 2


def evaluate(vqvae, prior, batches):
    """Measures a trained pair of models on a split.

    Args:
        vqvae: a `modules.VQVAE`.
        prior: a `modules.PixelCNN`.
        batches: (images in [-1, 1], positions), each image once.

    Returns:
        (the dict of metrics.json, codes int (N, g, g), reconstructions float (N, H, W) in [0, 1]). Besides the keys of the
        functions above: `bits_per_code`, the prior's code length, and `bytes_per_image`, that times codes over 8.
    """
    originals, reconstructions, codes, nats = [], [], [], []
    for images, positions in batches:
        some = vqvae.encode_to_codes(images)
        codes.append(some.numpy())
        originals.append(to_unit(images))
        reconstructions.append(to_unit(vqvae.decode_codes(some)))
        nats.append(-prior.log_prob(some, positions).numpy())
    originals, reconstructions, codes = map(np.concatenate, (originals, reconstructions, codes))
    codes_per_image = codes[0].size
    bits_per_code = float(np.concatenate(nats).mean() / np.log(2) / codes_per_image)
    measured = {**reconstruction_metrics(originals, reconstructions), **code_metrics(codes, prior.num_embeddings),
                "bits_per_code": bits_per_code, "bytes_per_image": bits_per_code * codes_per_image / 8}
    return measured, codes, reconstructions

"""The PNG slices of a data set, decoded: into memory, or into a cache that is mapped into memory."""

import concurrent.futures
import hashlib
import json
import os
from pathlib import Path

import numpy as np
from tqdm import tqdm

from support.files import unfinished
from support.images import pad_to_square, read_slice
from support.orientation import turn

SIDE_MULTIPLE = 32  # pixels: what the networks need
BLOCK = 256  # files at a time


class SliceReader:
    """Decodes the PNG files of a data set, all of the size of its first: padded, and turned front up."""

    def __init__(self, first_path, front):
        self.first_path, self.front = first_path, front
        self.size = read_slice(first_path).shape
        self.shape = (-(-max(self.size) // SIDE_MULTIPLE) * SIDE_MULTIPLE,) * 2

    def blocks(self, paths, name):
        """Yields uint8 (up to BLOCK, side, side), in parallel: Pillow lets go of Python's lock meanwhile."""
        def decode(path):
            image = pad_to_square(read_slice(path, self.size, self.first_path)[np.newaxis], self.shape[0])
            return turn(image, self.front or "up")[0]

        bar = tqdm(total=len(paths), desc=f"Reading {name}", unit=" images", leave=False, disable=None)
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool, bar:
            for start in range(0, len(paths), BLOCK):
                block = np.stack(list(pool.map(decode, paths[start:start + BLOCK])))
                bar.update(len(block))
                yield block

    def read(self, paths, name):
        """uint8 (N, side, side) in memory."""
        images, start = np.empty((len(paths), *self.shape), np.uint8), 0
        for block in self.blocks(paths, name):
            images[start:start + len(block)] = block
            start += len(block)
        return images

    def read_cached(self, paths, name, cache_dir):
        """`read`, from a memory-mapped .npy file if these very files were decoded into it before.

        Its name is a digest of their folder, names, sizes and times of change: no cache is ever stale.
        """
        listing = [(path.name, (status := path.stat()).st_size, status.st_mtime_ns) for path in paths]
        key = json.dumps([str(paths[0].parent.resolve()), self.shape, self.front, listing])
        file = Path(cache_dir) / f"slices-{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            # One name for whatever is unfinished: so what any killed process left is found and removed.
            with unfinished(Path(cache_dir) / "slices") as new:
                with open(new, "wb") as stream:  # through a map, a full disk would kill the process (SIGBUS)
                    header = {"descr": "|u1", "fortran_order": False, "shape": (len(paths), *self.shape)}
                    np.lib.format.write_array_header_1_0(stream, header)
                    for block in self.blocks(paths, name):
                        stream.write(np.ascontiguousarray(block))
                new.replace(file)
        return np.load(file, mmap_mode="r", allow_pickle=False)

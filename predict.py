"""Reconstructs test images with a trained run, measures them, and samples new brains.

    python predict.py                                        # the newest run
    python predict.py --run-dir runs/oasis --data-dir DIR --slice all
    python predict.py --evaluate                             # and are the samples good, and new?
    python predict.py --images scan.png head.nii.gz          # one's own images
    python predict.py --codes runs/oasis/images/scan_codes.npy
    python predict.py --write-dataset DIR --heads 100        # sampled heads as a data set that train.py reads
"""

if __name__ == "__main__":
    import support.environment  # noqa: F401

import argparse
import contextlib
import dataclasses
import datetime
import json
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from PIL import Image

import dataset
from modules import load_models
from support import cli, devices, figures, judge, metrics, report, runs, sampler, synthetic, template, volumes
from support.cli import UserError
from support.files import check_results_folder, results_folder, write_json
from support.images import in_chunks, spread, to_uint8, to_unit
from support.own_images import read_own_files
from support.runs import Run
from support.slices import MAX_POSITIONS, SPLITS

NUM_EXAMPLES = 10  # test images that are written beside their reconstructions
PICTURED_HEADS = 3  # in head.png and report.html

# The commands beside the test people, and the options that each uses: the others it would ignore.
USED = {"--images": ["--output-dir"], "--codes": ["--output-dir"],
        "--write-dataset": ["--heads", "--ventricles", "--temperature", "--seed"]}
DEFAULTS = {"run_dir": None, "data_dir": None, "cache_dir": None, "images": None, "codes": None,
            "write_dataset": None, "num_samples": 16, "slice": None, "heads": 1, "ventricles": None,
            "temperature": 1.0, "seed": 0, "evaluate": False, "export": None, "output_dir": None}


def parse_arguments(argv):
    """The command line; an option that the command would ignore is refused."""
    parser = cli.script_parser(__doc__)
    parser.argument_default = argparse.SUPPRESS  # an option that is given is told from one that is not
    add, command = parser.add_argument, parser.add_mutually_exclusive_group()
    position = cli.number(int, 0, MAX_POSITIONS)
    add("--run-dir", metavar="DIR", help="folder of the run (default: the newest finished one in runs/)")
    add("--data-dir", metavar="DIR", help="of the PNG splits (default: the run's own, else as in train.py)")
    add("--cache-dir", metavar="DIR", help="folder to keep decoded slices in, for data larger than memory")
    command.add_argument("--images", nargs="+", metavar="FILE", help="reconstruct these in place of the test "
                         "split: grayscale PNGs of any size, or NIfTI volumes")
    command.add_argument("--codes", metavar="FILE", help="decode the codes of a .npy file of --images")
    command.add_argument("--write-dataset", metavar="DIR",
                         help="write --heads sampled heads, and nothing else, as PNG splits")
    add("--num-samples", type=cli.number(int, 1), metavar="N", help="single slices to sample (default: 16)")
    add("--slice", type=lambda text: text if text == "all" else position(text), metavar="K",
        help="slice position of the samples, 0 is the lowest, or all for one sample of each (default: "
        "--num-samples spread over all)")
    add("--heads", type=cli.number(int, 0), metavar="N",
        help="heads to sample: all slices of one new person each (default: 1)")
    add("--ventricles", type=cli.number(float, 0), metavar="Q", help="size of the heads' ventricles, from 0 "
        "to 1: a quantile, among training people, of the dark share of the brain's inner half (default: any)")
    add("--temperature", type=cli.number(float, 0), metavar="T",
        help="of sampling: 1 is the model, less is blander (default: 1)")
    add("--seed", type=cli.number(int, 0, cli.MAX_SEED), metavar="S", help="of every draw (default: 0)")
    add("--evaluate", action="store_true", help=f"also judge {judge.NUM_HEADS} sampled heads beside people")
    add("--export", metavar="DIR", help="also write TensorFlow SavedModels: see README")
    add("--output-dir", metavar="DIR", help="for the results: new, or that of an earlier call, whose results "
        "are replaced (default: RUN/predictions, RUN/images, RUN/codes)")
    given = vars(parser.parse_args(argv))
    options = [f"--{name.replace('_', '-')}" for name in given]  # as they are called on the command line
    useless = [(option, command) for command in options if command in USED for option in options
               if option not in (command, "--run-dir", *USED[command])]
    if given.get("slice") == "all" and "num_samples" in given:
        useless.append(("--num-samples", "--slice all"))
    if "ventricles" in given and "evaluate" in given:  # which judges heads as the model samples them
        useless.append(("--ventricles", "--evaluate"))
    if useless:
        raise UserError("{} is of no use with {}; leave out the one or the other.".format(*useless[0]))
    if "write_dataset" in given and given.get("heads", 0) < len(SPLITS):
        raise UserError("--write-dataset needs --heads: how many to sample, at least 3, one for each split.")
    if given.get("ventricles", 0) > 1:
        raise UserError(f"--ventricles: expected a number from 0 to 1, got {given['ventricles']}.")
    return argparse.Namespace(**{**DEFAULTS, **given})


def find_run(run_dir):
    """The `Run` in a folder; without one the newest finished in runs/, or the one in assets/pretrained."""
    run_dir = runs.newest() if run_dir is None else run_dir
    if run_dir is None:
        print("There is no finished run in runs/: using the pretrained weights, of simulated people.")
        return Run.load(runs.PRETRAINED)
    if not Run.has_models(Path(run_dir)):
        raise UserError(f"{run_dir} holds no trained run; train one with train.py --run-dir.")
    run = Run.load(run_dir)
    if not Run.is_finished(run.folder):
        print(f"Note: {run_dir} is not finished: these are its best weights so far, not calibrated.")
    return run


def load_data(arguments, run, vqvae):
    """The splits that are needed: test; for --evaluate all three; None, and a line, if there are no data."""
    trained_on, side, fits = run.config["data"], vqvae.image_size, False
    folder = Path(arguments.data_dir or trained_on["folder"])
    if not arguments.data_dir and not folder.is_dir():
        # An older version's demo was another.
        is_demo = trained_on["is_demo"] and run.geometry == template.DEMO_GEOMETRY
        folder = template.make_demo_cohort() if is_demo else dataset.find_oasis()
    if folder:
        splits = dataset.load_splits(folder, SPLITS if arguments.evaluate else ["test"],
                                     run.settings["limit"], arguments.cache_dir, trained_on["front"])
        found, most = splits["test"].images.shape[1], max(split.positions.max() for split in splits.values())
        fits = found == side and most < run.num_positions
        if not fits and arguments.data_dir:
            raise UserError(f"{folder} has slices 0 to {most} of {found}x{found} pixels, but {run.folder} "
                            f"knows 0 to {run.num_positions - 1} of {side}x{side}; give --data-dir or "
                            "--run-dir to match.")
    if not fits:  # or others were found in their place
        missing = f"The {side}x{side} images of {run.folder}, {trained_on['folder']}, are not here"
        if arguments.evaluate:
            raise UserError(f"{missing}; say with --data-dir where they are.")
        print(f"{missing}, so this run is not measured and nothing is reconstructed; it samples only. "
              "With --data-dir it does both.")
        return None
    if arguments.evaluate:
        for name, split in splits.items():
            if len(split.head_indices(np.unique(splits["train"].positions))) < 2:
                raise UserError("--evaluate needs two people with all their slices in each split, but "
                                f"{name} of {folder} has not.")
        if dataset.fingerprints(splits)["train"] != trained_on["fingerprints"]["train"]:
            raise UserError(f"The training people in {folder} are not those that {run.folder} was trained "
                            "on, so --evaluate would miss copies; give its own data as --data-dir.")
    return splits


def decode_heads(vqvae, heads, positions):
    """Codes of heads, int (N, S, g, g), at S positions -> uint8 (N, S, H, W)."""
    decoded = np.zeros((*heads.shape[:2], vqvae.image_size, vqvae.image_size), np.uint8)  # there may be none
    for index, head in enumerate(heads):
        decoded[index] = to_uint8(vqvae.decode_head(head, positions)[..., 0])
    return decoded


@cli.exit_on_user_error
def main(argv=None):
    """Does what one of the four commands asks for."""
    arguments = parse_arguments(argv)
    devices.prepare(exact=True)
    run = find_run(arguments.run_dir)
    vqvae, prior = load_models(run)
    if arguments.images:
        predict_images(arguments, run, vqvae, prior)
    elif arguments.codes is not None:
        predict_codes(arguments, run, vqvae, prior)
    elif arguments.write_dataset is not None:
        write_dataset(arguments, run, vqvae, prior)
    else:
        predict_people(arguments, run, vqvae, prior)


def predict_people(arguments, run, vqvae, prior):
    """Reconstructs and measures the test people, samples slices and heads; judges and exports if asked to."""
    positions = sample_positions(arguments.slice, arguments.num_samples, prior.slice_positions)
    persons = persons_of_heads(arguments, run, prior)
    folder = Path(arguments.output_dir or run.results_path("predictions"))
    if arguments.export:
        check_results_folder(arguments.export, "--export", "predict.py --export")  # before the work begins
    page, judged = {}, {}
    with results_folder(folder, "--output-dir", "predict.py") as new:
        splits = load_data(arguments, run, vqvae)
        if splits:
            dataset.warn_of_lost_border("test", splits["test"].images, vqvae.margin)
            print(f"Reconstructing {len(splits['test'].images):,} test images ...", flush=True)
            coded = {name: dataset.encode_split(vqvae, prior, split) for name, split in splits.items()}
            page = reconstruct_test(new, vqvae, prior, splits["test"], coded["test"], arguments.seed)
            page["baselines"] = read_baselines(run, splits["test"])
        print(f"Sampling {len(positions)} slices ...", flush=True)
        codes = prior.sample(positions, arguments.seed, arguments.temperature)
        samples = in_chunks(lambda chunk: to_unit(vqvae.decode_codes(chunk)), codes, size=16)
        for number, (image, position) in enumerate(zip(samples, positions)):
            save_unit(image, new / f"sample_{number:04d}_slice_{position}.png")
        figures.sample_grid(samples, positions, vqvae.margin, new / "samples.png")
        num_judged = min(judge.NUM_HEADS, splits["train"].num_people) if arguments.evaluate else 0
        count = max(arguments.heads, num_judged)
        print(f"Sampling heads: {count} ...", flush=True)
        codes = sampler.sample_heads(prior, count, arguments.seed, arguments.temperature, persons=persons)
        heads = decode_heads(vqvae, codes, prior.slice_positions)
        if persons is not None and count:
            sizes = run.read_ventricles()["quantiles"]
            size = judge.tissue_statistics(heads.reshape(-1, *heads.shape[2:]))["dark_fraction"].mean()
            quantile = np.interp(size, sizes, np.linspace(0, 1, len(sizes)))
            print("Size of the ventricles, as a quantile of training people: asked for "
                  f"{arguments.ventricles:.2f}, shown by the heads in the mean {quantile:.2f}.")
        volumes.write_nifti_heads(heads[:arguments.heads], prior.slice_positions, run.geometry, new)
        shown, places, geometry = fill_gaps(heads[:min(arguments.heads, PICTURED_HEADS)],
                                            prior.slice_positions, run.geometry)
        if len(shown):
            figures.head_figure(shown, places, geometry, new / "head.png")
        if arguments.evaluate:
            judged = judge_heads(heads[:num_judged], run, vqvae, prior, splits, coded)
            judged |= {"seed": arguments.seed, "temperature": arguments.temperature}
            page["head_table"] = judge.head_table(judged)
        report.write_report(new / "report.html", **facts_of_page(arguments, run), **page, margin=vqvae.margin,
                            colours=figures.code_colours(vqvae.quantizer.embeddings), samples=samples,
                            sample_positions=positions, heads=shown, head_positions=places, geometry=geometry)
        if splits:
            write_json(new / "metrics.json", page["metrics"] | ({"heads": judged} if judged else {}))
    if arguments.export:
        with results_folder(arguments.export, "--export", "predict.py --export") as new:
            sampler.export(vqvae, prior, new)
    if judged:
        judge.print_heads(judged)
        kept = run.results_path("evaluation.json")  # --write-dataset reads it; later calls leave it alone
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, {"heads": judged})
    print(f"Done. Open {folder / 'report.html'}")


def persons_of_heads(arguments, run, prior):
    """The persons, float (heads, P), that --ventricles asks for; None for new ones."""
    if arguments.ventricles is None:
        return None
    return sampler.steered_people(prior, run.read_ventricles(), arguments.heads, arguments.seed,
                                  arguments.ventricles)


def reconstruct_test(folder, vqvae, prior, test, coded, seed):
    """Measures the test split: a dict of what the page shows of it, `metrics` and `examples`."""
    codes, colours = coded.codes[0], figures.code_colours(vqvae.quantizer.embeddings)
    measured, details = metrics.evaluate(vqvae, prior, dataset.image_batches(test, 32), coded, test.cases)
    per_image, ssim = details["per_image"], details["per_image"]["ssim"]
    figures.plot_errors(ssim, test.positions, details["error_map"], vqvae.margin, folder / "errors.png")
    table = np.column_stack([test.cases, test.positions, *per_image.values()])
    np.savetxt(folder / "per_image.csv", table, ["%d", "%d", *["%.6g"] * len(per_image)], ",", comments="",
               header=",".join(["case", "slice", *per_image]))
    captions = [f"case {case}, slice {position}\nSSIM {value:.3f}"
                for case, position, value in zip(test.cases, test.positions, ssim)]
    shown = test.examples(4)
    examples = report.Examples(test.images[shown] / 255, to_unit(coded.decode(vqvae, shown)), codes[shown],
                               metrics.bits_per_place(prior, coded, shown), [captions[i] for i in shown])
    figures.reconstruction_grid(*examples[:3], examples.captions, colours, vqvae.margin,
                                folder / "reconstructions.png")
    count = min(NUM_EXAMPLES, len(test.images))
    drawn = np.sort(np.random.default_rng(seed).choice(len(test.images), count, replace=False))
    for i, reconstruction in zip(drawn, to_unit(coded.decode(vqvae, drawn))):
        name = f"original_vs_reconstructed_case_{test.cases[i]:03d}_slice_{test.positions[i]}.png"
        save_unit(np.hstack([test.images[i] / 255, reconstruction]), folder / name)
    sd = f" ± {measured['ssim_sd']:.3f}" if "ssim_sd" in measured else ""
    print(f"Of {len(test.images)} images of {test.num_people} test people: SSIM {measured['ssim']:.3f}{sd}, "
          f"inside the brain {measured['ssim_foreground']:.3f}; {measured['bits_per_code']:.2f} bits per "
          f"code, {measured['bytes_per_image']:.0f} bytes per image.", flush=True)
    return {"metrics": measured, "examples": examples}


def read_baselines(run, test):
    """`metrics.baselines`, as train.py measured them; None, and a line, of other test people than its own."""
    if dataset.fingerprints({"test": test})["test"] != run.config["data"]["fingerprints"]["test"]:
        print(f"Note: the test people are not those of {run.folder}.")
        return None
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # of a run of before there are none
        baselines = json.loads((run.folder / "metrics.json").read_text())["baselines"]
        return {name: baselines[name] for name in report.YARDSTICKS}
    return None


def save_unit(image, path):
    """Writes an image, float (H, W) in [0, 1], as PNG."""
    Image.fromarray(to_uint8(image * 2 - 1)).save(path)


def sample_positions(slice_, num_samples, positions):
    """The positions to sample, int (N,), of those there are: one for all, each once, or spread evenly."""
    if slice_ == "all":
        return np.array(positions)
    if slice_ is None:  # not `spread`: there may be more samples than positions
        return np.take(positions, np.linspace(0, len(positions) - 1, num_samples).round().astype(int))
    if slice_ not in positions:
        present = ", ".join(map(str, positions))
        raise UserError(f"--slice {slice_}: the training people have the slices {present} only.")
    return np.full(num_samples, slice_)


def fill_gaps(heads, slice_positions, geometry):
    """Heads, uint8 (N, S, H, W), black where training people have gaps; their positions; their geometry."""
    positions = volumes.regular_positions(slice_positions)
    filled = np.zeros((len(heads), len(positions), *heads.shape[2:]), np.uint8)
    filled[:, np.isin(positions, slice_positions)] = heads
    missing = ", ".join(str(position) for position in positions if position not in slice_positions)
    if len(heads) and missing:
        print(f"Note: the training people have no slices {missing}: these are black in the heads.")
    return filled, positions, dataclasses.replace(geometry, spacing=geometry.spacing * positions.step,
                                                  lowest=geometry.lowest + geometry.spacing * positions[0])


def facts_of_page(arguments, run):
    """What report.html says of the run. It is made to be shared: it names folders, but not where they lie."""
    folder = Path(arguments.data_dir or run.config["data"]["folder"]).resolve()
    name = run.folder.resolve().name
    what = "images in codes and back" if arguments.images else "brain slices, reconstructed and sampled"
    return {"title": f"Run {name}: {what}", "notice": synthetic.notice_of(folder) or run.notice,
            "facts": {"run": name, "data": folder.name, "date": datetime.date.today().isoformat(),
                      "seed": arguments.seed, "commit of training": run.config.get("git_commit")}}


def judge_heads(heads, run, vqvae, prior, splits, coded):
    """The figures of sampled heads, uint8 (N, S, H, W), beside people."""
    print("Judging heads ...", flush=True)
    indices = {name: split.head_indices(prior.slice_positions) for name, split in splits.items()}
    chosen = {name: rows[spread(len(rows), judge.NUM_HEADS)] for name, rows in indices.items()}
    originals = {name: splits[name].images[rows] for name, rows in chosen.items()}
    codes = {name: coded[name].codes[0][rows] for name, rows in chosen.items()}
    reconstructed = {name: decode_heads(vqvae, grids, prior.slice_positions) for name, grids in codes.items()}
    noise = [decode_heads(vqvae, judge.mix_people(codes[name], axes=3), prior.slice_positions)
             for name in ("validate", "test")]
    train = splits["train"].images, indices["train"]
    measured = judge.evaluate_heads(heads, originals, reconstructed, noise, train, run.geometry.pixel_size)
    bits = [metrics.code_lengths_of_heads(prior, coded[name], chosen[name]) for name in ("train", "test")]
    return measured | {"git_commit": runs.git_commit(), "bits_per_code_train": float(bits[0].mean()),
                       **judge.area_under_curve("membership", bits)}


def write_dataset(arguments, run, vqvae, prior):
    """Does what --write-dataset asks for; head i is the one that --heads gives without it."""
    folder, count = arguments.write_dataset, arguments.heads
    batches = sampler.heads_in_batches(prior, count, arguments.seed, arguments.temperature,
                                       persons=persons_of_heads(arguments, run, prior))
    heads = (head for batch in batches for head in decode_heads(vqvae, batch, prior.slice_positions))
    description = synthetic.describe(run, prior.slice_positions, count, arguments.seed, arguments.temperature,
                                     arguments.ventricles)
    with cli.advise(f"{folder} was not written"):
        synthetic.write_png_heads(folder, heads, description)
    print(f"Done: {count} heads in {folder}. {description['says']}")


def predict_images(arguments, run, vqvae, prior):
    """Writes reconstructions of one's own images, of a volume on its voxels too; codes, report, metrics."""
    files = read_own_files(arguments.images, run, vqvae.image_size, prior.slice_positions)
    dataset.warn_of_lost_border("given", np.concatenate([file.images for file in files]), vqvae.margin)
    folder = Path(arguments.output_dir or run.results_path("images"))
    refuse_inputs_in(folder, arguments.images)
    rows, means, examples, heads = [], [], [], []
    with results_folder(folder, "--output-dir", "predict.py --images") as new:
        print(f"{'image':32}{'SSIM':>8}{'bytes':>8}  slice position")
        for file in files:
            codes, bits, sizes = encode_own(vqvae, prior, file)
            np.save(new / f"{file.name}_codes.npy", codes if len(codes) > 1 else codes[0])
            positions = None if None in file.positions else file.positions
            originals, reconstructions = file.images / 255, to_unit(vqvae.decode_head(codes, positions))
            ssim = [metrics.ssim(*pair) for pair in zip(originals, reconstructions)]
            for index, (title, position) in enumerate(zip(file.titles, file.positions)):
                save_unit(originals[index], new / f"{title}_original.png")
                save_unit(reconstructions[index], new / f"{title}_reconstruction.png")
                rows.append({"image": title, "file": file.path, "ssim": ssim[index], "bytes": sizes[index],
                             "slice": position})
                size, place = ("-", "unknown") if position is None else (f"{sizes[index]:.0f}", position)
                print(f"{title:32}{ssim[index]:8.3f}{size:>8}  {place}")
            captions = [f"{title}\nSSIM {value:.3f}" for title, value in zip(file.titles, ssim)]
            examples.append(report.Examples(originals, reconstructions, codes, bits, captions))
            if file.cut:
                print(f"{file.name + ', mean':32}{np.mean(ssim):8.3f}")
                means.append({"file": file.path, "ssim": float(np.mean(ssim))})
                stack = np.zeros((len(file.cut.slices), *originals.shape[1:]))
                stack[file.used] = reconstructions
                volumes.write_in_input_frame(file.cut, stack, new / f"{file.name}_reconstruction.nii.gz")
                if positions:
                    heads.append(to_uint8(reconstructions * 2 - 1))
        examples = report.Examples(*map(np.concatenate, zip(*examples)))
        picture_own(new, arguments, run, vqvae, prior, examples, heads[:PICTURED_HEADS],
                    [Path(file.path).name for file in files])
        write_json(new / "metrics.json", {"images": rows, "volumes": means})
    print(f"Done. Open {folder / 'report.html'}")


def picture_own(folder, arguments, run, vqvae, prior, examples, heads, names):
    """Writes reconstructions.png and report.html of one's own images: `report.Examples`, uint8 (S, H, W)."""
    colours = figures.code_colours(vqvae.quantizer.embeddings)
    shown = report.Examples(*(part[spread(len(part), 4)] for part in examples))
    figures.reconstruction_grid(*shown[:3], shown.captions, colours, vqvae.margin,
                                folder / "reconstructions.png")
    page, geometry, positions = facts_of_page(arguments, run), run.geometry, ()
    page["facts"]["files"] = ", ".join(names)
    page["notice"] = page["notice"] and f"Of what the model has learnt from: {page['notice']}"
    if heads:
        heads, positions, geometry = fill_gaps(np.stack(heads), prior.slice_positions, geometry)
    shown = shown._replace(bits=None if np.isnan(shown.bits).any() else shown.bits)
    report.write_report(folder / "report.html", **page, margin=vqvae.margin, colours=colours, examples=shown,
                        heads=heads, head_positions=positions, geometry=geometry)


def refuse_inputs_in(folder, files):
    """UserError if one of the files to read lies where new results take the place of the old."""
    for file in files:
        if Path(file).resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{file} lies in {folder}, whose old results will go; give another --output-dir.")


def encode_own(vqvae, prior, file):
    """An `OwnFile`'s codes (N, g, g), their bits, each image's bytes: NaN and None at unknown positions."""
    count, is_known = len(file.images), None not in file.positions
    split = dataset.Split.from_heads(file.images[np.newaxis], file.positions if is_known else range(count))
    if not is_known:
        codes = np.int32(dataset.encode(vqvae, split))
        return codes, np.full(codes.shape, np.nan), [None] * count
    coded = dataset.encode_split(vqvae, prior, split)
    codes = np.int32(coded.codes[0])
    # Several images are one head's: each is given those below it, and bears its share of the person's bytes.
    bits = metrics.bits_per_place(prior, coded, np.arange(count), conditional=count > 1)
    person_bits = metrics.person_bits_per_code(coded) if count > 1 else 0
    return codes, bits, ((bits.mean(axis=(1, 2)) + person_bits) * codes[0].size / 8).tolist()


def read_codes(path, vqvae):
    """Reads codes, int32 (N, g, g), from a .npy file that holds them, or those of one image, (g, g)."""
    grid, count = vqvae.grid_size, vqvae.quantizer.num_embeddings
    with contextlib.suppress(ValueError, EOFError, AttributeError, BadZipFile):  # AttributeError: a .npz file
        codes = np.load(path, mmap_mode="r", allow_pickle=False)  # mapped: a false shape fills no memory
        if (codes.ndim in (2, 3) and codes.shape[-2:] == (grid, grid) and codes.size
                and codes.dtype.kind in "iu" and codes.min() >= 0 and codes.max() < count):
            return np.asarray(codes, np.int32).reshape(-1, grid, grid)
    raise UserError(f"{path} holds no codes of this run; give a .npy file of integers from 0 to {count - 1} "
                    f"of shape ({grid}, {grid}) or (N, {grid}, {grid}).")


def predict_codes(arguments, run, vqvae, prior):
    """Writes the images of the codes in a file, which are one head's, as FILE_NNNN.png."""
    codes = read_codes(arguments.codes, vqvae)
    folder = Path(arguments.output_dir or run.results_path("codes"))
    refuse_inputs_in(folder, [arguments.codes])
    with results_folder(folder, "--output-dir", "predict.py --codes") as new:
        # All the slices that training people have, or others next to each other
        positions = prior.slice_positions if len(codes) == len(prior.slice_positions) else None
        for number, image in enumerate(decode_heads(vqvae, codes[np.newaxis], positions)[0]):
            Image.fromarray(image).save(new / f"{Path(arguments.codes).stem}_{number:04d}.png")
    print(f"Done: see {folder}.")


if __name__ == "__main__":
    main()

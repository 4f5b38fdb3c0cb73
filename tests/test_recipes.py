"""README's recipes: every command and Python block, on tiny stand-ins, gives what its comment promises."""

import json
from pathlib import Path
import re
import shlex
import shutil
import sys

import nibabel
import numpy as np
from PIL import Image
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.tiny import read_history
import dataset
import modules
import predict
from support import figures, runs, sampler, stages, volumes
from support.files import write_json
from support.images import to_uint8
from support.runs import Run
from tests.conftest import ROOT
import train

SECTION = (ROOT / "README.md").read_text().partition("\n## Recipes\n")[2].partition("\n## ")[0]
(BASH,), (OBJECTS, EXPORTED) = (re.findall(rf"^```{language}\n(.*?)^```", SECTION, re.M | re.S)
                                for language in ("bash", "python"))
# For a run of eight slices, and for a data set and a training that take seconds
STAND_INS = {"--slice 16": "--slice 6", "--temperature 0.8": "--temperature 0.8 --seed 5 --slice all",
             "--heads 100": "--heads 6 --seed 4 --temperature 0.7",
             "train.py": "train.py --epochs 1 --prior-epochs 1"}


def pixels(pattern):
    """The pictures of these names, in order, int (N, height, width)."""
    return np.stack([np.asarray(Image.open(path), int) for path in sorted(Path().glob(pattern))])


def assert_close(written, expected):
    """But for what rounds to another gray level."""
    assert np.ptp(written) > 9 and np.abs(written - np.asarray(expected, int)).max() <= 1


@pytest.fixture
def models(trained, tmp_path, monkeypatch):
    """Both networks of runs/NAME and of assets/pretrained, in a folder with all that the recipes name."""
    monkeypatch.chdir(tmp_path)
    tiny, run, pretrained = trained / "runs" / "tiny", Path("runs/NAME"), tmp_path / "assets" / "pretrained"
    Path("DIR").symlink_to(trained / "cohort")
    splits, config = dataset.load_splits("DIR"), json.loads((tiny / "config.json").read_text())
    config["data"]["folder"] = "/gone"  # test_predict.py has the test people
    config["pixelcnn"]["num_layers"] = 1
    vqvae = modules.load_model(tiny / "vqvae.keras")
    prior = modules.PixelCNN(**{**config["pixelcnn"], "codebook_digest": vqvae.quantizer.digest()})
    prior.fit_people(dataset.head_pictures(splits["train"], vqvae.margin, 8)[0])
    rng = np.random.default_rng(0)
    for weight in prior.trainable_variables:
        weight.assign(weight + rng.normal(0, 0.1, weight.shape))
    prior.code_vectors.assign(rng.normal(size=prior.code_vectors.shape))
    prior.movement.assign(0.5)
    shutil.copytree(tiny, run)
    prior.save(run / "pixelcnn.keras")
    write_json(run / "config.json", config)
    shutil.copytree(run, pretrained, ignore=shutil.ignore_patterns("metrics.json"))
    for name, image in zip("ab", splits["test"].images):
        Image.fromarray(image).save(f"{name}.png")
    volumes.write_nifti_heads(splits["test"].images[np.newaxis, :8], range(8), Run.load(run).geometry, Path())
    Path("head_000.nii.gz").rename("scan.nii.gz")
    monkeypatch.setattr(runs, "PRETRAINED", pretrained)
    for module in (modules, predict):  # loaded once, and the sampler compiled once
        monkeypatch.setattr(module, "load_models", lambda run: (vqvae, prior))
    monkeypatch.setattr(sampler, "samples_at_once", lambda bytes_each: 1)
    for drawn in ("sample_grid", "head_figure", "reconstruction_grid"):  # other tests look at pictures
        monkeypatch.setattr(figures, drawn, lambda *_: None)
    monkeypatch.setattr(train, "draw_figures", lambda *_: None)
    return vqvae, prior


def test_every_command_does_what_its_comment_says(models, monkeypatch):
    vqvae, prior = models
    lines = [line for line in BASH.splitlines() if not line.startswith("#")]
    def run(words):
        line = lines.pop(0)
        assert words in line
        for shown, stand_in in STAND_INS.items():
            line = line.replace(shown, stand_in)
        _, script, *arguments = shlex.split(line, comments=True)
        {"predict.py": predict, "train.py": train}[script].main(arguments)
    def decoded(codes):
        return to_uint8(vqvae.decode_codes(codes)[..., 0])
    def last(heads):
        return predict.decode_heads(vqvae, heads[-1:], range(8))[0]
    run("--num-samples 100")
    assert_close(pixels("slices/sample_*.png")[:2], decoded(prior.sample([0, 0])))
    assert len(pixels("slices/*_slice_?.png")) == 100 and not list(Path("slices").glob("head*"))
    run("--slice 16")
    assert_close(pixels("slice_16/*_slice_6.png")[:2], decoded(prior.sample([6, 6])))
    run("--temperature 0.8")
    assert_close(pixels("bland/sample_*.png"), decoded(prior.sample(range(8), seed=5, temperature=0.8)))
    assert_close(volumes.read_slices("bland/head_000.nii.gz").slices,
                 last(prior.sample_heads(1, seed=5, temperature=0.8)))
    run("--ventricles 0.9")
    persons = sampler.steered_people(prior, Run.load("runs/NAME").read_ventricles(), 1, 0, 0.9)
    assert_close(volumes.read_slices("large/head_000.nii.gz").slices,
                 last(prior.sample_heads(1, persons=persons)))
    run("--heads 3")
    volume = nibabel.load("brains/head_002.nii.gz")
    # x to the right, y to the front, z up: the image's rows run backwards, its columns to the right.
    assert_close(np.asarray(volume.dataobj, int).transpose(2, 1, 0)[:, ::-1], last(prior.sample_heads(3)))
    assert volume.header.get_zooms()[:2] == (4, 4)  # 256 mm over 64 pixels
    run("--images scan.nii.gz")
    head = dataset.load_splits("DIR", ["test"])["test"].take(slice(8))
    np.testing.assert_array_equal(np.load("scan/scan_codes.npy"), dataset.encode(vqvae, head))
    run("--codes scan/scan_codes.npy")
    assert_close(pixels("back/scan_codes_????.png"), pixels("scan/scan_slice_?_reconstruction.png"))
    run("--images a.png b.png")
    np.testing.assert_array_equal(pixels("mine/?_original.png"), pixels("?.png"))
    assert_close(pixels("mine/?_reconstruction.png"), decoded(vqvae.encode_to_codes(
        dataset.normalise(head.images[:2])[..., np.newaxis])))
    run("--write-dataset")
    splits = dataset.load_splits("synthetic")
    assert [split.num_people for split in splits.values()] == [4, 1, 1]
    heads = predict.decode_heads(vqvae, prior.sample_heads(6, seed=4, temperature=0.7), range(8))
    assert_close(np.concatenate([split.images for split in splits.values()]), np.concatenate(heads))
    run("--run-dir assets/pretrained")
    assert not Path("runs/NAME/predictions").exists()
    assert Path("runs/shipped-weights/predictions/report.html").exists()
    run("--export exported")
    check_python(*models)
    save = stages.Checkpoints.on_epoch_end
    def save_and_copy(self, epoch, logs):
        save(self, epoch, logs)
        if self.stage.name == "decoder" and epoch == 0:
            shutil.copytree("runs/tuned", "runs/stopped")
    monkeypatch.setattr(stages.Checkpoints, "on_epoch_end", save_and_copy)
    run("--start-from assets/pretrained")
    check_tuned(monkeypatch)
    check_tensorboard(*lines)


def check_python(vqvae, prior):
    objects, exported = {}, {}
    exec(OBJECTS, objects)
    test = dataset.load_splits("DIR", ["test"])["test"].images[:8]
    np.testing.assert_allclose(objects["images"], test[..., np.newaxis] / 127.5 - 1, atol=1e-6)
    np.testing.assert_allclose(objects["decoded"], vqvae(objects["images"]), atol=1e-5)
    head, = prior.sample_heads(1, seed=1)
    np.testing.assert_array_equal(objects["head"], vqvae.decode_head(head))
    exported["images"] = objects["images"]
    exec(EXPORTED, exported)
    np.testing.assert_array_equal(exported["codes"], objects["codes"])
    np.testing.assert_allclose(exported["decoded"], objects["decoded"], atol=1e-5)
    np.testing.assert_array_equal(exported["slices"], prior.sample([5]))
    np.testing.assert_array_equal(exported["heads"], prior.sample_heads(1))
    np.testing.assert_allclose(exported["head"], vqvae.decode_head(exported["heads"][0]), atol=1e-5)


def check_tuned(monkeypatch):
    """It is finished; its copy, stopped at the decoder's first epoch, resumes to the same bits.

    By then the run that both began with has moved."""
    tuned, stopped = Path("runs/tuned"), Path("runs/stopped")
    assert runs.newest() == tuned and Run.load(tuned).start_from["folder"] == str(runs.PRETRAINED)
    moved = shutil.move(runs.PRETRAINED, "moved")
    monkeypatch.setattr(train, "finish", lambda *_: None)
    train.main(["--run-dir", str(stopped), "--resume", "--start-from", moved])
    for name in ("decoder_history.csv", "pixelcnn_history.csv"):
        assert read_history(tuned / name) == read_history(stopped / name) != []


def check_tensorboard(line):
    assert shutil.which(line.split()[0], path=Path(sys.executable).parent)
    logs = {path.parent for path in Path("runs/tuned").rglob("*tfevents*")}
    tags = [tag for folder in logs for tag in EventAccumulator(str(folder)).Reload().Tags()["tensors"]]
    assert {"epoch_loss", "epoch_bits_per_code", "reconstructions"} <= set(tags)

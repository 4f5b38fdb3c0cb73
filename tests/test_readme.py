"""The README says what the repository does, and no number that no run stands behind."""

import json
import re

import pytest

from benchmarks import gpu, tables
import dataset
import predict
from support import judge
from tests.conftest import ROOT
import train

DOCUMENTS = {path.relative_to(ROOT).as_posix(): path.read_text() for path in tables.DOCUMENTS}
README = DOCUMENTS["README.md"]
ONE_LINE = " ".join(README.split())
RESULTS = json.loads((ROOT / "assets" / "results.json").read_text())
BENCHMARKS = {"codecs", "faults", "gpu", "loading", "optimizers", "reconstruction", "sampling",
              "scaling", "training", "utility", "ventricles"}
RUNS = {"real_slices", "two_cores", "heads", "demo", "pretrained", "pretrained_heads"}

# Numbers in running text: these sentences, filled from the results, have to stand in one of the documents.
SENTENCES = (
    "tell them from reconstructed people (AUC {heads[told_apart_heads]:.2f}; 0.5 is guessing)",
    "You should see `SSIM {demo[ssim]:.3f}`",
    "{demo[environment_gigabytes]:.0f} GB of disk",
    "{real_slices[people][train]} to train, {real_slices[people][validate]} to validate, "
    "{real_slices[people][test]} to test",
    "{real_slices[code_entropy]:.2f} by the frequency of codes, {real_slices[bits_per_code_alone]:.2f} by "
    "the prior for a slice alone, {real_slices[bits_per_code]:.2f} for a slice in its head",
    "Of {heads[num_heads]} heads sampled after training on real people, {heads[copies]} lie",
    "batches of 128 leave PatternFlow's model {reconstruction[patternflow][steps]} steps",
    "largest likelihood on validation people (here {real_slices[movement]:.2f})",
    "Of the weights' heads {pretrained_heads[copies]} stand out",
)


TABLE = re.compile(r"(?:<!-- (results: \w+|not measured) -->\n)?((?:^\|.*\n)+)", re.M)
NUMBER_IN_CELL = re.compile(r"\| *\**\d[\d.,]*( ?\S{1,3})?\** *\|")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_and_pictures_resolve_and_no_line_of_code_is_cut_off_at_the_width_of_a_page(name):
    prose = re.sub(r"^```.*?^```", "", DOCUMENTS[name], flags=re.M | re.S)
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", prose) if "://" not in link]
    assert links and [link for link in links if not ((ROOT / name).parent / link).is_file()] == []
    blocks = re.findall(r"^```\w*\n(.*?)^```", DOCUMENTS[name], re.M | re.S)
    assert [line for block in blocks for line in block.splitlines() if len(line) > 92] == []


def test_every_script_and_asset_is_named_and_the_readme_is_read_in_one_sitting():
    assert sum(bool(re.search(r"\w", word)) for word in README.split()) <= 1_700
    for path in (*ROOT.glob("*.py"), *(ROOT / "assets").glob("*"), *(ROOT / "benchmarks").glob("*.py")):
        assert any(path.relative_to(ROOT).as_posix() in text for text in DOCUMENTS.values()), path


@pytest.mark.parametrize("script", (train, predict, dataset))
def test_every_option_in_the_readme_exists(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--help"])
    options = set(re.findall(r"(--[a-z0-9-]+)", capsys.readouterr().out))
    lines = re.findall(rf"{script.__name__}\.py([^`\n#]*)", README)
    used = {option for line in lines for option in re.findall(r"--[a-z0-9-]+", line)}
    assert used and used <= options


def test_ci_runs_the_command_of_the_readme():
    install, command = (ROOT / ".ci" / "run").read_text().splitlines()[-2:]
    assert install == "pip install --quiet -r requirements.txt" and f"\n  && {command}\n" in README


@pytest.mark.parametrize("name", DOCUMENTS)
def test_tables_are_those_of_the_record_and_each_is_shown_once(name):
    """If this fails after a benchmark was recorded: python benchmarks/tables.py."""
    shown = [match[2] for text in DOCUMENTS.values() for match in tables.MARKED.finditer(text)]
    assert sorted(shown) == sorted(tables.TABLES)
    for marker, table in TABLE.findall(DOCUMENTS[name]):
        assert marker and (marker != "not measured" or not NUMBER_IN_CELL.search(table)), table
    assert DOCUMENTS[name] == tables.fill(DOCUMENTS[name], RESULTS)


@pytest.mark.parametrize("sentence", SENTENCES)
def test_numbers_in_sentences_are_those_of_the_record(sentence):
    filled = sentence.format(**RESULTS)
    assert any(filled in " ".join(text.split()) for text in DOCUMENTS.values()), filled


def test_the_time_of_a_real_run_and_the_copies_that_chance_gives_are_those_of_the_record():
    run, heads = RESULTS["real_slices"], RESULTS["heads"]
    minutes = tables.minutes(RESULTS)[2][1]
    assert f"Trained on {run['people']['train']} real people ({minutes}utes on two CPU cores)" in ONE_LINE
    assert f"chance gives {heads['num_heads'] * heads['copies_false_alarms']:.0f}." in ONE_LINE
    assert f"than {100 - 100 * heads['copies_false_alarms']:.0f} % of people do" in ONE_LINE
    assert heads["copies_found"] == heads["copies_planted"]


def test_estimated_minutes_are_of_the_default_run_and_follow_from_speeds():
    """A run of 100 images, 4 heads and other epochs; speeds of one to four images/s."""
    settings = train.Settings()
    assert tables.OASIS["epochs"] == {"vqvae": settings.epochs, "decoder": settings.decoder_epochs,
                                      "pixelcnn": settings.prior_epochs}
    assert tables.OASIS["heads"] == settings.calibration_heads
    assert tables.CALIBRATION_SLICES == 32 * settings.calibration_rounds
    run = {"images": 100, "heads": 4, "epochs": {"vqvae": 2, "decoder": 3, "pixelcnn": 5}}
    speeds = {"vqvae": 1, "decoder": 2, "pixelcnn": 4, "sampling": 3}
    assert tables.estimate(run, speeds) == 200 + 150 + 125 + 4 * 64 / 3
    assert [tables.in_minutes(value) for value in (119, 5999, 6480)] == ["2 min", "100 min", "1.8 h"]


def test_the_record_says_where_everything_comes_from():
    assert RESULTS.keys() == BENCHMARKS | RUNS
    for key, entry in RESULTS.items():
        assert all(entry[field] for field in ("command", "commit", "date", "hardware", "machine")), key
    text = DOCUMENTS["benchmarks/README.md"].replace("\\\n  ", "")
    shown = re.findall(r"^python benchmarks/.*", text, re.M)
    assert sorted(shown) == sorted(RESULTS[key]["command"] for key in BENCHMARKS)  # what is shown was run
    assert list(RESULTS["gpu"]["images_per_second"]) == list(gpu.SETTINGS)


@pytest.mark.parametrize("key", ("heads", "pretrained_heads"))
def test_the_record_of_heads_holds_the_figures_of_the_table_and_its_judges_find_obvious_fakes(key):
    record = RESULTS[key]
    shown = {name + suffix for name in judge.ROWS for suffix in (*judge.COLUMNS, *judge.BESIDE)}
    origin = {"command", "commit", "date", "hardware", "machine", "git_commit", "num_heads", "num_people",
              "seed", "temperature", "bits_per_code_train", "membership_reference_epochs",
              "copies_heads"}
    before = {name for name in record if "_before" in name}  # of an earlier commit's run: `tables.before`
    assert {name.removesuffix("_interval") for name in record.keys() - before} <= shown | origin
    for name in ("slices_fake_noise", "slices_fake_mean_person", "heads_fake_noise", "heads_fake_mean_person",
                 "heads_fake_mixed_people", "heads_fake_rougher"):
        least = 0.8 if name == "heads_fake_rougher" else 0.95  # of middling difficulty
        assert record[f"told_apart_{name}"] >= least, name

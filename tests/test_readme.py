"""The README says what the repository does."""

import json
import re

import pytest

from tests.conftest import ROOT
import dataset
import predict
import train

README = (ROOT / "README.md").read_text()


def test_links_and_pictures_resolve():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(links) > 10
    for link in links:
        assert link.startswith("https://") or (ROOT / link).is_file(), link


def test_every_script_and_asset_is_named():
    for path in (*ROOT.glob("*.py"), *(ROOT / "assets").glob("*")):
        assert path.name in README, path
    for path in (ROOT / "benchmarks").glob("*.py"):
        assert f"benchmarks/{path.name}" in README, path


@pytest.mark.parametrize("script, main", (("train.py", train.main), ("predict.py", predict.main), ("dataset.py", dataset.main)))
def test_usage_lists_the_options_that_exist(script, main, capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    options = set(re.findall(r"(--[a-z0-9-]+)", capsys.readouterr().out.split("options:")[0])) - {"--help"}
    usage = re.search(rf"^python {script} +(\[.*?)(?=^python|^```)", README, re.M | re.S)[1]
    assert set(re.findall(r"--[a-z0-9-]+", usage)) == options


def test_results_are_those_of_the_record():
    results = json.loads((ROOT / "assets" / "results.json").read_text())["real_slices"]
    row = next(line for line in README.splitlines() if line.startswith("| real T1 slices"))
    for key, digits in (("ssim", 3), ("ssim_gaussian", 3), ("ssim_foreground", 3), ("psnr", 1), ("perplexity", 0)):
        assert f"{results[key]:.{digits}f}" in row, key
    assert f"/ {results['bytes_per_image']:.0f} |" in row
    assert results["command"].split(" && ")[0] in row
    assert results["copy_test_says"] in " ".join(README.split())
    assert {"ssim", "bits_per_code", "code_entropy", "frechet", "frechet_floor", "kid", "density", "coverage", "coverage_floor",
            "ms_ssim_samples", "ms_ssim_real", "copy_test"} <= results.keys()

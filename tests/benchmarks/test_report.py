"""benchmarks/report.py: which result files it takes, and what it writes without some of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import record
import report

ROOT = report.ROOT


def write(folder: Path, **changes) -> Path:
    data = {"machine": {"commit": "0123456789"}, "rows": [{"note": "calibrated on text"}]}
    path = folder / "peers.json"
    path.write_text(json.dumps(data | changes))
    return path


def test_takes_a_file_of_a_commit(tmp_path):
    assert report.load(write(tmp_path))["machine"] == {"commit": "0123456789"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"machine": {"commit": "0123456789-dirty"}}, "commit is '0123456789-dirty'"),
        ({"checks": [{"commit": "89abcdef01-dirty"}]}, "commit is '89abcdef01-dirty'"),
        ({"machine": {}}, "no commit is named"),
        ({"note": "Put together from what the tuning runs printed"}, "note is 'Put together"),
        ({"rows": [{"note": "typed by hand"}]}, "note is 'typed by hand'"),
    ],
)
def test_refuses_what_no_commit_measured(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        report.load(write(tmp_path, **changes))
    assert str(caught.value).startswith("peers.json: ")


def test_check_ends_with_the_reason(tmp_path, monkeypatch):
    write(tmp_path, machine={"commit": "0123456789-dirty"})
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["report.py", "--check"])
    with pytest.raises(SystemExit, match=r"peers\.json: commit is '0123456789-dirty'"):
        report.main()


def test_written_texts_are_those_of_the_result_files():
    found = report.load_all(report.RESULTS)
    readme = (ROOT / "README.md").read_text()
    assert report.filled(readme, found) == readme
    texts = {path.stem: path.read_text() for path in report.RESULTS.glob("*.md")}
    assert report.documents(found) == texts


def test_readme_says_what_is_not_recorded():
    found = report.load_all(report.RESULTS)
    without = {name: data for name, data in found.items() if name not in ("peers", "gpu")}
    text = report.readme_links(without)
    assert "`make bench`" in text
    assert "`make gpu`" in text
    assert "none are recorded" in text
    full = report.readme_links(without | {"peers": {}, "peers_model": {}, "gpu": {}})
    assert "none are recorded" not in full
    assert "results/gpu.md" in full


def test_table_of_readme_has_a_line_where_dense_wins():
    found = report.load_all(report.RESULTS)
    lines = report.readme_table(found["kernels"], found["model"]).splitlines()
    assert sum(line.startswith("| ") for line in lines[2:]) <= 6
    worst = min(r["speedup"] for r in found["kernels"]["runs"][-1]["results"])
    assert any(f"{worst:.2f}x" in line for line in lines)


def test_every_method_is_of_a_family_of_the_plot():
    pytest.importorskip("matplotlib")
    import plots

    models = report.load(report.RESULTS / "methods.json").values()
    named = [name for members in plots.FAMILIES.values() for name in members]
    assert len(named) == len(set(named))
    assert {r["method"] for model in models for r in model["rows"]} <= set(named)


def test_results_of_one_benchmark_do_not_make_the_next_ones_commit_dirty(tmp_path, monkeypatch):
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    monkeypatch.setattr(record, "RESULTS", results)
    files = [results / "kernels.json", tmp_path / "README.md", tmp_path / "kernel.h"]
    for path in files:
        path.write_text("old")
    who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    for command in (("init", "-q"), ("add", "."), (*who, "commit", "-qm", "old")):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    for path in files[:2]:
        path.write_text("new")
    assert len(record.commit()) == 10
    files[2].write_text("new")
    assert record.commit().endswith("-dirty")

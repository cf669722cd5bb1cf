"""The comparison of runs, and pages that open from disk and show what they are given as text."""

import html.parser
import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from PIL import Image

from experiments import table
from experiments.show import charts, comparison, markdown, webpage
from experiments.show.runs import HEADER
from experiments.show.webpage import Section
from ssa_jax.errors import ConfigError
from ssa_jax.methods import METHODS
from ssa_jax.reporting import colors, pictures, plots
from ssa_jax.runs.workdir import WorkdirError

ROOT = Path(__file__).parent.parent
EVIL = '<script>alert("x")</script>|$x_1'


def make_run(folder, accuracies=(0.5, 0.6), summary=True, **config):
    folder.mkdir(parents=True)
    record = {
        "config": {"method": "bp", "learning_rate": 0.1, "workdir": str(folder), **config},
        "versions": {"jax": "9.9.9"}, "commit": "abc", "hardware": "A&B processor, 3 CPUs",
        "started": "2026-01-01",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(record))
    rows = [
        {"epoch": i, "test_accuracy": a, "train_loss": 2.0 - a, "ranks": {"0": 8, "1": 16},
         "wall_s": 3.0 * i, "compile_s": 1.5}
        for i, a in enumerate(accuracies, start=1)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if summary:
        told = {
            **rows[-1], "status": "finished", "epochs": 2, "factorized": True, "params": 2_000_000,
            "params_ratio": 0.5, "macs": 3_000_000, "macs_ratio": 0.25, "rank_fraction": 0.4,
            "diagnosis": [],
        }  # fmt: skip
        (folder / "summary.json").write_text(json.dumps(told))
    return str(folder)


@pytest.fixture
def runs(tmp_path):
    """A finished run, and one that still runs and has a name to be careful with."""
    return [
        make_run(tmp_path / "a"),
        make_run(tmp_path / EVIL.replace("/", "∕"), (0.7,), summary=False, method="dfa", seed=1),
    ]


class Tags(html.parser.HTMLParser):
    """The tags of a page, the text of its cells, and its images."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.cells, self.images = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "td":
            self.cells.append("")
        if tag == "img":
            self.images.append(dict(attrs)["src"])

    def handle_data(self, data):
        if self.cells and self.tags[-1] == "td":
            self.cells[-1] += data


def test_a_report_tells_results_differences_and_origin(runs, tmp_path):
    page = comparison.write(comparison.read(runs), tmp_path / "out")
    told = (tmp_path / "out/report.md").read_text()
    first, second = (
        line for line in told.splitlines() if "| finished " in line or "running" in line
    )
    cells = [c.strip() for c in first.strip("|").split("|")]
    assert dict(zip(HEADER, cells, strict=True)) == {
        "run": "a", "state": "finished", "epochs": "2", "test accuracy": "60.00 %",
        "train loss": "1.400", "rank": "40.0 %", "ranks": "8 16", "parameters": "2.000 M (50 %)",
        "MACs": "3.00 M (25 %)", "wall time": "6.0 s", "compile time": "1.5 s",
        "diagnosis": "healthy",
    }  # fmt: skip
    # What a run that goes on does not tell yet is a dash, the rest is of its last row.
    assert "| running | 1 | 70.00 % | 1.300 | - |" in " ".join(second.split())
    differences = told.split("## Settings that differ")[1].split("##")[0]
    assert "method" in differences
    assert "seed" in differences
    assert "learning" not in differences
    assert "workdir" not in differences
    assert "9.9.9" in told
    with Image.open(tmp_path / "out/curves.png") as picture:
        low, high = picture.convert("L").getextrema()
        assert high - low > 100
    # Once more over the same folder, as a report of runs that go on is made.
    assert comparison.write(comparison.read(runs), tmp_path / "out") == page


def test_a_page_shows_names_as_text_and_fetches_nothing(runs, tmp_path):
    page = comparison.write(comparison.read(runs), tmp_path / "out").read_text()
    tags = Tags(page)
    assert tags.tags.count("script") == 1
    assert any(EVIL.replace("/", "∕") in cell for cell in tags.cells)
    assert "A&B processor, 3 CPUs" in tags.cells
    assert len(tags.images) == 1
    assert all(src.startswith("data:image/png;base64,") for src in tags.images)
    assert "http" not in page.replace("http-equiv", "")
    told = (tmp_path / "out/report.md").read_text()
    assert "<script" not in told.replace(r"\<script", "")


def test_equal_settings_are_said_to_be_equal(tmp_path):
    runs = comparison.read([make_run(tmp_path / "x/a"), make_run(tmp_path / "y/a")])
    # Told apart by as much of their paths as that takes.
    assert [run.name for run in runs] == ["x/a", "y/a"]
    page = comparison.write(runs, tmp_path / "out")
    assert "All settings are the same." in page.read_text()


def test_a_folder_that_is_no_run_or_not_ours(runs, tmp_path):
    with pytest.raises(WorkdirError, match=r"nowhere holds no run: config\.json is missing"):
        comparison.read([*runs, str(tmp_path / "nowhere")])
    with pytest.raises(ConfigError, match="give the workdirs to compare"):
        comparison.read([])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("x")
    with pytest.raises(WorkdirError, match="holds other things than a report"):
        comparison.write(comparison.read(runs), tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    with pytest.raises(WorkdirError, match="cannot write to /dev/null/out"):
        comparison.write(comparison.read(runs), Path("/dev/null/out"))


def test_a_wrong_command_is_one_line_and_exit_code_2(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "experiments.report", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path} holds no run")
    assert len(done.stderr.strip().splitlines()) == 1


def test_every_head_of_a_table_is_a_button_to_sort_by():
    table = webpage.page("x", [Section(table=(("a", "<b>"), [("1", "&")]))])
    assert table.count("<th scope") == table.count("<button") == 2
    assert [cell.strip() for cell in Tags(table).cells] == ["1", "&"]
    assert "&lt;b&gt;" in table


SETTINGS = {"rank_schedule": "none", "angles": [10.0, 0.0]}


def test_runs_of_one_method_are_told_apart_by_name_and_settings(tmp_path, capsys):
    folders = []
    for name, rate, method in (("slow", 0.1, "bp"), ("fast", 0.4, "bp"), ("other", 0.1, "dfa")):
        folders.append(make_run(tmp_path / name, learning_rate=rate, method=method))
        file = tmp_path / name / "summary.json"
        told = json.loads(file.read_text()) | SETTINGS | {"method": method, "factorized": False}
        file.write_text(json.dumps(told))
    table.main(folders)
    header, _, slow, fast, other = capsys.readouterr().out.splitlines()
    assert header.split()[1] == "run"
    assert header.split()[-2] == "settings"
    assert slow.startswith("| slow")
    assert "learning_rate=0.1 " in slow
    assert "learning_rate=0.4 " in fast
    # No other run has its label.
    assert "learning_rate" not in other
    table.main(folders[1:])
    assert "settings" not in capsys.readouterr().out


def test_columns_without_anything_are_left_out():
    whole = ("a", "b", "c"), [("1", "-", ""), ("2", "-", "x")]
    assert markdown.filled(whole) == (["a", "c"], [["1", ""], ["2", "x"]])
    cells = Tags(webpage.page("x", [Section(table=whole)])).cells
    assert [cell.strip() for cell in cells] == ["1", "", "2", "x"]
    # Of no line nothing is known to be missing.
    assert markdown.filled((("a",), [])) == (("a",), [])


def test_a_method_has_its_colour_in_every_picture():
    named = colors.of(["dfa", "ssa direct", "bp, dense", "ssa sequential", "a model"])
    assert named[:3] == [colors.NAMED[name] for name in ("dfa", "ssa", "bp")]
    assert colors.of(["ssa (hybrid ranks)"]) == [colors.NAMED["ssa"]]
    assert len(set(named)) == 5
    assert set(METHODS) <= set(colors.NAMED)
    assert len({colors.NAMED[name] for name in METHODS}) == len(METHODS)


def shown(file):
    """The colours of a picture's points."""
    with Image.open(file) as picture:
        return {
            "#{:02x}{:02x}{:02x}".format(*rgb)
            for _, rgb in picture.convert("RGB").getcolors(1 << 24)
        }


def test_curves_and_bars_are_drawn_in_the_colours_of_their_methods(tmp_path):
    rows = [{"epoch": e, "test_accuracy": 0.1 * e, "train_loss": 1 / e} for e in (1, 2, 3)]
    runs = [plots.Named("mine", rows, "ssa"), plots.Named("theirs", rows[:2], "dfa")]
    points = [charts.Point(x, x, 0.0) for x in (1.0, 2.0)]
    curves = [charts.Curve("ssa direct", points), charts.Curve("dfa", points[::-1])]
    bars = charts.BarPanel("%", ["dfa", "ssa"], [charts.Bars("mlp", [[1.0], [2.0]])])
    for file in (
        plots.draw_runs(tmp_path / "runs.png", runs),
        charts.draw(tmp_path / "curves.png", [charts.Panel("x", "y", curves)]),
        charts.draw(tmp_path / "bars.png", [bars]),
    ):
        assert {colors.NAMED["ssa"], colors.NAMED["dfa"]} <= shown(file)


def test_an_svg_tells_its_values_under_the_pointer(tmp_path):
    file = tmp_path / "picture.svg"
    few, many = ([charts.Point(i, i / 3, 0.1) for i in range(n)] for n in (3, 30))
    curves = [charts.Curve("a < $b", few), charts.Curve("c", many)]
    charts.draw(file, [charts.Panel("x", "y", curves, levels=[0.5])])
    titles = [e.text for e in ET.parse(file).iter() if e.tag.endswith("title")]
    assert titles.count("a < $b: 2, 0.6667") == 1
    assert sum(t.startswith("c: ") for t in titles if t) == len(many)
    assert sum(": " in t for t in titles if t) == len(few) + len(many)
    bars = [charts.Bars("d", [[1.0, 2.0], [3.0]])]
    charts.draw(file, [charts.BarPanel("x", ["one", "two"], bars)])
    titles = [e.text for e in ET.parse(file).iter() if e.tag.endswith("title")]
    assert titles[-2:] == ["d: 1.5", "d: 3"]


def test_panels_of_bars_name_the_same_things_once(tmp_path):
    def words(names):
        file = tmp_path / "picture.svg"
        panels = [charts.BarPanel("a length", n, [charts.Bars("d", [[1.0]])]) for n in names]
        charts.draw(file, panels)
        # Matplotlib draws text as shapes, and says in a comment which.
        return [file.read_text().count(f"<!-- {word} -->") for word in ("a length", "one", "two")]

    assert words([["one"], ["one"]]) == [1, 1, 0]
    assert words([["one"], ["two"]]) == [2, 1, 1]


def test_no_unit_hides_behind_another_and_units_count_from_one():
    assert pictures.together([[9.0, 8.0], [0.0, 0.1], [5.0, 5.0], [0.0, 0.0]]) == [[1], [2, 4], [3]]
    assert [pictures.called(units) for units in ([1], [2, 4], [3, 4, 5])] == [
        "unit 1", "units 2, 4", "units 3 to 5",
    ]  # fmt: skip
    assert plots.layer("0/units/0/map/kernel") == "unit 1: map"
    assert plots.layer("3/body/0/kernel") == "unit 4: body/0"
    assert plots.layer("0/kernel") == "unit 1: kernel"

"""The pages of trainings: one run, and several side by side."""

import json
import re
from pathlib import Path

import pytest
from helpers import pages
from helpers.records import full

from contralto.align.monitoring import side_by_side
from contralto.align.monitoring.panels import Panel, inline_svg, panels_of
from contralto.cli import main
from contralto.common.plots import TEXT


def small(scale):
    """A record whose changes are of a scale, over three steps."""
    made = full()
    for at, point in enumerate(made.points):
        point.step = at
        point.chosen = [change * scale for change in point.chosen]
        point.rejected = [change * scale for change in point.rejected]
    return made


@pytest.mark.parametrize("scale", [1e-7, 1e-3, 1.0, 1e5])
def test_no_label_is_cut_at_any_scale(scale):
    svg = inline_svg(panels_of(small(scale))[0])
    assert pages.cut_texts(svg) == []
    assert TEXT not in svg
    assert "fill: var(--soft)" in svg


def test_long_titles_have_two_lines():
    title = "a title that is so long that it cannot stand in one line above one plot of this size"
    svg = inline_svg(Panel(title, lambda axes: None))
    assert pages.cut_texts(svg) == []
    assert title not in svg


def test_a_label_that_leaves_the_box_is_noticed():
    text = '<svg viewBox="0 0 99 99"><text style="font: 10px; text-anchor: end" x="9" y="50">-0.002</text>'
    assert pages.cut_texts(text) == ["-0.002"]
    wide = inline_svg(
        Panel(
            "title", lambda axes: None, "a label of the axis that is far too long for a plot of this size, on any page"
        )
    )
    assert pages.cut_texts(wide) != []


def test_steps_are_whole_numbers():
    svg = inline_svg(panels_of(small(1.0))[0])
    below = [
        text for text in re.findall(r"<text[^>]*text-anchor: middle[^>]*>([^<]*)</text>", svg) if text[0].isdigit()
    ]
    assert below == ["0", "1", "2"]


def saved(folder, **about):
    full(**about).save(folder)
    return folder


def test_runs_side_by_side_show_figures_and_what_differs(tmp_path):
    runs = [saved(tmp_path / "dpo"), saved(tmp_path / "apo", learning_rate=1e-3, settings={"seed": 4, "<b>": 1})]
    records = dict(zip(("dpo", "apo"), map(side_by_side.read_run, runs), strict=True))
    assert dict(side_by_side.figures_of_runs(records))["chosen, nats"] == ["-2.75 ± 1.04"] * 2
    assert side_by_side.differing_settings(records) == [
        ("learning_rate", ["0.0001", "0.001"]),
        ("seed", ["3", "4"]),
        ("<b>", ["", "1"]),
    ]


def test_rounds_stand_for_their_trainings(tmp_path):
    for number in (10, 2, 1):
        saved(tmp_path / f"round-{number}" / "model")
    runs = side_by_side.find_runs([tmp_path])
    assert side_by_side.run_labels(runs) == ["round-1", "round-2", "round-10"]


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["nothing"], r"there is no monitor\.json or training_log\.json in .*nothing: give the output_dir"),
        (["run", "run"], "is given twice"),
    ],
)
def test_folders_that_are_no_runs_are_rejected(tmp_path, folders, message):
    saved(tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        side_by_side.find_runs([tmp_path / folder for folder in folders])


@pytest.mark.slow
def test_the_command_writes_one_page(tmp_path, capsys):
    folders = [str(saved(tmp_path / name)) for name in ("a", "b")]
    page = tmp_path / "both.html"
    assert main(["align", "report", *folders, "--output", str(page)]) == 0
    text = page.read_text()
    assert text.count("<svg") == len(pages.plots(text)) == 10
    assert not [cut for plot in pages.plots(text) for cut in pages.cut_texts(plot)]
    assert "None: the runs have the same settings and versions." in text
    assert main(["align", "report", folders[0]]) == 0
    assert (Path(folders[0]) / "training_report.html").is_file()
    assert main(["align", "report", folders[0], "--output", str(page)]) != 0
    assert "--output is for several trainings" in capsys.readouterr().err


def distilled(folder, *, factor):
    folder.mkdir()
    logs = [{"step": step, "loss": factor / step, "loss/chosen": factor / step} for step in (1, 2)]
    about = full().about | {"teacher": "big", "done": 2, "losses": ["distillm2"], "learning_rate": factor}
    (folder / "training_log.json").write_text(json.dumps({"about": about, "logs": logs}))
    return folder


def test_distillations_are_compared_by_their_logs(tmp_path):
    runs = [distilled(tmp_path / name, factor=factor) for name, factor in (("low", 0.5), ("high", 1.0))]
    page = side_by_side.write_comparison(runs, tmp_path / "both.html").read_text()
    assert "<td>0.5 to 0.25</td><td>1 to 0.5</td>" in page
    assert "<td>learning_rate</td><td>0.5</td><td>1.0</td>" in page
    assert page.count("<svg") == 2
    assert not [cut for plot in pages.plots(page) for cut in pages.cut_texts(plot)]
    with pytest.raises(ValueError, match="have no figures in common: give runs of one kind"):
        side_by_side.write_comparison([runs[0], saved(tmp_path / "dpo")], tmp_path / "both.html")

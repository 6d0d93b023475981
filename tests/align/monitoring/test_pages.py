"""The pages of trainings: one run, and several side by side."""

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


def test_a_label_that_leaves_the_box_is_noticed():
    wide = Panel(
        "a title that is so long that it cannot stand above one plot of this size, on any page", lambda axes: None
    )
    assert pages.cut_texts(inline_svg(wide)) == [wide.title]
    assert pages.cut_texts(
        '<svg viewBox="0 0 99 99"><text style="font: 10px; text-anchor: end" x="9" y="50">-0.002</text>'
    ) == ["-0.002"]


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
    records = dict(zip(("dpo", "apo"), map(side_by_side.Record.load, runs), strict=True))
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
    [(["nothing"], r"there is no monitor\.json in .*nothing: give the output_dir"), (["run", "run"], "is given twice")],
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

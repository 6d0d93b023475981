"""Output folders in which an earlier run has left something."""

import json
from types import SimpleNamespace

from contralto.align.monitoring.output_folder import EARLIER, MEASURED, OutputFolder, last_checkpoint


def state(step, *, is_main=True):
    return SimpleNamespace(global_step=step, is_world_process_zero=is_main)


def begin(folder, step=0, **how):
    OutputFolder().on_train_begin(SimpleNamespace(output_dir=str(folder)), state(step, **how), None)


def save(folder, *steps):
    """Checkpoints of the run that is under way."""
    for step in steps:
        (folder / f"checkpoint-{step}").mkdir(exist_ok=True)
        (folder / f"checkpoint-{step}" / "trainer_state.json").touch()
        OutputFolder().on_save(SimpleNamespace(output_dir=str(folder)), state(step), None)


def last(folder):
    return (last_checkpoint(folder) or "none").rpartition("-")[2]


def test_a_run_that_starts_anew_sets_the_measurements_of_another_aside(tmp_path, caplog):
    for number, name in enumerate(MEASURED):
        (tmp_path / name).write_text(str(number))
    begin(tmp_path, is_main=False)
    begin(tmp_path, 4)  # resumed
    assert all((tmp_path / name).is_file() for name in MEASURED)
    begin(tmp_path)
    assert not any((tmp_path / name).exists() for name in MEASURED)
    assert [(tmp_path / EARLIER / "1" / name).read_text() for name in MEASURED] == list("0123")
    assert "holds measurements of an earlier run" in caplog.text
    (tmp_path / MEASURED[0]).write_text("of the second run")
    begin(tmp_path)
    assert (tmp_path / EARLIER / "2" / MEASURED[0]).read_text() == "of the second run"


def test_last_is_a_checkpoint_of_the_latest_run(tmp_path):
    begin(tmp_path)
    save(tmp_path, 50, 100)
    assert last(tmp_path) == "100"
    begin(tmp_path)
    assert last(tmp_path) == "none"
    save(tmp_path, 10, 50)
    assert last(tmp_path) == "50"
    begin(tmp_path, 10)  # resumed before its last checkpoint
    assert last(tmp_path) == "10"
    (tmp_path / MEASURED[0]).touch()
    begin(tmp_path, 100)  # the first run goes on
    assert last(tmp_path) == "100"
    assert not (tmp_path / MEASURED[0]).exists()
    assert json.loads((tmp_path / EARLIER / "checkpoints.json").read_text()) == ["checkpoint-50"]


def test_a_folder_without_another_run_stays_as_it_is(tmp_path):
    begin(tmp_path)
    save(tmp_path, 3)
    assert [each.name for each in tmp_path.iterdir()] == ["checkpoint-3"]

"""lm-eval's index of tasks, read from one folder and once."""

from pathlib import Path

import lm_eval
import pytest
from lm_eval.tasks._index import TaskIndex


@pytest.fixture(scope="module", autouse=True)
def one_index():
    """lm-eval reads its thousands of task files whenever it starts; here it reads those of one folder, once."""
    build, known = TaskIndex.build, {}

    def remembered(paths, **how):
        for path in map(Path, paths):
            if path.name == "tasks" and path.parent == Path(lm_eval.__file__).parent:
                known[path] = known.get(path) or build([path / "hellaswag"], **how)
        fresh = build([path for path in paths if Path(path) not in known], **how)
        return {name: entry for index in known.values() for name, entry in index.items()} | fresh

    TaskIndex.build = staticmethod(remembered)
    yield
    TaskIndex.build = staticmethod(build)

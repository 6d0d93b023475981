"""A data set that maps its rows by one function once, however often it is asked to.

lm-eval 0.4.13 calls the `process_docs` of a task whenever it needs the documents: five times in an evaluation of HellaSwag, each time for
all 10,042 rows, whatever `--limit` says. Data sets of the hub find the rows in a file of the last call; rows in memory have no such file.
"""

from collections.abc import Callable
from typing import Any

from datasets import Dataset

__all__ = ["MappedOnce"]


class MappedOnce(Dataset):  # type: ignore[misc]
    """A data set in memory that keeps the results of `map`. Made by `MappedOnce.of`.

    Examples:
        >>> calls = []
        >>> data = MappedOnce.of(Dataset.from_list([{"x": 1}, {"x": 2}]))
        >>> for _ in range(2):
        ...     doubled = data.map(lambda row: calls.append(row) or {"x": 2 * row["x"]})
        >>> doubled["x"][:], len(calls)
        ([2, 4], 2)
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._mapped: dict[Any, Dataset] = {}

    @classmethod
    def of(cls, data: Dataset) -> "MappedOnce":
        """Return a data set with the same rows.

        Args:
            data: The data set.
        """
        return cls(data.data, info=data.info, split=data.split)

    def map(self, function: Callable[..., Any] | None = None, *args: Any, **kwargs: Any) -> Dataset:
        """Return the mapped rows: those of the first call for a function of the same code, which reads nothing but its rows.

        Args:
            function: The function.
            args: Further arguments; with any, the rows are mapped anew.
            kwargs: Likewise.
        """
        code = getattr(function, "__code__", None)
        if code is None or args or kwargs or code.co_freevars or getattr(function, "__defaults__", None):
            return super().map(function, *args, **kwargs)
        if code not in self._mapped:
            self._mapped[code] = super().map(function)
        return self._mapped[code]

"""A table of named entries that other packages can extend: losses, decoding methods, strategies, engines, checks, metrics."""

from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from contralto.common.suggestions import did_you_mean

__all__ = ["Registry"]

T = TypeVar("T")


class Registry(Generic[T]):
    """A table of entries by name, in the order of registration.

    Entries come from `register`, and from the entry points of `group` in installed packages. The names of entry points are read at
    the first look-up; an entry point is imported when its entry is used, and not at all if its name has been registered before.

    Args:
        kind: the singular noun for an entry in error messages, such as "loss".
        group: the entry-point group that other packages use, such as "contralto.losses".
        check: called with every entry; raises ValueError for an object that cannot be an entry.

    Examples:
        >>> registry = Registry("loss", group="contralto.losses")
        >>> registry.register(abs, name="absolute")
        <built-in function abs>
        >>> registry.get("absolute")(-1)
        1
        >>> registry.get("square")
        Traceback (most recent call last):
            ...
        ValueError: there is no loss 'square'; there are absolute
    """

    def __init__(self, kind: str, *, group: str, check: Callable[[Any], None] | None = None) -> None:
        self.kind, self.group = kind, group
        self._check = check
        self._entries: dict[str, T] = {}
        self._points: dict[str, EntryPoint] | None = None

    def register(self, entry: T, *, name: str | None = None) -> T:
        """Add an entry.

        Args:
            entry: the entry.
            name: the name of the entry; defaults to its attribute `name`.

        Returns:
            The entry, so that the function can be used as a decorator.

        Raises:
            ValueError: the name is taken by another entry, or the entry is not valid.
        """
        if self._check is not None:
            self._check(entry)
        name = name if name is not None else str(getattr(entry, "name"))  # noqa: B009 (T need not have it)
        if self._entries.setdefault(name, entry) is not entry:
            raise ValueError(f"there is already a {self.kind} {name!r}: give the new one another name")
        return entry

    def unregister(self, name: str) -> None:
        """Remove an entry that `register` added.

        Args:
            name: the name of the entry.

        Raises:
            ValueError: no entry has that name.
        """
        self.get(name)
        del self._entries[name]

    def get(self, name: str) -> T:
        """Return the entry of a name.

        Args:
            name: the name of the entry.

        Raises:
            ValueError: no entry has that name, or its entry point cannot be imported.
        """
        if name not in self._entries and name in self._entry_points():
            self._load(self._entry_points()[name])
        if name not in self._entries:
            raise ValueError(
                f"there is no {self.kind} {name!r}{did_you_mean(name, self.names())}; there are {', '.join(self.names())}"
            )
        return self._entries[name]

    def names(self) -> tuple[str, ...]:
        """Return the names of all entries, without importing entry points."""
        return tuple(dict.fromkeys((*self._entries, *self._entry_points())))

    def items(self) -> list[tuple[str, T]]:
        """Return names and entries, importing all entry points.

        Raises:
            ValueError: an entry point cannot be imported.
        """
        return [(name, self.get(name)) for name in self.names()]

    def values(self) -> list[T]:
        """Return all entries, importing all entry points.

        Raises:
            ValueError: an entry point cannot be imported.
        """
        return [self.get(name) for name in self.names()]

    def __getitem__(self, name: str) -> T:
        """Return `get(name)`."""
        return self.get(name)

    def __contains__(self, name: object) -> bool:
        """Return True if an entry has that name."""
        return name in self._entries or name in self._entry_points()

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self.names())

    def __len__(self) -> int:
        """Return the number of entries."""
        return len(self.names())

    def _entry_points(self) -> dict[str, EntryPoint]:
        if self._points is None:
            self._points = {point.name: point for point in sorted(entry_points(group=self.group))}
        return self._points

    def _load(self, point: EntryPoint) -> None:
        """Import an entry point and register what it names.

        Raises:
            ValueError: the import fails, or the object is not a valid entry.
        """
        package = point.dist.name if point.dist else point.module
        try:
            entry = point.load()
            if (name := getattr(entry, "name", point.name)) != point.name:
                raise ValueError(f"it is named {name!r}")
            self.register(entry, name=point.name)
        except Exception as error:  # the code of another package: any error there is a problem of that package
            raise ValueError(
                f"the {self.kind} {point.name!r} of the package {package} cannot be loaded: {error}"
            ) from error

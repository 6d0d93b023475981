"""Settings of the workers of a run on a Ray cluster, as recipes name them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from contralto.common.suggestions import did_you_mean
from contralto.data_gen.ranges import check_number

__all__ = ["RaySettings", "read_ray_settings"]

MOST_WORKERS = 10_000


class RaySettings(NamedTuple):
    """The workers of a run on a Ray cluster, under the names that Ray has for them."""

    concurrency: int = 2
    """The number of workers, each of which has engines of its own."""
    num_cpus: float = 1
    """The processors that Ray reserves for a worker."""
    num_gpus: float = 0
    """The GPUs that Ray reserves for a worker; a part of one lets workers share it."""


def read_ray_settings(recipe: Mapping[str, Any], where: str = "the recipe") -> RaySettings:
    """Return what a recipe says under `ray`.

    Args:
        recipe: the mapping of the recipe.
        where: the name of the recipe, for errors.

    Raises:
        ValueError: an unknown name, or a value out of range.

    Examples:
        >>> read_ray_settings({"ray": {"concurrency": 8, "num_gpus": 1}})
        RaySettings(concurrency=8, num_cpus=1, num_gpus=1)
        >>> read_ray_settings({"ray": {"workers": 8}})
        Traceback (most recent call last):
            ...
        ValueError: the recipe: ray has no 'workers'; it may have concurrency, num_cpus, num_gpus
    """
    given = recipe.get("ray", {})
    names = RaySettings._fields
    if not isinstance(given, dict):
        raise ValueError(f"{where}: ray must be a mapping with {', '.join(names)}, not {given!r}")  # noqa: TRY004 - a recipe's mistake
    if unknown := [name for name in given if name not in names]:
        hint = did_you_mean(str(unknown[0]), names)
        raise ValueError(f"{where}: ray has no {unknown[0]!r}{hint}; it may have {', '.join(names)}")
    settings = RaySettings(**given)
    check_number(f"{where}: ray: concurrency", settings.concurrency, least=1, most=MOST_WORKERS, whole=True)
    check_number(f"{where}: ray: num_cpus", settings.num_cpus, most=MOST_WORKERS)
    check_number(f"{where}: ray: num_gpus", settings.num_gpus, most=MOST_WORKERS)
    return settings

"""The objects of COCO images, from its annotation files."""

import json
import random
from collections.abc import Collection
from pathlib import Path
from typing import Any

from contralto.common.files import read_text
from contralto.eval.metrics.vocabulary import ObjectVocabulary, mentions, normalize

__all__ = ["coco_objects"]


def coco_objects(
    instances: Path, captions: Path, vocabulary: ObjectVocabulary, *, n: int | None = None, seed: int = 0
) -> dict[str, list[str]]:
    """Collect the objects of COCO images: those with a segmentation mask, and those named in a human caption.

    Args:
        instances: COCO's `instances_*.json`.
        captions: COCO's `captions_*.json` of the same images.
        vocabulary: The names of objects; it has every category of `instances`.
        n: The number of images to choose at random among those that have captions; None for all.
        seed: The seed of that choice.

    Returns:
        The objects by file name of the image, sorted by COCO's image id.

    Raises:
        ValueError: A file is not a COCO annotation file, `n` is not a number of images, or a category is not in the vocabulary.
    """
    boxes, described = _coco(instances, {"annotations", "categories"}), _coco(captions, {"annotations", "images"})
    category = {each["id"]: normalize(each["name"]) for each in boxes["categories"]}
    for name in category.values():
        if name not in vocabulary.names:
            raise ValueError(f"the synonym list has no line for {name!r}, a category of {instances}: add one")
    numbers = sorted({each["image_id"] for each in described["annotations"]})
    if n is None:
        n = len(numbers)
    if not isinstance(n, int) or not 1 <= n <= len(numbers):
        raise ValueError(f"n must be from 1 to {len(numbers)}, the images that {captions} has captions of, not {n!r}")
    chosen = sorted(random.Random(seed).sample(numbers, n))
    objects_of: dict[int, set[str]] = {number: set() for number in chosen}
    for each in boxes["annotations"]:
        if each["image_id"] in objects_of:
            objects_of[each["image_id"]].add(vocabulary.names[category[each["category_id"]]])
    for each in described["annotations"]:
        if each["image_id"] in objects_of:
            objects_of[each["image_id"]].update(mentions(each["caption"], vocabulary))
    files = {each["id"]: each["file_name"] for each in described["images"]}
    return {files[number]: sorted(objects) for number, objects in objects_of.items()}


def _coco(path: Path, keys: Collection[str]) -> dict[str, Any]:
    """Read a COCO annotation file that has the given keys."""
    if not path.is_file():
        raise ValueError(f"there is no {path}: CHAIR reads COCO's instances and captions of the images")
    try:
        content = json.loads(read_text(path))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict) or not set(keys) <= content.keys():
        raise ValueError(f"{path} is not a COCO annotation file: it needs the keys {' and '.join(sorted(keys))}")
    return content

"""The reference's log-probabilities of pairs with images, which are not tokens before a collator has read them."""

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from PIL.Image import Image

from contralto.align.caches.reference import ReferenceCache
from contralto.common.hashing import content_digest, json_digest, pixels_digest, tokenizer_digest

__all__ = ["ImageReferenceCache", "processor_digest"]


TOKENIZER = "tokenizer.json"
"""The file that also says how the last call has padded."""


class ImageReferenceCache(ReferenceCache):
    """The blocks of one reference and one processor, named by the texts and the pixels of their rows.

    Args:
        folder: the folder of all references.
        key: the hash of the reference and of what turns a row into the inputs of a model: processor and truncation.
        logps_of: see `ReferenceCache`; the rows are examples as the collator reads them.
        processes: see `ReferenceCache`.

    Raises:
        ValueError: when a data set is added, a row has something that is neither text, number nor image.
    """

    rows_per_block = 64  # whose images are in memory

    def blocks(self, dataset: Iterable[Any]) -> Iterator[list[dict[str, Any]]]:
        """Yield the rows of a data set in blocks, with all columns.

        Args:
            dataset: a `Dataset`.
        """
        rows = iter(dataset)
        while block := list(islice(rows, self.rows_per_block)):
            yield block

    def block_hash(self, rows: Any) -> str:
        """Return a hash of the texts and the pixels of rows.

        Args:
            rows: the rows of a block.
        """
        return json_digest([_content(row) for row in rows])


def processor_digest(processor: Any) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of the files that a processor saves: of its tokenizer, template and image processor.

    Args:
        processor: a processor of transformers.

    Examples:
        >>> from transformers import AutoProcessor
        >>> from contralto import testbed
        >>> processor = AutoProcessor.from_pretrained(testbed.path("vision-0"))
        >>> processor_digest(processor) == processor_digest(processor)
        True
    """
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        files = [path for path in sorted(Path(folder).iterdir()) if path.name != TOKENIZER]
        found = {path.name: content_digest(path.read_bytes()) for path in files}
    return json_digest({**found, TOKENIZER: tokenizer_digest(processor.tokenizer)}, 16)


def _content(value: Any) -> Any:
    """Return a part of a row as a JSON value in which images are digests of their pixels."""
    if isinstance(value, Image):
        return {"pixels": pixels_digest(value)}
    if isinstance(value, bytes):
        return {"bytes": content_digest(value)}
    if isinstance(value, Mapping):
        return {name: _content(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_content(part) for part in value]
    if value is None or isinstance(value, str | int | float):
        return value
    raise ValueError(
        f"a row has a {type(value).__name__}, and precompute_ref_log_probs finds rows again by texts, numbers and PIL images: "
        "make it one of these, or set precompute_ref_log_probs to False"
    )

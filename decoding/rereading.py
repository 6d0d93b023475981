"""Read tokens of one tokenizer as the tokens of another one that stand for the same text."""

from collections.abc import Iterator, Sequence

from contralto.decoding.byte_tokens import ByteTokens

__all__ = ["reread"]


def reread(own: ByteTokens, other: ByteTokens, row: Sequence[int], *, begins: bool = True) -> list[int]:
    """Return the tokens of another tokenizer that stand for the text of tokens.

    Special tokens that both tokenizers have are kept, others are read as the characters of their names. The tokens that the first
    tokenizer begins texts with are left out, those of the other one are put first; so are the spaces that they put before texts.

    Args:
        own: the tokenizer of the tokens.
        other: the other tokenizer.
        row: token ids without padding.
        begins: whether they begin a text; otherwise they continue one.

    Returns:
        Token ids of the other tokenizer.

    Raises:
        ValueError: the tokens begin a text, hold none, and the other tokenizer begins texts with nothing.
    """
    row = list(row)
    if begins and row[: len(own.begin)] == own.begin:
        row = row[len(own.begin) :]
    ids = list(other.begin) if begins else []
    is_first, spaced = begins, begins and other.prepends
    for part in _parts(own, other, row):
        if isinstance(part, bytes):
            part = part.removeprefix(b" ") if is_first and own.prepends else part
            ids += other.encode(b" " + part if spaced and part else part)
        else:
            ids.append(part)
        is_first, spaced = False, other.prepends_always and not isinstance(part, bytes)
    if begins and not ids:
        raise ValueError("the prompt has no text, and the other model's tokenizer begins texts with nothing")
    return ids


def _parts(own: ByteTokens, other: ByteTokens, row: Sequence[int]) -> Iterator[bytes | int]:
    """Yield the text between special tokens of both tokenizers, and these tokens as ids of the other one; text first and last."""
    names, text, is_fresh = {at: content for content, at in own.special.items()}, b"", False
    for token in row:
        name = names.get(token)
        if name in other.special:
            yield text
            yield other.special[name]
            text = b""
        elif name is not None:
            text += name.encode()
        else:
            new = own.texts.get(token, b"")
            text += new.removeprefix(b" ") if is_fresh and own.prepends_always else new
        is_fresh = name is not None
    yield text

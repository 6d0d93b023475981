"""Read a tokenizer as strings of bytes, so that the tokens of different vocabularies can be compared.

Three kinds of tokenizers can be read: byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM2), whose tokens spell bytes with 256 characters; BPE
with byte fallback (Llama 2, Gemma), whose tokens spell spaces as U+2581 and unknown bytes as `<0x0A>`; and whole words whose spaces are
spelled so (the testbed). Any other kind, and any that changes text before it is split, is rejected: the bytes of its tokens are not those
of the text.
"""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from tokenizers import Tokenizer

__all__ = ["ByteTokens"]

SPACE = "\u2581"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_characters() -> dict[str, int]:
    """Return the byte of each character of byte-level BPE (GPT-2's table)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("\xa1"), ord("\xac") + 1), *range(ord("\xae"), ord("\xff") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


CHARACTERS = _byte_characters()
SPELLED = {byte: character for character, byte in CHARACTERS.items()}


class ByteTokens:
    """The tokens of a tokenizer as bytes, and its encoding of any bytes within a text.

    Args:
        tokenizer: a fast transformers tokenizer of byte-level BPE, of BPE with byte fallback, or of words with their spaces.
        name: of its model, for errors.

    Attributes:
        texts: the bytes of every token that stands for text, by id.
        special: the ids of special tokens, by content.
        begin: the tokens that the tokenizer puts before every text.
        prepends: whether it puts a space before every text.
        prepends_always: whether it puts a space after every special token, too.

    Raises:
        ValueError: the tokenizer cannot be read as bytes, or changes text before it is split.

    Examples:
        >>> from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        >>> from transformers import PreTrainedTokenizerFast
        >>> tokenizer = Tokenizer(models.BPE())
        >>> tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        >>> tokenizer.decoder = decoders.ByteLevel()
        >>> alphabet = pre_tokenizers.ByteLevel.alphabet()
        >>> tokenizer.train_from_iterator(["the hat"], trainers.BpeTrainer(vocab_size=258, initial_alphabet=alphabet))
        >>> tokens = ByteTokens(PreTrainedTokenizerFast(tokenizer_object=tokenizer), "it")
        >>> [tokens.texts[token] for token in tokens.encode(" the é".encode()[:-1])]
        [b' ', b't', b'he', b' ', b'\xc3']
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(
                f"tokens of different vocabularies are compared as bytes, which needs fast tokenizers, and that of {name} is "
                "none: use another model"
            )
        state = json.loads(backend.to_str())
        self.is_byte_level = _is_byte_level(state)
        _check_kind(state, name, is_byte_level=self.is_byte_level)
        self.special = {token["content"]: token["id"] for token in state["added_tokens"] if token["special"]}
        self.texts = dict(self._texts(state))
        self.begin = [token for token in tokenizer("")["input_ids"] if token != tokenizer.eos_token_id]
        self.prepends = _prepends(state)
        self.prepends_always = _prepends(state, always=True)
        self._ids = {text: token for token, text in self.texts.items()}
        self._continuing = Tokenizer.from_str(json.dumps(_continuing(state)))

    def _texts(self, state: dict[str, Any]) -> Iterator[tuple[int, bytes]]:
        """Yield every token that stands for text, with its bytes."""
        vocabulary, special = state["model"]["vocab"], set(self.special)
        for token, at in vocabulary.items():
            if token not in special and (text := self._spell(token)) is not None:
                yield at, text
        added = (token for token in state["added_tokens"] if not token["special"])
        yield from ((token["id"], token["content"].encode()) for token in added if token["content"] not in vocabulary)

    def _spell(self, token: str) -> bytes | None:
        """Return the bytes of a token; None if it is not spelled with the characters of bytes."""
        if self.is_byte_level:
            return bytes(map(CHARACTERS.__getitem__, token)) if CHARACTERS.keys() >= set(token) else None
        if match := _BYTE.fullmatch(token):
            return bytes([int(match[1], 16)])
        return token.replace(SPACE, " ").encode()

    def encode(self, data: bytes) -> list[int]:
        """Return the tokens of bytes within a text, without tokens that begin or end it.

        No text is read as a special token. Bytes for which the vocabulary has no token are left out, as the tokenizer does.

        Args:
            data: any bytes, also the beginning or the rest of a character.
        """
        ids: list[int] = []
        while data:
            valid, rest = _split(data)
            if valid:
                found = self._continuing.encode(valid, add_special_tokens=False).ids
                ids += [token for token in found if token in self.texts]  # without unknown tokens
            ids += self._encode_broken(rest)
            data = data[len(valid.encode()) + len(rest) :]
        return ids

    def split(self, texts: Sequence[bytes]) -> list[list[int]]:
        """Return the tokens of the bytes of other tokens: one token where the vocabulary has it, else those of `encode`.

        Args:
            texts: of any bytes.

        Returns:
            Token ids of each; none where the vocabulary lacks a byte of the text, so that its tokens would not spell it.
        """
        whole = [i for i, text in enumerate(texts) if text and not _split(text)[1]]
        encodings = self._continuing.encode_batch_fast([texts[i].decode() for i in whole], add_special_tokens=False)
        found = {i: encoding.ids for i, encoding in zip(whole, encodings, strict=True)}
        pieces = [found[i] if i in found else self.encode(text) for i, text in enumerate(texts)]
        return [self._exact(text, own) for text, own in zip(texts, pieces, strict=True)]

    def _exact(self, text: bytes, pieces: list[int]) -> list[int]:
        if len(pieces) != 1 and text in self._ids:
            return [self._ids[text]]
        return pieces if b"".join(self.texts.get(token, b"") for token in pieces) == text else []

    def _encode_broken(self, data: bytes) -> list[int]:
        """Return the tokens of bytes that are no whole characters."""
        if self.is_byte_level:
            return [token.id for token in self._continuing.model.tokenize("".join(SPELLED[byte] for byte in data))]
        return [self._ids[bytes([byte])] for byte in data if bytes([byte]) in self._ids]


def _split(data: bytes) -> tuple[str, bytes]:
    """Return the valid text at the beginning of bytes, and the broken bytes that follow it."""
    try:
        return data.decode(), b""
    except UnicodeDecodeError as error:
        return data[: error.start].decode(), data[error.start : error.end]


def _is_byte_level(state: dict[str, Any]) -> bool:
    return (state["decoder"] or {}).get("type") == "ByteLevel"


def _steps(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """Return the steps of a normalizer, pre-tokenizer or decoder."""
    if part is None:
        return []
    return [step for each in part[inner] for step in _steps(each, inner)] if part["type"] == "Sequence" else [part]


def _check_kind(state: dict[str, Any], name: str, *, is_byte_level: bool) -> None:
    """Raise ValueError unless tokens can be read as bytes and text is not changed."""
    kind = state["model"]["type"]
    spells_bytes = kind == "BPE" and (is_byte_level or bool(state["model"].get("byte_fallback")))
    if not (spells_bytes or (kind == "WordLevel" and _keeps_spaces(state))):
        raise ValueError(
            "tokens of different vocabularies are compared as bytes, which can be read from byte-level BPE, BPE with byte fallback and "
            f"words with their spaces, and the tokenizer of {name} is neither ({kind}): use a model with another tokenizer"
        )
    for step in _steps(state["normalizer"], "normalizers"):
        if step["type"] not in ("NFC", "Prepend", "Replace") or (step["type"] == "Replace" and not _is_space(step)):
            raise ValueError(
                f"the tokenizer of {name} changes text before it is split ({step['type']}), so that its tokens are not those "
                "of the text: use a model with another tokenizer"
            )


def _is_space(step: dict[str, Any]) -> bool:
    return bool(step["pattern"] == {"String": " "} and step["content"] == SPACE)


def _keeps_spaces(state: dict[str, Any]) -> bool:
    """Return whether a tokenizer splits text without dropping any of it, and spells spaces as `SPACE`."""
    steps = _steps(state["pre_tokenizer"], "pretokenizers")
    kept = all(step["type"] in ("Metaspace", "Split") and step.get("behavior") != "Removed" for step in steps)
    return kept and any(step.get("replacement") == SPACE for step in steps)


def _prepends(state: dict[str, Any], *, always: bool = False) -> bool:
    """Return whether a tokenizer puts a space before every text; with `always`, whether it does so after special tokens, too."""
    steps = [*_steps(state["normalizer"], "normalizers"), *_steps(state["pre_tokenizer"], "pretokenizers")]
    schemes = ("always",) if always else ("always", "first")
    return any(
        step["type"] == "Prepend" or step.get("add_prefix_space") or step.get("prepend_scheme") in schemes
        for step in steps
    )


def _continuing(state: dict[str, Any]) -> dict[str, Any]:
    """Return a tokenizer for text that continues a text: nothing is put before it, and no text is a special token."""
    kept = [step for step in _steps(state["normalizer"], "normalizers") if step["type"] == "Replace"]
    pre = _steps(state["pre_tokenizer"], "pretokenizers")
    for step in pre:
        if "add_prefix_space" in step:
            step["add_prefix_space"] = False
        if "prepend_scheme" in step:
            step["prepend_scheme"] = "never"
    return state | {
        "normalizer": {"type": "Sequence", "normalizers": kept} if kept else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre} if pre else None,
        "post_processor": None,
        "truncation": None,
        "padding": None,
        "added_tokens": [token for token in state["added_tokens"] if not token["special"]],
    }

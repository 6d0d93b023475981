"""Check that contrasted models share a tokenizer, since their probabilities are compared token by token.

Two models with different tokenizers run without an error, and their contrast is meaningless. So tokenizers are compared wherever
both can be found: passed by the caller, or in the folder or local hub cache that a model was loaded from (`name_or_path`). Nothing is
downloaded, and a pair of models is compared once: by the sizes of their vocabularies, by their files, and by loaded tokenizers only
where the files do not decide. Where a tokenizer cannot be found, the sizes of the vocabularies decide: they must be equal, or differ
by no more than padding of the embedding matrix explains.
"""

import filecmp
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor
from transformers import AutoTokenizer

from contralto.common.hub import from_pretrained
from contralto.decoding.tokenizer_files import local_file, read_vocabulary

__all__ = [
    "Vocabulary",
    "check_same_tokenizer",
    "check_sizes",
    "differing_tokens",
    "find_tokenizer",
    "fit_vocabulary",
    "same_tokenizer",
    "share_tokenizer",
    "vocabulary_size",
]

BLOCKS = (64, 128, 256, 512, 1024)
"""Embedding matrices are padded to a multiple of one of these: Gemma 3 64, Qwen2.5 and Pythia 128 to 512, Phi-2 1024."""
_FOUND: WeakKeyDictionary[Any, WeakKeyDictionary[Any, bool]] = WeakKeyDictionary()
"""For pairs of models, whether their tokenizers were found and are the same."""


def fit_vocabulary(logits: Tensor, size: int) -> Tensor:
    """Return logits `(..., size)` for the first `size` tokens, `-inf` for tokens without a row in the model's head.

    Models with the same tokenizer may pad their embeddings to different sizes. The additional rows belong to no token.

    Args:
        logits: `(..., V)`.
        size: number of tokens of the main model.

    Examples:
        >>> fit_vocabulary(torch.zeros(1, 3), 4)
        tensor([[0., 0., 0., -inf]])
    """
    extra = size - logits.shape[-1]
    return logits[..., :size] if extra <= 0 else torch.nn.functional.pad(logits, (0, extra), value=-torch.inf)


def check_sizes(size: int, other: int, *, share_tokenizer: bool = False) -> None:
    """Raise an error if the sizes of two vocabularies cannot belong to the same tokenizer.

    The sizes must be equal, or the larger one a multiple of a block (64 to 1024) that is no smaller than the difference, or the
    difference one token, such as a pad token that was added.

    Args:
        size: number of tokens of the main model.
        other: number of tokens of another branch.
        share_tokenizer: whether the models are known to share a tokenizer; then a difference up to 1024 is padding.

    Raises:
        ValueError: the sizes are further apart.

    Examples:
        >>> check_sizes(152064, 151936)
        >>> check_sizes(1200, 900)
        Traceback (most recent call last):
            ...
        ValueError: the branches' vocabularies have 1200 and 900 tokens, a larger difference than padding explains: all branches must share one tokenizer; if they do, pass it as tokenizer=
    """
    larger, extra = max(size, other), abs(size - other)
    padded = any(larger % block == 0 and extra <= block for block in BLOCKS)
    if extra > BLOCKS[-1] or not (extra <= 1 or padded or share_tokenizer):
        way_out = "" if extra > BLOCKS[-1] else "; if they do, pass it as tokenizer="
        raise ValueError(
            f"the branches' vocabularies have {size} and {other} tokens, a larger difference than padding "
            f"explains: all branches must share one tokenizer{way_out}"
        )


def check_same_tokenizer(model: str, tokenizer: Any, other_model: str, other: Any) -> None:
    """Raise an error if the tokens of two tokenizers differ; a pad token that only one has at the end is allowed.

    Args:
        model: the name of the first model.
        tokenizer: its tokenizer.
        other_model: the name of the other model.
        other: its tokenizer.

    Raises:
        ValueError: a token of one has another id in the other, or none.

    Examples:
        >>> from contralto import testbed
        >>> check_same_tokenizer("expert", testbed.tokenizer(), "amateur", testbed.tokenizer())
    """
    differing = {*differing_tokens(tokenizer, other), *differing_tokens(other, tokenizer)}
    if differing:
        raise _different(model, other_model, differing)


def differing_tokens(tokenizer: Any, other: Any) -> list[str]:
    """Return the tokens of a tokenizer that have another id, or none, in another one, except an added pad token.

    Args:
        tokenizer: the tokenizer whose tokens are looked up.
        other: the tokenizer in which they are looked up.

    Examples:
        >>> from contralto import testbed
        >>> differing_tokens(testbed.tokenizer(), testbed.tokenizer())
        []
    """
    rest = other.get_vocab()
    differing = {token for token, at in tokenizer.get_vocab().items() if rest.get(token) != at}
    return sorted(differing - ({tokenizer.pad_token} if _is_added_pad(tokenizer, rest) else set()))


def _different(model: str, other_model: str, tokens: set[str]) -> ValueError:
    return ValueError(
        f"{model} and {other_model} have different tokenizers ({len(tokens)} tokens differ, such as {min(tokens)!r}), and "
        "contrastive decoding compares their probabilities token by token"
    )


def _is_added_pad(tokenizer: Any, rest: dict[str, int]) -> bool:
    """Return whether a tokenizer's pad token comes after all tokens of the other, which does not have it."""
    pad = tokenizer.pad_token
    return pad is not None and pad not in rest and tokenizer.pad_token_id > max(rest.values())


def share_tokenizer(model: Any, other: Any) -> bool:
    """Return whether two models are known to share a tokenizer; False where the tokenizer of one cannot be found.

    Args:
        model: the main model.
        other: the model of another branch.

    Raises:
        ValueError: both tokenizers were found, and differ; or the vocabularies' sizes differ by more than padding explains.

    Examples:
        >>> from contralto import testbed
        >>> share_tokenizer(testbed.load("expert"), testbed.load("amateur"))
        True
    """
    if model is other:
        return True
    known = _FOUND.setdefault(model, WeakKeyDictionary())
    if other not in known:
        check_sizes(vocabulary_size(model), vocabulary_size(other), share_tokenizer=True)
        known[other] = _compare(model, other)
    return known[other]


def _compare(model: Any, other: Any) -> bool:
    """Compare the tokenizers of two models, by their files if those are the same."""
    return same_tokenizer(_name(model), _name(other))


def _name(model: Any) -> str:
    """Return the folder or hub name that a model was loaded from; empty if there is none."""
    return str(getattr(model, "name_or_path", "") or "")


def same_tokenizer(name: str, other: str) -> bool:
    """Return whether two models, named by folder or repository, are known to share a tokenizer, without a download.

    Args:
        name: of the main model.
        other: of the model of another branch.

    Raises:
        ValueError: both tokenizers were found, and differ.

    Examples:
        >>> from contralto import testbed
        >>> same_tokenizer(str(testbed.path("expert")), str(testbed.path("amateur"))), same_tokenizer("", "nobody/none")
        (True, False)
    """
    names = [name, other]
    if not all(names):
        return False
    one, two = (local_file(each, "tokenizer.json") for each in names)
    if one is not None and two is not None and (one == two or filecmp.cmp(one, two, shallow=False)):
        return True
    if _agree_by_files(*names):
        return True
    tokenizers = [find_tokenizer(each) for each in names]
    if None in tokenizers:
        return False
    check_same_tokenizer(names[0], tokenizers[0], names[1], tokenizers[1])
    return True


def _agree_by_files(name: str, other: str) -> bool:
    """Return whether the files of two tokenizers declare the same vocabulary; False if only the loaded tokenizers can decide.

    Raises:
        ValueError: a token has two ids, or an id two tokens, which no added token can change.
    """
    one, two = read_vocabulary(name), read_vocabulary(other)
    if one is None or two is None:
        return False
    if one.ids == two.ids:
        return one.is_complete and two.is_complete
    if _conflict(one.ids, two.ids):
        raise _different(name, other, {token for token, _ in one.ids.items() ^ two.ids.items()})
    return False


def _conflict(one: Mapping[str, int], two: Mapping[str, int]) -> bool:
    """Return whether a token has two ids, or an id two tokens."""
    tokens = {at: token for token, at in two.items()}
    return any(two.get(token, at) != at or tokens.get(at, token) != token for token, at in one.items())


def find_tokenizer(name: str) -> Any | None:
    """Return the tokenizer in the folder of a model's weights, without a download.

    Args:
        name: a folder or the name of a repository.

    Returns:
        The tokenizer, or None if there is none in the folder or in the local cache of the hub.

    Examples:
        >>> from contralto import testbed
        >>> len(find_tokenizer(str(testbed.path("expert")))) == len(testbed.tokenizer())
        True
    """
    if not name or local_file(name, "config.json") is None:
        return None
    try:
        return from_pretrained(AutoTokenizer, name, local_files_only=True, trust_remote_code=False)
    except Exception:  # noqa: BLE001  a tokenizer that cannot be loaded, for any reason, counts as not found
        return None


class Vocabulary:
    """The vocabulary that the models of a method share.

    Args:
        models: the models of the branches.
        tokenizer: the tokenizer that they share; None to look for it.

    Raises:
        TypeError: the name of a tokenizer.
        ValueError: the tokenizers of two of them were found, and differ.
    """

    def __init__(self, models: Sequence[Any], tokenizer: Any = None) -> None:
        self._models, self._tokenizer = list(models), tokenizer
        if isinstance(tokenizer, str):
            raise TypeError(f"tokenizer must be a tokenizer, not its name {tokenizer!r}: load it by from_pretrained()")
        self._shared = tokenizer is not None
        self._compared: WeakSet[Any] = WeakSet()
        for model in self._models:
            self._check_given(model)
        for model in self._models[1:]:
            share_tokenizer(self._models[0], model)

    def check(self, main: Any) -> None:
        """Raise ValueError if the main model has another tokenizer or vocabulary than the branches' models.

        Args:
            main: the model that generates.
        """
        self._check_given(main)
        known = [share_tokenizer(main, model) for model in self._models]
        self._shared = self._tokenizer is not None or all(known)
        self.check_size(vocabulary_size(main))

    def check_size(self, size: int) -> None:
        """Raise ValueError if a model's vocabulary differs in size by more than padding explains.

        Args:
            size: number of tokens of the main model.
        """
        for model in self._models:
            check_sizes(size, vocabulary_size(model), share_tokenizer=self._shared)

    def fit(self, logits: Tensor, size: int) -> Tensor:
        """Return a branch's logits `(..., size)`, see `fit_vocabulary`.

        Args:
            logits: `(..., V)`.
            size: number of tokens of the main model.

        Raises:
            ValueError: the sizes differ by more than padding explains.
        """
        if logits.shape[-1] == size:
            return logits
        check_sizes(size, logits.shape[-1], share_tokenizer=self._shared)
        return fit_vocabulary(logits, size)

    def _check_given(self, model: Any) -> None:
        if self._tokenizer is None or model in self._compared:
            return
        if (found := find_tokenizer(_name(model))) is not None:
            check_same_tokenizer("the given tokenizer", self._tokenizer, _name(model), found)
        self._compared.add(model)


def vocabulary_size(model: Any) -> int:
    """Return the number of rows of a model's language-model head.

    Args:
        model: a transformers model.
    """
    return int(model.config.get_text_config(decoder=True).vocab_size)

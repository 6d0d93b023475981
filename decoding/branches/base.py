"""Define what the executors require of a branch, and unwrap the models that branches accept."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from contralto.decoding.branches.variants import ModelVariant, check_loaded

if TYPE_CHECKING:
    from contralto.decoding.branches.prompts import Prompts
    from contralto.decoding.branches.reader import CachedReader
    from contralto.decoding.branches.static import StaticSteps

__all__ = ["Branch", "Unwrapped", "model_state", "unwrap"]


class Branch(ABC):
    """A source of next-token logits that a rule contrasts with those of the main model.

    Three methods are required. The others let an executor run the branch together with the main model, or not at every step; by
    default a branch runs on its own.
    """

    @property
    def model(self) -> Any:
        """Return the transformers model that computes the logits; None if there is no such model."""
        return None

    @abstractmethod
    def __call__(self, input_ids: Tensor) -> Tensor:
        """Return the logits of the token after each row.

        Args:
            input_ids: `(B, T)` int64, the rows of the main model.

        Returns:
            `(B, V)`.
        """

    def catch_up(self, input_ids: Tensor) -> Tensor:
        """Return the logits of the token after each row, where the rows continue those of the last call by generated tokens.

        Args:
            input_ids: `(B, T)` int64, the rows of the main model, any number of tokens longer than at the last call.

        Returns:
            `(B, V)`; by default as for any rows, of a branch that treats prompts and generated tokens alike.
        """
        return self(input_ids)

    @abstractmethod
    def score(self, input_ids: Tensor, count: int, attention_mask: Tensor | None = None) -> Tensor:
        """Return the logits of the last `count` tokens of each row, from one forward pass.

        Args:
            input_ids: `(B, T)` int64.
            count: number of tokens to predict, below `T`.
            attention_mask: `(B, T)`, 0 for padding.

        Returns:
            `(B, count, V)`.
        """

    @abstractmethod
    def reset(self) -> None:
        """Discard the state and the cache of the last call."""

    def resolve(self, main: Tensor, logits: Tensor) -> Tensor:
        """Return this branch's logits in the vocabulary of the main model.

        Args:
            main: `(..., V)` scores of the main model.
            logits: of this branch, as it returned them, in the dtype and on the device of `main`.

        Returns:
            `(..., V)`; by default `logits`, of a branch that shares the vocabulary.
        """
        return logits

    @property
    def shares_tokenizer(self) -> bool:
        """Return whether the logits of this branch are those of the main model's tokens."""
        return True

    def begin(self, ids: Tensor, mask: Tensor, fills: Sequence[int] = ()) -> None:  # noqa: B027  optional
        """Set the prompts and the padding of a generation, until `end`.

        Args:
            ids: `(B, T)` int64, the prompts of the main model.
            mask: `(B, T)`, 0 for padding.
            fills: token ids that pad the rows that have ended.
        """

    def end(self) -> None:  # noqa: B027  optional
        """Discard the prompts and the padding that `begin` set."""

    def limit_tokens(self, size: int) -> None:  # noqa: B027  optional
        """Declare that ids of generated tokens are below `size`.

        Args:
            size: the vocabulary size of the main model.
        """

    def fix_shapes(self, static: "StaticSteps") -> None:  # noqa: B027  optional
        """Read the next generation with a static cache, and compiled where `generate()` would compile, until `end`.

        Args:
            static: the steps.
        """

    def joint_prompts(self, model: Any, ids: Tensor) -> "Prompts | None":
        """Return this branch's rows for a forward pass of `model` that they share with the main rows.

        Args:
            model: the main model.
            ids: `(B, T)` int64, its prompts.

        Returns:
            The prepared rows; None if the branch needs a forward pass of its own.
        """
        return None

    def joint_reader(self, model: Any) -> "CachedReader | None":
        """Return a reader whose forward pass yields both the main model's logits and those of this branch.

        Args:
            model: the main model.

        Returns:
            The reader; None if the branch needs a forward pass of its own.
        """
        return None

    def split_joint(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Split the logits of `joint_reader`.

        Args:
            logits: `(R, n, V)` as that reader returns them.

        Returns:
            The main model's logits `(B, n, V)`, and those of the branch.

        Raises:
            NotImplementedError: the branch has no joint reader.
        """
        raise NotImplementedError(f"{type(self).__name__} has no joint reader")


class Unwrapped(NamedTuple):
    """A transformers model and the context manager that its forward passes run in."""

    model: Any
    context: Callable[[], AbstractContextManager[Any]]

    @property
    def is_adapted(self) -> bool:
        """Return whether the model runs unchanged, with its adapters enabled."""
        return self.context is nullcontext


def unwrap(model: Any) -> Unwrapped:
    """Return the transformers model inside a PEFT model or a variant such as `AdaptersOff`.

    Args:
        model: a transformers model, a PEFT model, or a `ModelVariant`.

    Raises:
        TypeError: the model is a name, cannot generate, or is a PEFT model with learned prompts.
    """
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    if isinstance(model, ModelVariant):
        model, context = model.model, model.context
    elif hasattr(model, "get_base_model"):
        if any(config.is_prompt_learning for config in model.peft_config.values()):
            raise TypeError(
                "a PEFT model with a learned prompt cannot be a branch, because its base model does not contain the "
                "prompt"
            )
        model = model.get_base_model()
    check_loaded(model)
    if not (hasattr(model, "can_generate") and model.can_generate()):
        raise TypeError(f"a branch needs a transformers model that can generate, not {type(model).__name__}")
    return Unwrapped(model, context)


def model_state(model: Any) -> list[Any]:
    """Return a value that changes when a model is trained, reloaded, or given other adapters.

    PyTorch counts in-place changes of a tensor (`Tensor._version`), except those made through `.data`; PEFT layers list their
    active and merged adapters.

    Args:
        model: a `torch.nn.Module`.
    """
    versions = [0 if p.is_inference() else p._version for p in model.parameters()]
    layers = (module for module in model.modules() if hasattr(module, "merged_adapters"))
    return [versions, [(list(layer.active_adapters), list(layer.merged_adapters)) for layer in layers]]

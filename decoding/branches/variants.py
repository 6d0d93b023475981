"""Weaker variants of a model, as branches that need no second model: without adapters, its first layers, with dropout, quantised.

A variant is written where an amateur is expected: `ContrastiveDecodingLogitsProcessor(EarlyExit(model, layers=8))`. Its forward
passes are those of the model in a context, so that it keeps a cache of its own, and everything that a branch does (beams, padding,
windows, scoring) works as for another model.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from contralto.common.hashing import seed_from
from contralto.common.head import find_layers, running_layers
from contralto.common.head.hooks import hooked, in_this_thread

__all__ = ["AdaptersOff", "Dropout", "EarlyExit", "ModelVariant", "check_loaded", "inner_model", "quantized_copy"]


class ModelVariant(ABC):
    """A model whose forward passes run in a context that changes what it computes.

    Attributes:
        model: the transformers model inside.
        description: what it is, for lines about the cost of a method.
        share: share of the model's layers that it runs.
        joint: whether `loop()` reads it in the forward pass of the model itself.
        reads_alike: whether its states depend on tokens and positions alone, so that those of a prompt's beginning may be reused.
    """

    model: Any
    description: str
    share = 1.0
    joint = False
    reads_alike = False

    @abstractmethod
    def context(self) -> AbstractContextManager[Any]:
        """Return the context manager that forward passes run in."""

    def alone(self) -> Any:
        """Return a copy of the model that always runs in the context, in this thread: the variant as a model of its own."""
        own = copy.deepcopy(self)
        own.model.variant_context = context = own.context()  # kept, since a context that is collected ends
        context.__enter__()
        return own.model


class AdaptersOff(ModelVariant):
    """A PEFT model seen without its adapters: its base model as a branch, with no second model in memory.

    Args:
        peft_model: a `peft.PeftModel`. Its adapters are disabled while the branch runs, and enabled again afterwards.

    Raises:
        TypeError: the model has no adapters to disable.

    Examples:
        >>> from peft import LoraConfig, get_peft_model
        >>> from contralto import testbed
        >>> from contralto.decoding import ContrastiveDecodingLogitsProcessor
        >>> tuned = get_peft_model(testbed.load("expert"), LoraConfig(task_type="CAUSAL_LM"))
        >>> processor = ContrastiveDecodingLogitsProcessor(AdaptersOff(tuned))
        >>> prompt = testbed.tokenizer()("Ben went out to the", return_tensors="pt")
        >>> text = tuned.generate(**prompt, logits_processor=[processor], max_new_tokens=4)
    """

    description = "the same model without its adapters"
    reads_alike = True

    def __init__(self, peft_model: Any) -> None:
        if not (hasattr(peft_model, "disable_adapter") and hasattr(peft_model, "get_base_model")):
            raise TypeError(
                f"AdaptersOff needs a peft.PeftModel, whose adapters it can disable, not {type(peft_model).__name__}"
            )
        self.peft_model, self.model = peft_model, peft_model.get_base_model()

    def context(self) -> AbstractContextManager[Any]:
        """Return the context in which the adapters are disabled."""
        disabled: AbstractContextManager[Any] = self.peft_model.disable_adapter()
        return disabled


class EarlyExit(ModelVariant):
    """The first layers of a model, whose result passes the final norm and the head, as in early-exit work.

    Its logits are those of an earlier layer, as LayerSkip drafts with (Elhoushi et al. 2024, arXiv 2404.16710). The other layers
    are skipped, so that a forward pass costs `layers` of the model's layers and the head; in `loop()`, where the model itself has
    computed these layers already, the head alone.

    Args:
        model: a decoder-only transformers model, or a PEFT model, whose adapters stay enabled.
        layers: number of first layers, from 1 to one less than the model has.

    Raises:
        ValueError: the model has no list of layers, or not so many.

    Examples:
        >>> from contralto import testbed
        >>> from contralto.decoding import ContrastiveDecodingLogitsProcessor
        >>> model, prompt = testbed.load("expert"), testbed.tokenizer()("Ben went out to the", return_tensors="pt")
        >>> contrast = ContrastiveDecodingLogitsProcessor(EarlyExit(model, layers=1))
        >>> slow = model.generate(**prompt, logits_processor=[contrast], max_new_tokens=4)
        >>> torch.equal(slow, model.generate(**prompt, custom_generate=contrast.loop(), max_new_tokens=4))
        True
    """

    joint = True
    reads_alike = True

    def __init__(self, model: Any, layers: int) -> None:
        self.model, self.layers = inner_model(model), layers
        depth = find_layers(self.model).depth
        if not (1 <= layers < depth and layers == int(layers)):
            raise ValueError(
                f"layers must be a number from 1 to {depth - 1}, of the model's {depth} layers, not {layers}"
            )
        self.share = layers / depth
        self.description = f"the first {layers} of the model's {depth} layers"

    def context(self) -> AbstractContextManager[Any]:
        """Return the context in which the other layers are skipped."""
        return running_layers(self.model, range(self.layers))


class Dropout(ModelVariant):
    """A model with dropout, the amateur of Distillation Contrastive Decoding (Phan et al. 2024, arXiv 2402.14874).

    The paper contrasts `(1 + beta) s_expert - beta s_amateur`, as contrastive decoding does, with the model itself under dropout as
    amateur, at rates of 0.2 to 0.4. There a mask is drawn anew in every forward pass of the attention; then cached states belong to other
    masks than the tokens that read them, and no result can be repeated. Here each layer has one mask for all tokens, rows and steps
    (as in variational dropout, Gal & Ghahramani 2016, arXiv 1512.05287), a function of the seed: what a layer `f` adds to its input is
    masked by feature,

        h' = h + m * (f(h) - h) / (1 - rate),      m_i ~ Bernoulli(1 - rate)

    so that the branch is a fixed thinned model, and its logits depend on the tokens alone, with or without a cache, in any batch.

    Args:
        model: a decoder-only transformers model, or a PEFT model, whose adapters stay enabled.
        rate: probability that a feature is dropped, in (0, 1).
        seed: of the masks.

    Raises:
        ValueError: a rate out of range, or a model without a list of layers.

    Examples:
        >>> from contralto import testbed
        >>> from contralto.decoding import ContrastiveDecodingLogitsProcessor
        >>> model, prompt = testbed.load("expert"), testbed.tokenizer()("Ben went out to the", return_tensors="pt")
        >>> contrast = ContrastiveDecodingLogitsProcessor(Dropout(model, rate=0.3))
        >>> text = model.generate(**prompt, logits_processor=[contrast], max_new_tokens=4)
    """

    reads_alike = True

    def __init__(self, model: Any, rate: float, *, seed: int = 0) -> None:
        if not 0 < rate < 1:
            raise ValueError(f"dropout must lie in (0, 1), not {rate}")
        self.model, self.rate, self.seed = inner_model(model), rate, seed
        self._layers = find_layers(self.model)
        self._masks: dict[tuple[Any, ...], Tensor] = {}
        self.description = f"the same model with dropout {rate:g} (seed {seed})"

    def mask(self, layer: int, size: int) -> Tensor:
        """Return the mask of a layer, `(size,)`: 0 for dropped features, else 1 / (1 - rate).

        Args:
            layer: number of the layer, from 0.
            size: number of features.
        """
        draws = torch.Generator().manual_seed(seed_from(f"dropout {self.seed} {layer}"))
        kept = torch.rand(size, generator=draws, dtype=torch.float64) >= self.rate
        return kept.double() / (1 - self.rate)

    @contextmanager
    def context(self) -> Iterator[None]:
        """Apply the masks to the layers in this thread."""
        parts: Any = self.model.get_submodule(self._layers.name)
        handles = [layer.register_forward_hook(self._hook(i), with_kwargs=True) for i, layer in enumerate(parts)]
        with hooked(handles):
            yield

    def _hook(self, layer: int) -> Any:
        def drop(_module: Any, args: Any, kwargs: Any, output: Any) -> Any:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            key = (layer, after.shape[-1], after.dtype, after.device)
            if key not in self._masks:
                self._masks[key] = self.mask(layer, after.shape[-1]).to(after)
            thinned = before + self._masks[key] * (after - before)
            return (thinned, *output[1:]) if isinstance(output, tuple) else thinned

        return in_this_thread(drop)


def check_loaded(model: Any) -> None:
    """Raise TypeError for the name of a model in place of the model.

    Args:
        model: a transformers model, or anything that wraps one.

    Examples:
        >>> check_loaded("gpt2")
        Traceback (most recent call last):
            ...
        TypeError: a branch needs a transformers model, not its name 'gpt2': load it by from_pretrained(); the model itself, weakened (self:... on the command line), is EarlyExit(model, layers), Dropout(model, rate) or quantized_copy(model, bits) of contralto.decoding
    """
    if isinstance(model, str):
        raise TypeError(
            f"a branch needs a transformers model, not its name {model!r}: load it by from_pretrained(); the model itself, "
            "weakened (self:... on the command line), is EarlyExit(model, layers), Dropout(model, rate) or "
            "quantized_copy(model, bits) of contralto.decoding"
        )


def inner_model(model: Any) -> Any:
    """Return the transformers model inside a PEFT model, whose adapters stay enabled; another model itself.

    Args:
        model: a transformers or PEFT model.

    Raises:
        TypeError: the name of a model.
    """
    check_loaded(model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@torch.no_grad()
def quantized_copy(model: Any, bits: int = 8) -> Any:
    """Return a copy of a model whose layers have weights rounded to a few bits, the other amateur of arXiv 2402.14874.

    Each output feature has its own scale, and weights are rounded to the nearest (symmetric, absmax):

        W'_ij = s_i * round(W_ij / s_i),      s_i = max_j |W_ij| / (2^(bits - 1) - 1)

    The copy keeps the dtype: what is rounded is the information in the weights, not their size in memory. Embeddings, head and norms
    stay. For a smaller and faster amateur load the model with a quantisation configuration of transformers.

    Args:
        model: a decoder-only transformers model.
        bits: bits per weight, from 2 to 8.

    Raises:
        ValueError: bits out of range, or a model without a list of layers or with weights that are quantised already.

    Examples:
        >>> from contralto import testbed
        >>> model = testbed.load("expert")
        >>> coarse = quantized_copy(model, bits=2)
        >>> coarse.model.layers[0].mlp.up_proj.weight[0].unique().numel() <= 3
        True
    """
    from transformers.pytorch_utils import Conv1D

    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be a number from 2 to 8, not {bits}")
    model = inner_model(model)
    if getattr(model, "is_quantized", False):
        raise ValueError(f"{type(model).__name__} is quantised already: use layers or dropout for an amateur of it")
    layers, coarse = find_layers(model), copy.deepcopy(model)
    levels = 2 ** (bits - 1) - 1
    for module in coarse.get_submodule(layers.name).modules():
        inputs = 0 if isinstance(module, Conv1D) else -1  # GPT-2 stores its matrices transposed
        for weight in module.parameters(recurse=False):
            if weight.ndim >= 2 and weight.is_floating_point():
                scale = weight.double().abs().amax(inputs, keepdim=True).clamp(min=1e-30) / levels
                weight.copy_((weight.double() / scale).round() * scale)
    return coarse

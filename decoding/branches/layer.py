"""Provide the branch of earlier layers of the main model, which DoLa contrasts with its last layer."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from contralto.common.head import find_path, read_layers
from contralto.decoding.branches.model import ModelBranch
from contralto.decoding.branches.prompts import Prompts
from contralto.decoding.branches.reader import CachedReader
from contralto.decoding.branches.variants import EarlyExit, check_loaded

__all__ = ["EarlyExitBranch", "LayerBranch", "LayerReader", "model_branch"]


class LayerReader(CachedReader):
    """A reader whose logits `((1 + L) * R, n, V)` are the model's own, and after them those of each layer."""

    layers: Sequence[int]
    final_norm: bool
    reads_layers = True
    """Whether the logits of the layers are returned, too."""

    def _run(self, ids: Tensor, *, new: int | None, keep: int, **changed: Any) -> Any:
        if not self.reads_layers:
            return super()._run(ids, new=new, keep=keep, **changed)
        changed |= {"output_hidden_states": True}
        with read_layers(self.model, self.layers, keep=keep, final_norm=self.final_norm):
            return super()._run(ids, new=new, keep=keep, **changed)


class LayerBranch(ModelBranch):
    """The logits of earlier layers of the model, computed by its own head, as DoLa does.

    An early layer passes what the model's last layer passes on its way to the logits: the final norm, the head, and the
    scale or soft cap that some families put after it. See `contralto.common.head`, which measures it.

    Args:
        model: a decoder-only transformers model.
        layers: numbers of layers: 0 for the embeddings, 1 for the first layer, ...
        final_norm: whether early layers pass the final norm. Without it they go into the head as they are.
        attention_mask: see `ModelBranch`.
        vision_inputs: see `ModelBranch`.

    Raises:
        TypeError: `model` cannot generate.
        ValueError: an encoder-decoder, no layers, a layer that the model does not have or that is its last, or a model
            whose layers do not lead to its logits (see `contralto.common.head.find_path`).
    """

    def __init__(
        self,
        model: Any,
        layers: Sequence[int],
        *,
        final_norm: bool = True,
        attention_mask: Tensor | None = None,
        vision_inputs: Mapping[str, Any] | None = None,
    ) -> None:
        check_loaded(model)
        if isinstance(layers, int):
            raise TypeError(f"layers must be a list of layer numbers, not {layers}: pass layers=[{layers}]")
        if getattr(model.config, "is_encoder_decoder", False):
            raise ValueError(
                f"{type(model).__name__} is an encoder-decoder, and layers can be contrasted only in decoder-only "
                "models"
            )
        self._layers, self._final_norm = list(layers), final_norm
        super().__init__(model, attention_mask=attention_mask, vision_inputs=vision_inputs)
        depth = self._model.config.get_text_config(decoder=True).num_hidden_layers
        first = find_path(self._model).first
        if not layers or not all(first <= layer < depth for layer in layers):
            raise ValueError(
                f"layers must be some of {first} to {depth - 1} of this model's {depth} layers, not {list(layers)}"
            )

    def _make_reader(self, context: Any) -> CachedReader:
        reader = LayerReader(self._model, context=context)
        reader.layers, reader.final_norm = self._layers, self._final_norm
        return reader

    def joint_prompts(self, model: Any, ids: Tensor) -> Prompts | None:
        """Return None: earlier layers share the forward pass of the main rows, see `joint_reader`.

        Args:
            model: the main model.
            ids: `(B, T)` int64, its prompts.
        """
        return None

    def joint_reader(self, model: Any) -> CachedReader | None:
        """Return the branch's reader if `model` is its model.

        Args:
            model: the main model.
        """
        return self._reader if self._model is model else None

    def split_joint(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Split logits `((1 + L) * B, n, V)` into those of the last layer and those of the earlier layers.

        Args:
            logits: as the branch's reader returns them.

        Returns:
            `(B, n, V)` of the last layer, and `(B, n, L, V)` of the earlier layers.
        """
        by_layer = logits.reshape(1 + len(self._layers), -1, *logits.shape[1:])  # (1 + L, B, n, V)
        return by_layer[0], by_layer[1:].movedim(0, 2)

    def _select(self, logits: Tensor) -> Tensor:
        return self.split_joint(logits)[1]


class EarlyExitBranch(ModelBranch):
    """The logits of a model's first layers; in `loop()` they are read in the forward pass of the main rows.

    Args:
        early: the model with the number of its first layers.
        options: see `ModelBranch`.
    """

    def __init__(self, early: EarlyExit, **options: Any) -> None:
        super().__init__(early, **options)
        self._layer = early.layers

    def joint_reader(self, model: Any) -> CachedReader | None:
        """Return a reader of both, if `model` is the branch's model and the branch reads the main rows.

        Args:
            model: the main model.
        """
        if self._model is not model or self._window is not None:
            return None
        try:
            find_path(model)
        except ValueError:  # then the branch has forward passes of its own, which need no path
            return None
        reader = LayerReader(model)
        reader.layers, reader.final_norm = [self._layer], True
        return reader

    def split_joint(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Split logits `(2 * B, n, V)` into those of the model and those of its first layers.

        Args:
            logits: as the joint reader returns them.
        """
        main, early = logits.chunk(2)
        return main, early


def model_branch(model: Any, **options: Any) -> ModelBranch:
    """Return the branch of a model or of a variant of one.

    Args:
        model: a transformers model, a PEFT model, or a `ModelVariant`.
        options: see `ModelBranch`.
    """
    return EarlyExitBranch(model, **options) if isinstance(model, EarlyExit) else ModelBranch(model, **options)

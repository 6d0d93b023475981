"""`torch_compile` for trainers on pairs: every layer of a model by itself, as torch advises for repeated layers.

accelerate compiles a model as a whole, whose forward here is also the layout of a batch, the measurement of the head and the passes over
the vocabulary: some fifty graphs, none of which is used again when a batch has another number of rows. The layers are what can be compiled,
and all of them have one code.
"""

from typing import Any

from torch import nn

from contralto.common.head import find_layers

__all__ = ["compile_layers", "compiles_layers", "layers_of"]

RECOMPILE_LIMIT = 32
"""Graphs of a layer: with gradients for its input, for its weights alone, and without; for the sizes of batches; in training and not."""


def compiles_layers(trainer: Any) -> bool:
    """Return whether the layers are compiled here; accelerate compiles those of sharded models, before it divides their weights.

    Args:
        trainer: a trainer of transformers.
    """
    is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    return bool(trainer.args.torch_compile) and not is_sharded


def layers_of(*models: Any) -> list[nn.Module]:
    """Return the layers of models.

    Args:
        models: models without wrappers; None has no layers.

    Raises:
        ValueError: the layers of a model are not found, see `contralto.common.head.find_layers`.
    """
    found: list[nn.Module] = []
    for model in models:
        if model is not None:
            found += model.get_submodule(find_layers(model).name).children()
    return found


def compile_layers(layers: list[nn.Module], args: Any) -> None:
    """Compile layers in place, each by itself. Hooks that are registered on them or within them afterwards are not called.

    Args:
        layers: the layers.
        args: the configuration of the training, for backend and mode.
    """
    for layer in layers:
        layer.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode, recompile_limit=RECOMPILE_LIMIT)

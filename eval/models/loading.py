"""Load the models of an evaluation: adapters by lm-eval's `peft` or as the model itself, and models in 4 or 8 bits.

Read from lm_eval 0.4.13: `HFLM._create_model`, whose own `peft` takes an adapter of another model silently, and whose `load_in_4bit` is
no argument of transformers 5 any more.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from contralto.common.adapters import split_adapter
from contralto.common.hub import check_weights, from_pretrained, has_own, locate, with_adapter
from contralto.decoding import quantization
from contralto.decoding.loading import load_critic
from contralto.decoding.methods import Critic

__all__ = ["ModelLoading"]


class ModelLoading:
    """The part of a model of lm-eval that loads models by name; a mixin before one of lm-eval's model classes."""

    bits: dict[str, int]
    """4 or 8 for quantised models, by the option that names the model, see `contralto.decoding.quantization.take_bits`."""
    decoder: Any
    """The decoder with its method."""
    tokenizer_class: Any = AutoTokenizer
    """The class that reads the tokenizer or the processor."""

    def _resolved(self, name: str, kwargs: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """Return the model to load and lm-eval's arguments, with an adapter apart from its base.

        Args:
            name: The model, which may be an adapter.
            kwargs: lm-eval's arguments; `peft` names an adapter.
        """
        if kwargs.get("gguf_file"):
            return name if Path(name).is_dir() else locate(name), dict(kwargs)
        check_weights(name)
        base, adapter = split_adapter(name, kwargs.get("peft"))
        own = {} if adapter is None else {"peft": adapter}
        if adapter is not None and not kwargs.get("tokenizer") and has_own(self.tokenizer_class, adapter):
            own["tokenizer"] = locate(adapter)
        return locate(base), {**kwargs, **own}

    def _create_model(
        self,
        pretrained: str,
        *,
        dtype: Any = "auto",
        peft: str | None = None,
        quantization_config: Any = None,
        **kwargs: Any,
    ) -> None:
        """Create lm-eval's model, quantised and with an adapter if the arguments say so.

        Args:
            pretrained: The folder or the hub id.
            dtype: A torch dtype, or auto.
            peft: An adapter.
            quantization_config: That of the stored weights.
            kwargs: lm-eval's other arguments.
        """
        wanted = quantization.quantization_config(self.bits.get(quantization.MAIN), dtype) or quantization_config
        super()._create_model(pretrained, dtype=dtype, quantization_config=wanted, **kwargs)  # type: ignore[misc]
        quantization.check_quantized(self._model, pretrained)
        if peft:
            self._model: Any = with_adapter(self._model, peft).eval()

    def _load_other(self, option: str, name: str, *, auto: Any, dtype: Any, device: Any, trusted: bool) -> Any:
        """Return another model of the method on a device.

        Args:
            option: The option that names it.
            name: A folder, a hub id, or `testbed:NAME`.
            auto: The class that loads it, unless it is a critic.
            dtype: A torch dtype.
            device: The device.
            trusted: Whether the model may run code that comes with it.
        """
        how: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trusted}
        if option in self.bits:
            quantised = quantization.quantization_config(self.bits[option], dtype)
            how |= {"device_map": {"": str(device)}, "quantization_config": quantised}
        is_critic = isinstance(self.decoder.config.declaration.models.get(option), Critic)
        model = load_critic(name, how) if is_critic else from_pretrained(auto, name, **how)
        if option in self.bits:
            quantization.check_quantized(model, name)
            return model.eval()
        return model.to(device).eval()

"""The decoding methods: their declarations, the registry, and the configuration that names one.

- `base`: `Method`, the declaration of every fact about a method;
- `entries`, `image_entries`: the built-in declarations;
- `registry`: all methods by name, `register` for further ones, the entry-point group `contralto.methods`;
- `config`: `DecodingConfig`, a method with its parameters, models, sampling and executor;
- `build`: logits processors, loops and arguments of `generate()` of a configuration.

Nothing here imports torch before a configuration is checked or a processor is made.
"""

from contralto.decoding.methods import entries as _entries
from contralto.decoding.methods import image_entries as _image_entries
from contralto.decoding.methods.base import GATE, Critic, Form, Method, MethodParameter, Support, Unsupported
from contralto.decoding.methods.build import cost, generate_kwargs, likelihood_processor, logits_processor
from contralto.decoding.methods.config import (
    DecodingConfig,
    SamplingConfig,
    check_sampling,
    model_options,
    option_names,
    parameter_names,
)
from contralto.decoding.methods.registry import METHODS, register
from contralto.decoding.methods.views import VIEWS, Extra, View

__all__ = [
    "GATE",
    "METHODS",
    "VIEWS",
    "Critic",
    "DecodingConfig",
    "Extra",
    "Form",
    "Method",
    "MethodParameter",
    "SamplingConfig",
    "Support",
    "Unsupported",
    "View",
    "check_sampling",
    "cost",
    "generate_kwargs",
    "likelihood_processor",
    "logits_processor",
    "model_options",
    "option_names",
    "parameter_names",
    "register",
]

del _entries, _image_entries

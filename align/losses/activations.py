"""The activations of a reference model from which MaPO, a variant of SparsePO, makes token masks (arXiv 2410.05102).

The places are those of the released code (huawei-noah/HEBO, SparsePO/src/masks), which has model files of its own with hooks for GPT-2,
GPT-NeoX, GPT-J and GPT-BigCode. Here they are found by forward hooks and by transformers' attention interface, in any decoder.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

__all__ = ["KINDS", "Activations", "Kind", "record"]

Kind = Literal["attention", "mlp", "residual", "logits"]
KINDS: tuple[Kind, ...] = ("attention", "mlp", "residual", "logits")
Activations = dict[str, list[Tensor]]
"""By kind: for each place `(B, T)` float32, the mean of the activation over its features."""

_ATTENTION = re.compile(r"attn|attention|mixer", re.IGNORECASE)
_ROUTER = re.compile(r"(^|[._])(gate|router)$")
_INTERLEAVED = "query_key_value"
"""The projection of GPT-NeoX and BLOOM, whose rows are query, key and value of each head in turn."""


@contextmanager
def record(model: nn.Module, *, kinds: Sequence[Kind] = KINDS) -> Iterator[Activations]:
    """Record the activations of every forward pass within the context, for `mapo`.

    Works on any decoder of transformers, wrapped by PEFT or not:

        attention   outputs of the projections to queries, keys and values; queries and keys after the rotary embedding; inputs of the
                    last projection
        mlp         inputs of the MLP's last projection: the features after the non-linearity
        residual    inputs of the first layer; in each layer outputs of norms, of attention and of MLP, the sum after the attention, and
                    outputs of the layer; outputs of the norm after the last layer
        logits      logits, without scale and soft cap, from the outputs of the last norm and the output layer

    Only means over features are kept, one number per token and place; the logits themselves are not computed. Places without a vector per
    token (experts that get some of the tokens) are left out. A layer whose MLP reads what its attention reads has no sum in between.
    Queries and keys after the rotary embedding are found where the family uses transformers' attention interface.

    Args:
        model: the model, to be run within the context: `model(input_ids=..., attention_mask=...)`.
        kinds: some of `KINDS`.

    Yields:
        The activations by kind, filled by the forward pass; a second forward pass within the context starts over.

    Raises:
        ValueError: a kind is unknown, or no decoder layers are found in the model.

    Examples:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=5, bos_token_id=0, eos_token_id=0))
        >>> with torch.no_grad(), record(model) as activations:
        ...     _ = model(input_ids=torch.tensor([[1, 2, 3]]))
        >>> {kind: len(places) for kind, places in sorted(activations.items())}  # 2 layers of 4, 1 and 6 places
        {'attention': 8, 'logits': 1, 'mlp': 2, 'residual': 14}
    """
    if unknown := sorted(set(kinds) - set(KINDS)):
        raise ValueError(f"kinds must be of {', '.join(KINDS)}, not {', '.join(unknown)}")
    decoder: Any = getattr(model, "get_decoder", lambda: model)()
    layers = _layers(decoder, type(model).__name__)
    recorder = _Recorder(model, kinds)
    handles = [layers[0].register_forward_pre_hook(recorder.start, with_kwargs=True)]
    for layer in layers:
        handles += recorder.hooks(layer)
    norms = [child for child in decoder.children() if _is_norm(child)]
    if norms:
        handles.append(norms[-1].register_forward_hook(recorder.finish))
    try:
        with recorder.attention_inputs():
            yield recorder.activations
    finally:
        for handle in handles:
            handle.remove()


def _layers(decoder: Any, name: str) -> list[nn.Module]:
    """Return the layers of the language model: its longest list of modules that contain projections."""
    lists: list[Any] = [m for m in decoder.modules() if isinstance(m, nn.ModuleList) and m and _projections(m[0])]
    if not lists:
        raise ValueError(f"no decoder layers found in {name}: it has no list of modules with projections")
    longest: list[nn.Module] = max(lists, key=len)
    return list(longest)


def _projections(layer: nn.Module) -> dict[str, nn.Module]:
    """Return the modules with a weight matrix by name, except routers; an adapter around a projection counts as that projection."""
    projections: dict[str, nn.Module] = {}
    for name, module in layer.named_modules():
        weight = getattr(module, "weight", None)
        is_matrix = isinstance(weight, Tensor) and weight.ndim == 2 and not isinstance(module, nn.Embedding)
        inside = any(name.startswith(f"{outer}.") for outer in projections)
        if name and is_matrix and not inside and not _ROUTER.search(name):
            projections[name] = module
    return projections


def _is_norm(module: nn.Module) -> bool:
    """Return whether a module is a norm: one vector of weights and nothing inside."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 1 and not any(True for _ in module.children())


class _Recorder:
    """The store of the hooks."""

    def __init__(self, model: nn.Module, kinds: Sequence[Kind]) -> None:
        self.model, self.kinds = model, kinds
        self.activations: Activations = {}
        self.shape = torch.Size()
        self.has_rotary = any("rotary" in name for name, _ in model.named_modules())
        self.attentions: list[nn.Module] = []
        """Modules that call the attention interface, as far as they are of the decoder."""
        self.fused: dict[nn.Module, Tensor | None] = {}
        """By attention module with one projection for all three: its output, until the interface tells them apart."""
        self.stream: list[Tensor] = []
        """Tensors of the residual stream in this layer that have been kept."""

    def start(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Clear the store, and keep the numbers of rows and tokens of the new forward pass."""
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        self.activations.clear()
        self.shape = hidden.shape[:2]
        if "residual" in self.kinds:
            self.keep("residual", hidden)

    def keep(self, kind: Kind, value: Any) -> None:
        """Keep the mean activation of each token `(B, T)`, unless the value has another number of tokens."""
        value = value[0] if isinstance(value, tuple) else value
        if value.shape[:-1] in (self.shape, (self.shape.numel(),)):  # some layers flatten rows and tokens
            mean = value.detach().mean(-1, dtype=torch.float32).view(self.shape)
            self.activations.setdefault(kind, []).append(mean)

    def keep_heads(self, value: Tensor) -> None:
        """Keep queries, keys or values `(B, heads, T, D)`, as one vector per token."""
        if value.ndim == 4 and (value.shape[0], value.shape[2]) == tuple(self.shape):
            self.keep("attention", value.transpose(1, 2).flatten(2))

    def keep_once(self, value: Any) -> None:
        """Keep a tensor of the residual stream, unless it is one that has been kept."""
        value = value[0] if isinstance(value, tuple) else value
        if not any(value is other for other in self.stream):
            self.stream.append(value)
            self.keep("residual", value)

    def finish(self, norm: nn.Module, args: Any, output: Tensor) -> None:
        """Keep the output of the last norm, and the mean logit: the product with the mean row of the output layer."""
        if "residual" in self.kinds:
            self.keep("residual", output)
        head: Any = getattr(self.model, "get_output_embeddings", lambda: None)()
        weight = getattr(head, "weight", None)
        if "logits" not in self.kinds or weight is None:
            return
        weight, bias = (_whole(each) for each in (weight, getattr(head, "bias", None)))
        if weight.shape[-1] != output.shape[-1]:
            return
        mean = output.detach().float() @ weight.detach().float().mean(0)
        mean = mean if bias is None else mean + bias.detach().float().mean()
        self.keep("logits", mean[..., None])

    # ------------------------------------------------------------------------------------------------------- a layer

    def hooks(self, layer: nn.Module) -> list[Any]:
        """Return the hooks of a layer."""
        projections = _projections(layer)
        by_kind = {
            kind: [name for name in projections if bool(_ATTENTION.search(name)) == (kind == "attention")]
            for kind in ("attention", "mlp")
        }
        hooks: list[Any] = []
        if "attention" in self.kinds:
            hooks += self._of_attention(layer, projections, by_kind["attention"])
        if "mlp" in self.kinds:
            hooks += [
                projections[name].register_forward_pre_hook(lambda module, args: self.keep("mlp", args[0]))
                for name in by_kind["mlp"][-1:]
            ]
        if "residual" in self.kinds:
            hooks += self._of_stream(layer, [names[-1] for names in by_kind.values() if names])
        return hooks

    def _of_attention(self, layer: nn.Module, projections: dict[str, nn.Module], names: list[str]) -> list[Any]:
        self.attentions += [
            m for name, m in layer.named_modules() if any(n.rpartition(".")[0] == name for n in names) and name
        ]
        hooks = []
        for name in names[:-1]:
            fused = len(names) == 2
            parent = layer.get_submodule(name.rpartition(".")[0])
            hook = self._split_hook(parent, name) if fused else self._output_hook()
            hooks.append(projections[name].register_forward_hook(hook))
        for name in names[-1:]:
            parent = layer.get_submodule(name.rpartition(".")[0])
            hooks.append(
                projections[name].register_forward_pre_hook(lambda module, args, p=parent: self._last(p, args[0]))
            )
        return hooks

    def _output_hook(self) -> Any:
        return lambda module, args, output: self.keep("attention", output)

    def _split_hook(self, attention: nn.Module, name: str) -> Any:
        """Return the hook of a projection to queries, keys and values at once."""

        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            heads = getattr(self.model.config, "num_attention_heads", 0)
            if name.endswith(_INTERLEAVED) and heads and output.shape[-1] == 3 * args[0].shape[-1]:
                for part in output.view(*output.shape[:-1], heads, 3, -1).unbind(-2):
                    self.keep("attention", part.flatten(-2))
            else:
                self.fused[attention] = output

        return keep

    def _last(self, attention: nn.Module, value: Tensor) -> None:
        """Keep the inputs of the last projection, after an output that could not be split."""
        if (whole := self.fused.pop(attention, None)) is not None:
            self.keep("attention", whole)
        self.keep("attention", value)

    def _of_stream(self, layer: nn.Module, last: list[str]) -> list[Any]:
        def begin(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            self.stream = [args[0] if args else kwargs["hidden_states"]]  # the layer before has kept it

        def before(module: nn.Module, args: Any) -> None:
            self.keep_once(args[0])

        def after(module: nn.Module, args: Any, output: Any) -> None:
            self.keep_once(output)

        hooks: list[Any] = [layer.register_forward_pre_hook(begin, with_kwargs=True)]
        for name, child in layer.named_children():
            if _is_norm(child):
                hooks += [child.register_forward_pre_hook(before), child.register_forward_hook(after)]
            elif name in last or any(True for _ in child.children()):  # an MLP may be projections of the layer itself
                hooks.append(child.register_forward_hook(after))
        return [*hooks, layer.register_forward_hook(after)]

    # ------------------------------------------------------------------------------------------- the attention interface

    @contextmanager
    def attention_inputs(self) -> Iterator[None]:
        """Keep queries and keys as they enter the attention functions of transformers, and what a fused projection holds."""
        if not self.attentions or not (self.has_rotary or any(len(_projections(m)) == 2 for m in self.attentions)):
            yield
            return
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as FUNCTIONS

        known = {name: FUNCTIONS[name] for name in FUNCTIONS}
        own = {name: self._recording(known.get(name)) for name in (*known, "eager")}
        FUNCTIONS.update(own)
        try:
            yield
        finally:
            for name in own:
                FUNCTIONS.pop(name)
                if name in known and FUNCTIONS.get(name) is not known[name]:  # it was registered for this table alone
                    FUNCTIONS[name] = known[name]

    def _recording(self, function: Any) -> Any:
        def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
            if any(module is each for each in self.attentions):
                fused = self.fused.pop(module, None) is not None
                for part in (query, key, *([value] if fused else [])):
                    if fused or self.has_rotary:
                        self.keep_heads(part)
            call = function or sys.modules[type(module).__module__].eager_attention_forward
            return call(module, query, key, value, *args, **kwargs)

        return attention


def _whole(weight: Any) -> Any:
    """Return a weight that FSDP2 may have sharded."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight

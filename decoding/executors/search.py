"""Contrastive search: choose among the k likeliest tokens one that is likely and dissimilar to the context.

Su et al. 2022 (arXiv 2202.06417), Su & Collier 2023 (arXiv 2210.14140). A step needs the hidden state that each of the k
candidates would have. Two ways to compute them give the same tokens:

- the **tree** (`tree`): one forward pass of k query positions that share one position id and one cache. A mask lets each
  candidate attend to the context and to itself. The chosen candidate's keys and values stay in the cache, the others leave it,
  and its logits begin the next step: one forward pass per token, and a cache of k more tokens.
- **replicas**: one forward pass of one position for k copies of every row and of its cache. Slower and larger, but every
  model with a cache supports it.

A model's first tree is compared with a plain forward pass, so that a model that cannot read trees is never decoded wrongly.
"""

from collections.abc import Mapping
from typing import Any

from transformers.cache_utils import StaticLayer

from contralto.decoding.branches.cache import linear_layers, split_cache
from contralto.decoding.branches.padding import check_mask
from contralto.decoding.executors.generation import CustomGenerate, Generation
from contralto.decoding.executors.search_state import SearchPath, SearchState, check_parameters

__all__ = ["ContrastiveSearch", "check_search"]


class ContrastiveSearch(CustomGenerate):
    """Contrastive search as the decoding loop of `generate()`, one forward pass per token.

        model.generate(**inputs, custom_generate=ContrastiveSearch(alpha=0.6, k=4))

    Su et al. 2022 (arXiv 2202.06417), equation 5, see `contrastive_search`. `h` is `hidden_states[-1]`, the decoder's
    in an encoder-decoder. The prompt belongs to the context, with the images in it; padding does not.

    All processors of `generate()` (repetition penalty, minimum length, suppressed tokens, your own) act on the model's
    logits before the k candidates are chosen, a watermark on the contrastive scores, see `order`. Batches of left-padded prompts, encoder-decoders, images,
    stopping criteria and `return_dict_in_generate` work as in greedy search; `output_scores` gives the contrastive
    scores, `output_logits` the model's logits. A returned cache holds all tokens but the last, as `generate()` leaves it.

    A static cache needs room for the candidates: pass `max_cache_len` to `generate()`. Trees over it are compiled where `generate()` would
    compile. `stop_strings` need a tokenizer,
    which transformers does not hand to callables: pass a `StopStringCriteria` as a stopping criterion.

    Args:
        alpha: weight of the degeneration penalty, in [0, 1]. The paper uses 0.6; 0 is greedy search.
        k: number of candidates, at least 1. The papers use 3 to 10; 1 is greedy search.
        path: how candidates are read: "tree", "replicate", or "auto" (the tree where the model passes its test). Use
            "tree" to learn why a model does not pass.
        streamer: as for `generate()`, which does not hand its own to callables.

    Raises:
        ValueError: at construction, a parameter outside its range; when called, `do_sample`, beams, `use_cache=False`,
            `prefill_chunk_size`, attentions or hidden states as outputs, a cache that already holds tokens, is
            quantized, or is static and too small or with a sliding window, a model without a cache, or `path="tree"`
            for a model that cannot be read so.

    Examples:
        >>> from contralto import testbed
        >>> model, tokenizer = testbed.load("expert"), testbed.tokenizer()
        >>> inputs = tokenizer("Ben went out to the barn door. He", return_tensors="pt")
        >>> output = model.generate(**inputs, custom_generate=ContrastiveSearch(alpha=0.4), max_new_tokens=16)
        >>> text = tokenizer.decode(output[0])
    """

    name = "contrastive search"
    compiles = True
    alternative = "its scores cannot be summed over steps, so pass num_beams=1 to generate()"

    def __init__(self, *, alpha: float = 0.6, k: int = 4, path: SearchPath = "auto", streamer: Any = None) -> None:
        super().__init__(streamer=streamer)
        check_parameters(alpha, k)
        if path not in ("auto", "tree", "replicate"):
            raise ValueError(f"path must be 'auto', 'tree' or 'replicate', not {path!r}")
        self.alpha, self.k, self.path = alpha, k, path

    def _generate(self, model: Any, generation: Generation, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        state = SearchState(
            model, generation.ids, model_kwargs, alpha=self.alpha, k=self.k, path=self.path, config=generation.config
        )
        returns_cache = generation.config.return_dict_in_generate

        def advance() -> None:
            tokens = generation.step(state.logits, state.score)
            # Finished rows continue with their candidate, which the tree holds already, unless the cache is returned:
            # then it must hold the padding.
            if returns_cache:
                tokens = generation.ids[:, -1]
            state.advance(tokens, ends=not generation.unfinished.any())

        generation.run(advance)
        return {"past_key_values": state.reader.cache}

    def _check(self, model: Any, config: Any, model_kwargs: Mapping[str, Any], processors: Any) -> None:
        super()._check(model, config, model_kwargs, processors)
        check_search(config, model_kwargs, self.k)


def check_search(config: Any, model_kwargs: Mapping[str, Any], k: int) -> None:
    """Check the options of `generate()` before the first forward pass.

    Args:
        config: the prepared generation configuration.
        model_kwargs: the prepared inputs of the first forward pass.
        k: number of candidates.

    Raises:
        ValueError: an option that contrastive search does not support.
    """
    if config.do_sample:
        raise ValueError("contrastive search is deterministic and does not sample: pass do_sample=False to generate()")
    if not model_kwargs.get("use_cache"):
        raise ValueError("contrastive search needs the cache: pass use_cache=True to generate()")
    if config.prefill_chunk_size is not None:
        raise ValueError("contrastive search needs the hidden states of the whole prompt: leave prefill_chunk_size out")
    if config.output_attentions or config.output_hidden_states:
        raise ValueError(
            "contrastive search does not return the attentions and hidden states of its k candidates: leave "
            "output_attentions and output_hidden_states out"
        )
    if model_kwargs.get("encoder_outputs") is None and model_kwargs.get("attention_mask") is not None:
        check_mask(model_kwargs["attention_mask"])
    if model_kwargs.get("past_key_values") is not None:
        _check_cache(model_kwargs["past_key_values"], room=(config.max_length or 0) - 1 + k)


def _check_cache(cache: Any, *, room: int) -> None:
    """Raise ValueError for a cache that holds tokens, or from which candidates cannot be removed."""
    if not any(linear_layers(cache)) and (length := int(cache.get_seq_length())):
        raise ValueError(
            f"the cache already contains {length} tokens, but not their hidden states, which contrastive search "
            "needs: pass the whole prompt without past_key_values"
        )
    layers = split_cache(cache)[0].layers
    static = [layer for layer in layers if isinstance(layer, StaticLayer)]
    kinds = (kind for layer in layers for kind in type(layer).__mro__)
    if any("Quantized" in kind.__name__ for kind in kinds):  # the base's name has changed in transformers 5.20
        kind = "a quantized cache"
    elif any(layer.is_sliding for layer in static):
        kind = "a static cache with a sliding window"
    elif static and (size := cache.get_max_length()) < room:
        raise ValueError(
            f"contrastive search also stores its candidates in the static cache, which needs room for {room} "
            f"tokens, not {size}: pass max_cache_len={room}"
        )
    else:
        return
    raise ValueError(f"contrastive search cannot remove candidates from {kind}: use the dynamic cache")

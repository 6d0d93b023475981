"""Losses of alignment: pure functions of log-probabilities and hidden states, and the objective that combines them.

- `preference`: the preference losses; `loss` declares one, `registry` names all, `objective` combines several by weight.
- `divergences`: divergences between two models from logits; `chunked` computes them from hidden states without keeping logits, by the
  `formulas` and their `sweep` over chunks of tokens.
- `cross_tokenizer`: divergences between models with different vocabularies.
- `masks`: the token masks of SparsePO.
- `curriculum`: the schedules of DistiLLM-2.
"""

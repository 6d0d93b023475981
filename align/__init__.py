"""Alignment by contrast.

`losses` holds the preference losses, pure functions of log-probabilities; `objective` names and combines them. `divergences`
computes divergences and log-probabilities over the whole vocabulary from hidden states, a few tokens at a time, so that no logits
are kept. `masks` makes the token masks of SparsePO, `curriculum` the schedules of DistiLLM-2. None of the five knows a trainer.
"""

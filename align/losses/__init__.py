"""Losses of alignment: pure functions of log-probabilities, and the registry that combines them."""

"""Metrics that lm-eval does not have: CHAIR, POPE, open-ended generation."""

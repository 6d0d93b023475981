"""Measure real models: the framework of `benchmarks/real_card.py`, and its lines in `lines/`."""

"""Audit, monitor and report of a training run."""

"""Monitoring of a training run: the audit before it, the measurements during it, and the report after it."""

"""Caches on disk: log-probabilities of the reference, distributions of the teacher."""

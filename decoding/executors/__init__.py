"""Executors run a contrastive method: the loop, contrastive search, speculation and scoring."""

"""Marks of tests that run TRL's own trainers."""

import pytest

RENAMED_OPTIONS = [
    pytest.mark.filterwarnings(f"ignore:.{name}. is deprecated:FutureWarning")  # stock TRL's, under transformers 5.23
    for name in ("gradient_checkpointing", "gradient_checkpointing_disable", "gradient_checkpointing_enable")
]
"""TRL 1.16 uses names that transformers 5.23 deprecates."""

"""lm-eval models that decode and score by contrast."""

"""Recipes that reproduce papers: models, data, commands, figures to compare with, and what they cost."""

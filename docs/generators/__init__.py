"""Generators of the pages of the site that are derived from the sources."""

"""Strategies make a preference pair of a row by asking engines."""

"""Measuring by contrast: two systems on the same items, with exact tests."""

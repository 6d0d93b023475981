"""Comparison of decoders on the same documents, with controls and paired tests."""

"""Trains the embedded pair of byte-level Mamba-1 models (see README.md in this folder)."""

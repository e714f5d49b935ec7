"""Layers of Mamba language models over the fused ops."""

"""Micro-benchmarks of the ops, speed of whole runs, quality of the embedded pair."""

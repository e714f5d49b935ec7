"""Fixtures shared by tests/ and benchmarks/: random models, scripted drafts, table models, an oracle, timing."""

"""Serving: an engine of requests that join and leave, and OpenAI's API over it."""

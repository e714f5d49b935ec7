"""Requests that come and go: an engine around one batch."""

from .completion import Completion, RequestOutput, TokenOutput
from .engine import Engine, EngineStats
from .request import Request
from .scheduler import QueueFullError

__all__ = ["Completion", "Engine", "EngineStats", "QueueFullError", "Request", "RequestOutput", "TokenOutput"]

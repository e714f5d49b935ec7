"""``speculative-mamba serve``: OpenAI's API over HTTP."""

import argparse
import contextlib
import ipaddress
import os
import resource
import socket
import sys

from ..decode.sampling import SamplingParams
from ..models import MambaLM
from ..serve.engine import Engine
from ..serve.fields import MAX_CHOICES
from ..serve.protocol import OPENAI_SAMPLING, ServedModel, recommended_sampling
from ..streams import PROGRAM, say
from .options import (
    TEXT,
    Parser,
    add_engine_options,
    add_model_options,
    choose_draft,
    executor_of,
    integer,
    load_models,
    notices,
)

API_KEY = "SPECULATIVE_MAMBA_API_KEY"
STALLED_S = 60  # until a client that takes nothing is dropped


def build_parser() -> Parser:
    parser = Parser(
        prog=f"{PROGRAM} serve",
        description="Serves a model over HTTP, with OpenAI's API at /v1 and a page at /. SIGTERM and Ctrl-C end it "
        "when all that is under way is answered; a second Ctrl-C at once.",
    )
    option = parser.option
    parser.add_argument("model", nargs="?", metavar="MODEL", help="the same as --model_target")
    option("host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all of this machine's")
    option("port", type=integer(0, 65535), default=8000, help="0 takes one that is free")
    option("api_key", type=TEXT, help=f"what callers must name (default: {API_KEY} of the environment, or none)")
    option("max_queue_size", type=integer(1, 10**6), default=1024, metavar="N", help="texts that may wait")
    option(
        "prefix_cache_mb", type=integer(0, 2**20), default=256, metavar="N",
        help="memory for states of prompts that may come again, in MiB; 0 for none",
    )  # fmt: skip
    option("max_body_mb", type=integer(1, 1024), default=8, metavar="N", help="the largest request body, in MiB")
    option(
        "no_default_sampling", action="store_true",
        help="fields that a request leaves out are OpenAI's defaults, whatever generation_config.json recommends",
    )  # fmt: skip
    add_engine_options(parser)
    add_model_options(parser)
    return parser


def run(arguments: list[str]) -> int:
    parser = build_parser()
    options, given = parser.read(arguments)
    if options.model is not None:
        if "model_target" in given:
            parser.error("the model is named twice, as MODEL and by --model_target")
        options.model_target = options.model
    if options.served_model_name == "":
        parser.error("argument --served_model_name: must not be empty")
    choose_draft(options, given)
    api_key = _api_key(options)
    try:
        from ..serve import openai_api
    except ModuleNotFoundError as error:
        install = 'pip install -c constraints.txt -e ".[serve]"'
        raise ValueError(f"serving needs {error.name}, which is not installed; install it with: {install}") from None
    with bind(options.host, options.port) as listener:
        target, draft = load_models(options)
        default = OPENAI_SAMPLING if options.no_default_sampling else _default_sampling(target)
        for notice in notices(options, given, default):
            say(notice)
        served = ServedModel(
            target, options.served_model_name or target.name, options.max_length, default,
            max_choices=min(MAX_CHOICES, options.max_queue_size),
            draft=draft.name if isinstance(draft, MambaLM) else draft,
        )  # fmt: skip
        engine = Engine(
            target, draft=draft, lookahead=options.K, acceptance=options.acceptance,
            max_batch_size=options.max_batch_size, max_queue_size=options.max_queue_size,
            max_length=options.max_length, prefix_cache_bytes=options.prefix_cache_mb << 20,
            executor=executor_of(options, target),
        )  # fmt: skip
        try:
            limits = openai_api.Limits(
                body_bytes=options.max_body_mb << 20, calls=options.max_batch_size + options.max_queue_size
            )
            app = openai_api.create_app(engine, served, api_key=api_key, limits=limits)
            listener.listen(1024)
            _allow_many_connections()
            say(
                f"{options.max_batch_size} texts at once, of up to {options.max_length} tokens each: "
                f"{engine.cache_bytes / 2**20:.0f} MiB beside the weights"
            )
            announce(listener, served, api_key)
            with contextlib.suppress(KeyboardInterrupt):
                openai_api.http_server(app).run(sockets=[listener])
        finally:
            engine.close(drain=False)  # whoever waited for a text has got it, or has left
    return 0


def _api_key(options: argparse.Namespace) -> str | None:
    """
    Raises:
        ValueError: it cannot stand in a header.
    """
    key = os.environ.get(API_KEY) if options.api_key is None else options.api_key
    if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
        where = API_KEY if options.api_key is None else "--api_key"
        raise ValueError(f"{where} must be made of visible ASCII characters, and at least one")
    return key


def _default_sampling(target: MambaLM) -> SamplingParams:
    """
    Raises:
        ValueError: the model recommends what is not supported.
    """
    try:
        return recommended_sampling(target)
    except ValueError as error:
        raise ValueError(f"{error}; --no_default_sampling takes no notice of it") from None


def bind(host: str, port: int) -> socket.socket:
    """A socket at this address, before anything that takes long.

    Raises:
        ValueError: the address is not one of this machine, or is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if sys.platform == "linux":  # connections inherit it: one whose client takes nothing is dropped
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * STALLED_S)
        listener.bind(address)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"cannot listen on {host}, port {port}: {error}") from None
    return listener


def _allow_many_connections() -> None:
    """As many open files as the system lets this process have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError):  # macOS has no such number where the limit is infinite
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def announce(listener: socket.socket, served: ServedModel, api_key: str | None) -> None:
    host, port = listener.getsockname()[:2]
    place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    say(f"serving {served.name} with draft {served.draft or 'none'} at http://{place}")
    if api_key is None and not ipaddress.ip_address(host).is_loopback:
        say(f"whoever reaches {host} may use it; --api_key or {API_KEY} in the environment sets a key")

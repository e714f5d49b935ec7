"""An engine as arguments: what a worker on another machine loads, once."""

from dataclasses import dataclass, field

from ..decode import SamplingParams
from ..models import MambaLM, load_model, load_pair
from ..ops.threads import set_num_threads
from ..serve import Engine
from ..serve.protocol import ServedModel, recommended_sampling


@dataclass(frozen=True)
class EngineArgs:
    """Models and an engine, as arguments that can be sent to another machine.

    target, draft: as ``load_model`` and ``generate`` name them; a draft is a model, ``"ngram"`` or None. name: what
    calls of the API name the model; None for target. lookahead, acceptance, max_batch_size, max_queue_size, max_length,
    prefix_cache_bytes, executor: of the ``Engine``. sampling: what calls get that name no parameters; None: what the
    model recommends, and OpenAI's defaults for the rest. threads: of a worker; None: one for each core that it has.
    load: further arguments of ``load_model``, such as dtype, device and backend.

    Models are named as every machine finds them: a hub id, or a folder that all of them see.
    """

    target: str = "builtin:target"
    draft: str | None = "builtin:draft"
    name: str | None = None
    lookahead: int = 4
    acceptance: str = "coupled"
    max_batch_size: int = 8
    max_queue_size: int = 1024
    max_length: int = 8192
    prefix_cache_bytes: int = 0
    executor: str = "eager"
    sampling: SamplingParams | None = None
    threads: int | None = None
    load: dict = field(default_factory=dict)

    def start(self) -> tuple[Engine, ServedModel]:
        """Loads the models and opens an engine, which is the caller's to close.

        Raises:
            ValueError: an argument is out of range, or the models cannot be loaded or do not fit together.
        """
        if self.threads is not None:
            set_num_threads(self.threads)
        draft: MambaLM | str | None = self.draft
        if draft in (None, "ngram"):
            target = load_model(self.target, **self.load)
        else:
            target, draft = load_pair(self.target, draft, **self.load)
        engine = Engine(
            target, draft=draft, lookahead=self.lookahead, acceptance=self.acceptance,
            max_batch_size=self.max_batch_size, max_queue_size=self.max_queue_size, max_length=self.max_length,
            prefix_cache_bytes=self.prefix_cache_bytes, executor=self.executor,
        )  # fmt: skip
        sampling = recommended_sampling(target) if self.sampling is None else self.sampling
        return engine, ServedModel(target, self.name or self.target, self.max_length, sampling, draft=self.draft)

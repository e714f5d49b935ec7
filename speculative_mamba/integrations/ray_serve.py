"""Ray Serve: OpenAI's API of ``speculative-mamba serve`` as a deployment with replicas."""

from typing import TYPE_CHECKING

from .engine_args import EngineArgs

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve import Application

    from ..serve.openai_api import Limits


def build_application(
    engine: EngineArgs,
    *,
    replicas: int = 1,
    api_key: str | None = None,
    limits: "Limits | None" = None,
    num_cpus: float = 1,
    num_gpus: float = 0,
) -> "Application":
    """For ``ray.serve.run``: each replica loads the models once and answers many calls at a time.

    api_key, limits: of ``create_app``. num_cpus, num_gpus: of each replica. A replica that dies is replaced; calls that
    it was answering fail, and their clients ask again.
    """
    from ray import serve

    from ..serve.openai_api import Limits, create_app

    limits = limits or Limits()

    def app() -> "FastAPI":
        return create_app(*engine.start(), api_key=api_key, limits=limits)

    deployment = serve.deployment(
        serve.ingress(app)(), name="speculative_mamba", num_replicas=replicas, max_ongoing_requests=limits.calls,
        ray_actor_options={"num_cpus": num_cpus, "num_gpus": num_gpus},
    )  # fmt: skip
    return deployment.bind()

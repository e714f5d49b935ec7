"""Ray Data: generation as a stateful map over a dataset. Each worker loads its model once."""

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from ..serve.batch_files import BatchRunner, Line
from .engine_args import EngineArgs

if TYPE_CHECKING:
    from ray.data import Dataset

RESULTS = ("text", "finish_reason", "completion_tokens", "error")


class TextGenerator:
    """For ``Dataset.map_batches``: adds to each row what the model makes of it.

    A row is a call of OpenAI's API: ``fields`` names the columns that are fields of its body, ``prompt`` or
    ``messages`` among them; ``None`` in a row is as good as absent. defaults: fields that all rows have. Other columns
    are left as they are. New columns: text and finish_reason (of the first choice), completion_tokens, and error, which
    says why a row has no text.

    The text of a row is that of the row alone, whatever runs beside it and on which worker, greedy or coupled.
    """

    def __init__(
        self, engine: EngineArgs, fields: tuple[str, ...] = ("prompt",), defaults: Mapping[str, object] | None = None
    ) -> None:
        self._fields, self._defaults, rows = fields, dict(defaults or {}), engine.max_batch_size
        self._engine, served = engine.start()
        self._runner = BatchRunner(self._engine, served, served, self._defaults, rows)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        lines = list(self._lines(batch))
        results = [_result(record) for record in self._runner.records(lines)]
        columns = np.array(results, dtype=object).reshape(-1, len(RESULTS)).T
        return {**batch, **dict(zip(RESULTS, columns, strict=True))}

    def _lines(self, batch: dict[str, np.ndarray]) -> Iterator[Line]:
        missing = [name for name in self._fields if name not in batch]
        if missing:
            raise ValueError(f"the dataset has no column {missing[0]}; it has {', '.join(batch)}")
        for number, values in enumerate(zip(*(batch[name] for name in self._fields), strict=True), 1):
            body = {name: _plain(value) for name, value in zip(self._fields, values, strict=True)}
            body = {name: value for name, value in body.items() if value is not None}
            yield Line(number, json.dumps(body).encode(), str(number))


def generate_texts(
    dataset: "Dataset",
    engine: EngineArgs,
    *,
    workers: int = 1,
    fields: tuple[str, ...] = ("prompt",),
    defaults: Mapping[str, object] | None = None,
    batch_size: int = 64,
    num_cpus: float = 1,
    num_gpus: float = 0,
) -> "Dataset":
    """A dataset with texts: ``TextGenerator`` over ``dataset``, on so many workers.

    fields, defaults: as ``TextGenerator`` has them. batch_size: rows that a worker takes at a time, of which
    ``engine.max_batch_size`` run together. num_cpus, num_gpus: of each worker. A worker that dies is replaced, and its
    rows run again.
    """
    from ray.data import ActorPoolStrategy

    return dataset.map_batches(
        TextGenerator, fn_constructor_args=(engine, fields, defaults), batch_size=batch_size, batch_format="numpy",
        compute=ActorPoolStrategy(size=workers), num_cpus=num_cpus, num_gpus=num_gpus,
    )  # fmt: skip


def _plain(value: object) -> object:
    """What JSON has, of a value of a column."""
    if isinstance(value, np.ndarray):
        return [_plain(one) for one in value]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list) else value


def _result(record: dict) -> tuple[str | None, str | None, int, str | None]:
    """As RESULTS names them."""
    response = record["response"]
    if response is None or "error" in response["body"]:
        error = record["error"] or response["body"]["error"]
        return None, None, 0, error["message"]
    body = response["body"]
    choice = body["choices"][0]
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    return text, choice["finish_reason"], body["usage"]["completion_tokens"], None

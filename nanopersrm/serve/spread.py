"""The lines of a batch, judged by several machines with Ray Data; what comes out is the same.

    ray start --head                                  # and on the others: ray start --address HEAD
    python judge.py --batch in.jsonl --out out.jsonl --ray 4

Four workers load the base once each and keep it; on a cluster with GPUs each gets one. Without a
cluster (RAY_ADDRESS) Ray starts one on this machine. Lines travel to the workers and records come
back, in the order of the lines, and this process writes them: so a spread run can be killed, goes
on, and can go on without Ray.

The same is byte for byte where all machines round alike; other CPUs and GPUs round otherwise, as
they do without Ray. All of them need this project installed and base and adapter in the same place.

What we left out. All lines that are to be judged lie in Ray's object store, memory first and then
disk, at once. A worker that dies is started again by Ray and its lines are judged again.
"""

import functools
import importlib.util
import json
import logging
from collections.abc import Iterable, Iterator
from typing import Any

from nanopersrm import InputError
from nanopersrm.serve.batch import Asking, Load, Numbered, Record, record_of

FAILED = "failed"  # instead of a record: why this worker can judge nothing
AT_ONCE = 8  # lines that a worker takes: few, so that records come back soon


def spread(load: Load, lines: Iterable[Numbered], asking: Asking, workers: int) -> Iterator[Record]:
    """The record of each line, in order, from so many workers; each calls `load` once."""
    if workers < 1:
        raise InputError(f"--ray: expected a number of workers from 1, got {workers}")
    if importlib.util.find_spec("ray") is None:
        raise InputError("--ray: expected the library ray: pip install 'ray[data]'")
    rows = [{"number": number, "raw": raw} for number, raw in lines]
    if not rows:
        return
    import ray
    import ray.data  # takes seconds

    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    settings = ray.data.DataContext.get_current()
    settings.execution_options.preserve_order = True
    settings.enable_progress_bars = False
    records = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // AT_ONCE)).map_batches(
        Worker,
        fn_constructor_args=(load, asking),
        batch_size=AT_ONCE,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_gpus=1 if ray.cluster_resources().get("GPU") else 0,
    )
    for row in records.iter_rows():
        record = json.loads(row["record"])
        if FAILED in record:
            raise InputError(record[FAILED])
        yield record


class Worker:
    """A process of Ray with a judge of its own."""

    def __init__(self, load: Load, asking: Asking):
        self.load, self.asking = functools.cache(load), asking

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        lines = zip(batch["number"], batch["raw"], strict=True)
        try:
            records = [record_of(self.load, int(k), bytes(raw), self.asking) for k, raw in lines]
        except InputError as error:  # of `load`: Ray would wrap it in errors of its own
            records = [{FAILED: str(error)}]
        return {"record": [json.dumps(record) for record in records]}

"""One process of a run of llmos-benchmark.

It is given its job as JSON and takes the first steps; then it takes as many more as it is told to,
line by line, and in between it rests, so that the runs can take turns. It answers in JSON, a line
each time. When its input ends it ends, whatever it is doing: nothing is left of a run whose
benchmark was stopped.
"""

import importlib
import json
import os
import queue
import sys
import threading
import time
import traceback
from typing import Any, TextIO

from llmos_tf.process import peak_resident_bytes
from llmos_tf.scripts.peers.kinds import KINDS
from llmos_tf.scripts.peers.workload import Job

# Updates after which the loss is told, to be compared with that of the other runs.
UPDATES = 5


def main() -> None:
    """Serves one process of a run until its input ends."""
    answers = _own_stdout()
    counts: queue.SimpleQueue[int] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(counts,), daemon=True).start()
    try:
        _serve(Job.from_dict(json.loads(sys.argv[1])), counts, answers)
    except Exception as error:
        traceback.print_exc()
        _answer(answers, error=_words(error))
    # Without the farewells of the frameworks, which may wait for other processes.
    os._exit(1)


def _serve(job: Job, counts: "queue.SimpleQueue[int]", answers: TextIO) -> None:
    kind = KINDS.get(job.kind)
    module = f"llmos_tf.scripts.peers.{'ours' if kind is None else kind.module}"
    begin = time.perf_counter()
    take = importlib.import_module(module).make(job)
    setup = time.perf_counter() - begin
    times, losses = take(1 + UPDATES)
    _answer(answers, setup=setup, first_step=times[0], loss=losses[0], later_loss=losses[UPDATES])
    while True:
        # Each turn begins with a step that does not count: it wakes the threads and fills the
        # caches, which others have used meanwhile, and in it `fit` begins to read its data.
        times, _ = take(1 + counts.get())
        _answer(answers, times=times[1:], peak_bytes=peak_resident_bytes())


def _words(error: Exception) -> str:
    """Type and message, without the calls that TensorFlow lists in its messages."""
    noise = ("Graph execution error", "Detected at node", "File ", "[[{{")
    lines = [line.strip() for line in str(error).splitlines()]
    return f"{type(error).__name__}: " + " ".join(
        line for line in lines if line and not line.startswith(noise)
    )


def _own_stdout() -> TextIO:
    """Takes stdout for the answers; what a framework prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def _read(counts: "queue.SimpleQueue[int]") -> None:
    for line in sys.stdin:
        counts.put(int(line))
    os._exit(0)


def _answer(answers: TextIO, **values: Any) -> None:
    print(json.dumps(values), file=answers, flush=True)


if __name__ == "__main__":
    main()

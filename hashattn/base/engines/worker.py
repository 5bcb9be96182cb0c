"""python -m hashattn.base.engines.worker DESCRIPTOR: a process of hashattn.base.engines.processes.

It receives the work and then one job after another through the connection of that file descriptor,
and sends back (kind, value): "result" for each item, "done" after each job, "progress", or "error"
as its last message. It ends as soon as the process at the other end does.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

import torch

from hashattn.base.engines.base import EngineError
from hashattn.base.progress import report_to


def main(descriptor: int) -> int:
    """Work until the other end is gone; returns 1 after an error of the work."""
    torch.set_num_threads(1)
    connection, received, lock = Connection(descriptor), SimpleQueue(), threading.Lock()

    def send(kind: str, value: Any = None) -> None:
        with lock:  # tqdm's monitor is a thread of its own
            connection.send_bytes(pickle.dumps((kind, value)))

    threading.Thread(target=_receive, args=(connection, received), daemon=True).start()
    report_to(lambda message: send("progress", message))
    try:
        work = pickle.loads(received.get())
        while True:
            for result in work(pickle.loads(received.get())):
                send("result", result)
            send("done")
    except Exception as error:
        send("error", _sendable(error))
        return 1


def _receive(connection: Connection, received: SimpleQueue[bytes]) -> None:
    while True:
        try:
            received.put(connection.recv_bytes())
        except (EOFError, OSError):
            os._exit(1)  # nobody waits for the results any more


def _sendable(error: Exception) -> Exception:
    """The error, with a note of where it was raised; an EngineError if it cannot be pickled."""
    note = f"in a worker process:\n{''.join(traceback.format_exception(error))}"
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        copy = EngineError(f"{type(error).__name__}: {error}")
    copy.add_note(note)
    return copy


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))

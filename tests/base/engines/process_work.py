"""Work for processes, in a module of its own so that they start without the tests' imports."""

import os
import signal
import time

import torch

from hashattn.base.progress import progress_bar, say


class Unsendable(Exception):
    """Cannot be unpickled: its message does not give back both arguments."""

    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


class Noting:
    """Yields (item, process, threads) every `pause` seconds or more; some items end the process."""

    def __init__(self, pause=0.0):
        self.pause = pause

    def __call__(self, items):
        for item in progress_bar(items, desc=f"job {items[0]}"):
            time.sleep(self.pause)
            if item == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if item == "terminated":
                os.kill(os.getpid(), signal.SIGTERM)
            if item == "exits":
                os.write(2, b"the disk is gone\n")
                os._exit(3)
            if item == "wrong":
                raise KeyError("no such sample")
            if item == "unsendable":
                raise Unsendable("this", "that")
            if item == "said":
                say("half of it is done")
            yield item, os.getpid(), torch.get_num_threads()

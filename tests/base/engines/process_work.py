"""Work for processes: in a module of its own, so that they start without the tests' imports."""

import os
import signal
import time

import torch

from hashattn.base.progress import progress_bar, say


class Unsendable(Exception):
    """Loses a part of itself when it is pickled."""

    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


class Noting:
    """Gives (item, its process, its threads), at least `pause` seconds apart; some items end it."""

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

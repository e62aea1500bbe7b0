"""Fair sharing of one worker thread between requests.

A search pauses before every token, also inside a block, a lookahead's rollouts and the reading of its
prompts, so that plain requests wait for one token at most. A sampler written as a generator of states
could pause between its steps only: that is why a search has a thread of its own here, which never runs
beside the worker.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

__all__ = ["FairShare", "Stretches", "Stopped"]


class Stopped(BaseException):
    """Raised inside work that nobody waits for any more. No method's own `except Exception` catches it."""


class Stretches:
    """Work that owns its loop, run a stretch at a time: between `resume` and the next `pause` it alone computes.

    The work gets a thread of its own, which never runs beside the one that resumes it.
    """

    def __init__(self, work: Callable[[Callable[[], None]], None]) -> None:
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._work, self._stopped = work, False
        self.over = False
        self._thread = threading.Thread(target=self._run, daemon=True, name="steer-search")
        self._thread.start()

    def resume(self) -> None:
        """Run the work to its next pause, or to its end."""
        self._go.release()
        self._back.acquire()

    def stop(self) -> None:
        """Have the next pause raise `Stopped`, and run the work until it has ended."""
        self._stopped = True
        while not self.over:
            self.resume()

    def pause(self) -> None:
        """Called by the work: let others compute. Raises `Stopped` where it is not wanted any more."""
        self._back.release()
        self._go.acquire()
        self._check()

    def _check(self) -> None:
        if self._stopped:
            raise Stopped

    def _run(self) -> None:
        self._go.acquire()
        try:
            self._check()
            self._work(self.pause)
        except Stopped:
            pass
        finally:
            self.over = True
            self._back.release()


class FairShare:
    """Two queues of one worker. While both have work, `share` of the time goes to the second; alone each gets all."""

    def __init__(self, share: float) -> None:
        self._weights = (1 - share, share)
        self._spent = [0.0, 0.0]

    def pick(self, ready: tuple[bool, bool]) -> int | None:
        """The queue whose turn it is, None where neither has work."""
        if not any(ready):
            return None
        if all(ready):
            return 0 if self._spent[0] <= self._spent[1] else 1
        only = 0 if ready[0] else 1
        # Idle time earns nothing: whoever was away comes back level.
        self._spent[1 - only] = max(self._spent)
        return only

    def charge(self, queue: int, seconds: float) -> None:
        """Note what a turn took."""
        self._spent[queue] += seconds / self._weights[queue]

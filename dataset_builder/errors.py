"""The two ways in which asking a model goes wrong: for one record, and for the whole run."""

from collections.abc import Sequence


class Stop(Exception):
    """The run cannot go on; what was answered is kept, and the same command goes on from there.

    Args:
        reason: One line for the user.
        budget: Whether a limit of the user's was reached, and not an error.
    """

    def __init__(self, reason: str, budget: bool = False) -> None:
        super().__init__(reason)
        self.budget = budget


class BadAnswer(Exception):
    """A record fails: a server refused, cut off or garbled an answer twice, or did not answer.

    Args:
        reason: Why, without any text of the record.
        requests: Hashes of the answered requests that led here; a retry of the record asks them anew.
    """

    def __init__(self, reason: str, requests: Sequence[str] = ()) -> None:
        super().__init__(reason)
        self.requests = list(requests)

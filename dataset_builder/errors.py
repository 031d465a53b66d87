"""The ways in which asking a model goes wrong: for one attempt, for one record, and for the whole run."""

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
        requests: Hashes of the answered requests that led here, and of the line of a file that refuses one; a retry of the
            record asks them anew.
    """

    def __init__(self, reason: str, requests: Sequence[str] = ()) -> None:
        super().__init__(reason)
        self.requests = list(requests)


class Refused(Exception):
    """A server refuses a request as it is.

    Args:
        reason: Why, in our words.
        parameter: The parameter that it names, if it does, in lower case.
        complaint: All its words in lower case; they may quote the record or a key, so nobody sees them.
    """

    def __init__(self, reason: str, parameter: str, complaint: str) -> None:
        super().__init__(reason)
        self.parameter, self.complaint = parameter, complaint
        self.line = ""
        """Hash of the line that says so, if it came in a file."""


class NoAnswer(Exception):
    """An attempt brought no answer, and another one may.

    Args:
        reason: Why, in our words.
        wait: Seconds that the server asks to wait, if it does.
        sent: Whether the request may have reached a model, and so may have to be paid.
    """

    def __init__(self, reason: str, wait: float | None = None, sent: bool = False) -> None:
        super().__init__(reason)
        self.wait = wait
        self.sent = sent
        self.cost = 0.0
        """US dollars that are counted for it, since it may have been paid."""

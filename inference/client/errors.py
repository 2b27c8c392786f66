"""The client's closed set of errors, split by who is at fault. Each text says what to do.

A transport raises them as the cause of an exception that the SDKs know; the proxy turns them into answers. None of them
ever contains content or an API key.
"""

from adytum.attestation.core.errors import AttestationError


class ClientError(Exception):
    """Base of all errors that this package raises."""

    unopened = False
    """Whether it is certain that no backend opened the request, so that it may be sealed for another backend."""


class RequestRefused(ClientError):
    """This machine: the request cannot be sealed as it is, and nothing was sent. `status` is the proxy's answer."""

    def __init__(self, message: str, *, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class UpstreamUnreachable(ClientError):
    """The network or the backend's machine: no connection, or it ended before an answer began.

    `unopened`: there was no connection to send the request on.
    """

    def __init__(self, message: str, *, unopened: bool = False) -> None:
        super().__init__(message)
        self.unopened = unopened


class UpstreamRefused(ClientError):
    """The backend, or something before it, answered in the clear before it opened the request.

    `unopened`: the answer states it in the form that only backends use. A plain 503 does not prove it: a balancer also
    sends that for a backend that it lost after the request was opened.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int,
        problem_type: str = "about:blank",
        retry_after: int | None = None,
        unopened: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.problem_type = problem_type
        self.retry_after = retry_after
        """Seconds."""
        self.unopened = unopened


class NotVerified(ClientError):
    """The backend's evidence does not meet the policy, so nothing was sealed for it. The cause names the step."""

    def __init__(self, message: str, cause: AttestationError | None = None) -> None:
        super().__init__(message)
        self.__cause__ = cause


class NoUpstream(ClientError):
    """None of several upstreams can be used for the request, and nothing was sent. The text lists each one's reason."""


class ResponseCut(ClientError):
    """The answer ended before its authenticated end: what was received is not the whole answer."""


class ResponseForged(ClientError):
    """The answer was not sealed by the verified backend for this request, or it was changed on the way."""


class StaleDate(ClientError):
    """The backend needs another date in the request. The session now knows it: the request is sealed again, once."""

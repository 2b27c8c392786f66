"""The channel's closed set of errors, split by who is at fault.

`ChannelError` is the only exception type that leaves this package: whatever a peer sends, whatever the cryptography
library raises, arrives as one of these. The texts name what was wrong with the framing, never content or keys; the
gateway does not forward even those to a peer whose request is not open.
"""


class ChannelError(Exception):
    """Base of everything that this package raises."""


class MalformedMessage(ChannelError):
    """The peer's bytes do not follow the wire format."""


class TruncatedMessage(MalformedMessage):
    """The message ended before its authenticated end."""


class MessageTooLarge(ChannelError):
    """A part of the message exceeds a named limit (`Limits`)."""


class UnknownKey(ChannelError):
    """The key identifier or suite is none that this receiver holds: the sender should fetch the keys again."""


class OpenFailed(ChannelError):
    """A ciphertext did not authenticate: wrong key, or changed on the way."""


class ExchangeMisuse(ChannelError):
    """Our own code called an exchange out of order, or went on after an error."""

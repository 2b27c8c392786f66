"""The channel: HPKE, key configurations, binary HTTP, Oblivious HTTP, EHBP, padding. No IO, no clock, no logging.

Imports the standard library and `cryptography` only. `ChannelError` is the only exception type that leaves it.
"""

"""Transports for clients of httpx2 and httpx, and so for the OpenAI and Anthropic packages.

Each verifies a backend, then talks to it:

    transport = AdytumTransport(upstream="https://llm.example.org", policy=Policy.from_toml(path))
    client = openai.OpenAI(base_url="https://llm.example.org/v1", http_client=httpx2.Client(transport=transport))

`AdytumTransport` is safe for several threads; `AsyncAdytumTransport` belongs to one event loop. Both only take requests
for the upstream's own origin. Errors are raised as the exceptions that the SDKs know, of the library that the client is
of, with ours as the cause:

    RequestRefused       LocalProtocolError
    UpstreamUnreachable  as the inner transport raised it (ConnectError, ReadTimeout, ...)
    UpstreamRefused      RemoteProtocolError; 429 and 503 become answers of that status, which SDKs retry in due time
    NotVerified          ConnectError
    ResponseCut          ReadError
    ResponseForged       RemoteProtocolError
"""

from adytum.inference.client.transport._async import AsyncAdytumTransport
from adytum.inference.client.transport._sync import AdytumTransport

__all__ = ["AdytumTransport", "AsyncAdytumTransport"]

"""The client: transports for HTTP libraries and a local proxy. Each verifies a backend before it sends anything."""

from adytum.inference.client.transport import AdytumTransport, AsyncAdytumTransport

__all__ = ["AdytumTransport", "AsyncAdytumTransport"]

"""The local proxy: an OpenAI-compatible endpoint on this machine that verifies backends before it sends anything."""

from adytum.inference.client.proxy.run import CannotStart, run_proxy

__all__ = ["CannotStart", "run_proxy"]

"""Our own client's samples as the run file's requests."""

from adytum.benchmarks.load.load import Sample
from adytum.benchmarks.runfile.runfile import Request


def request(sample: Sample) -> Request:
    """Ends with the last event that has content, as in `vllm bench serve`; without events, with the answer's end."""
    first = sample.arrivals[0] if sample.arrivals else None
    last = sample.arrivals[-1] if sample.arrivals else sample.total
    return Request(
        sample.start, first, last, tuple(sample.gaps), sample.tokens, sample.prompt_tokens, error=sample.error
    )

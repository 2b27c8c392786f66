"""What operators see: counts and coarse times, for Prometheus, on a separate port on loopback.

The host reads this too, so nothing here is finer than what the network shows anyway: no text, no name that a client
chose, no exact length. Labels are from `LABELS`, and their values from the configuration and the code. Tokens are
counted in buckets, and times in a few wide ones.
"""

from collections.abc import Callable, Iterator, Mapping

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from adytum.inference.gateway.accounting.metering import rounded

LABELS = frozenset(("model", "caller", "route", "outcome", "kind", "code", "status", "state", "step"))
"""The only labels that a series may have."""
_SECONDS = (0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_GAPS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
Gauges = Callable[[], Mapping[str, list[tuple[dict[str, str], float]]]]
"""By metric: label values and the current number."""
GAUGES = {
    "adytum_requests_in_progress": "Sealed requests that are arriving or being answered.",
    "adytum_engine_requests": "Requests that a model's engine has.",
    "adytum_engine_running": "Requests that the engine works on, as it reports.",
    "adytum_engine_waiting": "Requests that wait in the engine's queue, as it reports.",
    "adytum_engine_kv_cache_used": "Share of the engine's KV cache that is in use, in steps of 0.05, as it reports.",
    "adytum_engine_restarts": "Starts of the engine after the first.",
    "adytum_model_state": "1 for the state that a model is in.",
    "adytum_step": "1 for the step of the backend's life.",
    "adytum_connections": "Open connections.",
    "adytum_connections_cut": "Connections that were cut for exceeding a limit, since the start.",
    "adytum_key_age_seconds": "Seconds since the announced keys were made.",
    "adytum_key_expires_seconds": "Seconds until the announced keys are answered for the last time.",
    "adytum_evidence_rounds": "Rounds of evidence that were collected, since the start.",
    "adytum_evidence_failures": "Rounds of evidence that failed, since the start.",
}


class Telemetry:
    """The metrics of one backend. `bucket`: tokens. `gauges`: returns the numbers that are looked up for each page."""

    def __init__(self, bucket: int, gauges: Gauges) -> None:
        self._bucket = bucket
        self.registry = CollectorRegistry()
        asked = "Requests that an engine was asked."
        self._requests = self._counter("adytum_requests", asked, "model", "route", "outcome")
        self._tokens = self._counter("adytum_tokens", "Tokens, rounded up per answer.", "model", "caller", "kind")
        self._refusals = self._counter("adytum_refusals", "Refusals by the gateway, inside the seal.", "code")
        self._unopened = self._counter("adytum_unopened", "Requests that were not opened.", "status")
        self._ttft = Histogram(
            "adytum_time_to_first_token_seconds",
            "From the opened request to its first event.",
            ("model",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._gap = Histogram(
            "adytum_inter_chunk_seconds",
            "Mean time between the events of an answer.",
            ("model",),
            buckets=_GAPS,
            registry=self.registry,
        )
        self.registry.register(_Gauges(gauges))
        ProcessCollector(registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        if not LABELS.issuperset(labels):
            raise ValueError(f"{name}: {labels} are not all in LABELS")
        return Counter(name, text, labels, registry=self.registry)

    def request(self, model: str, route: str, outcome: str) -> None:
        """Counts a request to an engine that has ended."""
        self._requests.labels(model, route, outcome).inc()

    def tokens(self, model: str, caller: str, prompt: int, cached: int, completion: int) -> None:
        """Counts the tokens of a request."""
        for kind, count in (("prompt", prompt), ("cached", cached), ("completion", completion)):
            self._tokens.labels(model, caller, kind).inc(rounded(count, self._bucket))

    def times(self, model: str, ttft: float, gap: float | None) -> None:
        """Records a streamed answer's times, in seconds. `gap`: the mean, if it had more than one event."""
        self._ttft.labels(model).observe(ttft)
        if gap is not None:
            self._gap.labels(model).observe(gap)

    def refused(self, code: str | None) -> None:
        """Counts an answer of the gateway's own, inside the seal."""
        self._refusals.labels(code or "none").inc()

    def unopened(self, status: int) -> None:
        """Counts an answer in the clear to a sealed request."""
        self._unopened.labels(str(status)).inc()

    def page(self) -> bytes:
        """All metrics, in Prometheus's text format."""
        return generate_latest(self.registry)


class _Gauges(Collector):
    """Numbers that other parts keep, looked up for each page."""

    def __init__(self, gauges: Gauges) -> None:
        self._gauges = gauges

    def describe(self) -> Iterator[Metric]:
        for name, text in GAUGES.items():
            yield GaugeMetricFamily(name, text)

    def collect(self) -> Iterator[Metric]:
        for name, found in self._gauges().items():
            labels = list(found[0][0]) if found else []
            if not LABELS.issuperset(labels):
                raise ValueError(f"{name}: {labels} are not all in LABELS")
            family = GaugeMetricFamily(name, GAUGES[name], labels=labels)
            for values, number in found:
                family.add_metric([values[label] for label in labels], number)
            yield family


class MetricsServer:
    """`GET /metrics` on loopback, and nothing else."""

    def __init__(self, telemetry: Telemetry, port: int) -> None:
        self._telemetry = telemetry
        self._port = port
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        """Raises `OSError` if the port is taken."""
        app = web.Application()
        app.router.add_get("/metrics", self._page)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self._port).start()

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _page(self, _request: web.Request) -> web.Response:
        return web.Response(body=self._telemetry.page(), headers={"Content-Type": CONTENT_TYPE_LATEST})

"""What is counted: by the gateway, and by each of its replicas under that one's name."""

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families


class GatewayMetrics:
    """A gateway's counters, in a registry of their own."""

    def __init__(self) -> None:
        own = self._registry = CollectorRegistry()
        self.requests = Counter(
            "kvweave_gateway_requests", "Requests, by path and status", ["path", "status"], registry=own
        )
        self.open = Gauge("kvweave_gateway_requests_open", "Requests that are being answered or wait", registry=own)
        self.up = Gauge("kvweave_gateway_replicas_up", "Replicas that answer", registry=own)
        self.decoders = Gauge(
            "kvweave_gateway_decoders_up", "Decoders that answer, of those that it started", registry=own
        )
        self.again = Counter("kvweave_gateway_again", "Requests that went on to another replica", registry=own)
        self.goes_on = Counter("kvweave_gateway_went_on", "Streams that another replica went on with", registry=own)
        self.restarts = Counter("kvweave_gateway_restarts", "Replicas that were started anew", registry=own)

    def text(self, replicas: Mapping[str, str]) -> bytes:
        """The exposition.

        Args:
            replicas: what each one tells, by its name.
        """
        return generate_latest(self._registry) + generate_latest(_Joined(replicas))


class _Joined(CollectorRegistry):
    """What several servers tell, told apart by a label."""

    def __init__(self, replicas: Mapping[str, str]) -> None:
        super().__init__()
        self._joined: dict[str, Metric] = {}
        for name, text in replicas.items():
            for family in text_string_to_metric_families(text):
                own = self._joined.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    own.samples.append(sample._replace(labels=dict(sample.labels) | {"replica": name}))

    def collect(self) -> Iterable[Metric]:
        return self._joined.values()

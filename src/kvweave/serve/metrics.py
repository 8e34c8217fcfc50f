"""What is counted, in Prometheus' form. Names and labels say nothing of what anybody asked."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """One server's counters, in a registry of their own."""

    def __init__(self) -> None:
        own = self.registry = CollectorRegistry()

        def counter(name: str, text: str) -> Counter:
            return Counter(f"kvweave_{name}", text, registry=own)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"kvweave_{name}", text, registry=own)

        def seconds(name: str, text: str) -> Histogram:
            return Histogram(f"kvweave_{name}_seconds", text, registry=own, buckets=_SECONDS)

        self.requests = Counter("kvweave_requests", "Requests, by path and status", ["path", "status"], registry=own)
        self.open = gauge("requests_open", "Requests that are being answered or wait")
        self.waiting = gauge("queue", "Requests that wait for the model")
        self.queue_seconds = seconds("queue", "From the queue's end to the model")
        self.prefill_seconds = seconds("prefill", "A prompt read and cut")
        self.first_seconds = seconds("first_token", "From asking to the first token")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts that were read")
        self.tokens = counter("tokens", "Tokens that were decoded; its rate is tokens a second")
        self.whole = counter("prompt_bytes", "Bytes of all keys and values of prompts")
        self.kept = counter("kept_bytes", "Bytes of them that were kept")
        self.together = gauge("rows_together", "Replies that share a forward pass")
        self.alone = gauge("rows_alone", "Replies that take a forward pass each")
        self.kv_bytes = gauge("kv_bytes", "Bytes of keys and values of replies that are decoded")
        self.again = counter("decoders_again", "Replies that went on to another of several decoders")
        self.contexts = gauge("contexts", "Contexts that are held")
        self.context_bytes = gauge("context_bytes", "Bytes of keys and values of contexts")

    def prompt(self, tokens: int, whole: int, seconds: float) -> None:
        """A prompt of so many tokens, `whole` bytes uncut, was read and cut."""
        self.prefill_seconds.observe(seconds)
        self.prompt_tokens.inc(tokens)
        self.whole.inc(whole)

    def text(self) -> bytes:
        """The exposition."""
        return generate_latest(self.registry)

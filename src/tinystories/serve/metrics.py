"""What GET /metrics reports, in Prometheus' text format; names follow llama.cpp's server."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

LATENCY_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)
TOKEN_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)


class Metrics:
    """The counters of one server, in a registry of its own. They may be changed from any thread."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"tinystories_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"tinystories_{name}", text, buckets=buckets, registry=registry)

        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts, END included")
        self.cached_tokens = counter("prompt_tokens_cached", "Tokens of prompts that a slot already held")
        self.predicted_tokens = counter("tokens_predicted", "Tokens generated")
        self.prefill_seconds = counter("prompt_seconds", "Time spent on prompts")
        self.decode_seconds = counter("tokens_predicted_seconds", "Time spent on decode steps")
        self.decode_steps = counter("decode", "Decode steps")
        self.decoded_slots = counter("decode_slots", "Slots in decode steps, summed up")
        self.requests = counter("requests", "HTTP requests by path and status", "path", "status")
        self.refused = counter("refused", "Requests refused because the queue was full")
        self.endings = counter("endings", "Sequences by the reason of their end", "reason")
        self.queue_seconds = histogram("queue_seconds", "From the request to a slot", LATENCY_BUCKETS)
        self.first_token_seconds = histogram("time_to_first_token_seconds", "From the request to text", LATENCY_BUCKETS)
        self.token_seconds = histogram("time_per_token_seconds", "Mean of a sequence", TOKEN_BUCKETS)

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Report the value of a function."""
        Gauge(f"tinystories_{name}", text, registry=self.registry).set_function(value)

    def as_text(self) -> bytes:
        """Return all metrics."""
        return generate_latest(self.registry)

"""What differs between the releases of vLLM, as far as a manager can notice."""

from __future__ import annotations

from dataclasses import dataclass

OLDEST, NEWEST = (0, 11), (0, 33)


@dataclass(frozen=True, slots=True)
class Profile:
    """One release's habits, asked for by name: nowhere else are numbers compared."""

    text: str
    minor: tuple[int, int]

    @property
    def json_bodies(self) -> bool:
        """/sleep and /wake_up answer JSON and validate their parameters (else: empty 200)."""
        return self.minor >= (0, 32)

    @property
    def pauses_scheduler(self) -> bool:
        """Sleep has a mode and requests to a sleeper queue (else they kill the engine)."""
        return self.minor >= (0, 17)

    @property
    def partial_wake_runs(self) -> bool:
        """A wake of the weights alone lets requests run, into unmapped memory (vllm#44395)."""
        return (0, 17) <= self.minor < (0, 24)

    @property
    def half_awake_sleeps(self) -> bool:
        """One whose weights alone are awake can be put back to sleep: the executor keeps tags
        (0.31; seen on 0.32). Before it has one flag, and does nothing."""
        return self.minor >= (0, 31)

    @property
    def wake_retryable(self) -> bool:
        return self.minor >= (0, 29)

    @property
    def sleep_gauge(self) -> bool:
        return self.minor >= (0, 12)

    @property
    def old_cache_gauge(self) -> bool:
        return self.minor < (0, 12)

    @property
    def has_pause(self) -> bool:
        return self.minor >= (0, 12)

    @property
    def pause_needs_dev_mode(self) -> bool:
        return self.minor >= (0, 16)

    @property
    def releases_kv(self) -> bool:
        return self.minor >= (0, 31)

    @property
    def catches_sigterm_in_start(self) -> bool:
        """A handler exists that the handshake swallows once (zmq_socket_ctx, vllm#52299)."""
        return self.minor >= (0, 22)

    @property
    def shutdown_timeout_flag(self) -> bool:
        return self.minor >= (0, 20)

    @property
    def queue_limit_flag(self) -> bool:
        return self.minor >= (0, 29)

    @property
    def guarded_prefixes(self) -> tuple[str, ...]:
        """Paths that the API key protects; all others are open."""
        if self.minor >= (0, 27):
            return ("/v1", "/v2", "/inference", "/cohere")
        return ("/v1", "/v2", "/inference") if self.minor >= (0, 22) else ("/v1",)

    @property
    def utilisation(self) -> float:
        """Default of --gpu-memory-utilization (0.90 in 0.11, 0.92 in 0.32; the step is assumed)."""
        return 0.92 if self.minor >= (0, 24) else 0.9


def profile(text: str) -> Profile:
    """Raises ValueError outside 0.11 to 0.33."""
    numbers = text.split(".")
    try:
        minor = (int(numbers[0]), int(numbers[1]))
    except (ValueError, IndexError):
        raise ValueError(f"version {text!r} is not of the form 0.32.0") from None
    if not OLDEST <= minor <= NEWEST:
        raise ValueError(f"version {text} is not simulated, only 0.11 to 0.33")
    return Profile(text, minor)

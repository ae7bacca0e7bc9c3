"""Retention policies as words: "last=3", "every=1000", "best=loss" (pure)."""

from ftkit.checkpoint.persist.retention import KeepBest, KeepEvery, KeepLast, Policy
from ftkit.core.errors import UsageError


def policy(text: str) -> Policy:
    """Read one policy.

    Args:
      text: "last=N", the newest N; "every=N", steps that N divides; "best=METRIC" or
        "best=METRIC:N", the N with the least of a metric, or with ":max" at the end the most.

    Raises:
      UsageError: it is none of these.
    """
    kind, _, rest = text.partition("=")
    try:
        match kind, rest.split(":"):
            case "last", [count]:
                return KeepLast(int(count))
            case "every", [steps]:
                return KeepEvery(int(steps))
            case "best", [metric, *more] if metric:
                largest = more[-1:] == ["max"]
                numbers = more[:-1] if largest else more
                if len(numbers) <= 1:
                    best = int(numbers[0]) if numbers else 1
                    return KeepBest(metric=metric, count=best, largest=largest)
    except ValueError as error:
        raise UsageError(f"{text!r} is no policy of retention: {error}") from error
    raise UsageError(
        f"{text!r} is no policy of retention: say last=N, every=N, best=METRIC[:N][:max]"
    )

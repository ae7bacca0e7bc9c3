"""Retention policies as words: "last:3,every:1000,best:loss" (pure)."""

from ftkit.checkpoint.persist.retention import KeepBest, KeepEvery, KeepLast, Policy
from ftkit.core.errors import UsageError


def policies(text: str) -> list[Policy]:
    """Read policies, which add up; none keeps all.

    Args:
      text: empty, or several with commas between them: "last:N", the newest N; "every:N", steps that N
        divides; "best:METRIC" or "best:METRIC:N", the N with the least of a metric, or with
        ":max" at the end the most.

    Raises:
      UsageError: one is none of these.
    """
    return [_policy(word) for word in text.split(",")] if text else []


def _policy(text: str) -> Policy:
    kind, *words = text.split(":")
    try:
        match kind, words:
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
        f"{text!r} is no policy of retention: say last:N, every:N or best:METRIC[:N][:max]"
    )

"""Governor: when how many bytes that are not training's may travel. Pure: it is handed the time.

Snapshots, parity and checkpoints are cut into pieces. A piece goes when the idle window that we
are in has room for it (`idle_windows`), within the caps of link and memory bandwidth; where none
comes that is long enough, a few go all the same, but never for more than `max_slowdown` of the time. So
what does not fit takes longer, and training does not; `forecast` says how long.

Pacing needs to know that a piece has *arrived*: TCP takes what fits its buffers at once, and a
sender that counts that as sent is blind (on 1 Gbit/s: 3.6 % of slow-down, against 1.2 % with an
acknowledgement for every piece, and few on their way).
"""

import math
from dataclasses import dataclass

from ftkit.core.idle_windows import IdleWindows

#: A piece of which nothing was heard by then holds nobody back: its sender has died.
LOST_S = 5.0

#: The slow-down of so many seconds is saved up, and more only for a piece that waits for it.
SAVED_S = 1.0

#: What fits a window that was there lately waits so long for the next one.
SOON_S = 1.0

#: The longest pause while training sends; it is looked up again when a transfer may have ended.
REST_S = 0.05

#: A new measurement of the rate counts like its bytes beside so many, or more. One that says that the
#: link is slower by more than this factor is believed bit by bit: a piece may have waited for a
#: process that did not run.
_OLD_BYTES, _NEWS_MIN, _SLOWER_MAX = 3 << 20, 0.1, 8.0

#: A piece takes at most this part of the room that a window has: they get smaller towards its end,
#: which is not known exactly.
_PART = 0.25

#: A byte that is sent is read, and written to a buffer of the kernel's.
TOUCHES = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficLimits:
    """What other traffic may cost training."""

    max_slowdown: float = 0.01
    """Outside of idle windows it takes at most this part of the time."""
    rate_max: float | None = None
    """Bytes a second, on average over a second; None for what the link gives."""
    memory_rate_max: float | None = None
    """Bytes a second read from and written to memory, on average over a second; None for no cap."""
    piece_bytes_min: int = 64 << 10
    """Smaller pieces cost more than they carry."""
    piece_bytes_max: int = 4 << 20
    """Whatever comes up meanwhile waits for one."""
    unacknowledged_max: int = 4
    """Pieces on their way at once."""
    rate_guess: float = 100e6
    """Bytes a second, until one has been measured."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_slowdown < 1:
            raise ValueError(f"max_slowdown must be in [0, 1), got {self.max_slowdown}")
        if not 0 < self.piece_bytes_min <= self.piece_bytes_max:
            raise ValueError(
                f"pieces of {self.piece_bytes_min} to {self.piece_bytes_max} bytes cannot be cut"
            )
        rates = self.rate_guess, self.rate_max, self.memory_rate_max
        if not all(rate is None or (rate > 0 and math.isfinite(rate)) for rate in rates):
            raise ValueError(
                "rates must be positive and finite, or None for no cap, got rate_guess, rate_max, "
                f"memory_rate_max = {rates}"
            )
        if self.unacknowledged_max < 1:
            raise ValueError("at least one piece must be on its way at once")


@dataclass(frozen=True, slots=True, eq=False)
class Grant:
    """So many bytes may go now. Say with it what became of them: each is one of its own."""

    bytes: int
    intrudes: bool = False
    """No idle window has room for them: they are part of the slow-down that is allowed."""


@dataclass(frozen=True, slots=True)
class Pause:
    """Nothing may go before so many seconds have passed, or something has changed."""

    seconds: float
    reason: str


@dataclass(frozen=True, slots=True)
class Forecast:
    """What sending so many bytes will take."""

    bytes: int
    seconds: float
    within_s: float | None
    """The time there is for it, if that was said."""

    @property
    def fits(self) -> bool:
        return self.within_s is None or self.seconds <= self.within_s

    def __str__(self) -> str:
        """One sentence for people."""
        said = f"{self.bytes} bytes take about {self.seconds:.1f} s of idle windows"
        if self.within_s is None:
            return said
        if self.fits:
            return f"{said}, and there are {self.within_s:.1f} s for them"
        return f"{said} and do not fit {self.within_s:.1f} s: they stretch over more steps"


class _Cap:
    """Bytes a second, on average over a second: what is not used is saved up so long."""

    def __init__(self, rate: float, now: float, name: str) -> None:
        self.rate, self._name = rate, name
        self._budget, self._at = rate, now

    def pause(self, now: float, least: float, look_s: float) -> Pause | None:
        """For how long `least` bytes must wait, if they must."""
        self._budget = min(self.rate, self._budget + (now - self._at) * self.rate)
        self._at = now
        # A piece larger than a second's bytes waits for a full budget, and overdraws it.
        missing = min(least, self.rate) - self._budget
        return Pause(max(look_s, missing / self.rate), self._name) if missing > 0 else None

    @property
    def left(self) -> float:
        return self._budget

    def spend(self, nbytes: float) -> None:
        self._budget -= nbytes


class Governor:
    """See the module. One thread's object."""

    def __init__(
        self, limits: TrafficLimits, windows: IdleWindows, now: float, *, look_s: float = 0.002
    ) -> None:
        """Govern from now on.

        Args:
          limits: what is allowed.
          windows: told elsewhere of training's transfers.
          now: seconds.
          look_s: the shortest pause; how exactly the end of a transfer is noticed.
        """
        self.limits, self.windows = limits, windows
        self._look_s = look_s
        self._allowed_s, self._allowed_at = 0.0, now
        """Seconds outside of idle windows that may be taken now."""
        self._saving_s = 0.0
        """What a piece that was refused needs of them."""
        self._wanted_since: float | None = None
        """Since when something has been wanted, and nothing granted."""
        self._rate = limits.rate_guess
        self._link = _Cap(limits.rate_max, now, "the cap of the link") if limits.rate_max else None
        memory = limits.memory_rate_max
        self._memory = _Cap(memory, now, "the cap of memory bandwidth") if memory else None
        self._flying: dict[Grant, float] = {}
        """What is on its way, and when it was let go; in that order."""
        self.granted = 0
        """Bytes so far."""
        self.intruding = 0
        """Of these, bytes outside of idle windows."""

    @property
    def rate(self) -> float:
        """Bytes a second that pieces travelled at lately."""
        return self._rate

    def decide(
        self, now: float, wanted: int, *, whole: bool = False, touches: float = TOUCHES
    ) -> Grant | Pause:
        """Whether some of `wanted` bytes, at least one, may go now. A grant counts as gone.

        What was granted is on its way until `arrived` or `given_up`. With `whole`, all of them or
        none. `touches`: how often each is read or written in memory, for the cap of that.
        """
        limits = self.limits
        self._flying = {g: at for g, at in self._flying.items() if now - at <= LOST_S}
        # What is not used is gone, or an idle hour would pay for half a minute at a stretch.
        most_s = max(limits.max_slowdown * SAVED_S, self._saving_s)
        more_s = limits.max_slowdown * (now - self._allowed_at)
        self._allowed_s, self._allowed_at = min(most_s, self._allowed_s + more_s), now
        if len(self._flying) >= limits.unacknowledged_max:
            return Pause(self._look_s, "pieces on their way are not acknowledged")
        least = wanted if whole else min(wanted, limits.piece_bytes_min)
        most = wanted if whole else min(wanted, limits.piece_bytes_max)
        for cap, times in self._caps(touches):
            if pause := cap.pause(now, least * times, self._look_s):
                return pause
            most = max(least, min(most, int(cap.left / times)))
        # What is on its way uses the same window.
        room = self.windows.left(now) * self._rate - sum(g.bytes for g in self._flying)
        if room >= least:
            part = room if whole else max(least, room * _PART)
            return self._grant(now, Grant(int(min(most, part))), touches)
        needs_s = least / self._rate
        # Each node would take what is allowed, and each delays all: not for what soon has a window.
        if self._wanted_since is None:
            self._wanted_since = now
        soon = self.windows.had(needs_s) and now - self._wanted_since < SOON_S
        if self._allowed_s >= needs_s and not soon:
            self._allowed_s -= needs_s
            if needs_s >= self._saving_s:
                self._saving_s = 0.0
            return self._grant(now, Grant(least, intrudes=True), touches)
        self._saving_s = max(self._saving_s, needs_s)
        if not self.windows.busy:
            return Pause(self._look_s, "the window is too short")
        rest_s = min(self.windows.busy_for(now), REST_S)
        return Pause(max(self._look_s, rest_s), "training sends")

    def arrived(self, *grants: Grant, seconds: float) -> None:
        """These pieces are where they were to go, and took so many seconds together.

        One that was taken for lost, or was granted by somebody else, still tells the rate.
        """
        for grant in grants:
            self.given_up(grant)
        nbytes = sum(grant.bytes for grant in grants)
        if nbytes and seconds > 0:
            # Not the mean of rates: of two that are taken in late one after the other, the second
            # seems to come at once.
            slowness = 1 / self._rate
            news = min(seconds / nbytes, _SLOWER_MAX * slowness) - slowness
            self._rate = 1 / (slowness + max(_NEWS_MIN, nbytes / (nbytes + _OLD_BYTES)) * news)

    def given_up(self, grant: Grant) -> None:
        """Nobody will say when this piece arrives; it counts as gone, and holds nobody back."""
        self._flying.pop(grant, None)

    def forecast(
        self, nbytes: int, *, within_s: float | None = None, touches: float = TOUCHES
    ) -> Forecast:
        """How long `nbytes` will take, from the windows of the last steps."""
        limits = self.limits
        least_s = limits.piece_bytes_min / self._rate
        share = self.windows.idle_share(least_s) + limits.max_slowdown
        rate = self._rate * min(1.0, share)
        for cap, times in self._caps(touches):
            rate = min(rate, cap.rate / times)
        return Forecast(nbytes, nbytes / rate if rate else float("inf"), within_s)

    def _caps(self, touches: float) -> list[tuple[_Cap, float]]:
        """The caps that there are, and how much of each a byte takes."""
        both = (self._link, 1.0), (self._memory, touches)
        return [(cap, times) for cap, times in both if cap is not None]

    def _grant(self, now: float, grant: Grant, touches: float) -> Grant:
        self._flying[grant], self._wanted_since = now, None
        self.granted += grant.bytes
        self.intruding += grant.bytes if grant.intrudes else 0
        for cap, times in self._caps(touches):
            cap.spend(grant.bytes * times)
        return grant

"""What ftkit raises.

A fault that ftkit is built to survive is a value (`Verdict`), not an exception; wrong
arguments are `ValueError` where they come in. What remains::

    FtkitError
    ├── JobFault                 the job, not the caller, is at fault; survivable
    │   ├── GenerationAborted    a collective ended because its generation is over
    │   └── StepRolledBack       this step was not committed and will be played again
    ├── JobStopped               the job ends, with the reason
    ├── UsageError               the script or command line asks for something impossible
    │   ├── OutsideStep          an optimizer stepped outside `with step:`
    │   ├── RootInUse            another job writes checkpoints there
    │   ├── Refused              a collective's arguments do not fit it; nothing was sent
    │   ├── StateChanged         state appeared, moved or changed shape after `protect`
    │   ├── NotDeterministic     the data differed between two readings of the same step
    │   └── NotFinite            gradients are NaN or infinite, and were so again
    ├── CapacityError            not enough memory, shared memory or disk; says how much
    ├── StoreError               a store of checkpoints failed or was too slow
    ├── IntegrityError           bytes are not what was written; treated as lost
    ├── StateRefused             ranks differ in what they should share, and none can be chosen
    └── WireError                a connection broke or spoke wrongly
        ├── Unreachable          members of a world to whom no link could be made
        ├── AuthenticationError  the peer does not hold the job's secret
        └── ProtocolError        a frame or message outside the schema

`JobFault` inside `with step:` is swallowed there and the step is played again, unless the
optimizer has stepped already: then the step counts, and the rank ends rather than differ.
"""

from ftkit.core.ids import MemberId


class FtkitError(Exception):
    """Root of everything ftkit raises on purpose."""


class JobFault(FtkitError):
    """The job failed around this rank; inside a step it is survived."""


class GenerationAborted(JobFault, RuntimeError):
    """A collective ended early because its generation is over. Also what gloo raises then."""


class StepRolledBack(JobFault):
    """The step was not committed anywhere; the same step comes round again."""


class JobStopped(FtkitError):
    """The job is over; the message says why."""


class UsageError(FtkitError):
    """The caller asked for something that cannot work; the message says what to do."""


class OutsideStep(UsageError):
    """A protected optimizer was stepped outside `with step:`."""


class RootInUse(UsageError):
    """Another job holds the lease of this root of checkpoints; the message says whose it is."""


class Refused(UsageError, RuntimeError):
    """The arguments do not fit the collective; nothing was sent. Also what gloo raises then."""


class StateChanged(UsageError):
    """Protected state appeared, moved or changed shape after `protect`."""


class NotDeterministic(UsageError):
    """The same step read different data twice."""


class NotFinite(UsageError):
    """A step's gradients are not finite, twice from the same samples; the message says whose."""


class CapacityError(FtkitError):
    """Not enough room; the message says how much is needed and how much there is."""


class AllPinned(CapacityError):
    """Every slab of an arena that could be spared is being read by a tier below."""


class StoreError(FtkitError):
    """A store of checkpoints failed or was too slow; nothing was half committed."""


class IntegrityError(FtkitError):
    """Stored bytes do not match their checksum."""


class StateRefused(FtkitError):
    """What ranks should hold alike differs, and nothing says who is right; nothing was changed."""


class WireError(FtkitError):
    """A connection broke or its peer misbehaved."""


class Unreachable(WireError):
    """No link could be made to `members`, which are of one world with this one."""

    def __init__(self, message: str, members: frozenset[MemberId]) -> None:
        super().__init__(message)
        self.members = members


class AuthenticationError(WireError):
    """The peer could not prove that it holds the job's secret."""


class ProtocolError(WireError):
    """The peer sent something outside the schema."""

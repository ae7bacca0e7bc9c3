"""Exit codes with a meaning, of ranks and of `ftkit run`; others are the script's own."""

#: The script or the command line asks for what cannot work: a retry would fail alike.
USAGE = 64
#: No process could be told to be at fault.
UNRECOVERABLE = 70
#: A rank ended because its agent was gone.
AGENT_GONE = 71
#: A rank ended because the job did.
STOPPED = 72
#: `ftkit run` was interrupted (128 + SIGINT).
INTERRUPTED = 130

"""Drill programmes: chosen faults, done to a job in production at random moments, with guard rails.

::

    schedule   when                        pure
    job_state  how the job stands          pure, from what agents answer
    targets    whom                        pure
    costs      what it may cost            pure, from the history
    guards     whether                     pure
    machine    what next                   pure: state and what was seen in, state and command out
    measure    what came of it             pure, from the job's events
    record     one line of the history
    certificate, certificate_view          what was survived, from histories
    remote     asks and strikes, by the agents
    driver     carries out what the machine says
    command    the command line
"""

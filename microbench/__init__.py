"""Real kernels on the user's GPU, timed beside their own quantities and bounds.

`case` names what is measured; one module per family of kernels (named like the kernels they validate) prepares it,
checks it and lists its cases; `clock` times it; `run` writes one immutable file per run; `fit` turns runs into a profile
of constants.  This package imports the simulator, never the reverse.
"""

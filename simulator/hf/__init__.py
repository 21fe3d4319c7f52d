"""config.json -> ModelSpec: the only package that knows Hugging Face's keys.

A config is data: it is read, never run.  What is not recognised is named in a warning with its effect bounded;
only what cannot be read at all is refused.
"""

from simulator.hf.catalog import catalog, find, load_model
from simulator.hf.config import read_config, with_formats

__all__ = ["catalog", "find", "load_model", "read_config", "with_formats"]

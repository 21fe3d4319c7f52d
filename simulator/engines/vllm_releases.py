"""What earlier releases of vLLM did otherwise: `[[earlier]]` of data/engines/vllm.toml, each rule read in the last wheel that had it and in the next.

A log is of one release.  The same memory and model print other sizes under another: DeepSeek-V4-Flash's block was 1,051,776 bytes until 0.22
and is 1,002,240 since 0.27, a window held one step in flight until 0.25 and holds all of them since.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True, slots=True)
class Rules:
    """What differs between releases; the defaults are the newest's.

    `state_copies`: blocks of a recurrent state of one request, where prefixes are cached.
    `in_flight`: a window is kept beside the tokens of "one" step or of "all" steps that run at once.
    `v4_block`: bytes of DeepSeek-V4's pool block; "tuples": one page of every size, as often as the most layers of one size in any group; "sizes":
    every size as often as the most layers of it in any group; "group": the widest group.  In the first two a page is padded to the next size of
    the groups that keep every token.
    `weighed`: "Maximum concurrency" counts a group's blocks by its "bytes" in those of the first group, or as "blocks".
    `printed`: "GPU KV cache size" is blocks over "groups" times tokens of a block, or maximum concurrency times "length".
    """

    state_copies: int
    in_flight: str = "all"
    v4_block: str = "group"
    weighed: str = "blocks"
    printed: str = "length"


def number(release: str) -> tuple[int, int]:
    """A release as (major, minor).

    >>> number("0.22.1") < number("0.9")
    False
    """
    found = re.match(r"(\d+)\.(\d+)", release)
    if found is None:
        message = f"release {release!r} of vLLM is not a version; write it as 0.22"
        raise ValueError(message)
    return int(found[1]), int(found[2])


def rules_of(facts: Mapping[str, Any], release: str | None) -> Rules:
    """The rules of a release, None for the newest: of each rule the first entry whose last release is not before it.

    Errors: ValueError for a release that is newer than the one read, or none.
    """
    newest = Rules(state_copies=int(facts["memory"]["state_copies"]["value"]))
    if release is None:
        return newest
    if number(release) > number(facts["version"]):
        message = f"release {release} of vLLM: its rules were read up to {facts['version']}; leave the release out"
        raise ValueError(message)
    found = {f.name: getattr(newest, f.name) for f in fields(Rules)}
    for entry in sorted(facts["earlier"], key=lambda e: number(e["until"]), reverse=True):
        if number(release) <= number(entry["until"]):
            found[entry["rule"]] = entry["value"]
    return Rules(**found)

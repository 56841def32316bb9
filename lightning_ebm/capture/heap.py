"""What a step lets go of is not given back to the system and asked for anew a step later."""

import functools

import torch

_LARGEST = 31 << 20
"""Bytes; glibc takes no note of blocks from 32 MiB on."""


@functools.cache
def keep_heap() -> None:
    """Once in a process: lets glibc keep up to 62 MiB of free memory at the top of its heap, instead of a few.

    It gives that back as soon as it is more than twice the largest block that was ever freed. All states of a step are
    let go of together, and are more than twice the largest of them; every page that is asked for anew is then filled
    with zeros by the system, in a step of equilibrium propagation for a third of its time. So one large block, which
    is never touched, is freed here, as most programs do some time. Other allocators do not mind.
    """
    torch.empty(_LARGEST, dtype=torch.uint8, device="cpu")

"""Parser for sizes such as 5GB."""

import re

from moe.errors import ConfigError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_size(text: str, field: str, *, least: int = 1, allowed: str = "a size such as 5GB or 4GiB") -> int:
    """Convert "5GB" to 5 * 10^9 and "5GiB" to 5 * 2^30; raises ConfigError about `field` below `least` bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if found is None or (found[3] and not found[2]):
        raise ConfigError(field, text, allowed)
    unit = (_BINARY if found[3] else _UNITS)[found[2].upper()]
    size = int(float(found[1]) * unit)
    if size < least:
        raise ConfigError(field, text, "more than 0" if least == 1 else f"at least {least} bytes, such as 5GB")
    return size

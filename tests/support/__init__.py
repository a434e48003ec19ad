"""Cases, bounds and helpers that tests share."""

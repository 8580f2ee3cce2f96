"""The further ranks, which the core starts as `python -m psyche.sidecar`."""

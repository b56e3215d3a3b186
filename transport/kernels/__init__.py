"""Compiled loops over pages and bitmaps: pure functions on arrays, without the GIL.

Loops are declared by `declare`, compiled by numba on a machine's first run (some ten seconds), and
found in its on-disk cache from then on (`cache`, `load`). `bitmap` and `digests` are for everyone;
`pages` and `unpack` are behind `transport.sending.encoder` and `transport.receiving.decoder`.
"""

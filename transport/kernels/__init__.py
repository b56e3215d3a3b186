"""Compiled loops over pages and bitmaps: pure functions on arrays, without the GIL.

The only room that imports numba. `compiled.warm_up` loads every kernel from numba's cache, or
compiles it on a machine's first run (some seconds). `bitmap` and `digests` are for everyone;
`pages` is behind `transport.encoder` and `transport.decoder`.
"""

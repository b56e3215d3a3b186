"""Compiled loops over pages and bitmaps: pure functions on arrays, without the GIL.

Loops are declared by `compiled` and compiled by numba on a machine's first run (some seconds), in a
process of its own (`__main__`, `compiler`, `linker`). Others load what came of it (`cache`,
`image`), so numba and LLVM are imported nowhere else. `bitmap` and `digests` are for everyone;
`pages` and `unpack` are behind `transport.sending.encoder` and `transport.receiving.decoder`.
"""

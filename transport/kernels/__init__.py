"""Compiled loops over pages and bitmaps: pure functions on arrays, without the GIL."""

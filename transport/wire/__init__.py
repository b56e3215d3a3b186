"""Formats on the wire: frames of pages, records, codecs. Bytes in, values out; no I/O."""

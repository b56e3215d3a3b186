"""The receiver's work: parsing, decoding and writing of pages, and the mapping of memory."""

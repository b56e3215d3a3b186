"""QEMU's migration stream, opened: the VMM tracks what the guest writes, and we move the pages.

    form       the stream's form, in numbers
    sections   header, sections, commands          Outline
    kernel     records of pages, compiled          follow_records
    reader     bytes in, events out                StreamReader
    mapping    which file a RAM block is, proven   MappingProof
    opened     the reader and the proof together   OpenedStream

Owns the bytes and what they say. Not owned: the sockets, how fast the VMM is read, who moves the
announced pages, and when the tail may be passed on (not before all of them are in place).
"""

"""The form of QEMU's migration stream, as far as it is read here: its numbers and their bounds.

All integers are big-endian. A stream, from its first byte to the tail:

    "QEVM" u32 version
    07 u32 n, name                                configuration: the machine type's name
       05 u8 n, name, u32 version, content        subsections of it
    08 u16 command, u16 n, data                   anywhere between sections
    01 u32 id, u8 n, name, u32 instance, u32 version, content, footer     section start
    02 u32 id, content, footer                    section part
    03 u32 id, content, footer                    section end
    04 ...                                        the tail: full sections, end, description

    footer   7e u32 id
    content  of `ram`, the only section whose content is followed: records up to one with 010

A record is a u64 whose low 12 bits are flags and whose other bits are an offset in a RAM block:

    004   the offset is the length of all RAM; u8 n, name, u64 length for each block up to it
    008   a page: [u8 n, name of its block] unless 020, then 4096 bytes
    002   a page of zeros: [u8 n, name] unless 020, then a byte 00
    010   the end of this section's records

020 means the block of the record before, also of one in a section before. Source: QEMU's
docs/devel/migration and its sources, checked against streams of QEMU 11.1.
"""

MAGIC, VERSION = 0x5145564D, 3
MULTIFD_MAGIC = 0x11223344

END_OF_STREAM, SECTION_START, SECTION_PART, SECTION_END, SECTION_FULL = range(5)
SUBSECTION, DESCRIPTION, CONFIGURATION, COMMAND = range(5, 9)
FOOTER = 0x7E

RAM_SECTION, RAM_VERSION = "ram", 4

COMMAND_BYTES = {1: 0, 2: 4, 11: 0}
"""Length of the commands that may pass: open return path, ping, switchover start."""
SUBSECTION_BYTES = {"configuration/uuid": 16}
"""Length of the configuration's subsections that change nothing about the format."""

ZERO, BLOCKS, PAGE, END_OF_RECORDS, CONTINUE = 0x02, 0x04, 0x08, 0x10, 0x20
OTHER_FLAGS = {
    0x40: "an XBZRLE delta",
    0x80: "an RDMA hook",
    0x100: "a compressed page",
    0x200: "a flush of multifd channels, which hold the pages",
}
"""Flags of records that QEMU is known to write and that are not followed."""

PAGE_BYTES = 4096
MAX_NAME_BYTES = 255
MAX_BLOCKS = 512
"""A guest with 64 emulated devices has below 100."""
MAX_BLOCK_PAGES = 1 << 32
"""16 TiB, as `sync.memory` has it."""

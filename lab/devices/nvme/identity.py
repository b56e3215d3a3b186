"""What an NVMe controller says of itself and of its namespaces.

Owns the data structures of Identify. Sources: NVM Express Base Specification 1.4, figures 247
(controller) and 245 (namespace), section 5.15.2.3 (descriptors).
"""

import hashlib
import struct

VENDOR_ID = 0x1B36
DEVICE_ID = 0x0010
VERSION = 0x0001_0400
MODEL = "vfio-ferry NVMe"
FIRMWARE = "1"
MAX_EVENTS = 4
MAX_TRANSFER_PAGES_LOG2 = 5
BLOCK_BITS = 9
STRUCTURE_BYTES = 4096


def controller(serial: str, controller_id: int, n_namespaces: int) -> bytes:
    """Identify Controller."""
    data = bytearray(STRUCTURE_BYTES)
    struct.pack_into("<HH", data, 0, VENDOR_ID, VENDOR_ID)
    data[4:24] = serial.encode().ljust(20)
    data[24:64] = MODEL.encode().ljust(40)
    data[64:72] = FIRMWARE.encode().ljust(8)
    data[72] = 6
    data[77] = MAX_TRANSFER_PAGES_LOG2
    struct.pack_into("<HI", data, 78, controller_id, VERSION)
    data[111] = 1
    data[258:260] = bytes([3, MAX_EVENTS - 1])
    data[260] = 0b11
    struct.pack_into("<HH", data, 266, 343, 373)
    data[512:514] = bytes([0x66, 0x44])
    struct.pack_into("<I", data, 516, n_namespaces)
    data[525] = 1
    name = f"nqn.2024-01.io.vfio-ferry:{serial}".encode()
    data[768 : 768 + len(name)] = name
    return bytes(data)


def namespace(serial: str, nsid: int, n_blocks: int) -> bytes:
    """Identify Namespace: blocks of 512 bytes without metadata."""
    data = bytearray(STRUCTURE_BYTES)
    struct.pack_into("<QQQ", data, 0, n_blocks, n_blocks, n_blocks)
    data[104:120] = unique_id(serial, nsid)
    struct.pack_into("<I", data, 128, BLOCK_BITS << 16)
    return bytes(data)


def descriptors(serial: str, nsid: int) -> bytes:
    """The namespace's identification descriptors: its NGUID."""
    return (struct.pack("<BBxx", 2, 16) + unique_id(serial, nsid)).ljust(STRUCTURE_BYTES, b"\0")


def unique_id(serial: str, nsid: int) -> bytes:
    """The same at every controller with this serial."""
    return hashlib.sha256(f"{serial} {nsid}".encode()).digest()[:16]

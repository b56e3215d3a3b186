"""Every message of the vfio-user protocol, sans-IO: import from here.

Each message is a frozen dataclass: `pack()` returns the body, `unpack(body)` reads one and raises
`ProtocolError` for anything malformed. `encode_message` puts the header in front. Values that do
not fit their field are the caller's mistake (struct.error).

=========================  ==========================  =============================
command                    request                     reply
=========================  ==========================  =============================
VERSION                    `Version`                   `Version`
DMA_MAP                    `DmaMap`                    empty
DMA_UNMAP                  `DmaUnmap`                  `DmaUnmap`
DEVICE_GET_INFO            `DeviceInfoRequest`         `DeviceInfo`
DEVICE_GET_REGION_INFO     `RegionInfoRequest`         `RegionInfo`
DEVICE_GET_REGION_IO_FDS   `RegionIoFdsRequest`        `RegionIoFds`
DEVICE_GET_IRQ_INFO        `IrqInfoRequest`            `IrqInfo`
DEVICE_SET_IRQS            `SetIrqs`                   empty
REGION_READ                `RegionAccess`              `RegionAccess` with data
REGION_WRITE               `RegionAccess` with data    `RegionAccess`
DEVICE_RESET               empty                       empty
REGION_WRITE_MULTI         `WriteMulti`                `WriteMultiReply`
DEVICE_FEATURE             `Feature`                   `Feature`
MIG_DATA_READ              `MigData`                   `MigData` with data
MIG_DATA_WRITE             `MigData` with data         empty
=========================  ==========================  =============================

Data of `Feature` by its index: MIGRATION `MigrationFlags`, MIG_DEVICE_STATE `MigState`,
DMA_LOGGING_START and _STOP `LoggingControl`, DMA_LOGGING_REPORT `LoggingReport`, MIG_DATA_SIZE
`DataSize`. DMA_READ and DMA_WRITE are `sync.gateway.datapath.dma_service`'s.

Source: QEMU, docs/interop/vfio-user.rst.
"""

from sync.vfio_user.access import (
    DmaFlags,
    DmaMap,
    DmaUnmap,
    RegionAccess,
    UnmapFlags,
    WriteMulti,
    WriteMultiReply,
)
from sync.vfio_user.errors import Disconnected, ProtocolError, VfioUserError
from sync.vfio_user.features import (
    DataSize,
    Feature,
    FeatureFlags,
    FeatureIndex,
    LoggingControl,
    LoggingReport,
    MigData,
    MigrationFlags,
    MigrationState,
    MigrationSupport,
    MigState,
)
from sync.vfio_user.information import (
    PCI_NUM_IRQS,
    PCI_NUM_REGIONS,
    DeviceFlags,
    DeviceInfo,
    DeviceInfoRequest,
    IrqFlags,
    IrqInfo,
    IrqInfoRequest,
    IrqSet,
    PciIrq,
    PciRegion,
    RegionFlags,
    RegionInfo,
    RegionInfoRequest,
    RegionIoFds,
    RegionIoFdsRequest,
    SetIrqs,
)
from sync.vfio_user.version import MAJOR, MINOR, Capabilities, TwinSocket, Version
from sync.vfio_user.wire import (
    FLAG_ERROR,
    FLAG_NO_REPLY,
    FLAG_REPLY,
    FLAG_TYPE_MASK,
    HEADER,
    HEADER_BYTES,
    Command,
    Header,
    encode_message,
    message_limit_bytes,
)

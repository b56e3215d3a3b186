"""What can be wrong with a VMM's migration stream."""

from sync.vmm.errors import VmmError


class StreamError(VmmError):
    """The VMM's migration stream cannot be opened any further."""


class StreamNotFollowed(StreamError):
    """The stream holds something that the reader does not know: it can only be carried closed."""


class StreamCorrupt(StreamError):
    """The stream contradicts itself or its format, or ends where it must not."""


class TailTooLong(StreamError):
    """The device state behind the guest's RAM is longer than the caller allows."""


class MappingRefuted(StreamError):
    """A block's pages are not those of the file that they had been proven to be."""

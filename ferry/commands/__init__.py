"""The sub-commands of `vfio-ferry`: each module has a dataclass `Options` and a function `run`."""

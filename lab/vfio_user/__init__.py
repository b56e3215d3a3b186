"""A vfio-user server and client for devices and guests of the laboratory."""

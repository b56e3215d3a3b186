"""Devices that are served over vfio-user, and what they are made of.

Knows no network, no VMM and no gateway: a device sees one vfio-user client.
"""

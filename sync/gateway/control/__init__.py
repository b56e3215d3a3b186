"""The gateway's control protocol: requests, their wire format, and the client for it."""

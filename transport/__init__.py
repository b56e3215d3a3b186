"""Moves pages and records between two hosts. Knows no device and no VMM."""

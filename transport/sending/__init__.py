"""The sender's work: rounds of pages, lanes, encoding, the choice of a codec."""

"""One migration: what each side does in which phase, and what they say to each other."""

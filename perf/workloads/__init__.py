"""What guest memory holds and how it changes: made up from a seed, or recorded."""

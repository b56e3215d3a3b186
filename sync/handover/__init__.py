"""Who owns the guest: the states of both sides of a migration, without any I/O."""

"""Register synchronisation: operations, profiles, snapshot and replay."""

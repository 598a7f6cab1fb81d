"""A reader of compiled programs."""

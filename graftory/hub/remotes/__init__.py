"""Remotes: hubs elsewhere. One interface (`base`), one file for each kind, one table (`addresses`)."""

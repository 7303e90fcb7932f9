"""One plain model out of a base's files and an adapter, never whole in memory; and what other programs read."""

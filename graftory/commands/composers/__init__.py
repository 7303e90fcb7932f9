"""The subcommands of `hub compose`, one module each."""

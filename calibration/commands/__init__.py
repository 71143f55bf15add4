"""The subcommands `calibrate` and `bench`."""

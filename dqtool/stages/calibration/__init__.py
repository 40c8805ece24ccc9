"""Parts of `dqtool calibrate`."""

"""Hold the lines of the card: every module here that defines `LINE` is one, see `real.line`."""

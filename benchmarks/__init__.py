"""Every claim about speed and memory, as a command that measures both sides in one run."""

"""Processes, machines, and the place where everything is joined."""

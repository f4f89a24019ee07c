"""What moves between the ranks of a run, from their recordings alone; see docs/traffic.md."""

"""What a run takes, by arithmetic and without torch."""

"""A run as a person looks at it: one page that opens from the disk, or curves in the terminal; from its folder alone."""

"""The command `smollm2`."""

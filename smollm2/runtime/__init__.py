"""The machine: device, precision, ranks."""

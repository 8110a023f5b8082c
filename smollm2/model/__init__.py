"""The transformer: attention, element-wise functions, loss."""

"""The model, its linear layers and its loss."""

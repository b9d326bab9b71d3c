"""What acts on gradients, parameters or the model, on request only."""

"""What a trained network has learned, and ablations."""

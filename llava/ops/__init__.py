"""Pure tensor and array functions; they know neither files nor models."""

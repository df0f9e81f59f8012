"""The LLaVA that reads a detector's evidence."""

"""Training of detectors and explainer on one engine, the HF Trainer."""

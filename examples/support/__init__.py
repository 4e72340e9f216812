"""What the examples need around rlkern: text, a model, a training loop, measurements, a report."""

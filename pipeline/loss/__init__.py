"""The loss terms of DINOv2 and the teacher targets they need."""

"""What a run keeps of an encoder of one's own."""

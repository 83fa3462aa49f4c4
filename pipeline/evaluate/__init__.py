"""How good is a backbone: features, k-NN, health, pictures."""

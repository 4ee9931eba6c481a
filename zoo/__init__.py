"""What the method is run on: the embedded shapes model with its rule, adapters of large models, rewards."""

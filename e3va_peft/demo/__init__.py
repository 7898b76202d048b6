"""The two inputs of `e3va demo`, both real and both from PyPI: a pretrained ViT and brain MRI."""

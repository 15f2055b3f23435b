"""TrainVerify: formally verifies that a distributed PyTorch training step equals its single-device model."""
__version__ = "0.1.0"

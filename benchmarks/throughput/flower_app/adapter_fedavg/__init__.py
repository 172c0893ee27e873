"""FedAvg of a LoRA adapter as a Flower app."""
